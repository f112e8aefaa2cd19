"""Every kernel, compiled for GPUs you don't have: no spills, tensor cores, memory that fits.

Compiled in processes of their own: the interpreter and the compiler cannot share one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from oisd_kernels import audit

# Of every kernel, kept by a digest of its code, arguments and tile and of Triton's version.
RECORD = ROOT / "benchmarks/results/audit.jsonl"

USAGE = audit.Usage(
    "a_kernel", "a case", "sm_90", 8, 4, 200, 0, 0, 192 * 1024, True, {"HGMMA": 8}, 1
)


def sweep(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "oisd_kernels.audit", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=2700,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    failed = any(row["problems"] for row in report["kernels"]) or bool(report["unregistered"])
    assert done.returncode == failed
    return report


def failures(report: dict) -> list[str]:
    return [
        f"{row['kernel']} ({row['case']}) on {row['arch']}: {', '.join(row['problems'])}"
        for row in report["kernels"]
        if row["problems"]
    ]


def check(report: dict, archs: set[str]):
    assert not report["unregistered"], (
        "kernels that no case of oisd_kernels.audit.lens_cases launches"
    )
    assert not failures(report), "\n".join(failures(report))
    launched = {(row["kernel"], row["arch"]) for row in report["kernels"]}
    assert launched == {(name, arch) for name in audit.kernels() for arch in archs}
    assert all(row["occupancy"] >= 1 for row in report["kernels"])


def rows(path: Path) -> dict[str, dict]:
    """By digest; without the case, which is one of several that launch the same."""
    lines = map(json.loads, path.read_text().splitlines())
    return {row.pop("digest"): {k: v for k, v in row.items() if k != "case"} for row in lines}


def test_sm_90_of_every_kernel(tmp_path):
    """Compiles what the record does not hold, and two kernels that it may hold."""
    again, path = {"final_rows_kernel", "attention_statistics_kernel"}, tmp_path / "audit.jsonl"
    lines = [(json.loads(line), line) for line in RECORD.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for row, line in lines if row["kernel"] not in again))
    before, recorded = rows(path), rows(RECORD)
    report = sweep("--arch", "sm_90", "--record", str(path))
    compiled = {digest: row for digest, row in rows(path).items() if digest not in before}
    assert again <= {row["kernel"] for row in compiled.values()}
    assert compiled == compiled | {x: recorded[x] for x in compiled.keys() & recorded}
    check(report, {"sm_90"})
    matrix = {row["kernel"] for row in report["kernels"] if row["matrix"]}
    tiled = {name for name in audit.kernels() if name.startswith("tiled_")}
    assert len(tiled) == 8 and tiled - matrix == {"tiled_live_kernel"}


@pytest.mark.slow
def test_gfx942_of_every_kernel():
    """AMD's compiler: vector registers, their spills to memory, LDS, matrix-core instructions."""
    report = sweep("--arch", "gfx942")
    check(report, {"gfx942"})
    used = {name for row in report["kernels"] for name in row["tensor_core"]}
    assert any("bf16" in name for name in used) and all(x.startswith("v_mfma") for x in used)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_every_configuration(arch, tmp_path):
    """Compiled anew, and as it is recorded."""
    path = tmp_path / "audit.jsonl"
    report = sweep("--arch", arch, "--full", "--record", str(path))
    compiled, recorded = rows(path), rows(RECORD)
    assert len(compiled) == len(report["kernels"])
    assert compiled == compiled | {x: recorded[x] for x in compiled.keys() & recorded}
    check(report, {arch})


@pytest.mark.parametrize(
    "change",
    [
        {"spills": 1},
        {"stack": 8},
        {"shared": 227 * 1024 + 1},
        {"tensor_core": {}},
        {"registers": 4},
        {"arch": "sm_80"},  # 192 KB are too much there
    ],
    ids=str,
)
def test_a_problem_is_seen(change):
    assert USAGE.problems() == []
    assert len(replace(USAGE, **change).problems()) == 1


