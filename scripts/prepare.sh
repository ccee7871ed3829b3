#!/usr/bin/env bash
# Fetches a model, converts it to model.pth and, where a mode is given, quantises that.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

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

folder=$("$python" "$root/scripts/download.py" "$1")
"$python" "$root/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$folder"
if [[ -n $mode ]]; then
    "$python" "$root/quantize.py" --checkpoint_path "$folder/model.pth" --mode "$mode" \
        ${text:+--calibration_file "$text"}
fi
