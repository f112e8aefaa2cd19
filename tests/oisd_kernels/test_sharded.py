"""Sharded tensors are refused by name, with the remedy: an op would take a part for the whole."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from oisd_kernels import (
    attention_divergence,
    distillation_divergence,
    drop_in,
    linear_logprob,
    logit_lens_divergence,
    policy_head,
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda x: distribute_tensor(x, mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


def rows() -> torch.Tensor:
    return torch.randn(3, 4)


CALLS = {
    "logit_lens_divergence-weight": lambda s, w: logit_lens_divergence(rows(), rows(), s(w)),
    "logit_lens_divergence-hidden": lambda s, w: logit_lens_divergence(s(rows()), rows(), w),
    "linear_logprob-weight": lambda s, w: linear_logprob(rows(), s(w), torch.arange(3)),
    "linear_logprob-bias": lambda s, w: linear_logprob(
        rows(), w, torch.arange(3), bias=s(torch.randn(7))
    ),
    "distillation_divergence-hidden": lambda s, w: distillation_divergence(
        s(rows()), w, rows(), w.clone()
    ),
    "distillation_divergence-weight": lambda s, w: distillation_divergence(rows(), s(w), rows(), w),
    "distillation_divergence-teacher_weight": lambda s, w: distillation_divergence(
        rows(), w, rows(), s(w)
    ),
    "liger_fused_linear_jsd-student_weight": lambda s, w: drop_in.liger_fused_linear_jsd(
        rows(), s(w), rows(), w
    ),
    "ChunkedDivergenceFunction-teacher_weight": lambda s, w: (
        drop_in.ChunkedDivergenceFunction.apply(rows(), w, None, rows(), s(w), None, 0.5)
    ),
    "chunked_divergence_loss-completion_mask": lambda s, w: drop_in.chunked_divergence_loss(
        rows(), rows(), w, w.clone(), s(torch.ones(3)), 0.5
    ),
    "policy_head-weight": lambda s, w: policy_head(rows(), s(w), torch.arange(3)),
    "attention_divergence-q": lambda s, w: attention_divergence(
        s(torch.randn(1, 3, 2, 4)), *[torch.randn(1, 3, 2, 4)] * 3
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_dtensor_is_refused(call, shard):
    op, argument = call.split("-")
    message = (
        rf"{op}: {argument} must be a plain tensor.*, got a DTensor.*; pass {argument}.full_tensor"
    )
    with pytest.raises(ValueError, match=message):
        CALLS[call](shard, torch.randn(7, 4))


def test_the_remedy_for_a_trained_head_says_where_its_gradient_goes(shard):
    """`full_tensor()` alone would keep this rank's share of the gradient and drop the others'."""
    weight = shard(torch.randn(7, 4)).requires_grad_()
    for op in ("logit_lens_divergence-weight", "linear_logprob-weight"):
        with pytest.raises(ValueError, match=r"full_tensor\(grad_placements=.*Partial\(\"avg\"\)"):
            CALLS[op](lambda _: weight, None)


def test_what_the_remedy_gives_is_taken(shard):
    weight = torch.randn(7, 4)
    whole = shard(weight).full_tensor()
    hidden, final = rows(), rows()
    assert torch.equal(
        logit_lens_divergence(hidden, final, whole), logit_lens_divergence(hidden, final, weight)
    )
