"""Labels that a bias of -inf masks: one rule for all implementations, that of torch's log_softmax.

The Triton rows and the tiled kernel run in the interpreter, in a process of their own.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from oisd_kernels import distillation_divergence, linear_logprob, policy_head
from tests.interpreter import interpreted, outside, passes_in_the_interpreter

N, D, V, MASKED = 6, 8, 17, 3
BOUND = {torch.float32: 1e-4, torch.float64: 1e-10}


@outside
def test_the_interpreter_passes_these_tests():
    passes_in_the_interpreter(__file__)


def inputs(dtype: torch.dtype, mask: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bias = normal(V)
    bias[MASKED] = mask
    return {"hidden": normal(N, D), "weight": normal(V, D), "bias": bias, "out": normal(N)}


LABELS = torch.tensor([MASKED, 0, MASKED, 5, 16, 3])


def wanted(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities and their gradients in float64 by torch's own log_softmax."""
    leaves = [x[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = (leaves[0] @ leaves[1].T + leaves[2]) / 0.7
    logprob = -cross_entropy(z, LABELS, reduction="none")
    return logprob.detach(), [*torch.autograd.grad(logprob, leaves, x["out"].double())]


def require_close(found: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert want.norm() > 0.1
    assert (found.double() - want).norm() <= BOUND[dtype] * want.norm()


def check(impl: str, dtype: torch.dtype, mask: float, head: bool) -> None:
    x = inputs(dtype, mask)
    leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    op = policy_head if head else linear_logprob
    options = {"lens_temperature": 1.3} if head else {}
    students = (hidden.detach()[None],) if head else ()
    found = op(hidden, weight, LABELS, *students, bias=bias, temperature=0.7, impl=impl, **options)
    want, gradients = wanted(inputs(dtype, -torch.inf))
    assert found.logprob[LABELS == MASKED].tolist() == [-torch.inf] * 3
    seen = LABELS != MASKED
    require_close(found.logprob.detach()[seen], want[seen], dtype)
    assert found.entropy.isfinite().all() and found.logsumexp.isfinite().all()
    for own, gradient in zip(
        torch.autograd.grad(found.logprob, leaves, x["out"]), gradients, strict=True
    ):
        require_close(own, gradient, dtype)


MASKS = [-torch.inf, -1e30]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("head", [False, True], ids=["linear_logprob", "policy_head"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_value_and_gradient(impl, dtype, mask, head):
    """In the interpreter, "chunked" runs its Triton rows."""
    check(impl, dtype, mask, head)


@interpreted
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiled(dtype, mask):
    check("tiled", dtype, mask, head=False)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_student_that_cannot_give_what_the_teacher_can(impl, dtype, divergence):
    """The gradient of the forward KL stays q - p, also for the tokens that q lacks."""
    x, teacher = inputs(dtype, -torch.inf), inputs(dtype, 0.0)
    p = (teacher["hidden"].flip(0).double() @ teacher["weight"].double().T).softmax(-1)
    hidden = x["hidden"].clone().requires_grad_()
    rows = distillation_divergence(
        hidden, x["weight"], teacher["hidden"].flip(0), teacher["weight"], bias=x["bias"],
        divergence=divergence, impl=impl,
    )  # fmt: skip
    (found,) = torch.autograd.grad(rows, hidden, x["out"])
    free = x["hidden"].double().requires_grad_()
    # exp(-1e4) is 0 in float64, but 0 * -1e4 is not NaN.
    lq = (free @ x["weight"].double().T + x["bias"].double().clamp_min(-1e4)).log_softmax(-1)
    q = lq.exp()
    if divergence == "forward_kl":
        want = x["out"].double()[:, None] * (q - p).detach() @ x["weight"].double()
    else:
        m = p if divergence == "reverse_kl" else (p + q) / 2
        each = (q * (lq - m.log())).sum(-1)
        if divergence == "jsd":
            each = (each + (p * (p.log() - m.log())).sum(-1)) / 2
        (want,) = torch.autograd.grad(each, free, x["out"].double())
    require_close(found, want, dtype)
    assert rows.isfinite().all() and (divergence != "forward_kl" or (rows > 1e30).all())


def test_the_reference_can_still_be_transformed():
    x = inputs(torch.float64, -torch.inf)

    def total(hidden: torch.Tensor) -> torch.Tensor:
        rows = distillation_divergence(
            hidden, x["weight"], x["hidden"], x["weight"], bias=x["bias"], teacher_bias=x["bias"],
            impl="reference",
        )  # fmt: skip
        return rows.sum()

    moved = x["hidden"].flip(0)
    leaf = moved.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    assert want.norm() > 0.1
    torch.testing.assert_close(torch.func.grad(total)(moved), want)
    _, tangent = torch.func.jvp(total, (moved,), (x["hidden"],))
    torch.testing.assert_close(tangent, (want * x["hidden"]).sum())
