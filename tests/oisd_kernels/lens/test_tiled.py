"""The tiled kernels in the Triton interpreter, against the reference in float64.

Without TRITON_INTERPRET=1 the one test here runs this file again with it: the interpreter has to be
chosen before Triton is imported, and other tests need the compiler.
"""

from functools import partial
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreter import INTERPRETED, interpreted, outside, passes_in_the_interpreter

pytest.importorskip("triton")

from oisd_kernels import logit_lens_divergence, reference
from oisd_kernels.gpu import GFX942
from oisd_kernels.lens.tiled import tiles, values
from oisd_kernels.lens.tiled.tiles import TILES, Head, Scores, launch_tile
from oisd_kernels.lens.tiled.values import lens_values

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
lens = partial(logit_lens_divergence, impl="tiled")


@outside
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="is about a CPU without the interpreter")
def test_a_cpu_without_the_interpreter_is_refused():
    with pytest.raises(ValueError, match="hidden must be on a GPU"):
        lens(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 4))


def inputs(S, N, V, D, dtype=torch.float64, spread=1.0, seed=0):
    """hidden [S, N, D], teacher [N, D], weight [V, D], such that logits have that deviation."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((S, N, D), (N, D), (V, D))
    hidden, teacher, weight = (torch.randn(x, generator=generator) for x in shapes)
    return [x.to(dtype) for x in (hidden, teacher, weight * spread * D**-0.5)]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) else x


def both(hidden, teacher, weight, **options):
    """Loss and statistics, tiled and by the float64 reference on the same rounded inputs."""
    got = lens(hidden, teacher, weight, return_stats=True, **options)
    options = {name: wide(x) for name, x in options.items()}
    want = reference.logit_lens_divergence(
        wide(hidden), wide(teacher), wide(weight), return_stats=True, **options
    )
    return (got[0], *got[1]), (want[0], *want[1])


def check(got, want, relative, floor=1e-6):
    for have, wanted in zip(got, want, strict=True):
        assert have.shape == wanted.shape
        error = (have.double() - wanted).norm()
        assert error <= max(relative * wanted.norm(), floor * wanted.numel() ** 0.5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("S", "N", "V", "D"), [(2, 19, 131, 20), (1, 1, 2, 1), (3, 5, 16, 32)], ids=str
)
def test_matches_the_reference(S, N, V, D, divergence, dtype):
    got, want = both(*inputs(S, N, V, D, dtype), divergence=divergence)
    assert (want[0] > 0).all()
    assert got[0].dtype == dtype
    exact = dtype == torch.float64
    check(got, want, 1e-12 if exact else 1e-5, 1e-13 if exact else 1e-6)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_bias_softcap_temperature_beta_and_signed_weights(divergence, temperature):
    tensors = inputs(2, 19, 53, 24, spread=4)
    bias, token_weight = torch.randn(53).double(), torch.randn(2, 19).double()
    token_weight[0, 3] = token_weight[:, 5] = 0
    for reduction in ("none", "sum", "mean"):
        got, want = both(
            *tensors, bias=bias, token_weight=token_weight, divergence=divergence, beta=0.3,
            temperature=temperature, logit_softcap=5.0, reduction=reduction,
        )  # fmt: skip
        check(got, want, 1e-11, 1e-13)
    assert got[4][0, 3] == 0 and got[1][0, 3] == 0 and got[2][5] == 0


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_layer_without_its_dimension(divergence):
    hidden, teacher, weight = inputs(1, 7, 37, 9)
    got, want = both(hidden[0], teacher, weight, divergence=divergence)
    assert got[0].shape == (7,)
    check(got, want, 1e-12, 1e-13)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_single_precision(divergence, dtype, spread):
    got, want = both(*inputs(1, 16, 211, 64, dtype, spread), divergence=divergence)
    assert got[0].dtype == torch.float32
    check(got, want, 1e-5 if dtype == torch.float32 else 1e-4)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_mixed_dtypes_are_raised(divergence):
    hidden, teacher, weight = inputs(1, 5, 37, 16, torch.float32)
    got, want = both(hidden.bfloat16(), teacher, weight.bfloat16(), divergence=divergence)
    check(got, want, 1e-5)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_near_and_disjoint(divergence):
    hidden, teacher, weight = inputs(1, 8, 97, 32, torch.float32, 3.0)
    hidden[0, :4] = teacher[:4]
    hidden[0, 4:6] = teacher[4:6] + 1e-3 * hidden[0, 4:6]
    teacher[6:] = 20 * weight[5] / weight[5].norm() * 10
    hidden[0, 6:] = -teacher[6:]
    got, want = both(hidden, teacher, weight, divergence=divergence)
    check([x[..., :6] for x in got], [x[..., :6] for x in want], 1e-5)
    check(got, want, 1e-5)
    assert got[0][0, :4].abs().max() < 1e-6
    if divergence == "jsd":
        assert (got[0][0, 6:] - 0.6931472).abs().max() < 1e-5


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_saturated(divergence):
    """A student next to uniform, a peaked teacher: the normal state of an early layer."""
    hidden, teacher, weight = inputs(1, 16, 499, 32, torch.float32)
    got, want = both(hidden * 0.05, teacher * 8, weight, divergence=divergence)
    assert want[1].min() > 0.97 * torch.tensor(499.0).log()
    check(got, want, 1e-5)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_the_bias(divergence):
    tensors = inputs(1, 6, 70, 8)
    bias = torch.zeros(70).double()
    bias[0:20] = bias[50] = -torch.inf
    got, want = both(*tensors, bias=bias, divergence=divergence)
    check(got, want, 1e-12, 1e-13)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_row_stays_alone(divergence, bad):
    hidden, teacher, weight = inputs(2, 20, 40, 8)
    clean = lens(hidden, teacher, weight, divergence=divergence)
    hidden[1, 3, 2] = bad
    got = lens(hidden, teacher, weight, divergence=divergence)
    assert got[1, 3].isnan()
    got[1, 3] = clean[1, 3]
    assert torch.equal(got, clean)
    token_weight = torch.ones(2, 20).double()
    token_weight[1, 3] = 0
    got = lens(hidden, teacher, weight, divergence=divergence, token_weight=token_weight)
    assert got.isfinite().all() and got[1, 3] == 0


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("splits", [1, 4])
def test_slabs_and_splits_change_nothing(divergence, splits, monkeypatch):
    tensors = inputs(2, 23, 75, 12)
    monkeypatch.setattr(tiles, "machine", lambda device: (0, splits))
    token_weight = torch.randn(23).double() * (torch.arange(23) % 3 > 0)
    # Five tokens at once: no slab but the first starts at a tile.
    budget = 5 * 3 * (tiles.ROW_BYTES + values.FIELDS * 8)
    got, want = both(*tensors, divergence=divergence, token_weight=token_weight, max_bytes=budget)
    check(got, want, 1e-12, 1e-13)
    whole, _ = both(*tensors, divergence=divergence, token_weight=token_weight)
    check(got, whole, 1e-14, 1e-15)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_inputs(divergence):
    hidden, teacher, weight = inputs(2, 11, 26, 10)
    mixed = hidden.permute(1, 2, 0).contiguous().permute(2, 0, 1), teacher[::2], weight[::2]
    got, want = both(mixed[0][:, ::2], mixed[1], mixed[2], divergence=divergence)
    check(got, want, 1e-12, 1e-13)


@interpreted
def test_no_tokens_and_no_weight():
    hidden, teacher, weight = inputs(2, 0, 7, 4)
    assert lens(hidden, teacher, weight).shape == (2, 0)
    assert lens(hidden, teacher, weight, reduction="mean") == 0
    hidden, teacher, weight = inputs(2, 3, 7, 4)
    for reduction in ("none", "mean"):
        loss = lens(hidden, teacher, weight, token_weight=torch.zeros(3), reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss))


@interpreted
def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        lens(*inputs(1, 3, 7, 4), max_bytes=100)


class Largest(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, allocated by torch while the mode is on."""

    def __init__(self, *inputs):
        super().__init__()
        self.alive, self.most = {x.untyped_storage()._cdata: 0 for x in inputs}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.skipif(INTERPRETED, reason="counts allocations, launches nothing")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("S", [1, 8])
