"""Where csrc/ takes elements to lie, against somebody else's word: Triton's, proven on GPUs.

The emulation reads layouts as the kernels' author did, and would not see him misread one.
"""

import ctypes
import functools
import re

import pytest
import torch

from oisd_kernels.cuda import build, driver
from oisd_kernels.cuda.build import Unit
from tests.oisd_kernels.cuda import emulation
from tests.oisd_kernels.cuda.csrc_cases import needs_emulation

TRITON = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))
gluon = pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
pytestmark = [
    needs_emulation,
    pytest.mark.skipif(TRITON < (3, 7), reason="Triton 3.6 ends the process over these layouts"),
]

HOPPER_TILES = [tile for tile in build.tiles() if tile.engine == "WARPGROUP_ENGINE"]


def library(tile: build.Tile) -> ctypes.CDLL:
    return emulation.library(Unit("Bfloat16", tile, "NO_DIVERGENCE"))


@functools.cache
def context_and_builder():
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    context = ir.context()
    ir.load_dialects(context)
    CUDABackend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    return context, gluon_ir.GluonOpBuilder(context)  # which does not keep it


def linear(layout, shape: list[int]):
    _, builder = context_and_builder()
    return builder.to_linear_layout(layout._to_ir(builder), shape)


def place(indices: list[tuple[int, list[list[int]]]]) -> list[int]:
    """Of the element at some indices, each with what every one of its bits changes."""
    found = [0, 0]
    for index, bases in indices:
        for bit, base in enumerate(bases):
            if index >> bit & 1:
                found = [at ^ change for at, change in zip(found, base, strict=True)]
    return found


def test_lanes_of_mma_sync():
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left, right = (gl.DotOperandLayout(i, mma, k_width=2) for i in range(2))
    element_of = library(build.tiles()[0]).element_of
    for name, layout, shape, registers in (
        ("c", mma, [16, 8], 4),
        ("left", left, [16, 16], 8),
        ("right", right, [16, 8], 4),
    ):
        theirs = linear(layout, shape)
        assert registers == 2 ** len(theirs.reg_bases)
        for lane in range(32):
            for i in range(registers):
                row, column = ctypes.c_int(), ctypes.c_int()
                element_of(name.encode(), lane, i, ctypes.byref(row), ctypes.byref(column))
                wanted = place([(i, theirs.reg_bases), (lane, theirs.lane_bases)])
                assert [row.value, column.value] == wanted, (name, lane, i)


@pytest.mark.parametrize("columns", [64, 128])
def test_lanes_of_wgmma(columns):
    """A warp has 16 of the 64 rows; in those lanes are as in mma.sync, eight columns at a time."""
    mma = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )
    element_of = library(HOPPER_TILES[0]).element_of
    for name, layout, shape, registers in (
        ("c", mma, [64, columns], columns // 2),
        ("left", gl.DotOperandLayout(0, mma, k_width=2), [64, 16], 8),
    ):
        theirs = linear(layout, shape)
        assert registers == 2 ** len(theirs.reg_bases) and len(theirs.warp_bases) == 2
        for thread in range(128):
            for i in range(registers):
                row, column = ctypes.c_int(), ctypes.c_int()
                within = i % 4 if name == "c" else i
                element_of(
                    name.encode(), thread % 32, within, ctypes.byref(row), ctypes.byref(column)
                )
                ours = [thread // 32 * 16 + row.value, column.value + (i - within) // 4 * 8]
                indices = [(i, theirs.reg_bases), (thread % 32, theirs.lane_bases)]
                assert ours == place([*indices, (thread // 32, theirs.warp_bases)]), (thread, i)


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=lambda tile: f"{tile.name}{tile.head}")
def test_a_tile_in_shared_memory(tile):
    """As a tensor map with the 128-byte swizzle writes it and wgmma reads it."""
    theirs = linear(gl.NVMMASharedLayout(128, 16, 2), [tile.own, tile.head])
    for row in range(tile.own):
        for chunk in range(tile.head // 8):
            offset = library(tile).offset_of(row, chunk) // 2  # in elements
            assert place([(offset, theirs.offset_bases)]) == [row, 8 * chunk]


@gluon.jit
def product(  # noqa: N803
    X, Y, Z, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, SCORES: gl.constexpr
):
    """SCORES: [ROWS, DEPTH] @ [COLUMNS, DEPTH]^T from shared memory; else [ROWS, DEPTH], from
    registers, @ [DEPTH, COLUMNS]."""
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, COLUMNS, 16]
    )
    y_rows: gl.constexpr = COLUMNS if SCORES else DEPTH
    y_columns: gl.constexpr = DEPTH if SCORES else COLUMNS
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, blocked))[:, None]
    columns = gl.arange(0, DEPTH, gl.SliceLayout(0, blocked))[None, :]
    x = gl.load(X + rows * DEPTH + columns)
    rows = gl.arange(0, y_rows, gl.SliceLayout(1, blocked))[:, None]
    columns = gl.arange(0, y_columns, gl.SliceLayout(0, blocked))[None, :]
    y = gl.load(Y + rows * y_columns + columns)
    y_shared = gl.allocate_shared_memory(gl.bfloat16, [y_rows, y_columns], shared, y)
    sums = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    if SCORES:
        x_shared = gl.allocate_shared_memory(gl.bfloat16, [ROWS, DEPTH], shared, x)
        hopper.fence_async_shared()
        sums = hopper.warpgroup_mma(x_shared, y_shared.permute((1, 0)), sums)
    else:
        hopper.fence_async_shared()
        x = gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))
        sums = hopper.warpgroup_mma(x, y_shared, sums)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None]
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, mma))[None, :]
    gl.store(Z + rows * COLUMNS + columns, sums)


