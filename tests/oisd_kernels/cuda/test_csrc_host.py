"""The host's part of csrc/: tiles, checks, what is missing on a machine, the build."""

import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oisd_kernels.attention import cuda_impl
from oisd_kernels.attention.spec import Geometry, Layer
from oisd_kernels.cuda import build, driver, params
from oisd_kernels.cuda.build import Unit, Usage
from tests import ROOT
from tests.oisd_kernels.cuda import emulation
from tests.oisd_kernels.cuda.csrc_cases import (
    BF16,
    CASES,
    HOPPER,
    KIB,
    NARROW,
    ODD,
    SPECIALIZED,
    WIDE,
    Inputs,
    emulate,
    needs_nvcc,
)


@pytest.fixture
def emulator(monkeypatch) -> emulation.Emulator:
    return emulate(monkeypatch)


def geometry(lengths, *, known=False, **options) -> Geometry:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths) if known else None
    defaults = {"causal": True, "window": None, "softcap": None}
    return Geometry(cu_seqlens, len(lengths), longest, **(defaults | options))


@pytest.mark.parametrize("lengths", [ODD, (5,), (0, 0), (128,) * 9, (1,) * 200, (0, 4000)], ids=str)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("own", [64, 128])
def test_tiles_never_straddle_sequences(lengths, known, own):
    where = geometry(lengths, known=known)
    table = cuda_impl.tile_table(where.cu_seqlens, own)
    assert table.dtype == torch.int32
    assert table.diff().tolist() == [-(-length // own) for length in lengths]
    assert table[-1] <= cuda_impl.tile_bound(sum(lengths), where, own)


def test_the_bound_is_exact_where_lengths_are_equal():
    assert cuda_impl.tile_bound(4 * 300, geometry((300,) * 4, known=True), 128) == 12


def test_band():
    assert cuda_impl.band(geometry((4,))) == (cuda_impl.UNBOUNDED, 0)
    assert cuda_impl.band(geometry((4,), window=3)) == (2, 0)
    assert cuda_impl.band(geometry((4,), window=3, causal=False)) == (2, 2)


def test_tile_that_fits_the_gpu():
    gpus = (WIDE, NARROW, HOPPER, SPECIALIZED)
    names = [cuda_impl.choose_tile(128, 3, *gpu).name for gpu in gpus]
    assert names == ["wide", "narrow", "hopper", "specialized"]
    assert cuda_impl.choose_tile(128, 2, *NARROW).name == "wide"  # no teacher
    assert cuda_impl.choose_tile(64, 3, *NARROW).own == 128
    with pytest.raises(ValueError, match=r"the GPU must offer \d+ bytes of shared memory"):
        cuda_impl.choose_tile(128, 3, 48 * KIB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "q must have dtype bfloat16 or float16"),
        ({"head": 96}, "q must have a head dimension of 64 or 128"),
        ({"heads": (4, 2, 4)}, "k_teacher must have a number of heads that divides J = 2"),
    ],
    ids=["dtype", "head", "teacher"],
)
def test_unsupported_input(change, message, emulator):
    inputs = Inputs(replace(CASES[0], lengths=(3,), **change))
    teacher = Layer(inputs.q_teacher, inputs.k_teacher, torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=message):
        cuda_impl.check_supported(inputs.q, inputs.k, inputs.geometry(), teacher)


def test_unsupported_softcap(emulator):
    inputs = Inputs(replace(CASES[0], lengths=(3,)))
    with pytest.raises(ValueError, match="softcap must be None"):
        cuda_impl.check_supported(inputs.q, inputs.k, geometry((3,), softcap=30.0))


def test_cpu_tensors_are_refused():
    inputs = Inputs(replace(CASES[0], lengths=(3,)))
    with pytest.raises(ValueError, match="q must be on a CUDA device"):
        cuda_impl.check_supported(inputs.q, inputs.k, inputs.geometry())


def launch_nothing() -> None:
    unit = build.units()[0]
    cuda_impl.run(unit, "none", params.Backward(), torch.device("cuda:0"), 1, 128, 0)


def test_no_compiler_and_nothing_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(
        ValueError, match="nvcc is neither .* run `python -m oisd_kernels.cuda.build`"
    ):
        launch_nothing()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.cache_folder() / f"{build.units()[0].name}.fatbin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.cuda.ExternalStream)
    with pytest.raises(ValueError, match="no CUDA driver is installed"):
        cuda_impl.shared_limit(torch.device("cuda:0"))


