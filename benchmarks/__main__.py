"""`python -m benchmarks`: what each kernel costs beside its alternatives and the physical limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

BEGUN = time.monotonic()  # before torch is imported
_USAGE = """\
usage: python -m benchmarks list [--device cpu|cuda]
       python -m benchmarks run [CASES ...] [--device cpu|cuda] [--quick] [--out DIR]
       python -m benchmarks report DIR ...
       python -m benchmarks compare BASE NEW
       python -m benchmarks gpu --out DIR [--minutes 9] [--rehearse]
       python -m benchmarks peers [lens] [cost] [graders] [--rounds 5]

list     the cases, their implementations, and which of these cannot run here and why
run      correctness first, then time and memory of what is correct; CASES are parts of names
report   the table again, and plots as PNG files
compare  ratios with intervals; exit status 1 if anything got slower or takes more memory
gpu      nine minutes on one GPU: what is correct, then all headline numbers, best first
peers    other projects' logit lenses and graders beside ours

`python -m benchmarks run --help`, `gpu --help` and `peers --help` list the settings.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status: 0 done, 1 something is worse or wrong, 2 a wrong command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in ("list", "run", "report", "compare", "gpu", "peers"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    command, *rest = arguments
    try:
        # Imported here: a GPU machine may lack what the other commands need, and the GPU queue's
        # processes import this file.
        if command == "gpu":
            from benchmarks.gpu.command import main as queue

            return queue(rest, BEGUN)
        if command == "peers":
            from benchmarks.peers.command import main as peers

            return peers(rest)
        from benchmarks.commands import COMMANDS

        return COMMANDS[command](rest)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
