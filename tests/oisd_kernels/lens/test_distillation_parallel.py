"""A student's and a teacher's vocabulary in parts on several processes equal the whole on one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from oisd_kernels import distillation_divergence
from oisd_kernels.lens import vocab_parallel
from tests.oisd_kernels.lens.test_chunked import budget, peak_memory
from tests.oisd_kernels.lens.test_vocab_parallel import KINDS, SPLITS, V, exactly, require_equal
from tests.oisd_kernels.lens.vocab_parallel_runs import Call, on_processes, run
from tests.oisd_kernels.test_reference import CASES, GRADIENT_BOUND, LOSS_BOUND, lens_case, normal

N, D, E = 11, 6, 10

HEADS: dict[str, dict[str, Any]] = {
    "alike": {"temperature": 0.7},
    "scales": {"logit_scale": 0.6, "teacher_logit_scale": 1.3},
    "softcaps": {"logit_softcap": 3.0, "teacher_logit_softcap": 5.0, "temperature": 0.7},
    "all": {
        "biased": True,
        "temperature": 0.7,
        "logit_scale": 0.6,
        "teacher_logit_scale": 1.3,
        "logit_softcap": 3.0,
        "teacher_logit_softcap": 5.0,
    },
}


def call(split: Any, divergence: str, reduction: str = "none", **more: Any) -> Call:
    """By default with both gradients, signed weights with zeros, and chunks of a few tokens."""
    biased, frozen = more.pop("biased", False), more.pop("frozen", False)
    token_weight = normal(N, seed=4)
    token_weight[2] = token_weight[7] = 0
    tensors = {
        "hidden": normal(N, D, seed=0),
        "teacher_hidden": normal(N, E, seed=1),
        "token_weight": token_weight,
        "teacher_weight": normal(V, E, seed=3),
    }
    if biased:
        tensors["teacher_bias"] = normal(V, seed=6)
    options = dict(divergence=divergence, reduction=reduction, max_bytes=budget(8, V, E))
    return Call(
        "distillation_divergence",
        tensors,
        normal(V, D, seed=2),
        normal(V, seed=7) if biased else None,
        options | more,
        {"loss": normal(N, seed=5) if reduction == "none" else torch.tensor(-1.7)},
        ("hidden",) if frozen else ("hidden", "weight"),
        split,
    )


def exact_calls(size: int) -> dict[str, Call]:
    """In float64; every option with some split."""
    splits, calls = SPLITS[size], {}
    turn = iter(splits * 20)
    for kind in KINDS:
        for name, options in HEADS.items():
            for reduction in ("none", "sum", "mean") if size == 2 else ("none",):
                split = next(turn)
                some = dict(beta=0.3, frozen=name == "scales" and reduction == "none")
                calls[f"{kind}-{name}-{reduction}-{split}"] = call(
                    split, kind, reduction, **some, **options
                )
    for split in splits:
        shared = call(split, "jsd", biased=True)
        del shared.tensors["teacher_weight"], shared.tensors["teacher_bias"]
        shared.tensors["teacher_hidden"] = normal(N, D, seed=1)
        calls[f"one-head-{split}"] = shared
    for split in ("dtensor", "group"):  # the other head as plain rows of the same group
        even = [4, 4, 4, 1] if size == 4 else [7, 6]
        mixed = call("group", "jsd")
        mixed.split, mixed.teacher_split = (even, "group") if split == "group" else ("group", even)
        calls[f"mixed-{split}"] = mixed
    dropped = call(splits[0], "jsd", "sum")
    dropped.tensors["token_weight"] = torch.zeros(N).double()
    calls["all-rows-dropped"] = dropped
    unweighted = call(splits[1], "jsd", **HEADS["all"])
    del unweighted.tensors["token_weight"]
    calls["unweighted"] = unweighted
    empty = call(splits[0], "jsd", "sum")
    for name in ("hidden", "teacher_hidden", "token_weight"):
        empty.tensors[name] = empty.tensors[name][:0]
    calls["no-rows"] = empty
    if size == 4:  # the last rank's part is empty
        small = call("dtensor", "jsd", **HEADS["all"])
        small.weight, small.bias = small.weight[:5], small.bias[:5]
        small.tensors |= {
            name: small.tensors[name][:5] for name in ("teacher_weight", "teacher_bias")
        }
        calls["five-of-four"] = small
    return calls


def bounded_calls(size: int) -> dict[str, Call]:
    """In float32, where the bounds lie: the cases of the reference's tests, a wider teacher."""
    parts = [60, 191] if size == 2 else [1, 100, 0, 150]
    calls = {}
    for case in CASES:
        hidden, teacher, weight = (x.float() for x in lens_case(case))
        token_weight = normal(24, seed=5).float()
        token_weight[3] = 0
        wide = torch.cat([weight, weight], 1), torch.cat([teacher, torch.zeros_like(teacher)], 1)
        for kind in KINDS:
            calls[f"{case}-{kind}"] = Call(
                "distillation_divergence",
                {
                    "hidden": hidden[0],
                    "teacher_hidden": wide[1],
                    "token_weight": token_weight,
                    "teacher_weight": wide[0],
                },
                weight,
                None,
                dict(divergence=kind),
                {"loss": normal(24, seed=6).float()},
                ("hidden", "weight"),
                parts,
            )
    return calls


