#!/usr/bin/env bash
# Downloads a model and, if a mode is given, quantises it.
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
    *) refuse "unknown mode '$mode': pass int8, int4, int4-gptq or no mode" ;;
esac
# Before the download, so that nobody waits hours for this.
if [[ $mode == int4-gptq && ! -f $text ]]; then
    refuse "calibration text '$text' not found: pass a text file after int4-gptq"
fi
if [[ $mode != int4-gptq && -n $text ]]; then
    refuse "mode '$mode' uses no calibration text: remove $text"
fi
command -v -- "$python" >/dev/null || refuse "'$python' not found: set PYTHON to a Python with the packages of requirements.txt"
"$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("huggingface_hub")))' ||
    refuse "'$python' lacks packages of requirements.txt: run 'make .venv/runtime', or set PYTHON to a Python that has them"

folder=$("$python" "$root/scripts/download.py" "$1")
if [[ -z $mode ]]; then
    echo "$folder"
else
    "$python" "$root/quantize.py" --checkpoint_path "$folder" --mode "$mode" ${text:+--calibration_file "$text"}
fi