def test_driver_too_old(monkeypatch):
    class Old(driver.DriverError):
        def __init__(self) -> None:
            RuntimeError.__init__(self, "cuModuleLoadData: unsupported PTX")
            self.code = driver.UNLOADABLE[-1]

    def refuse(*arguments: object, **options: object) -> None:
        raise Old

    monkeypatch.setattr(build, "fatbin", lambda unit: Path("x"))
    monkeypatch.setattr(driver, "launch", refuse)
    monkeypatch.setattr(driver, "driver_version", lambda: "11.4")
    with pytest.raises(ValueError, match=r"the driver supports CUDA 11\.4: update it"):
        launch_nothing()


def test_strides_that_cannot_be_read_by_16_bytes_are_copied():
    x = torch.randn(6, 3, 65).to(BF16)
    assert cuda_impl._ready(x[..., :64]).is_contiguous()
    assert cuda_impl._ready(x[..., 1:]).data_ptr() % 16 == 0
    even = torch.randn(6, 3, 128).to(BF16)[..., 64:]
    assert cuda_impl._ready(even).data_ptr() == even.data_ptr()


def test_a_stride_of_zero_is_copied():
    """Tensor maps may not have one."""
    x = torch.randn(6, 1, 64).to(BF16).expand(6, 4, 64)
    assert cuda_impl._ready(x).stride() == (256, 64, 1)


@pytest.mark.parametrize(
    ("x", "sizes", "strides"),
    [
        (torch.zeros(6, 4, 128, dtype=BF16), (128, 4, 6), [256, 1024]),
        (torch.zeros(4, 6, 64, dtype=BF16).transpose(0, 1), (64, 4, 6), [768, 128]),
        (
            torch.zeros(1, 6, 3, 72, dtype=BF16)[:, :, 1, :64].transpose(0, 1),
            (64, 1, 6),
            [128, 432],
        ),
        (
            torch.zeros(1, 2, 64, dtype=BF16).as_strided((1, 2, 64), (7, 64, 1)),
            (64, 2, 1),
            [128, 128],
        ),
    ],
    ids=["contiguous", "heads first", "one head", "one token"],
)
def test_tensor_map(x, sizes, strides, monkeypatch):
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return bytes(range(128))

    monkeypatch.setattr(cuda_impl, "tensor_map", record)
    made = cuda_impl._map(x)
    assert bytes(made) == bytes(range(128))
    assert calls == [(x.device, BF16, x.data_ptr(), sizes, strides, (64, 1, 64))]


# The build


def test_units_have_names_of_their_own():
    names = [unit.name for unit in build.units()]
    assert len(names) == len(set(names)) == 56


def compiled(unit: Unit, arch: str) -> list[Usage]:
    usages = build.compile_for(unit, arch)
    expected = 3 if unit.divergence == "NO_DIVERGENCE" else 7
    assert len(usages) == expected and all(usage.registers > 8 for usage in usages)
    for usage in usages:
        if unit.tile.specialized and not usage.kernel.startswith("prepare"):
            # What a block is given at its start is what setmaxnreg distributes: else it hangs.
            owners, producer = register_shares()
            given = usage.registers * unit.tile.threads
            assert owners * unit.tile.own // 16 * 32 + producer * 128 <= given
    return usages


def register_shares() -> list[int]:
    """Of a thread of the owners and of the producer's warpgroup."""
    text = (build.source_folder() / "attention_ring.h").read_text(encoding="utf-8")
    return [int(re.search(rf"{role}_REGISTERS = (\d+)", text)[1]) for role in ("OWNER", "PRODUCER")]  # type: ignore[index]


def unit_named(name: str) -> Unit:
    return next(unit for unit in build.units() if unit.name == name)


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("bfloat16-wide_128-jsd", "sm_80"),
        ("float16-wide_64-forward_kl", "sm_80"),
        ("bfloat16-hopper_128-jsd", "sm_90a"),
        ("bfloat16-specialized_128-jsd", "sm_90a"),
    ],
)
def test_no_faults(name, arch):
    assert build.faults(compiled(unit_named(name), arch)) == []


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"])
@pytest.mark.parametrize("unit", build.units(), ids=lambda unit: unit.name)
def test_no_faults_anywhere(unit, arch):
    if (arch == "sm_90a") != (unit.tile.engine != "WARP_ENGINE"):
        pytest.skip("not its architecture")
    assert build.faults(compiled(unit, arch)) == []


