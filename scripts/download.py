"""Download a model from the Hugging Face Hub: its config, its tokenizer, one set of weights.

python scripts/download.py OWNER/NAME [--revision R] [--out FOLDER] [--file NAME]

Prints the folder to stdout, everything else to stderr. Running it again downloads what is still missing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()


from cli.options import OneLineParser
from loading.hub import CHECKPOINTS, fetch


def main() -> int:
    parser = OneLineParser(description="Download a model from the Hugging Face Hub and print its folder.")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hugging Face Hub, as OWNER/NAME")
    parser.add_argument("--revision", help="branch, tag or commit; default: the main branch")
    parser.add_argument("--out", type=Path, help="folder to write to; default: checkpoints/REPO in this repository")
    parser.add_argument(
        "--file", action="append", default=[], help="file to download instead of the weights; may be repeated"
    )
    options = parser.parse_args()
    out = options.out or CHECKPOINTS / options.repo
    try:
        print(fetch(options.repo, options.revision, out, options.file))
    except KeyboardInterrupt:
        print(
            "\ninterrupted: completed files are kept; run the same command again to download the others",
            file=sys.stderr,
        )
        return 130
    except ValueError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
