"""Compiles the tile candidates of `benchmarks.gpu.sweep`: none may spill, or be too large.

    python -m benchmarks.gpu.candidates [--entry WORD ...] [--record FILE]

A tile that the sweep finds faster is taken by every launch of its table's entry, so a candidate is
compiled in all of those that the full audit knows (`oisd_kernels.audit`), for sm_90 and with no GPU
there. Exit status: 1 if one has a problem, or if nothing launches it. --record keeps results as the
audit's does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.place import GPU
from benchmarks.gpu.sweep import ENTRIES, Entry, Tile
from oisd_kernels import audit
from oisd_kernels.audit.attention_cases import attention_cases
from oisd_kernels.audit.lens_cases import Cases, tiled_cases, tiled_gradient_cases
from oisd_kernels.measured_tiles import trying

ARCH = "sm_90"
FAMILIES: dict[str, tuple[Cases, ...]] = {
    "attention": (attention_cases,),
    "lens": (tiled_cases, tiled_gradient_cases),
}


def taking(entry: Entry, tile: Tile, usual: Sequence[audit.Launch]) -> list[audit.Launch]:
    """The launches that take `tile` in the entry's place; `usual`: those of today's tables."""
    known = {launch.key() for launch in usual}
    with trying(entry.family, entry.key, tile):
        found = audit.launches(ARCH, full=True, families=FAMILIES[entry.family])
    return [launch for launch in found if launch.key() not in known]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu.candidates", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--entry", nargs="+", default=[], metavar="WORD", help="these alone")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep and reuse results here")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    words = options.entry or [""]
    chosen = [entry for entry in ENTRIES if any(word in entry.name for word in words)]
    if not chosen:
        parser.error(f"--entry must be parts of {', '.join(entry.name for entry in ENTRIES)}")
    record = audit.Record(options.record)
    bad = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for entry in chosen:
            usual = audit.launches(ARCH, full=True, families=FAMILIES[entry.family])
            for label, tile in list(entry.candidates(GPU))[1:]:  # the first is today's
                launches = taking(entry, tile, usual)
                print(f"{entry.name}: {label}: {len(launches)} launches", flush=True)
                usages = [record.usage(launch, ARCH) for launch in launches]
                for usage in usages:
                    print(audit.row(usage), flush=True)
                if not usages or any(usage.problems() for usage in usages):
                    bad.append(f"{entry.name}: {label}")
    for name in bad:
        print(f"FAILED: {name}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
