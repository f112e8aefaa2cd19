"""The vocabulary in parts on several processes equals the whole on one."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from oisd import losses
from oisd_kernels import linear_logprob, logit_lens_divergence, policy_head
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked import rows_torch
from oisd_kernels.lens.chunked.rows import RowMath
from oisd_kernels.lens.chunked.rows_parallel import ParallelRows
from tests.oisd_kernels.lens.test_chunked import budget, peak_memory, policy_terms
from tests.oisd_kernels.lens.vocab_parallel_runs import Call, on_processes, run
from tests.oisd_kernels.test_reference import CASES, GRADIENT_BOUND, LOSS_BOUND, lens_case, normal

KINDS = ("jsd", "forward_kl", "reverse_kl")
SPLITS = {
    2: [[7, 6], [13, 0], [2, 11], "dtensor", "group", "tp-of-two-dimensions"],
    4: [[4, 4, 4, 1], [0, 5, 0, 8], [1, 2, 3, 7], "dtensor", "group"],
}
V, D, N = 13, 6, 11


def rows(layers: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Student and final hidden states, signed weights with zeros, rows and a token left out."""
    lead = () if layers is None else (layers,)
    weight = normal(*lead, N, seed=4)
    weight[..., 2] = weight[..., 7] = 0
    if layers:
        weight[1:, 5] = 0
    return normal(*lead, N, D, seed=0), normal(N, D, seed=1), weight


def lens(split: Any, divergence: str, layers: int | None, reduction: str, **more: Any) -> Call:
    hidden, teacher, token_weight = rows(layers)
    both = more.get("grad_weight", False)
    upstream = normal(*token_weight.shape, seed=5) if reduction == "none" else torch.tensor(-1.7)
    options = dict(divergence=divergence, reduction=reduction, max_bytes=budget(16, V, D))
    return Call(
        "logit_lens_divergence",
        {"hidden": hidden, "teacher_hidden": teacher, "token_weight": token_weight},
        normal(V, D, seed=2),
        normal(V, seed=3),
        options | more,
        {"loss": upstream},
        ("hidden", "weight") if both else ("hidden",),
        split,
    )


def logprob(split: Any, wanted: tuple[str, ...], **more: Any) -> Call:
    labels = torch.tensor([0, 12, 6, 7, 3, 1, 1, 11, 4, 8, 5])
    return Call(
        "linear_logprob",
        {"hidden": normal(N, D, seed=0), "labels": labels},
        normal(V, D, seed=2),
        normal(V, seed=3),
        dict(max_bytes=budget(5, V, D)) | more,
        {"logprob": normal(N, seed=5)},
        wanted,
        split,
    )


def policy(split: Any, layers: int, terms: bool, **more: Any) -> Call:
    call = logprob(split, ("student_hidden", "hidden_final", "weight"))
    hidden, final, token_weight = rows(layers)
    tensors = {
        "hidden_final": final,
        "labels": call.tensors["labels"],
        "student_hidden": hidden,
        "token_weight": token_weight,
    }
    upstream = {"divergence": normal(layers, N, seed=5), "logprob": normal(N, seed=6)}
    options = dict(max_bytes=budget(16, V, D)) | more
    if terms:
        upstream = {"divergence": upstream["divergence"], "policy_loss": torch.tensor(0.6)}
        options["policy"] = policy_terms(N)._asdict()
    return dataclasses.replace(
        call, op="policy_head", tensors=tensors, options=options, upstream=upstream
    )


