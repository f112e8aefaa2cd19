"""Compiles every Triton kernel for GPUs you don't have, and reports what each one uses.

    python -m oisd_kernels.audit [--arch sm_80 sm_90 gfx942] [--kernel NAME ...] [--full] [--json]
                                 [--record FILE]

It compiles what the launchers choose. The cases of `oisd_kernels.audit.lens_cases` call them with
tensors without storage (device "meta"), and their launches are recorded instead of run, including
the divisibility of each argument, which decides whether a kernel spills. Without --full, cases that
resemble another one are left out.

These are failures: spills; stack; more shared memory than the architecture has; `tl.dot` without
tensor-core instructions; an empty binary, which Triton makes of a tile that is too large for
sm_100; and a kernel (a function whose name ends in `_kernel`) that no case launches.

With --record, results are kept in FILE, one line of JSON per launch, so that you can stop a sweep
and resume it. benchmarks/results/audit.jsonl holds those of

    python -m oisd_kernels.audit --full --record benchmarks/results/audit.jsonl \\
        --arch sm_80 sm_86 sm_90 sm_100 gfx942

A launch that FILE holds is not compiled again as long as its code, arguments, tile and Triton are
the same; comments, docstrings and line numbers don't count. With --full and without --kernel, lines
that nothing launches any more are dropped.

Unset TRITON_INTERPRET: it replaces the compiler.
"""

import argparse
import ast
import dataclasses
import hashlib
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

import oisd_kernels
from oisd_kernels.audit.lens_cases import CASES, Cases


class Limits(NamedTuple):
    shared: int  # bytes, at most, of a block
    shared_sm: int  # bytes of a multiprocessor
    threads_sm: int
    registers_sm: int = 65536
    blocks_sm: int = 32
    warp: int = 32  # threads
    granule: int = 8  # registers of a thread are allocated in multiples of this
    reserved: int = 1024  # bytes of shared memory per block that the driver reserves


KIB = 1024
ARCHITECTURES = {
    "sm_80": Limits(163 * KIB, 164 * KIB, 2048),
    "sm_86": Limits(99 * KIB, 100 * KIB, 1536),
    "sm_89": Limits(99 * KIB, 100 * KIB, 1536),
    "sm_90": Limits(227 * KIB, 228 * KIB, 2048),
    "sm_100": Limits(227 * KIB, 228 * KIB, 2048),
    "sm_120": Limits(99 * KIB, 100 * KIB, 1536),
    # A compute unit: four SIMDs with 512 vector registers of 64 lanes and at most eight waves.
    "gfx942": Limits(64 * KIB, 64 * KIB, 2048, 4 * 512 * 64, 16, 64, 8, 0),
}
DEFAULT = ("sm_80", "sm_90", "sm_100")
EMPTY_REGISTERS = 8  # a kernel that computes anything has more
SPILL = re.compile(r"\b(?:STL|LDL)\b")
TENSOR_CORE = re.compile(r"\b(?:[HQIDO]MMA|[HQI]GMMA|UTC[A-Z]*MMA)\b")
MATRIX_CORE = re.compile(r"\bv_s?mfma[a-z]*_\w+")


@dataclass(frozen=True)
class Launch:
    """What a launcher asked Triton to compile."""

    case: str
    kernel: JITFunction
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]  # num_warps, num_stages

    def key(self) -> str:
        return repr(
            (self.kernel.__name__, self.signature, self.constexprs, self.attrs, self.options)
        )

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)

    def digest(self, arch: str) -> str:
        """A digest of all that determines the binary."""
        text = repr((code(self.kernel), self.key(), arch, triton.__version__))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code(function: JITFunction) -> str:
    """The code of a function and of all it calls, with their constants: no comments, docstrings."""
    tree: Any = function.parse().body[0]
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used = [function.__globals__[name] for name in sorted(names & function.__globals__.keys())]
    used = [code(x) if isinstance(x, JITFunction) else x for x in used]
    return repr([ast.unparse(tree), *(x for x in used if not isinstance(x, ModuleType))])


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses."""

    kernel: str
    case: str
    arch: str
    warps: int
    stages: int
    registers: int  # of a thread
    spills: int  # instructions that store to or load from local memory
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    matrix: bool  # holds a tl.dot
    tensor_core: dict[str, int]  # instructions by name
    occupancy: int  # blocks that a multiprocessor holds, by registers, shared memory and threads

    def problems(self) -> list[str]:
        limit = ARCHITECTURES[self.arch].shared
        found = {
            f"{self.spills} spills": self.spills > 0,
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.shared} bytes of shared memory, limit {limit}": self.shared > limit,
            "no tensor-core instruction": self.matrix and not self.tensor_core,
            "empty binary": self.registers <= EMPTY_REGISTERS,
        }
        return [text for text, bad in found.items() if bad]


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the package, by name."""
    found = {}
    for info in pkgutil.walk_packages(oisd_kernels.__path__, "oisd_kernels."):
        if info.name.rpartition(".")[2] == "__main__":
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


