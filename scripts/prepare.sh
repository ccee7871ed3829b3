#!/usr/bin/env bash
# Fetches a model, which is then run as it is, and, where a mode is given, quantises it.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python

refuse() {
    echo "error: $1" >&2
    exit 2
}

if [[ $# -lt 1 || $# -gt 3 || $1 == -* ]]; then
    echo "usage: scripts/prepare.sh OWNER/NAME [int8|int4|int4-gptq CALIBRATION_TEXT]" >&2
    exit 2
fi
mode=${2-}
text=${3-}
case $mode in
    "" | int8 | int4 | int4-gptq) ;;
    *) refuse "mode '$mode' is not known: give int8, int4 or int4-gptq, or nothing" ;;
esac
# Before the download, so that nobody waits hours for this.
if [[ $mode == int4-gptq && ! -f $text ]]; then
    refuse "int4-gptq needs a calibration text, and there is none at '$text': give a file after it"
fi
if [[ $mode != int4-gptq && -n $text ]]; then
    refuse "'$mode' reads no calibration text: leave out $text"
fi
command -v -- "$python" >/dev/null || refuse "'$python' is not there: set PYTHON to a Python with requirements.txt"
"$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("huggingface_hub")))' ||
    refuse "'$python' lacks what requirements.txt lists: run 'make .venv/runtime', or set PYTHON to one that has it"

folder=$("$python" "$root/scripts/download.py" "$1")
if [[ -z $mode ]]; then
    echo "$folder"
else
    "$python" "$root/quantize.py" --checkpoint_path "$folder" --mode "$mode" ${text:+--calibration_file "$text"}
fi