@gluon.jit
def copy(X, Y, shared: gl.constexpr, DTYPE: gl.constexpr):  # noqa: N803
    blocked: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 1, 8], [4, 1, 1], [2, 1, 0])
    box = gl.allocate_shared_memory(DTYPE, [64, 1, 64], shared)
    barrier = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(barrier, count=1)
    hopper.mbarrier.expect(barrier, X.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(X, [0, 0, 0], barrier, box)
    hopper.mbarrier.wait(barrier, 0)
    rows = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, blocked)))[:, None, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, blocked)))[None, None, :]
    gl.store(Y + rows * 64 + columns, box.load(blocked))


def compiled(function, signature: dict[str, str], warps: int, **constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    if type(function).__name__ == "InterpretedFunction":
        pytest.skip("Triton interprets, and does not compile, in this process")
    names = {(function.arg_names.index(name),): value for name, value in constants.items()}
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(fn=function, signature=signature, constexprs=names)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def their_descriptors(ptx: str) -> tuple[list[list[int]], set[str]]:
    """Of each wgmma, without the address of its operands; the flags that end the instruction."""
    constant = {
        register: int(value) & (1 << 64) - 1
        for register, value in re.findall(r"(?:or\.b64|add\.s64)\s+(%rd\d+), %rd\d+, (-?\d+);", ptx)
    }
    found, flags = [], set()
    for line in re.findall(r"wgmma\.mma_async\S+ .*;", ptx):
        operands = re.findall(r"%rd\d+", line)
        found.append([constant[register] for register in operands])
        flags.add(line.split(operands[-1])[1].split(", ", 2)[2])  # but the use of the accumulator
    return found, flags


def our_descriptors(tile: build.Tile, which: str) -> list[int]:
    to = (ctypes.c_ulonglong * 64)()
    return to[: library(tile).descriptors(which.encode(), to)]


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=lambda tile: f"{tile.name}{tile.head}")
def test_matrix_descriptors(tile):
    pointers = {"X": "*bf16", "Y": "*bf16", "Z": "*fp32"}
    sizes = {"ROWS": tile.own, "COLUMNS": tile.streamed, "DEPTH": tile.head}
    scores = compiled(product, pointers, 8, **sizes, SCORES=True)
    theirs, flags = their_descriptors(scores.asm["ptx"])
    ours = [our_descriptors(tile, which) for which in ("own", "streamed")]
    assert len(theirs) == tile.head // 16 and theirs == [
        list(pair) for pair in zip(*ours, strict=True)
    ]
    assert flags == {"1, 1, 0, 0;"}

    sizes = {"ROWS": tile.own, "COLUMNS": tile.head, "DEPTH": tile.streamed}
    rows = compiled(product, pointers, 8, **sizes, SCORES=False)
    theirs, flags = their_descriptors(rows.asm["ptx"])
    assert len(theirs) == tile.streamed // 16
    assert theirs == [[one] for one in our_descriptors(tile, "rows")]
    assert flags == {"1, 1, 1;"}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_tensor_maps(name, dtype):
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    shared = gl.NVMMASharedLayout(128, 16, 3)
    signature = {"X": f"tensordesc<{name}[64,1,64],{shared!r}>", "Y": f"*{name}"}
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[name]
    kernel = compiled(copy, signature, 4, shared=shared, DTYPE=element)
    (meta,) = kernel.metadata.tensordesc_meta
    assert meta["swizzle"] == driver.MAP_SWIZZLE_128
    assert TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]] == driver.MAP_TYPES[dtype]
    assert meta["block_size"] == [build.BOX_ROWS, 1, build.BOX_COLUMNS]
