"""Norms of gradients: right for tensors of any size, torch's own to the bit for small ones."""

import math

import pytest
import torch

from oisd import norms
from oisd.config import ModelConfig, WarmupConfig
from oisd.data.tasks import task_examples
from oisd.integrations.trl_shares import _Parallel
from oisd.norms import total_norm
from oisd.policy import load_policy
from oisd.warmup import warm_up
from tests.oisd import test_objective
from tests.oisd.test_objective import config_of, gradient_of, totals_of

policy, batch = test_objective.policy, test_objective.batch


def exact(*tensors):
    """In float64, a million entries at a time."""
    parts = (part for x in tensors for part in x.flatten().split(10**6))
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))


def test_a_tensor_of_600_mb():
    piece = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    gradient, wanted = piece.repeat(150), exact(piece) * math.sqrt(150)
    theirs = float(torch.nn.utils.get_total_norm([gradient]))
    assert theirs < 0.995 * wanted, "torch is right by now"
    assert float(total_norm([gradient])) == pytest.approx(wanted, rel=1e-6)
    both = total_norm([piece, gradient, piece[:7]])
    assert float(both) == pytest.approx(math.hypot(wanted, exact(piece, piece[:7])), rel=1e-6)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data, parameter.grad = gradient, gradient
    torch.nn.utils.clip_grads_with_norm_([parameter], 1.0, total_norm([gradient]))
    assert exact(gradient[: 10**6]) * math.sqrt(150) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_tensors_have_torchs_norm_to_the_bit(dtype):
    torch.manual_seed(1)
    for sizes in ([], [1], [7, 300, 5], [1 << 20, 3]):
        found = [torch.randn(n).to(dtype) for n in sizes]
        wanted = torch.nn.utils.get_total_norm(found)
        ours = total_norm(found)
        assert torch.equal(ours, wanted) and ours.dtype == wanted.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_of_tensors_of_any_shape(monkeypatch, dtype):
    monkeypatch.setattr(norms, "LARGE", 40)
    monkeypatch.setattr(norms, "_SLICE", 16)
    torch.manual_seed(2)
    found = [torch.randn(shape, dtype=dtype) for shape in [(3, 5), (41,), (17, 4), (2, 5, 7)]]
    found.append(torch.randn(9, 8, dtype=dtype).T)
    rel = 1e-6 if dtype == torch.float32 else 1e-14
    assert float(total_norm(found)) == pytest.approx(exact(*found), rel=rel)
    assert total_norm(found).dtype == dtype
    for number in (math.nan, math.inf):
        found[2][3, 3] = number
        assert str(float(total_norm(found))) == str(number)


@pytest.fixture
def without_torchs(monkeypatch):
    """No norm of a tensor is torch's: each is large."""

    def refuse(tensors, *args, **kwargs):
        assert not [*tensors], "a norm that may be too low"
        return torch.tensor(0.0)

    def switch():
        monkeypatch.setattr(norms, "LARGE", 0)
        monkeypatch.setattr(norms, "_SLICE", 100)
        monkeypatch.setattr("torch.nn.utils.get_total_norm", refuse)
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", refuse)

    return switch


@pytest.mark.parametrize("every", [0, 1], ids=["by-difference", "by-itself"])
def test_all_norms_of_a_step_are_ours(policy, batch, every, without_torchs):
    config = config_of(tokens=40, think_weight=2.0, share_every=1, run={"grad_norm_every": every})
    *_, wanted = gradient_of(policy, config, [(batch, totals_of(batch))])
    without_torchs()
    *_, found = gradient_of(policy, config, [(batch, totals_of(batch))])
    assert {"grad_norm", "share/think", "share/attention"} <= found.keys()
    assert found == pytest.approx(wanted, rel=1e-5) and min(map(abs, wanted.values())) > 1e-4


def test_those_of_the_trl_adapter_too(without_torchs):
    gradients = [torch.arange(300.0), torch.ones(20, 30)]
    without_torchs()
    norm = _Parallel(gradients).sum_over_processes(gradients)
    assert float(norm) == pytest.approx(exact(*gradients), rel=1e-6)


def test_the_warm_up_clips_by_ours(without_torchs):
    examples = task_examples("modular:terms=3,modulus=2", limit=32)
    ends = []
    for switch in (lambda: None, without_torchs):
        switch()
        policy = load_policy(ModelConfig(path="scratch:layers=2,width=16,heads=2"), seed=0)
        config = WarmupConfig(steps=3, batch_size=8, learning_rate=1e-2)
        warm_up(policy, examples, config, seed=0)
        ends.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
