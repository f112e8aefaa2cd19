"""Statistics and backward of attention and its alignment by the CUDA C++ kernels of csrc/.

The functions are those of `implementation`, for bfloat16 and float16 on NVIDIA GPUs from
sm_80 on, K of 64 or 128 (the teacher's the same), without softcap, the teacher's key heads dividing
the student's. Anything else is a ValueError that says so; so are a missing GPU, a missing compiler
where nothing was built yet, and a driver too old for what was built.

What happens here is the host's part: check, choose a tile, allocate, fill the kernels' arguments.
No value is read back from the device: the number of tiles is bounded by the number of tokens, and
superfluous blocks end at once.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.attention.spec import Alignment, Geometry, Layer, Plain
from oisd_kernels.cuda import build, driver, params
from oisd_kernels.cuda.build import PREPARE_ROWS, PREPARE_THREADS, Tile, Unit

OP = "attention"
ELEMENTS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}
DIVERGENCES = {"jsd": "JSD", "forward_kl": "FORWARD_KL", "reverse_kl": "REVERSE_KL"}
OTHERWISE = 'use impl="triton"'
# Whether a Hopper GPU multiplies by wgmma: off until the tests have passed on one. Then by
# HOPPER_ENGINE; "WARPGROUP_ENGINE" is the simpler one, to compare with.
WARPGROUPS = False
HOPPER_ENGINE = "SPECIALIZED_ENGINE"
UNBOUNDED = 1 << 30  # a window that hides nothing; positions stay below it
LOG2E = 1 / math.log(2)


class Work(NamedTuple):
    """What the launches of one call have in common."""

    unit: Unit
    layout: params.Layout
    offsets: tuple[Tensor, Tensor]  # cu_seqlens and the tile table, whose addresses `layout` holds
    blocks: int  # tiles at most

    def maps(self, tensors: Sequence[Tensor | None]) -> list[params.TensorMap]:
        """Of [N, heads, K] each, for blocks that copy by them."""
        used = self.unit.tile.specialized
        return [params.TensorMap() if x is None or not used else _map(x) for x in tensors]

    def launch(self, kernel: str, arguments: Any, like: Tensor, heads: int, tensors: int) -> None:
        shared = self.unit.tile.shared_bytes(tensors)
        threads = self.unit.tile.threads
        run(self.unit, kernel, arguments, like.device, self.blocks * heads, threads, shared)


def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Triton's: csrc has no forward, because those of others leave nothing to gain."""
    from oisd_kernels.attention import triton_impl  # Triton may be missing on CPU-only machines

    check_supported(q, k, geometry, None, v)
    return triton_impl.forward(q, k, v, geometry, scale, sink)


def logsumexp(q: Tensor, k: Tensor, geometry: Geometry, scale: float) -> Tensor:
    """Triton's, as `forward`."""
    from oisd_kernels.attention import triton_impl

    return triton_impl.logsumexp(q, k, geometry, scale)


