"""Other projects' lens divergences: what runs on a CPU is right there, what does not can be called.

Each is skipped where its package is absent.
"""

import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import lens, peers
from benchmarks.cases.case import EXACT, expected, verdict
from benchmarks.cases.lens import Shape
from benchmarks.cases.shapes import Head

SHAPE = Shape(Head(32, 211), "test", 2, 24, "peaked")
MAKERS = {
    "trl": peers._trl_lens,
    "orda_kernel": peers._orda_lens,
    "unsloth_zoo": peers._unsloth_lens,
}


@pytest.mark.parametrize("package", MAKERS)
def test_a_peer_that_runs_on_a_cpu_computes_the_same(package):
    """To our own bounds, so that their options are ours: JSD, its half, no mean, a fixed head."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    inputs = lens.inputs(SHAPE, "cpu", torch.float32)
    found = MAKERS[package](inputs)()
    weighted = package == "trl"
    want = expected(lens.truth(inputs, gradient=True), weighted, inputs["factor"])
    assert min(float(x.norm()) for x in want.values()) > 1e-2
    errors, wrong = verdict(found, want, EXACT[torch.float32])
    assert set(errors) == {"loss", "d_hidden"} and not wrong


def test_ligers_implementations_are_named_as_it_names_them():
    functional = pytest.importorskip("liger_kernel.functional")
    from liger_kernel.backends import all_impls

    signature = inspect.signature(functional.fused_linear_jsd)
    for impl in ("nvidia-triton", "nvidia-cutedsl"):
        x = torch.zeros(2, 3)
        bound = signature.bind(x, x, x, x, impl=impl)
        bound.apply_defaults()
        assert bound.arguments["jsd_beta"] == 0.5 and bound.arguments["temperature"] == 1.0
        assert impl in all_impls("fused_linear_jsd")


def test_ligers_mean_becomes_the_sum(monkeypatch):
    """Its kernels need a GPU; what is made of their result does not."""
    functional = pytest.importorskip("liger_kernel.functional")
    called = []

    def mean(h, weight, final, teacher_weight, *, impl):
        called.append((h.shape, impl))
        assert weight is teacher_weight and not weight.requires_grad
        return lens.reference.logit_lens_divergence(h, final, weight).mean()

    monkeypatch.setattr(functional, "fused_linear_jsd", mean)
    inputs = lens.inputs(SHAPE, "cpu", torch.float32)
    found = peers._liger_lens(inputs, impl="nvidia-cutedsl")()
    want = expected(lens.truth(inputs, gradient=True), False, None)
    assert not verdict(found, want, EXACT[torch.float32])[1]
    assert called == [((24, 32), "nvidia-cutedsl")] * 2


def test_peers_with_effects_on_others_must_be_named():
    usual = {i.name for i in lens.case(SHAPE, "cpu", torch.float32).implementations}
    apart = {i.name for i in peers.lens_by_name("cpu", torch.float32)}
    assert apart == {"ORDA skew_js", "Unsloth fused_linear_jsd"} and not apart & usual
    named = replace(SHAPE, rivals=tuple(apart))
    found = {i.name: i for i in lens.case(named, "cpu", torch.float32).implementations}
    assert found.keys() == {"ours: chunked", *apart}
    assert all(found[name].absent for name in apart)  # a CPU is not their place