def test_workspace_stays_below_64_mb(S, divergence, monkeypatch):
    """Counted with tensors without storage: 100,000 tokens against Qwen3's head."""

    def skip(*args, **kwargs):
        return None

    for name in ("tiled_jsd_kernel", "tiled_kl_kernel", "tiled_statistics_kernel"):
        monkeypatch.setattr(getattr(values, name), "run", skip)
    N, V, D = 100_000, 151_936, 2_560
    hidden, teacher, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((S, N, D), (N, D), (V, D))
    )
    head = Head([hidden, teacher[None]], weight, None, torch.float32, capability=90)
    keep = torch.empty(S, N, dtype=torch.bool, device="meta")
    with Largest(hidden, teacher, weight, keep) as largest:
        out = lens_values(head, keep, divergence, 0.5, Scores(1.0, None), True, True, None)
    outputs = sum(x.numel() * x.element_size() for x in out)
    assert outputs < largest.most < outputs + (64 << 20)


def test_every_tile_table_is_complete():
    kinds = set(product((1, 2), ("half", "more", "fp32", "odd")))
    assert all(set(table) == kinds for table in TILES.values())
    bf16 = torch.bfloat16
    assert launch_tile(75, 1, bf16, True, True) == TILES[86][1, "half"]
    assert launch_tile(89, 2, bf16, True, False) == TILES[86][2, "more"]
    assert launch_tile(103, 2, bf16, True, True) == TILES[100][2, "half"]
    assert launch_tile(120, 2, torch.float32, True, True) == TILES[86][2, "fp32"]
    assert launch_tile(90, 2, torch.float32, False, True) == TILES[90][2, "odd"]
    assert launch_tile(GFX942, 2, bf16, True, True) == TILES[942][2, "half"]
