"""Sharded tensors are refused by name, with the remedy: an op would take a part for the whole."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from oisd_kernels import attention_divergence, linear_logprob, logit_lens_divergence, policy_head


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


def test_what_the_remedy_gives_is_taken(shard):
    weight = torch.randn(7, 4)
    whole = shard(weight).full_tensor()
    hidden, final = rows(), rows()
    assert torch.equal(
        logit_lens_divergence(hidden, final, whole), logit_lens_divergence(hidden, final, weight)
    )
