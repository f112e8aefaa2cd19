"""`rows_split` in the interpreter: parts of a row, tokens with any number of rows, spare rows.

`test_lens_interpreter` and `test_likeliest` hold both forms to the same bounds. A program that
waits for one with a higher number never ends here.
"""

import math

import pytest
import torch

from oisd_kernels import PolicyTerms, distillation_divergence, policy_head
from oisd_kernels.lens.chunked import head_pass, rows_torch
from oisd_kernels.lens.chunked.record import HeadCall
from oisd_kernels.lens.chunked.rows import RowMath
from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.lens import row_forms
from tests.oisd_kernels.test_reference import assert_gradient_close, leaf, lens_truth, normal

KINDS = ["jsd", "forward_kl", "reverse_kl"]
PLAIN = RowMath("jsd", 0.3, 1.0, None)
ALL = PLAIN._replace(temperature=0.7, softcap=5.0)


@outside
@pytest.mark.timeout(600)
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__, timeout=550)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


def both_forms(patch, z, z_final, slot, math_, operand, *, layers, labels=None, bias=None,
               gradient=True, part=64, lag=1, forms=row_forms.FORMS):  # fmt: skip
    """Results of both forms on the same rows, by name; the gradient with its scale."""
    found = []
    factor = 1 + normal(len(z), seed=9).to(z.dtype)
    for form in forms:
        row_forms.choose(form, patch, part, lag)
        final_rows = z_final.clone()
        rows = row_forms.functions(form, final_rows, layers, operand if gradient else None)
        own = row_forms.in_room(z, rows, z.shape[1] + 7)
        final = rows.final_rows(final_rows, bias, labels, math_, True, True)
        got = rows.student_rows(
            own, final_rows, final, bias, slot, factor, math_, gradient, True, operand
        )
        torch.testing.assert_close(final_rows, z_final, rtol=0, atol=0, equal_nan=True)
        out = {f"final {name}": x for name, x in final._asdict().items()} | got._asdict()
        if gradient:
            assert got.d_logits.dtype == operand
            scale = got.scale[:, None].double() if got.scale.numel() else 1
            out["d_logits"] = got.d_logits.double() * scale
        out.pop("scale")
        found.append(out)
    return found


def require_same(whole, split, half=False):
    for name, wanted in whole.items():
        if wanted is None or not wanted.is_floating_point():
            assert wanted is None or torch.equal(split[name], wanted), name
            continue
        bound = 1e-6
        if name == "d_logits":
            assert wanted.norm() > 1e-3
            # One entry in a thousand may be rounded to the other neighbour.
            bound = 2e-4 if half else 1e-5
            error = (split[name] - wanted).norm() / wanted.norm()
            assert error <= bound, (name, error)
        else:
            torch.testing.assert_close(split[name], wanted, rtol=bound, atol=bound, msg=name)