def exact_calls(splits: list[Any]) -> dict[str, Call]:
    """In float64; every option with some split. Fewer on four processes, which two cores share."""
    turn, few = iter(splits * 20), len(splits[0]) == 4
    calls = {}
    for kind in KINDS:
        for layers in (None, 3):
            for reduction in ("none",) if few else ("none", "sum", "mean"):
                for both in (False, True):
                    split = next(turn)
                    name = (
                        f"lens-{kind}-S{layers or 1}-{reduction}-{'weight' if both else 'hidden'}"
                    )
                    more = dict(beta=0.3, temperature=0.7, logit_softcap=2.0, grad_weight=both)
                    calls[f"{name}-{split}"] = lens(split, kind, layers, reduction, **more)
    for wanted in (("hidden",), ("hidden", "weight")):
        for split in splits:
            more = dict(temperature=0.7, logit_softcap=2.0)
            calls[f"logprob-{'-'.join(wanted)}-{split}"] = logprob(split, wanted, **more)
    for terms in (False, True):
        for split in splits[:2] if few else splits:
            lens_temperature = 0.8 if split == splits[0] else None
            call = policy(split, 3, terms, temperature=0.7, lens_temperature=lens_temperature)
            calls[f"policy-{'terms' if terms else 'logprob'}-{split}"] = call
    calls["policy-everything"] = policy(
        splits[0], 1, False, grad_weight=True, logit_softcap=2.0, divergence="forward_kl"
    )
    calls["plain"] = dataclasses.replace(lens(splits[1], "jsd", 3, "none"), bias=None)
    none = lens(splits[0], "jsd", 3, "sum")
    none.tensors["token_weight"] = torch.zeros(3, N).double()
    calls["all-rows-dropped"] = none
    empty = lens(splits[0], "jsd", None, "sum")
    empty.tensors = {name: x[:0] for name, x in empty.tensors.items()}
    calls["no-rows"] = empty
    if few:  # the last rank's part is empty
        small = lens("dtensor", "jsd", 3, "none", grad_weight=True)
        small.weight, small.bias = small.weight[:5], small.bias[:5]
        calls["five-of-four"] = small
    return calls


def likeliest_call() -> Call:
    """Whole numbers, so that the ranks' logits are exact: each row of the unembedding comes twice,
    on two ranks or one, and of a pair the first is masked. Two rows of states hold NaN."""
    whole = [torch.round(2 * normal(*shape, seed=i)) for i, shape in enumerate([(3, N, D), (N, D)])]
    hidden, teacher = whole
    hidden[0, 2, 1] = teacher[3, 0] = math.nan
    weight = torch.round(2 * normal(7, D, seed=2)).repeat(2, 1)[:V]
    bias = torch.zeros(V).double()
    bias[2] = -math.inf
    tensors = {"hidden": hidden, "teacher_hidden": teacher}
    return Call("likeliest", tensors, weight, bias, split="dtensor")


def bounded_calls(splits: list[Any]) -> dict[str, Call]:
    """In float32, where the bounds lie: the cases of the reference's own tests."""
    size = len(splits[0])
    parts = [60, 191] if size == 2 else [1, 100, 0, 150]
    calls = {}
    for case in CASES:
        hidden, teacher, weight = (x.float() for x in lens_case(case))
        token_weight = normal(2, 24, seed=5).float()
        token_weight[:, 3] = 0
        for kind in KINDS:
            calls[f"{case}-{kind}"] = Call(
                "logit_lens_divergence",
                {"hidden": hidden, "teacher_hidden": teacher, "token_weight": token_weight},
                weight,
                None,
                dict(divergence=kind, grad_weight=True),
                {"loss": normal(2, 24, seed=6).float()},
                ("hidden", "weight"),
                parts,
            )
    return calls


def refused_calls(size: int) -> dict[str, tuple[Call, str]]:
    """Calls with what the error must say."""
    even = [13 - 3 * (size - 1), *[3] * (size - 1)]
    out_of_range = logprob(even, ())
    out_of_range.tensors["labels"] = torch.full((N,), V)
    rows_differ = dataclasses.replace(lens(even, "jsd", None, "sum"), fewer_rows=True)
    other_impl = lens(even, "jsd", None, "sum", impl="reference")
    lonely = dataclasses.replace(lens("dtensor", "jsd", 3, "sum"), split="fsdp")
    copies = logprob("replicated", ("hidden", "weight"))
    return {
        "labels": (out_of_range, r"linear_logprob: labels must lie in \[0, 13\), got 13"),
        "impl": (other_impl, 'impl must be "auto" or "chunked" where the vocabulary is in parts'),
        "fsdp": (
            lonely,
            "weight must be a plain tensor or tensor-parallel.*over fsdp; pass weight",
        ),
        "replicated": (copies, "weight must say how its gradient is placed.*grad_placements"),
        "rows": (rows_differ, "hidden must have as many rows on every rank"),
    }


