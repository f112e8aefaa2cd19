"""Compiled graphs whose numbers change, fake tensors, and derivatives that the ops do not have."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from oisd_kernels import (
    PolicyTerms,
    attention_divergence,
    distillation_divergence,
    flash_attention,
    linear_logprob,
    logit_lens_divergence,
    policy_head,
)
from oisd_kernels.drop_in import ChunkedDivergenceFunction, liger_fused_linear_jsd

make = torch.Generator().manual_seed(0)
FINAL, WEIGHT, OTHER = (torch.randn(*s, generator=make) for s in ((4, 6), (9, 6), (9, 6)))
LABELS, TOKENS = torch.tensor([8, 0, 3, 3]), torch.tensor([1.0, 0.0, -2.0, 0.5])
KEYS = torch.randn(1, 5, 2, 8, generator=make)
ROWS, QUERIES = torch.randn(4, 6, generator=make), torch.randn(1, 5, 4, 8, generator=make)


def lens(x, t=1.0, **options):
    options |= {"token_weight": TOKENS, "beta": t / 2, "temperature": t}
    return logit_lens_divergence(x, FINAL, WEIGHT, logit_softcap=9 * t, **options).sum()


def logprob(x, t=1.0, **options):
    return linear_logprob(x, WEIGHT, LABELS, temperature=t, **options).logprob.sum()


def head(x, t=1.0, **options):
    options |= {"temperature": t, "lens_temperature": 2 * t}
    terms = PolicyTerms(TOKENS, TOKENS, clip_low=t / 5)
    return policy_head(x, WEIGHT, LABELS, FINAL, policy=terms, **options).policy_loss


def distillation(x, t=1.0, **options):
    options |= {"temperature": t, "logit_scale": t}
    return distillation_divergence(x, WEIGHT, FINAL, OTHER, reduction="mean", **options)


def attention(x, t=1.0, **options):
    return attention_divergence(x, KEYS, 2 * x.detach(), KEYS, scale=t, reduction="sum", **options)


def flash(x, t=1.0, **options):
    out = flash_attention(x, KEYS, KEYS, scale=t, **options)
    return (out[0] if isinstance(out, tuple) else out).square().sum()


def liger(x, t=1.0):
    return liger_fused_linear_jsd(x, WEIGHT, FINAL, OTHER, LABELS, t / 2, 3, t)


def trl(x, t=1.0):
    apply = ChunkedDivergenceFunction.apply
    return apply(x, WEIGHT, None, FINAL, OTHER, None, t / 2, t)[0].sum()


OPS = {f: QUERIES if f in (attention, flash) else ROWS for f in (lens, logprob, head, distillation)}
OPS |= {attention: QUERIES, flash: QUERIES}
every_op = pytest.mark.parametrize("f", OPS, ids=lambda f: f.__name__)


def gradient(f, x, *numbers):
    x = x.clone().requires_grad_()
    value = f(x, *numbers)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("f", [*OPS, liger, trl], ids=lambda f: f.__name__)
def test_a_number_that_changes_compiles(f, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = OPS.get(f, ROWS)
    for t in (1.0, 0.9, 0.8):
        torch.testing.assert_close(gradient(compiled, x, t), gradient(f, x, t))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_that_changes_is_still_checked(value):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        logprob(ROWS, value)


@every_op
def test_fake_tensors_have_shapes(f):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(OPS[f].clone().requires_grad_())
        f(x).backward()
        assert x.grad.shape == x.shape


def test_fake_labels_are_not_read():
    with FakeTensorMode() as mode:
        tensors = (mode.from_tensor(x) for x in (ROWS, WEIGHT, LABELS))
        assert linear_logprob(*tensors).logprob.shape == (4,)


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@every_op
def test_transforms_are_refused_with_the_remedy(f, transform):
    with pytest.raises(RuntimeError, match='use impl="reference"'):
        transform(f, OPS[f])


@every_op
def test_the_remedy_is_one(f):
    def reference(x):
        return f(x, impl="reference")

    x = OPS[f]
    slope = gradient(reference, x)[1]
    torch.testing.assert_close(TRANSFORMS["grad"](reference, x), slope)
    for name in ("jvp", "forward mode"):
        got, want = TRANSFORMS[name](reference, x), (slope * x).sum()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(TRANSFORMS["vmap"](reference, x)[0], reference(x))


def test_forward_mode_is_refused_in_a_compiled_graph():
    torch._dynamo.reset()
    f = torch.compile(lambda x: torch.func.jvp(lens, (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match='use impl="reference"'):
        f(ROWS)