def refused_calls(size: int) -> dict[str, tuple[Call, str]]:
    """Calls with what the error must say, on every rank."""
    even = [13 - 3 * (size - 1), *[3] * (size - 1)]
    # On the first rank alone both parts are the same rows.
    others = [even[0], even[1] - 1, *even[2:-1], even[-1] + 1] if size > 2 else [12, 1]
    start = {2: [(0, 7), (7, 13)], 4: [(0, 4), (4, 8), (8, 12), (12, 13)]}[size]

    def other(split: Any, teacher_split: Any) -> Call:
        return dataclasses.replace(call(split, "jsd"), teacher_split=teacher_split)

    slices = "|".join(f"{a}:{b}" for a, b in start)
    head = "distillation_divergence: teacher_weight must"
    return {
        "other-parts": (
            other(even, others),
            rf"{head} be in the parts of weight.*got {re.escape(str(others))}; give each rank",
        ),
        "whole-rows": (
            other(even, "whole"),
            rf"{head} be in the parts of weight.*got {re.escape(str([13] * size))}",
        ),
        "whole-teacher": (
            other("dtensor", "whole"),
            rf"{head} be in the parts of weight.*got all 13 rows on this rank.*rows ({slices}),",
        ),
        "replicated-teacher": (
            other("dtensor", "replicated"),
            rf"{head} be in the parts of weight.*got all 13 rows.*distribute it as weight",
        ),
        "whole-student": (
            other("whole", "dtensor"),
            rf"{head} be whole, as weight is, got parts of \[.*distribute both alike",
        ),
        "fsdp": (
            other("dtensor", "fsdp"),
            f"{head} be a plain tensor or tensor-parallel.*pass teacher_weight.full_tensor",
        ),
        "fsdp-student": (
            other("fsdp", "fsdp"),
            'weight must be .*weight.full_tensor.grad_placements=.*Partial."avg".',
        ),
        "impl": (call(even, "jsd", impl="reference"), 'impl must be "auto" or "chunked"'),
        "rows": (
            dataclasses.replace(call(even, "jsd"), fewer_rows=True),
            "hidden must have as many rows on every rank",
        ),
    }


def trl_call(biased: bool) -> Call:
    """TRL's loss outside of FSDP2's forward: heads in shards, each rank with its own tokens."""
    given = call("fsdp", "jsd", "sum", biased=biased)
    given.tensors["token_weight"] = (given.tensors["token_weight"] != 0).double()
    return dataclasses.replace(
        given, op="chunked_divergence_loss", own_rows=True, options={"beta": 0.3}
    )


def all_calls(size: int) -> dict[str, Call]:
    calls = exact_calls(size) | bounded_calls(size)
    calls |= {f"trl-{biased}": trl_call(biased) for biased in (False, True)}
    return calls | {name: given for name, (given, _) in refused_calls(size).items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[Any]]:
    calls = {size: [*all_calls(size).values()] for size in SPLITS}
    return on_processes(tmp_path_factory.mktemp("gloo"), calls)


@pytest.fixture(params=SPLITS, ids=lambda size: f"{size}-processes")
def results(request, found):
    return request.param, dict(zip(all_calls(request.param), found[request.param], strict=True))


