"""Builds csrc/ with nvcc into fatbins, which `oisd_kernels.cuda.driver` loads.

    python -m oisd_kernels.cuda.build [--unit NAME ...] [--check] [--list]

A unit is one element type, one tile of `csrc/attention_tiles.h` and one divergence. It holds
machine code for sm_80 (which sm_86 and sm_89 run) and sm_90, and PTX from which the driver compiles
for anything later; or, if the tile's engine is one of wgmma, machine code for sm_90a alone. Units
are built when they are first needed, or all at once by the command above, into $XDG_CACHE_HOME/oisd
(or ~/.cache/oisd), under a hash of the sources and flags: where that folder was filled, nvcc is not
needed. Installing never needs it.

--check fails where a kernel uses local memory (spilled registers, or a stack), or where ptxas makes
products of wgmma wait for each other.
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CODES = {  # of nvcc's -gencode
    "WARP_ENGINE": (
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_80,code=compute_80",
    ),
    "WARPGROUP_ENGINE": ("arch=compute_90a,code=sm_90a",),
    "SPECIALIZED_ENGINE": ("arch=compute_90a,code=sm_90a",),
}
FLAGS = ("-std=c++17", "-O3")
ELEMENTS = ("Bfloat16", "Float16")
DIVERGENCES = ("NO_DIVERGENCE", "JSD", "FORWARD_KL", "REVERSE_KL")
SOURCE = "attention.cu"

# As in csrc/attention_tiles.h.
STAGES, MOST_STAGES, ROW_VALUES = 2, 4, 4
STAGE_EXTRA, RING_EXTRA, SHARED_HOPPER = 32, 16, 227 * 1024
BOX_ROWS, BOX_COLUMNS = 64, 64
PREPARE_THREADS, PREPARE_ROWS = 128, 16  # as in csrc/attention_prepare.h


class Tile(NamedTuple):
    """A tile of csrc/attention_tiles.h: a block's own rows and those it streams past them."""

    name: str
    engine: str  # of CODES
    head: int  # K
    own: int
    streamed: int

    @property
    def specialized(self) -> bool:
        return self.engine == "SPECIALIZED_ENGINE"

    @property
    def threads(self) -> int:
        return self.own // 16 * 32 + 128 * self.specialized

    def stages(self, tensors: int) -> int:
        """Streamed tiles in shared memory."""
        if not self.specialized:
            return STAGES
        free = SHARED_HOPPER - RING_EXTRA - tensors * self.own * self.head * 2
        return min(MOST_STAGES, free // self._stage_bytes(tensors))

    def shared_bytes(self, tensors: int) -> int:
        """Of a block that holds `tensors` pairs of own and streamed tiles."""
        own = tensors * self.own * self.head * 2
        stages = self.stages(tensors) * self._stage_bytes(tensors)
        return own + stages + RING_EXTRA * self.specialized

    def _stage_bytes(self, tensors: int) -> int:
        row = tensors * self.head * 2 + ROW_VALUES * 4
        return self.streamed * row + STAGE_EXTRA * self.specialized


class Unit(NamedTuple):
    """What one fatbin holds."""

    element: str  # of ELEMENTS
    tile: Tile
    divergence: str  # of DIVERGENCES

    @property
    def name(self) -> str:
        return f"{self.element}-{self.tile.name}_{self.tile.head}-{self.divergence}".lower()

    def macros(self) -> list[str]:
        return [
            f"-DOISD_ELEMENT={self.element}",
            f"-DOISD_TILE={self.tile.name}_{self.tile.head}",
            f"-DOISD_DIVERGENCE={self.divergence}",
        ]


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    kernel: str
    arch: str
    registers: int
    stack: int  # bytes of a thread
    spills: int  # bytes stored to and loaded from local memory
    serialized: bool = False  # its wgmma wait for each other, where the source does not say so


def source_folder() -> Path:
    """csrc/ of the installed package, or else of the repository."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / SOURCE).is_file():
            return folder
    raise FileNotFoundError(f"csrc/{SOURCE} is neither in {package} nor beside it")


def sources() -> list[Path]:
    """What nvcc compiles: all of csrc/ but its emulator, which a fatbin does not depend on."""
    return sorted(path for path in source_folder().iterdir() if path.suffix in (".h", ".cu"))


@functools.cache
def tiles() -> tuple[Tile, ...]:
    """The table of csrc/attention_tiles.h, in its order: the launcher takes the first that fits."""
    text = (source_folder() / "attention_tiles.h").read_text(encoding="utf-8")
    rows = re.findall(r"^ *TILE\((\w+), (\w+), (\d+), (\d+), (\d+)\)", text, re.MULTILINE)
    return tuple(Tile(name, engine, *map(int, sizes)) for name, engine, *sizes in rows)


def units() -> list[Unit]:
    return [
        Unit(element, tile, divergence)
        for tile in tiles()
        for element in ELEMENTS
        for divergence in DIVERGENCES
    ]


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda")]
    # What a CUDA_HOME names comes before the PATH, and the default place after it.
    search = [*folders[:-1], os.environ.get("PATH", ""), folders[-1]]
    return shutil.which("nvcc", path=os.pathsep.join(search))


@functools.cache
def source_hash() -> str:
    digest = hashlib.sha256(repr((CODES, FLAGS)).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "oisd" / f"csrc-{source_hash()}"


def fatbin(unit: Unit) -> Path:
    """The unit's fatbin, built if it is not there yet.

    Raises FileNotFoundError where it would have to be built and there is no nvcc, RuntimeError
    where the build fails.
    """
    path = cache_folder() / f"{unit.name}.fatbin"
    if not path.is_file():
        build(unit, path)
    return path


def build(unit: Unit, path: Path) -> list[Usage]:
    """Compiles `unit` for all its CODES to `path`, which appears when it is whole."""
    return compile_unit(unit, path, ["-fatbin", *_gencode(*CODES[unit.tile.engine])])


def compile_for(unit: Unit, arch: str) -> list[Usage]:
    """What the unit's kernels take on `arch`; nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        virtual = arch.replace("sm_", "compute_")
        options = ["-cubin", *_gencode(f"arch={virtual},code={arch}")]
        return compile_unit(unit, Path(folder) / "unit.cubin", options)


def compile_unit(unit: Unit, path: Path, options: Sequence[str]) -> list[Usage]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(
            "nvcc is neither in CUDA_HOME, nor on the PATH, nor in /usr/local/cuda"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        source = str(source_folder() / SOURCE)
        command = [
            nvcc,
            *FLAGS,
            *options,
            "-Xptxas",
            "-v",
            *unit.macros(),
            "-o",
            str(whole),
            source,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        os.replace(whole, path)
    return read_usage(done.stdout + done.stderr)


def read_usage(log: str) -> list[Usage]:
    """The kernels in the words of `ptxas -v`."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    serialized = re.findall(r"wgmma.* serialized .* function '(\w+)'", log)
    return [
        Usage(
            kernel, arch, int(registers), int(stack), int(stores) + int(loads), kernel in serialized
        )
        for kernel, arch, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    ]


def faults(usages: Iterable[Usage]) -> list[Usage]:
    """Kernels that use local memory, or whose products of wgmma are serialized."""
    return [usage for usage in usages if usage.stack or usage.spills or usage.serialized]


def _gencode(*codes: str) -> list[str]:
    return [part for code in codes for part in ("-gencode", code)]


def _row(unit: Unit, usage: Usage) -> str:
    tensors = 3 if usage.kernel.endswith("_fused") else 2
    shared = 0 if usage.kernel.startswith("prepare") else unit.tile.shared_bytes(tensors)
    local = f"  stack {usage.stack}, spills {usage.spills}" if usage.stack or usage.spills else ""
    local += "  wgmma serialized" if usage.serialized else ""
    return (
        f"{usage.kernel:<24} {usage.arch:<7} {usage.registers:>3} registers "
        f"{shared / 1024:>6.1f} KiB shared{local}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "oisd_kernels.cuda.build", description=(__doc__ or "").splitlines()[0]
    )
    names = {unit.name: unit for unit in units()}
    parser.add_argument("--unit", nargs="+", choices=names, metavar="NAME", help="these alone")
    parser.add_argument("--check", action="store_true", help="fail as the text above says")
    parser.add_argument("--list", action="store_true", help="the units' names, building nothing")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(names))
        return 0
    if find_nvcc() is None:
        parser.error("nvcc is neither in CUDA_HOME, nor on the PATH, nor in /usr/local/cuda")

    todo = [names[name] for name in options.unit or names]
    folder = cache_folder()
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for unit, usages in zip(
            todo, pool.map(lambda u: build(u, folder / f"{u.name}.fatbin"), todo), strict=True
        ):
            for usage in usages:
                print(f"{unit.name:<36} {_row(unit, usage)}", flush=True)
            failed += len(faults(usages))
    print(f"{len(todo)} units in {folder}, {failed} kernels with local memory or serialized wgmma")
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