@contextmanager
def recording(arch: str) -> Iterator[list[tuple[JITFunction, tuple[Any, ...]]]]:
    """Yields a list; launches are added to it, with what Triton derives from their arguments."""
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target(arch))
    launches: list[tuple[JITFunction, tuple[Any, ...]]] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        packed = self._pack_args(backend, kwargs, bound, specialization, options)
        launches.append((self, (*packed[1:], options)))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches(arch: str, full: bool = False, families: Iterable[Cases] = CASES) -> list[Launch]:
    """Every distinct launch that the cases of `families` make on `arch`."""
    capability = int(arch.removeprefix("sm_").removeprefix("gfx"))
    found: dict[str, Launch] = {}
    for case in (case for cases in families for case in cases(capability)):
        if case.full and not full:
            continue
        with recording(arch) as recorded:
            case.launch()
        for kernel, (signature, constexprs, attrs, options) in recorded:
            launch = Launch(case.name, kernel, signature, constexprs, attrs, options)
            found.setdefault(launch.key(), launch)
    return list(found.values())


def target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, ARCHITECTURES[arch].warp)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), ARCHITECTURES[arch].warp)


class Binary(NamedTuple):
    """What the compiler's output says about the kernel."""

    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    tensor_core: list[str]


def audit(launch: Launch, arch: str) -> Usage:
    """Compiles one launch and reads its binary."""
    compiled = triton.compile(launch.source(), target=target(arch), options=launch.options)
    read = _amd_binary if arch.startswith("gfx") else _nvidia_binary
    binary = read(compiled.asm)
    limits = ARCHITECTURES[arch]
    shared = max(compiled.metadata.shared, binary.shared - limits.reserved)
    return Usage(
        kernel=launch.kernel.__name__,
        case=launch.case,
        arch=arch,
        warps=binary.warps,
        stages=compiled.metadata.num_stages,
        registers=binary.registers,
        spills=binary.spills,
        stack=binary.stack,
        shared=shared,
        matrix="tt.dot" in compiled.asm["ttir"],
        tensor_core=dict(sorted(Counter(binary.tensor_core).items())),
        occupancy=occupancy(limits, binary.warps * limits.warp, binary.registers, shared),
    )


def _nvidia_binary(asm: dict[str, Any]) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        sass = _cuobjdump(cubin)
    usage = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", sass))
    threads = int(re.search(r"\.reqntid (\d+)", asm["ptx"])[1])  # pyright: ignore[reportOptionalSubscript]
    return Binary(
        threads // 32, int(usage["REG"]), len(SPILL.findall(sass)), int(usage["STACK"]),
        int(usage["SHARED"]), TENSOR_CORE.findall(sass),
    )  # fmt: skip


def _amd_binary(asm: dict[str, Any]) -> Binary:
    text = asm["amdgcn"]
    usage = dict(re.findall(r"\.(\w+):\s+(\d+)", text))
    # Scalar registers spill to lanes of vector registers, not to memory.
    return Binary(
        int(usage["max_flat_workgroup_size"]) // 64, int(usage["vgpr_count"]),
        int(usage["vgpr_spill_count"]), int(usage["private_segment_fixed_size"]),
        int(usage["group_segment_fixed_size"]), MATRIX_CORE.findall(text),
    )  # fmt: skip


