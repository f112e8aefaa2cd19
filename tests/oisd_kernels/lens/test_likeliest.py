"""The likeliest tokens that come out of the row pass, and rows that share a teacher row.

Ties, NaN and infinities as `torch.max` has them; log-probabilities and divergences against float64.
The Triton kernels run in the interpreter, in a process of their own.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from oisd_kernels.lens.chunked import chunks, rows_torch
from oisd_kernels.lens.chunked.rows import RowMath
from oisd_kernels.lens.chunked.rows_torch import BLOCK
from oisd_kernels.lens.logit_lens import lens_with_top
from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.lens import row_forms
from tests.oisd_kernels.test_reference import assert_gradient_close, lens_truth, normal

PLAIN = RowMath("jsd", 0.5, 1.0, None)
SIZES = [1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 7 * BLOCK, 1500, 3001]


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


def rows_with_ties(size: int, dtype: torch.dtype) -> Tensor:
    """[9, V] in a wider buffer, of few distinct values: a row has its maximum many times."""
    z = torch.full((9, size + 24), math.nan, dtype=dtype)[:, :size]
    z.copy_(torch.randint(-3, 4, (9, size), generator=torch.Generator().manual_seed(size)))
    z[1] = 0  # all alike
    z[2, -1] = 9  # the last one alone
    z[3, size // 2] = z[3, -1] = 9
    z[4, : size // 2] = -math.inf
    return z


@outside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_equals(size, dtype):
    z = rows_with_ties(size, dtype)
    z[5] = -math.inf
    z[6, size // 3] = z[6, -1] = math.nan
    z[7, size // 3], z[7, -1] = math.inf, math.nan
    z[8, 0] = math.inf
    largest, place = rows_torch.likeliest(z)
    wanted = z.max(-1)
    assert torch.equal(place, wanted.indices)
    torch.testing.assert_close(largest, wanted.values, rtol=0, atol=0, equal_nan=True)
    assert wanted.values[6:8].isnan().all()


@outside
@pytest.mark.parametrize(
    "place", [0, BLOCK - 1, BLOCK, 5 * BLOCK + 3, 6 * BLOCK - 1, 6 * BLOCK + 8]
)
def test_one_maximum_anywhere(place):
    """The last block overlaps the one before it."""
    z = normal(2, 6 * BLOCK + 9, seed=0)
    z[1, place] = 10
    z[0, place] = z[0, -1] = 10
    assert rows_torch.likeliest(z)[1].tolist() == [place, place]


def require_top(rows: Any, size: int, dtype: torch.dtype, temperature: float) -> None:
    """Both row functions against float64; rows 5 to 8 hold a NaN."""
    math_ = PLAIN._replace(temperature=temperature)
    z = rows_with_ties(size, dtype)
    z[5:, size // 3] = math.nan
    scores = z.double() / temperature
    wanted, logprob = scores.max(-1).indices, scores.log_softmax(-1).amax(-1)
    slot, ones = torch.arange(9), torch.ones(9, dtype=dtype)
    z_final = z.flip(0).clone()
    final = rows.final_rows(z_final, None, None, math_, True, True)
    got = rows.student_rows(z, z_final, final, None, slot, ones, math_, False, True, dtype)
    sound = torch.arange(5)
    for token, top in (
        (got.top1, got.top_logprob),
        (final.top1.flip(0), final.top_logprob.flip(0)),
    ):
        assert token.dtype == torch.int64 and top.dtype == dtype
        assert torch.equal(token[sound], wanted[sound])
        torch.testing.assert_close(
            top[sound].double(), logprob[sound], rtol=1e-6, atol=1e-6, check_dtype=False
        )
        assert top[5:].isnan().all()
        assert ((token >= 0) & (token < size)).all(), "a NaN leads outside the vocabulary"
        if rows is rows_torch:
            assert torch.equal(token, wanted)
    both = wanted == wanted.flip(0)
    assert 0 < both[sound].sum() or size == 1
    assert torch.equal(got.agreement[:4], both[:4].to(dtype))


@outside
@pytest.mark.parametrize("temperature", [1.0, 0.5], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", SIZES)
def test_top_of_the_torch_rows(size, dtype, temperature):
    require_top(rows_torch, size, dtype, temperature)


@interpreted
@pytest.mark.parametrize("form", row_forms.FORMS)
@pytest.mark.parametrize(
    "size, dtype",
    [
        (1, torch.float32),
        (1023, torch.float64),  # two parts of the split form
        (1025, torch.float32),
        (3001, torch.float32),
        pytest.param(1, torch.float64, marks=pytest.mark.slow),
        pytest.param(1023, torch.float32, marks=pytest.mark.slow),
        pytest.param(1025, torch.float64, marks=pytest.mark.slow),
        pytest.param(3001, torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_top_of_the_triton_rows(size, dtype, form, monkeypatch):
    row_forms.choose(form, monkeypatch, part=1024)
    rows = row_forms.functions(form, torch.empty(9, size, dtype=dtype), 1, None)
    assert rows is not rows_torch
    require_top(rows, size, dtype, 0.5)


@outside
@pytest.mark.parametrize("tile_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("kind, beta", [("jsd", 0.5), ("jsd", 0.2), ("forward_kl", 0.5),
                                        ("reverse_kl", 0.5)])  # fmt: skip
def test_rows_that_share_a_teacher_row(kind, beta, tile_rows, monkeypatch):
    """In any order and number, of one tile or several."""
    size = 311
    monkeypatch.setattr(chunks, "TILE", tile_rows * size)
    monkeypatch.setattr(chunks, "WIDE_TILE", tile_rows * size)
    slot = torch.tensor([0, 0, 0, 1, 3, 2, 2, 4, 5, 6, 6, 6, 6, 6, 0, 6, 5, 5, 0])
    z_final, z = 3 * normal(7, size, seed=0), 3 * normal(len(slot), size, seed=1)
    factor = normal(len(slot), seed=2)
    math_ = RowMath(kind, beta, 1.0, None)
    truth = lens_truth(
        z[None], z_final[slot], torch.eye(size).double(), divergence=kind, beta=beta,
        upstream=factor[None],
    )  # fmt: skip
    final = rows_torch.final_rows(z_final, None, None, math_, True, True)
    for gradient in (False, True):
        got = rows_torch.student_rows(
            z.clone(), z_final, final, None, slot, factor, math_, gradient, True, z.dtype
        )
        torch.testing.assert_close(got.divergence, truth.loss[0], rtol=1e-11, atol=1e-12)
        if gradient:
            assert got.d_logits is not None
            assert_gradient_close(got.d_logits, truth.d_hidden[0], 1e-11)


@outside
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "softcap2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64],
                         ids=["fp32", "bf16", "fp64"])  # fmt: skip
def test_lens_with_top(dtype, softcap):
    """V is no multiple of a block, and a bias masks a part of it."""
    size = 3 * BLOCK + 17
    hidden, teacher, weight = (
        normal(*shape, seed=i).to(dtype) for i, shape in enumerate([(3, 7, 9), (7, 9), (size, 9)])
    )
    bias = normal(size, seed=3).to(dtype)
    bias[40:90] = -math.inf
    stats, top = lens_with_top(hidden, teacher, weight, bias=bias, logit_softcap=softcap)
    rows = torch.cat([hidden, teacher[None]]).double()
    scores = rows @ weight.double().T + bias.double()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wanted = scores.log_softmax(-1).max(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for got, token, part in (
        (top.student_logprob, top.student_token, slice(0, 3)),
        (top.teacher_logprob[None], top.teacher_token[None], slice(3, 4)),
    ):
        assert torch.equal(token, wanted.indices[part])
        error = (got.double() - wanted.values[part]).abs().max()
        assert error < 10 * tolerance, error
    agreement = (wanted.indices[:3] == wanted.indices[3:]).to(stats.divergence.dtype)
    assert torch.equal(stats.top1_agreement, agreement)


@outside
def test_lens_with_top_refuses_what_the_lens_refuses():
    hidden, weight = normal(3, 7, 9, seed=0), normal(20, 9, seed=1)
    with pytest.raises(ValueError, match="teacher_hidden must"):
        lens_with_top(hidden, hidden[0, :5], weight)
    with pytest.raises(ValueError, match="weight must"):
        lens_with_top(hidden, hidden[0], weight[:, :5])
    with pytest.raises(ValueError, match="divergence must"):
        lens_with_top(hidden, hidden[0], weight, divergence="kl")


@outside
@pytest.mark.parametrize("vocabulary", [13, 20_011, 32_000, 151_936])
def test_the_budget_holds_the_rows_and_their_tile(vocabulary):
    """As many rows as fit, whichever tile they get, but for those of a row of scratch."""
    device, width, itemsize = torch.device("cpu"), 64, 4

    def needed(rows: int) -> int:
        row = (chunks.padded(vocabulary) + 2 * width) * itemsize
        tile = min(chunks.tile_rows(device, vocabulary, rows), rows)
        return rows * row + tile * chunks.SCRATCH_ROWS * vocabulary * itemsize

    tiles = set()
    for megabytes in (8, 9, 13, 20, 31, 40, 64, 96, 300, 1000):
        budget = megabytes << 20
        rows = chunks.row_capacity("op", budget, device, vocabulary, width, itemsize, 1)
        assert needed(rows) <= budget
        assert needed(rows + chunks.SCRATCH_ROWS + 1) > budget, "room for more"
        tiles.add(chunks.tile_rows(device, vocabulary, rows))
    assert len(tiles) > 1 or vocabulary > chunks.WIDE_TILE // 2