def all_calls(size: int) -> dict[str, Call]:
    calls = exact_calls(SPLITS[size]) | bounded_calls(SPLITS[size])
    calls["likeliest"] = likeliest_call()
    calls["replicated-frozen"] = logprob("replicated", ("hidden",))
    return calls | {name: call for name, (call, _) in refused_calls(size).items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[Any]]:
    calls = {size: [*all_calls(size).values()] for size in SPLITS}
    return on_processes(tmp_path_factory.mktemp("gloo"), calls)


@pytest.fixture(params=SPLITS, ids=lambda size: f"{size}-processes")
def results(request, found):
    size, calls = request.param, all_calls(request.param)
    both = zip(calls.values(), found[size], strict=True)
    return size, dict(zip(calls, both, strict=True))


def require_equal(found: list[dict[str, Tensor]], truth: dict[str, Tensor], check: Any) -> None:
    """Each rank has the values and the gradient to rows, all together the unembedding's."""
    for name, want in truth.items():
        if name in ("d_weight", "d_bias"):
            check(name, torch.cat([part[name] for part in found]), want)
            continue
        check(name, found[0][name], want)
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), f"{name}: the ranks differ"


def exactly(name: str, got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(
        got, want, rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: {text}"
    )


def test_any_split_and_option_in_float64(results):
    size, runs = results
    checked = 0
    for name in exact_calls(SPLITS[size]):
        call, found = runs[name]
        truth = run(call, impl="reference")
        if call.op == "policy_head":  # of dropped rows each implementation keeps what it has
            kept = (call.tensors["token_weight"] != 0).any(0)
            for values in (truth, *found):
                values["stats_teacher_entropy"] *= kept
        if name not in ("all-rows-dropped", "no-rows"):
            assert all(x.norm() > 1e-3 for key, x in truth.items() if key.startswith("d_")), name
        try:
            require_equal(found, truth, exactly)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        checked += 1
    assert checked >= {2: 60, 4: 30}[size]


def test_the_bounds_of_float32_hold(results):
    """Saturated, disjoint and one-hot distributions among them; against float64."""
    size, runs = results
    bounds = LOSS_BOUND[torch.float32], GRADIENT_BOUND[torch.float32]

    def check(name: str, got: Tensor, want: Tensor) -> None:
        assert got.dtype == torch.float32
        gap = got.double() - want
        if name.startswith("d_"):
            assert want.norm() > 1e-6
            assert gap.norm() <= bounds[1] * want.norm(), name
        elif name != "top1_agreement":
            assert gap.abs().max() <= 1e-6 or gap.norm() <= bounds[0] * want.norm(), name

    for name in bounded_calls(SPLITS[size]):
        call, found = runs[name]
        tensors = {key: x.double() for key, x in call.tensors.items()}
        wide = dataclasses.replace(call, tensors=tensors, weight=call.weight.double())
        try:
            require_equal(found, run(wide, impl="reference"), check)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_likeliest_tokens_of_parts(results):
    """The first of equals, and of NaN, whichever rank holds it."""
    size, runs = results
    call, found = runs["likeliest"]
    rows = torch.cat([call.tensors["hidden"], call.tensors["teacher_hidden"][None]])
    scores = rows @ call.weight.T + call.bias
    logprob, token = scores.log_softmax(-1).max(-1)
    assert logprob.isnan().sum() == 2 and (token == 9).any()
    assert ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).sum() > N
    wanted = {
        "student_token": token[:3], "student_logprob": logprob[:3],
        "teacher_token": token[3], "teacher_logprob": logprob[3],
    }  # fmt: skip

    for part in found:
        assert part.keys() == wanted.keys()
        for name, want in wanted.items():
            torch.testing.assert_close(part[name], want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_what_cannot_be_right_is_refused_on_every_rank(results):
    size, runs = results
    for name, (_, message) in refused_calls(size).items():
        for error in runs[name][1]:
            assert isinstance(error, str), f"{name} was taken"
            assert re.search(message, error), error


def test_a_replicated_weight_is_taken_where_it_needs_no_gradient(results):
    size, runs = results
    call, found = runs["replicated-frozen"]
    require_equal(found, run(call, impl="reference"), exactly)


# In one process: a group of one is the whole, so these reach beneath the public functions.


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_in_the_operands_dtype(operand, kind, alone):
    """Tensor cores take the gradient of the logits in half precision, in the logits' memory."""
    parallel, math_ = ParallelRows(alone, 0), RowMath(kind, 0.5, 0.7, 5.0)
    labels, factor = torch.arange(7), normal(7, seed=3).float() * 1e-4

    def gradients(rows: Any, dtype: torch.dtype) -> list[Tensor]:
        buffer = torch.full((14, 72), math.nan)
        z_final, z = buffer[:7, :61], buffer[7:, :61]
        z_final.copy_(normal(7, 61, seed=1) * 3)
        z.copy_(normal(7, 61, seed=2) * 3)
        final = rows.final_rows(z_final, None, labels, math_, True, True)
        slot = torch.arange(7)
        got = rows.student_rows(z, z_final, final, None, slot, factor, math_, True, True, dtype)
        last = rows.final_gradient(z_final, final, None, labels, factor, math_, dtype)
        both = (got.d_logits, got.scale), last
        assert all(x.dtype == dtype for x, _ in both)
        return [x.float() * (scale[:, None] if scale.numel() else 1) for x, scale in both]

    wanted = gradients(rows_torch, torch.float32)
    for got, want in zip(gradients(parallel, operand), wanted, strict=True):
        assert want.norm() > 1e-6
        error = (got - want).norm() / want.norm()
        assert 0 < error < torch.finfo(operand).eps


def test_a_part_keeps_to_its_budget(alone, monkeypatch):
    """No [N, V]: the logits of a chunk and the scratch of its rows."""
    size, width, vocabulary, budget_ = 300, 16, 20_011, 4 << 20
    hidden, final = normal(2, size, width, seed=0).float(), normal(size, width, seed=1).float()
    hidden.requires_grad_()
    weight = normal(vocabulary, width, seed=2).float()
    one = logit_lens_divergence(hidden, final, weight)
    part = vocab_parallel.whole(weight, None)._replace(group=alone.group_name)
    monkeypatch.setattr(vocab_parallel, "part", lambda *_: part)
    found = []

    def call() -> None:
        found.append(logit_lens_divergence(hidden, final, weight, max_bytes=budget_))

    peak = peak_memory(call)
    torch.testing.assert_close(found[0], one)
    outputs, index = hidden.numel() * 4 + 8 * 2 * size * 4, 6 * 2 * size * 8
    assert budget_ / 2 < peak <= budget_ + outputs + index


GROUPLESS = {
    "logit_lens_divergence": lambda h, w, **o: logit_lens_divergence(h, h, w, **o),
    "linear_logprob": lambda h, w, **o: linear_logprob(h, w, torch.arange(3), **o),
    "policy_head": lambda h, w, **o: policy_head(h, w, torch.arange(3), **o),
    "think_loss": lambda h, w, **o: losses.think_loss(
        h[None], h, w, torch.ones(3), token_weight=torch.ones(3), **o
    ),
    "grpo_and_think_loss": lambda h, w, **o: losses.grpo_and_think_loss(
        h, w, torch.arange(3), h[None], torch.ones(3), grpo_weight=torch.ones(3),
        think_weight=torch.ones(3), **o,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", GROUPLESS)
def test_a_group_that_is_none(op):
    """The losses hand it on."""
    hidden, weight = normal(3, 4, seed=0).float(), normal(5, 4, seed=1).float()
    GROUPLESS[op](hidden, weight, tp_group=None)
    with pytest.raises(ValueError, match="tp_group must be a torch.distributed.ProcessGroup"):
        GROUPLESS[op](hidden, weight, tp_group="tp")


def test_a_group_of_one_is_the_whole(alone):
    hidden, weight = normal(3, 4, seed=0), normal(5, 4, seed=1)
    whole = logit_lens_divergence(hidden, hidden.flip(0), weight)
    assert torch.equal(logit_lens_divergence(hidden, hidden.flip(0), weight, tp_group=alone), whole)