def statistics(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Each of the S layers computes the teacher's scores again."""
    layers = [
        _statistics(Layer(*layer, student.scale), teacher, keep, divergence, beta, geometry)
        for layer in zip(*student[:3], strict=True)
    ]
    value, statistic = zip(*layers, strict=True)
    return torch.stack(value), torch.stack(statistic)


def backward(
    student: Layer, geometry: Geometry, plain: Plain | None, alignment: Alignment | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, lse, scale, _ = student
    teacher = None if alignment is None else alignment.teacher
    v = None if plain is None else plain.v
    check_supported(q, k, geometry, teacher, v)
    dq, dk = _like(q), _like(k)
    dv = None if v is None else _like(v)
    N, H, J = q.shape[0], q.shape[1], k.shape[1]
    if N == 0:
        return dq, dk, dv

    kind = "plain" if alignment is None else "align" if plain is None else "fused"
    tensors = 1 + (plain is not None) + (alignment is not None)
    work = _work(q, k, geometry, alignment and alignment.divergence, teacher, tensors)
    scaled = _gradient_scale(q, alignment) if alignment is not None and plain is None else None
    q, k = _ready(q), _ready(k)
    prepared = _prepare(work.unit, kind, q, lse, plain, alignment, scaled)
    values, d_output = (None, None) if plain is None else (_ready(plain.v), _ready(plain.d_out))
    teacher_q, teacher_k = (_ready(teacher.q), _ready(teacher.k)) if teacher else (None, None)
    beta = alignment.beta if alignment is not None else 0.5
    read = (q, k, values, d_output, teacher_q, teacher_k)
    arguments = params.Backward(
        params.BackwardMaps(*work.maps(read)),
        *map(params.operand, (*read, dq, dk, dv)),
        *map(params.pointer, prepared),
        params.pointer(scaled),
        work.layout,
        scale * LOG2E,
        teacher.scale * LOG2E if teacher else 0.0,
        scale,
        math.log2(beta / (1 - beta)),
    )
    work.launch(f"backward_keys_{kind}", arguments, q, J, tensors)
    work.launch(f"backward_queries_{kind}", arguments, q, H, tensors)
    return dq, dk, dv


def check_supported(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    teacher: Layer | None = None,
    v: Tensor | None = None,
) -> None:
    """Raises ValueError with the reason where these kernels cannot do it."""
    if q.device.type != device_type():
        raise checks.argument_error(OP, "q", 'be on a CUDA device for impl="cuda"', q.device)
    named = {"q": q, "k": k, "v": v}
    if teacher is not None:
        named |= {"q_teacher": teacher.q, "k_teacher": teacher.k}
    for name, x in named.items():
        if x is None:
            continue
        if x.dtype not in ELEMENTS or x.dtype != q.dtype:
            wanted = 'have dtype bfloat16 or float16, all tensors the same, for impl="cuda"'
            raise checks.argument_error(OP, name, wanted, x.dtype, f"cast it, or {OTHERWISE}")
        if x.shape[-1] != q.shape[-1] or x.shape[-1] not in {tile.head for tile in build.tiles()}:
            wanted = 'have a head dimension of 64 or 128, all tensors the same, for impl="cuda"'
            raise checks.argument_error(OP, name, wanted, x.shape[-1], OTHERWISE)
    if geometry.softcap is not None:
        wanted = 'be None for impl="cuda"'
        raise checks.argument_error(OP, "softcap", wanted, geometry.softcap, OTHERWISE)
    if teacher is not None and k.shape[1] % teacher.k.shape[1]:
        wanted = f'have a number of heads that divides J = {k.shape[1]} for impl="cuda"'
        raise checks.argument_error(OP, "k_teacher", wanted, teacher.k.shape[1], OTHERWISE)
    if q.shape[0] * q.shape[1] >= UNBOUNDED:
        wanted = f'have N * H below {UNBOUNDED} for impl="cuda"'
        raise checks.argument_error(OP, "q", wanted, q.shape[0] * q.shape[1], OTHERWISE)


def choose_tile(head: int, tensors: int, shared_limit: int, engine: str = "WARP_ENGINE") -> Tile:
    """The first tile of the table for this K and engine whose block fits into `shared_limit`."""
    fitting = [t for t in build.tiles() if t.head == head and t.engine == engine]
    for tile in fitting:
        if tile.shared_bytes(tensors) <= shared_limit:
            return tile
    wanted = f"offer {fitting[-1].shared_bytes(tensors)} bytes of shared memory a block"
    raise checks.argument_error(OP, "the GPU", wanted, shared_limit, OTHERWISE)


def tile_table(cu_seqlens: Tensor, own: int) -> Tensor:
    """[B + 1] int32: sequence b is tiles table[b] : table[b + 1] of `own` rows."""
    tiles = (cu_seqlens.diff() + (own - 1)) // own
    return torch.nn.functional.pad(tiles.cumsum(0), (1, 0)).int()


def tile_bound(tokens: int, geometry: Geometry, own: int) -> int:
    """At least the last entry of `tile_table`, from what the host knows."""
    bound = min(tokens, tokens // own + geometry.sequences)
    if geometry.max_length is not None:
        bound = min(bound, geometry.sequences * -(-geometry.max_length // own))
    return bound


def band(geometry: Geometry) -> tuple[int, int]:
    """(left, right): query i sees key j where -left <= j - i <= right."""
    reach = UNBOUNDED if geometry.window is None else min(geometry.window - 1, UNBOUNDED)
    return reach, 0 if geometry.causal else reach


def device_type() -> str:
    return "cuda"


def shared_limit(device: torch.device) -> int:
    with _explained():
        return driver.shared_limit(_index(device))


def engine(device: torch.device) -> str:
    hopper = WARPGROUPS and torch.cuda.get_device_capability(device) == (9, 0)
    return HOPPER_ENGINE if hopper else "WARP_ENGINE"


def tensor_map(
    device: torch.device,
    dtype: torch.dtype,
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
) -> bytes:
    with _explained():
        return driver.tensor_map(_index(device), dtype, address, sizes, strides, box)


def run(
    unit: Unit,
    kernel: str,
    arguments: Any,
    device: torch.device,
    blocks: int,
    threads: int,
    shared: int,
) -> None:
    with _explained():
        path = build.fatbin(unit)
        driver.launch(
            _index(device), path, kernel, arguments, blocks=blocks, threads=threads, shared=shared
        )


class _explained:
    """What is missing on this machine, as the ValueError of an impl that is not available."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        remedy = ""
        if isinstance(error, FileNotFoundError):
            remedy = (
                "run `python -m oisd_kernels.cuda.build` where there is one and copy "
                f"{build.cache_folder()}, or {OTHERWISE}"
            )
        elif isinstance(error, OSError):
            remedy = OTHERWISE
        elif isinstance(error, driver.DriverError) and error.code in driver.UNLOADABLE:
            remedy = (
                f"the driver supports CUDA {driver.driver_version()}: update it, or build "
                f"with an nvcc that is no newer, or {OTHERWISE}"
            )
        if remedy:
            wanted = "find a driver and compiled kernels"
            raise checks.argument_error(OP, 'impl="cuda"', wanted, error, remedy) from error


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _statistics(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Of one layer: [N], [H, N]."""
    q, k, lse, scale, _ = student
    check_supported(q, k, geometry, teacher)
    N, H = q.shape[:2]
    value = q.new_empty(H, N, dtype=torch.float32)
    statistic = None if divergence == "forward_kl" else torch.empty_like(value)
    if N > 0:
        tensors = [_ready(x) for x in (q, k, teacher.q, teacher.k)]
        rows = [_rows(lse), _rows(teacher.lse)]
        kept = None if keep is None else keep.contiguous().view(torch.uint8)
        work = _work(q, k, geometry, divergence, teacher, 2)
        arguments = params.Statistics(
            params.StatisticsMaps(*work.maps(tensors)),
            *map(params.operand, tensors),
            *map(params.pointer, (*rows, kept, value, statistic)),
            work.layout,
            scale * LOG2E,
            teacher.scale * LOG2E,
            math.log2(beta),
            math.log1p(-beta) * LOG2E,
        )
        work.launch("statistics", arguments, q, H, 2)
    return value.mean(0), value.new_empty(0) if statistic is None else statistic


def _work(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    divergence: str | None,
    teacher: Layer | None,
    tensors: int,
) -> Work:
    tile = choose_tile(q.shape[-1], tensors, shared_limit(q.device), engine(q.device))
    unit = Unit(ELEMENTS[q.dtype], tile, DIVERGENCES.get(divergence or "", "NO_DIVERGENCE"))
    cu_seqlens = geometry.cu_seqlens.int().contiguous()
    table = tile_table(cu_seqlens, tile.own)
    left, right = band(geometry)
    layout = params.Layout(
        cu_seqlens.data_ptr(),
        table.data_ptr(),
        geometry.sequences,
        q.shape[0],
        left,
        right,
        q.shape[1],
        k.shape[1],
        teacher.k.shape[1] if teacher is not None else 0,
    )
    return Work(unit, layout, (cu_seqlens, table), tile_bound(q.shape[0], geometry, tile.own))


def _prepare(
    unit: Unit,
    kind: str,
    q: Tensor,
    lse: Tensor,
    plain: Plain | None,
    alignment: Alignment | None,
    scaled: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """lse2, lse2_teacher, delta [H, N] and factor [N] of csrc/attention_prepare.h."""
    N, H = q.shape[:2]
    lse2, delta = (q.new_empty(H, N, dtype=torch.float32) for _ in range(2))
    lse2_teacher = factor = lse_teacher = statistic = row_weight = None
    beta = 0.5
    if alignment is not None:
        lse2_teacher, factor = torch.empty_like(lse2), q.new_empty(N, dtype=torch.float32)
        lse_teacher, row_weight = _rows(alignment.teacher.lse), _rows(alignment.row_weight)
        beta = alignment.beta
        if alignment.divergence != "forward_kl":
            statistic = _rows(alignment.statistic)
    operands, d_lse = [None, None], None
    if plain is not None:
        operands = [_ready(plain.out), _ready(plain.d_out)]
        d_lse = None if plain.d_lse is None else _rows(plain.d_lse)
    rows = [_rows(lse), lse_teacher, statistic, d_lse, row_weight]
    arguments = params.Prepare(
        *map(params.operand, operands),
        *map(params.pointer, (*rows, scaled, lse2, lse2_teacher, delta, factor)),
        H,
        N,
        beta,
    )
    blocks = -(-N * H // PREPARE_ROWS)
    run(unit, f"prepare_{kind}", arguments, q.device, blocks, PREPARE_THREADS, 0)
    return lse2, lse2_teacher, delta, factor


def _gradient_scale(q: Tensor, alignment: Alignment) -> Tensor | None:
    """[1]: a power of two that brings the largest row weight near 2^7.

    float16 only: a row's gradient is its weight times a probability, and would underflow. The KL
    multiplies it by up to some hundred nats, which still fits.
    """
    if q.dtype != torch.float16:
        return None
    weight = alignment.row_weight.detach().float().abs().nan_to_num(0.0, 0.0, 0.0)
    largest = weight.amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2((7 - largest.log2().floor()).clamp(-100, 100)).view(1)


def _like(x: Tensor) -> Tensor:
    """Contiguous, not written."""
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _ready(x: Tensor) -> Tensor:
    """x [N, heads, K], copied unless 16 bytes at a time can be read from it.

    Tensor maps ask no more of strides than that, but that none be 0 (an expanded tensor), which
    their documentation leaves open.
    """
    x = x.detach()
    apart = [stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride and stride % 8 == 0 for stride in apart)
    return x if x.stride(2) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _map(x: Tensor) -> params.TensorMap:
    """Of x [N, heads, K] as `_ready` returns it: boxes of one head, in halves of 64 columns."""
    N, heads, K = x.shape
    # A stride that no two elements are apart by may be any number in x, but not here.
    strides = [
        x.element_size() * (stride if size > 1 else K)
        for size, stride in zip((heads, N), (x.stride(1), x.stride(0)), strict=True)
    ]
    box = (build.BOX_COLUMNS, 1, build.BOX_ROWS)
    words = tensor_map(x.device, x.dtype, x.data_ptr(), (K, heads, N), strides, box)
    return params.TensorMap.from_buffer_copy(words)