@needs_nvcc
def test_machine_code_has_what_the_source_asks_for(tmp_path):
    """Copies by tensor maps, their barriers, products of warpgroups, registers handed over; tensor
    maps and tiles at addresses that the hardware takes."""
    tools = pytest.importorskip("triton").__path__[0]
    cuobjdump = Path(tools) / "backends" / "nvidia" / "bin" / "cuobjdump"
    unit, cubin = unit_named("float16-specialized_64-reverse_kl"), tmp_path / "unit.cubin"
    options = ["-cubin", "-gencode", *build.CODES[unit.tile.engine]]
    build.compile_unit(unit, cubin, options)

    def dump(what: str) -> str:
        command = [str(cuobjdump), what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    code, sections = dump("-sass"), dump("-elf")
    kernels = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    pairs = re.findall(r" ([0-9a-f]+) +NOBITS .* \.nv\.shared\.(\w+)\n", sections)
    shared = {name: alignment for alignment, name in pairs}
    parameters = re.findall(
        r"^\.nv\.info\.(\w+)\n.*?Offset  : 0x(\w+).*?PARAM_CBANK.*?0x\w+ 0x(\w+)",
        sections,
        re.MULTILINE | re.DOTALL,
    )
    for name, offset, bank in parameters:
        if not name.startswith("prepare"):
            # The bank's upper half is its size.
            assert ((int(bank, 16) & 0xFFFF) + int(offset, 16)) % driver.MAP_ALIGNMENT == 0
    assert {name for name, _, _ in parameters} == set(kernels)
    owners, producer = register_shares()
    kinds = [
        f"backward_{side}_{kind}" for side in ("keys", "queries") for kind in ("align", "fused")
    ]
    for name in ("statistics", *kinds):
        for instruction in (
            r"UTMALDG\.3D ",
            r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT ",
            r"SYNCS\.ARRIVE\.TRANS64",
            r"HGMMA\.64x64x16\.F32 ",
            rf"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP0, {owners:#x} ",
            rf"USETMAXREG\.DEALLOC\.CTAPOOL {producer:#x} ",
            *([r"HGMMA\.64x64x16\.F32 .*tnspB"] if name != "statistics" else []),
            *([r"ARRIVES\.LDGSTSBAR"] if "keys" in name else []),
        ):
            assert re.search(instruction, kernels[name]), (name, instruction)
        assert not re.search(r"\s(STL|LDL|ATOMG|RED)[ .]", kernels[name])
        assert shared[name] == "400"  # shared memory's alignment, 1024: the period of the swizzle


@needs_nvcc
def test_command_line_builds_a_fatbin(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "bfloat16-wide_64-no_divergence"
    assert build.main(["--check", "--unit", name]) == 0
    path = build.fatbin(unit_named(name))
    assert path.stat().st_size > 0 and list(path.parent.iterdir()) == [path]
    printed = capsys.readouterr().out
    assert "backward_keys_plain" in printed and "sm_90" in printed


LOG = """
ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 672 bytes cmem[0]
ptxas info    : Compiling entry function 'b_kernel' for 'sm_80'
ptxas info    : Function properties for b_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 672 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function 'c_kernel'
ptxas info    : Compiling entry function 'c_kernel' for 'sm_90a'
ptxas info    : Function properties for c_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
"""


def test_faults_are_seen():
    usages = build.read_usage(LOG)
    assert usages == [
        Usage("a_kernel", "sm_80", 255, 16, 12),
        Usage("b_kernel", "sm_80", 32, 0, 0),
        Usage("c_kernel", "sm_90a", 168, 0, 0, serialized=True),
    ]
    assert build.faults(usages) == [usages[0], usages[2]]


def test_check_fails_on_local_memory(monkeypatch, capsys):
    usages = build.read_usage(LOG)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "build", lambda unit, path: usages)
    name = build.units()[0].name
    assert build.main(["--check", "--unit", name]) == 1
    assert build.main(["--unit", name]) == 0
    assert "spills 12" in capsys.readouterr().out


def test_the_wheel_holds_the_sources_and_not_the_emulator():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "csrc" in wheel["only-include"] and "csrc/emulator" in wheel["exclude"]
    assert wheel["sources"]["csrc"] == "oisd_kernels/csrc"


def test_the_hash_follows_what_nvcc_compiles_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "csrc"
    shutil.copytree(build.source_folder(), folder)
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    before = build.source_hash.__wrapped__()
    emulated = list((folder / "emulator").iterdir())
    for path in emulated:
        path.write_text(path.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
        assert build.source_hash.__wrapped__() == before, path.name
    found = {before}
    for path in build.sources():
        path.write_text(path.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
        found.add(build.source_hash.__wrapped__())
    assert len(emulated) > 5 and len(found) == 1 + len(build.sources()) > 10


@needs_nvcc
@pytest.mark.parametrize("unit", build.units()[:4], ids=lambda unit: unit.name)
def test_the_sources_are_what_nvcc_reads(unit):
    source = build.source_folder() / build.SOURCE
    command = [str(build.find_nvcc()), *build.FLAGS, *unit.macros(), "-M", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read = {Path(word).resolve() for word in done.stdout.replace("\\\n", " ").split()[2:]}
    ours = {path for path in read if source.parent.resolve() in path.parents}
    assert ours == {path.resolve() for path in build.sources()}