def test_any_split_and_option_in_float64(results):
    size, runs = results
    for name, given in exact_calls(size).items():
        truth = run(given, impl="reference")
        if name not in ("all-rows-dropped", "no-rows"):
            assert all(x.norm() > 1e-3 for key, x in truth.items() if key.startswith("d_")), name
        try:
            require_equal(runs[name], truth, exactly)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert len(exact_calls(size)) >= {2: 40, 4: 20}[size]


def test_the_bounds_of_float32_hold(results):
    """Saturated, disjoint and one-hot distributions among them; against float64."""
    size, runs = results
    bounds = LOSS_BOUND[torch.float32], GRADIENT_BOUND[torch.float32]

    def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.dtype == torch.float32
        gap = got.double() - want
        if name.startswith("d_"):
            assert want.norm() > 1e-6
            assert gap.norm() <= bounds[1] * want.norm(), name
        else:
            assert gap.abs().max() <= 1e-6 or gap.norm() <= bounds[0] * want.norm(), name

    for name, given in bounded_calls(size).items():
        tensors = {key: x.double() for key, x in given.tensors.items()}
        wide = dataclasses.replace(given, tensors=tensors, weight=given.weight.double())
        try:
            require_equal(runs[name], run(wide, impl="reference"), check)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_what_cannot_be_right_is_refused_on_every_rank(results):
    size, runs = results
    for name, (_, message) in refused_calls(size).items():
        for error in runs[name]:
            assert isinstance(error, str), f"{name} was taken"
            assert re.search(message, error), f"{name}: {error}"


@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
def test_the_drop_in_means_a_gathered_heads_gradient_over_the_ranks(results, biased):
    """As FSDP2 does for the parameters that its own backward reduces."""
    size, runs = results
    given = trl_call(biased)
    rows = ("hidden", "teacher_hidden", "token_weight")
    wants = []
    for rank in range(size):
        own = {name: x[rank::size] if name in rows else x for name, x in given.tensors.items()}
        wants.append(run(dataclasses.replace(given, tensors=own)))
        for name in ("loss", "entropy", "d_hidden"):
            exactly(name, runs[f"trl-{biased}"][rank][name], wants[rank][name])
    for name in ("d_weight", "d_bias")[: 1 + biased]:
        every = [want[name] for want in wants]
        assert (every[0] - every[1]).norm() > 1e-3  # of one rank alone it would be another
        got = torch.cat([part[name] for part in runs[f"trl-{biased}"]])
        exactly(name, got, torch.stack(every).mean(0))


def test_a_part_keeps_to_its_budget(tmp_path, monkeypatch):
    import torch.distributed as dist

    size, width, vocabulary, budget_ = 300, 16, 20_011, 4 << 20
    hidden, teacher = normal(size, width, seed=0).float(), normal(size, width, seed=1).float()
    hidden.requires_grad_()
    heads = normal(vocabulary, width, seed=2).float(), normal(vocabulary, width, seed=3).float()
    options: dict[str, Any] = dict(logit_softcap=3.0, max_bytes=budget_, return_entropy=False)
    one = distillation_divergence(hidden, heads[0], teacher, heads[1], **options)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'x'}", rank=0, world_size=1)
    found = []

    group = vocab_parallel.whole(heads[0], None)._replace(group=dist.group.WORLD.group_name)
    parts = group, group._replace(weight=heads[1])
    monkeypatch.setattr(vocab_parallel, "two_parts", lambda *_: parts)

    def part() -> None:
        found.append(distillation_divergence(hidden, heads[0], teacher, heads[1], **options))

    try:
        peak = peak_memory(part)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found[0], one)
    outputs = hidden.numel() * 4 + 4 * size * 4 + 6 * size * 8
    assert budget_ / 2 < peak <= budget_ + outputs


def test_a_group_that_is_none():
    heads = normal(3, 4, seed=0), normal(5, 4, seed=1), normal(3, 4, seed=2), normal(5, 4, seed=3)
    distillation_divergence(*heads, tp_group=None)
    with pytest.raises(ValueError, match="tp_group must be a torch.distributed.ProcessGroup"):
        distillation_divergence(*heads, tp_group="tp")