@interpreted
@pytest.mark.parametrize(
    "kind, size",
    [(kind, size) for kind in KINDS for size in (1, 150)]
    + [("jsd", 64), ("jsd", 65)]
    + [pytest.param(kind, size, marks=pytest.mark.slow) for kind in KINDS[1:] for size in (64, 65)],
)
def test_parts_of_any_size(kind, size, monkeypatch):
    """The last part has one column, or its row one part; its label is there."""
    z, z_final = (3 * normal(3, size, seed=i).float() for i in range(2))
    math_ = ALL._replace(divergence=kind)
    labels, bias = torch.tensor([size - 1, 0, size // 2]), normal(size, seed=3).float()
    whole, split = both_forms(
        monkeypatch, z, z_final, torch.arange(3), math_, torch.float32, layers=1, labels=labels,
        bias=bias,
    )  # fmt: skip
    if size == 1:
        assert split["d_logits"].abs().max() == 0 and split["final logprob"].abs().max() == 0
        for x in (whole, split):
            del x["d_logits"]
    require_same(whole, split)


@interpreted
@pytest.mark.parametrize(
    "slots, dtype, lag",
    [
        ([2], torch.bfloat16, 1),
        ([0, 0, 2], torch.float16, 9),
        ([1, 1, 1, 3], torch.bfloat16, 2),
        ([0, 1, 2, 3, 3], torch.float32, 1),
    ],
    ids=str,
)
def test_tokens_with_any_number_of_rows(slots, dtype, lag, monkeypatch):
    """Also none, before others and after them; final rows have their statistics all the same."""
    z, z_final = 3 * normal(len(slots), 150, seed=0).float(), 3 * normal(4, 150, seed=1).float()
    whole, split = both_forms(
        monkeypatch, z, z_final, torch.tensor(slots), PLAIN, dtype, layers=3,
        labels=torch.arange(4), lag=lag,
    )  # fmt: skip
    require_same(whole, split, half=dtype != torch.float32)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_values_alone(kind, monkeypatch):
    z, z_final = (3 * normal(4, 150, seed=i).float() for i in range(2))
    whole, split = both_forms(
        monkeypatch, z, z_final[:2], torch.tensor([0, 0, 1, 1]), ALL._replace(divergence=kind),
        torch.float32, layers=2, gradient=False,
    )  # fmt: skip
    assert split["d_logits"] is None
    require_same(whole, split)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_equal_and_disjoint_rows_and_a_nan(kind, monkeypatch):
    z_final = normal(4, 150, seed=0).float()
    z = z_final.clone()
    z[1, :75], z_final[1, 75:] = -9.0, -9.0
    z[2, :75], z_final[2, :60] = -300.0, -300.0  # probabilities of 0, in both and in one
    z[2, 75:] *= 2
    z_final[3, 140] = math.nan
    slot, math_ = torch.arange(4), PLAIN._replace(divergence=kind)
    truth = lens_truth(
        z.double(), z_final.double(), torch.eye(150).double(), divergence=kind, beta=0.3,
        upstream=1 + normal(4, seed=9),
    )  # fmt: skip
    for operand, bound in ((torch.float32, 1e-4), (torch.bfloat16, 8e-3)):
        (split,) = both_forms(
            monkeypatch, z, z_final, slot, math_, operand, layers=1, forms=["split"]
        )
        assert split["divergence"][0].abs() < 1e-7 and split["d_logits"][0].abs().max() < 1e-7
        for row in (1, 2):
            assert split["divergence"][row].item() == pytest.approx(truth.loss[row].item(), 1e-5)
            assert_gradient_close(split["d_logits"][row], truth.d_hidden[row], bound)
        for name in ("divergence", "d_logits"):
            bad = split[name].isnan().view(4, -1).all(1)
            assert bad.tolist() == [False, False, False, True]
        assert split["final entropy"].isnan().tolist() == [False, False, False, True]


@interpreted
def test_a_label_of_probability_1_and_one_outside(monkeypatch):
    z_final = normal(3, 150, seed=0).float()
    z_final[:2, 149] += 27.0
    labels = torch.tensor([149, 3, 150])
    row_forms.choose("split", monkeypatch, part=64)
    rows = row_forms.functions("split", z_final, 1, None)
    final = rows.final_rows(z_final, None, labels, PLAIN, True, True)
    one = torch.ones(1)
    rows.student_rows(
        z_final[:1].clone(), z_final, final, None, torch.tensor([1]), one, PLAIN, False, True,
        torch.float32,
    )  # fmt: skip
    wanted = z_final.double().log_softmax(-1)
    assert -1e-8 < wanted[0, 149] < 0, wanted[0, 149]
    for row, label in ((0, 149), (1, 3)):
        assert final.logprob[row].item() == pytest.approx(wanted[row, label].item(), 1e-5)
    assert final.logprob[2] == -math.inf


@interpreted
def test_the_memory_around_stays_as_it_is(monkeypatch):
    """The gradient lies `spare` rows on; what lies behind is another's, and so are gaps."""
    row_forms.choose("split", monkeypatch, part=64, lag=2)
    z_final = normal(4, 150, seed=1).float()
    rows = row_forms.functions("split", z_final, 2, torch.bfloat16)
    assert rows.spare == 4
    wide = torch.full((8 + 4 + 1, 192), 7.0)
    wide[:8, :150] = normal(8, 150, seed=0).float()
    before = wide.clone()
    final = rows.final_rows(z_final, None, None, PLAIN, True, True)
    got = rows.student_rows(
        wide[:8, :150], z_final, final, None, torch.arange(4).repeat_interleave(2), torch.ones(8),
        PLAIN, True, True, torch.bfloat16,
    )  # fmt: skip
    assert got.d_logits.data_ptr() == wide[4].data_ptr() and got.d_logits.norm() > 1e-3
    assert torch.equal(wide[:4], before[:4]) and torch.equal(wide[12:], before[12:])
    assert torch.equal(wide[4:12, 128:], before[4:12, 128:])


def shifted(patch, lag):
    """Spare rows where the gradient keeps the logits' dtype too, as it does on a CPU."""
    from oisd_kernels.lens.chunked import rows_split

    class Shifted(rows_split.SplitRows):
        def __init__(self, layers, *given):
            super().__init__(layers, *given)
            self.spare = 0 if self.operand is None else self.lag * layers

    row_forms.choose("split", patch, part=8, lag=lag)
    patch.setattr(rows_split, "SplitRows", Shifted)


def budget(rows, vocabulary, width):
    from oisd_kernels.lens.chunked import chunks

    row = (chunks.padded(vocabulary) + 2 * width) * 8
    scratch = chunks.SCRATCH_ROWS * vocabulary * 8
    return rows * (row + scratch)


@interpreted
@pytest.mark.parametrize(
    "lens_temperature, rows",
    [
        pytest.param(None, 60, id="one-temperature-one-chunk"),
        pytest.param(1.4, 3, id="two-many-chunks"),
        pytest.param(None, 3, id="one-temperature-many-chunks", marks=pytest.mark.slow),
        pytest.param(1.4, 60, id="two-one-chunk", marks=pytest.mark.slow),
    ],
)
def test_policy_head_with_spare_rows(lens_temperature, rows, monkeypatch):
    """Tokens that keep all, some or none of their rows, in one chunk or many."""
    shifted(monkeypatch, 1)
    hidden, final = leaf(normal(2, 5, 6, seed=0)), leaf(normal(5, 6, seed=1))
    weight, bias = leaf(normal(13, 6, seed=2)), normal(13, seed=3)
    token_weight = torch.tensor([[1.0, 0.0, -2.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0, -1.0]])
    results = []
    for impl in ("chunked", "reference"):
        out = policy_head(
            final, weight, torch.tensor([0, 12, 5, 7, 1]), hidden, bias=bias, logit_softcap=3.0,
            token_weight=token_weight, temperature=0.7, lens_temperature=lens_temperature,
            policy=PolicyTerms(torch.arange(5.0), torch.ones(5)), impl=impl, grad_weight=True,
            max_bytes=budget(rows, 13, 6),
        )  # fmt: skip
        loss = out.policy_loss + out.divergence.square().sum()
        grads = torch.autograd.grad(loss, (hidden, final, weight))
        assert all(x.norm() > 1e-3 for x in grads)
        stats = out.stats
        stats = stats._replace(teacher_entropy=stats.teacher_entropy[[0, 2, 4]])
        results.append([*out[:4], *stats, out.policy_loss, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@interpreted
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "softcap3"])
def test_another_head_beside_spare_rows(softcap, monkeypatch):
    """The softcap's slope lies behind them."""
    shifted(monkeypatch, 1)
    hidden, weight = leaf(normal(4, 6, seed=0)), leaf(normal(13, 6, seed=1))
    teacher, teacher_weight = normal(4, 4, seed=2), normal(13, 4, seed=3)
    results = []
    for impl in ("chunked", "reference"):
        loss = distillation_divergence(
            hidden, weight, teacher, teacher_weight, logit_softcap=softcap, temperature=0.7,
            impl=impl,
        )  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss.square().sum(), (hidden, weight))])
    assert results[0][1].norm() > 1e-3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@interpreted