def occupancy(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """How many blocks a multiprocessor holds, by registers, shared memory and threads."""
    warps = math.ceil(threads / limits.warp)
    registers_warp = math.ceil(registers / limits.granule) * limits.granule * limits.warp
    return min(
        limits.blocks_sm,
        limits.threads_sm // threads,
        limits.registers_sm // registers_warp // warps,
        limits.shared_sm // max(shared + limits.reserved, 1),
    )


class Record:
    """Usages by the digest of their launch, in a file of JSON lines (none without a path)."""

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {
            row["digest"]: row for row in map(json.loads, lines)
        }

    def usage(self, launch: Launch, arch: str) -> Usage:
        """The launch's usage from the file; if it is not there, compiled and added to it."""
        digest = launch.digest(arch)
        if digest in self.rows:
            held = self.rows[digest]
            usage = Usage(**{field.name: held[field.name] for field in dataclasses.fields(Usage)})
            return dataclasses.replace(usage, case=launch.case)
        usage = audit(launch, arch)
        more = {"problems": usage.problems(), "triton": triton.__version__, "digest": digest}
        self.rows[digest] = dataclasses.asdict(usage) | more
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[digest]) + "\n")
        return usage

    def keep(self, swept: dict[str, list[Launch]]) -> None:
        """Drops rows of swept architectures that no launch has any more; keeps launch order."""
        if self.path is None:
            return
        rows = [row for row in self.rows.values() if row["arch"] not in swept]
        for arch, recorded in swept.items():
            rows += [self.rows[launch.digest(arch)] for launch in recorded]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def unregistered(recorded: Iterable[Launch]) -> list[str]:
    """Kernels that no case launches."""
    return sorted(kernels().keys() - {launch.kernel.__name__ for launch in recorded})


def _cuobjdump(cubin: Path) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(cubin)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


COLUMNS = "{:<28} {:<44} {:<7} {:>5} {:>6} {:>5} {:>6} {:>6} {:>9} {:>5}  {}"
HEADING = COLUMNS.format(
    "kernel", "case", "arch", "warps", "stages", "regs", "spills", "stack", "shared", "occ.",
    "tensor core",
)  # fmt: skip


def row(usage: Usage) -> str:
    tensor_core = " ".join(f"{name}:{count}" for name, count in usage.tensor_core.items()) or "-"
    problems = "".join(f"  FAILED: {text}" for text in usage.problems())
    return COLUMNS.format(
        usage.kernel, usage.case, usage.arch, usage.warps, usage.stages, usage.registers,
        usage.spills, usage.stack, f"{usage.shared / KIB:.1f} KiB", usage.occupancy,
        tensor_core + problems,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "oisd_kernels.audit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=DEFAULT)
    parser.add_argument("--kernel", nargs="+", help="these kernels alone")
    parser.add_argument("--full", action="store_true", help="every combination of options")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep and reuse results here")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")

    usages, missing, swept, record = [], set(), {}, Record(options.record)
    if not options.json:
        print(HEADING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch in options.arch:
            todo = swept[arch] = launches(arch, options.full)
            missing.update(unregistered(todo))
            for launch in todo:
                if options.kernel and launch.kernel.__name__ not in options.kernel:
                    continue
                usages.append(record.usage(launch, arch))
                if not options.json:
                    print(row(usages[-1]), flush=True)
    if options.full and not options.kernel:
        record.keep(swept)
    failed = [usage for usage in usages if usage.problems()]
    if options.json:
        rows = [dataclasses.asdict(usage) | {"problems": usage.problems()} for usage in usages]
        json.dump(
            {"triton": triton.__version__, "unregistered": sorted(missing), "kernels": rows},
            sys.stdout,
            indent=1,
        )
    else:
        print(f"{len(usages)} compiled with triton {triton.__version__}, {len(failed)} failed")
        for name in sorted(missing):
            print(f"FAILED: {name} is launched by no case of oisd_kernels.audit.lens_cases")
    return 1 if failed or missing else 0