def test_a_record_spares_what_it_holds(tmp_path, monkeypatch):
    path, compiled = tmp_path / "audit.jsonl", []

    def compile_(launch: audit.Launch, arch: str) -> audit.Usage:
        compiled.append(launch)
        return replace(USAGE, kernel=launch.kernel.__name__, case=launch.case, arch=arch)

    monkeypatch.setattr(audit, "audit", compile_)
    first, second = audit.launches("sm_90")[:2]
    assert audit.Record(path).usage(first, "sm_90") == audit.Record(path).usage(first, "sm_90")
    audit.Record(path).usage(first, "sm_100")
    audit.Record(path).usage(second, "sm_90")
    audit.Record(path).usage(replace(second, options=second.options | {"num_stages": 9}), "sm_90")
    assert compiled[:3] == [first, first, second] and len(compiled) == 4
    audit.Record(path).keep({"sm_90": [second, first]})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [first.digest("sm_100"), second.digest("sm_90"), first.digest("sm_90")]
    assert [row["digest"] for row in rows] == kept


KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)

@triton.jit
def scaled(x):
    return x * FACTOR

@triton.jit
def a_kernel(X):
    tl.store(X, scaled(tl.load(X)))
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("    return", '    """A docstring."""\n    # A comment.\n\n    return', True),
        ("x * FACTOR", "x + FACTOR", False),
        ("constexpr(2)", "constexpr(3)", False),
        ("tl.load(X)", "tl.load(X + 1)", False),
    ],
)
def test_the_record_knows_a_kernel_by_its_code(tmp_path, old, new, same):
    codes = []
    for name, text in (("before", KERNEL), ("after", KERNEL.replace(old, new))):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        codes.append(audit.code(module.a_kernel))
    assert (codes[0] == codes[1]) == same


def test_an_elementwise_kernel_needs_no_tensor_core():
    assert replace(USAGE, matrix=False, tensor_core={}).problems() == []


def test_a_kernel_without_a_case_is_seen():
    recorded = audit.launches("sm_90")
    assert audit.unregistered(recorded) == []
    missing = recorded[0].kernel.__name__
    others = [launch for launch in recorded if launch.kernel.__name__ != missing]
    assert audit.unregistered(others) == [missing]


def test_recorded_arguments_carry_their_divisibility():
    launch = next(x for x in audit.launches("sm_90") if x.kernel.__name__ == "tiled_jsd_kernel")
    names = [launch.kernel.arg_names[path[0]] for path in launch.attrs]
    assert {"Xp", "Xq", "W", "stride_qn", "stride_w"} <= set(names)


def test_the_full_sweep_holds_every_configuration_of_the_short_one():
    short, full = (
        {launch.key() for launch in audit.launches("sm_90", full)} for full in (False, True)
    )
    assert short < full


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 255, 0, 1), (256, 128, 0, 2), (128, 32, 100 * 1024, 2), (32, 16, 0, 32)],
)
def test_occupancy(threads, registers, shared, blocks):
    assert audit.occupancy(audit.ARCHITECTURES["sm_90"], threads, registers, shared) == blocks


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 128, 0, 4), (512, 128, 0, 2), (512, 130, 0, 1), (256, 32, 40 * 1024, 1)],
)
def test_occupancy_of_a_compute_unit(threads, registers, shared, blocks):
    assert audit.occupancy(audit.ARCHITECTURES["gfx942"], threads, registers, shared) == blocks


def test_amd_assembly_is_read():
    text = """
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[6:7], v[8:9], a[0:15]
\tv_fma_f32 v1, v2, v3, v4
  - .agpr_count:     16
    .group_segment_fixed_size: 1024
    .max_flat_workgroup_size: 512
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 4
    .vgpr_count:     58
    .vgpr_spill_count: 3
"""
    mfma = ["v_mfma_f32_32x32x8_bf16"] * 2
    assert audit._amd_binary({"amdgcn": text}) == audit.Binary(8, 58, 3, 12, 1024, mfma)