def test_no_rows_at_all(monkeypatch):
    row_forms.choose("split", monkeypatch)
    final, weight = normal(3, 6, seed=1), normal(13, 6, seed=2)
    for layers, factor in ((2, torch.zeros(3)), (0, None)):
        hidden = normal(layers, 3, 6, seed=0)
        found, wanted = (
            policy_head(final, weight, torch.arange(3), hidden, token_weight=factor, impl=impl)
            for impl in ("chunked", "reference")
        )
        torch.testing.assert_close(found.logprob, wanted.logprob)
        assert found.divergence.count_nonzero() == 0


def test_which_calls_take_it(monkeypatch):
    """On an accelerator; "meta" stands for one."""
    pytest.importorskip("triton")
    from oisd_kernels.lens.chunked import rows_split

    def call(capacity=2000, group="", layers=1, vocabulary=151936, device="meta"):
        hidden, weight = (
            torch.empty(*shape, 8, device=device) for shape in ((layers, 1024), (vocabulary,))
        )
        return HeadCall(
            hidden, hidden[0] if layers else weight[:0], weight, capacity=capacity, group=group,
            hidden_grad=True,
        )  # fmt: skip

    assert head_pass.split_rows(call(), torch.bfloat16) is None, "on without being chosen"
    monkeypatch.setattr(head_pass, "SPLIT_ROWS", True)
    rows = head_pass.split_rows(call(), torch.bfloat16)
    # 24 MiB of 60 hold three times 1.2 MB of logits and 0.3 MB of gradient for each token.
    assert isinstance(rows, rows_split.SplitRows) and (rows.lag, rows.spare) == (6, 6)
    assert head_pass.split_rows(call(), torch.float32).spare == 0
    four = head_pass.split_rows(call(layers=4), torch.bfloat16)
    assert (four.lag, four.spare) == (2, 8)
    refused = call(capacity=47), call(group="a group"), call(layers=0), call(vocabulary=1 + 2**24)
    for other in refused:
        assert head_pass.split_rows(other, torch.bfloat16) is None
    if head_pass.row_functions(torch.device("cpu")) is rows_torch:
        assert head_pass.split_rows(call(device="cpu", vocabulary=13), torch.float32) is None
