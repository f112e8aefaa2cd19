"""Every bad argument is a ValueError that names the op and the argument, and says what it got."""

import re

import pytest
import torch

from oisd_kernels import attention_divergence, linear_logprob, logit_lens_divergence

X = torch.zeros  # shape -> tensor


def rejects(op, arguments: dict, name: str, got: str) -> None:
    pattern = rf"^{op.__name__}: {name} must .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        op(**arguments)


def longs(*values):
    return torch.tensor(values, dtype=torch.int64)


LENS = {
    "hidden": X(2, 4, 8),
    "teacher_hidden": X(4, 8),
    "weight": X(11, 8),
    "bias": X(11),
    "token_weight": X(2, 4),
}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("hidden", X(8), "[8]"),
        ("hidden", X(1, 2, 4, 8), "[1, 2, 4, 8]"),
        ("hidden", [[0.0]], "list"),
        ("hidden", X(2, 4, 8, dtype=torch.int64), "torch.int64"),
        ("teacher_hidden", X(2, 4, 8), "[2, 4, 8]"),
        ("teacher_hidden", X(5, 8), "[5, 8]"),
        ("teacher_hidden", X(4, 8, dtype=torch.complex64), "torch.complex64"),
        ("teacher_hidden", X(4, 8, device="meta"), "meta"),
        ("teacher_hidden", None, "NoneType"),
        ("weight", X(8), "[8]"),
        ("weight", X(8, 11), "[8, 11]"),
        ("weight", X(0, 8), "[0, 8]"),
        ("weight", X(11, 8, dtype=torch.int8), "torch.int8"),
        ("weight", X(11, 8, device="meta"), "meta"),
        ("bias", X(8), "[8]"),
        ("bias", X(1, 11), "[1, 11]"),
        ("bias", 0.5, "float"),
        ("token_weight", X(2), "[2]"),
        ("token_weight", X(4, 2), "[4, 2]"),
        ("token_weight", X(2, 4, 1), "[2, 4, 1]"),
        ("token_weight", X(4, dtype=torch.bool), "torch.bool"),
        ("divergence", "kl", "'kl'"),
        ("divergence", 1, "1"),
        ("beta", 0.0, "0.0"),
        ("beta", 1.0, "1.0"),
        ("beta", float("nan"), "nan"),
        ("beta", None, "None"),
        ("temperature", 0.0, "0.0"),
        ("temperature", -1, "-1"),
        ("temperature", float("inf"), "inf"),
        ("temperature", None, "None"),
        ("temperature", True, "True"),
        ("temperature", 1e-21, "1e-21"),
        ("logit_softcap", 0.0, "0.0"),
        ("logit_softcap", "30", "'30'"),
        ("logit_softcap", 0.009, "0.009"),
        ("logit_softcap", 1e21, "1e+21"),
        ("reduction", "batchmean", "'batchmean'"),
        ("grad_weight", 1, "1"),
        ("return_stats", None, "None"),
        ("max_bytes", 0, "0"),
        ("max_bytes", 2**63, "9223372036854775808"),
        ("max_bytes", 1e9, "1000000000.0"),
        ("max_bytes", 100, "100"),
        ("impl", "fast", "'fast'"),
        ("impl", None, "None"),
    ],
)
def test_lens_rejects(name, value, got):
    rejects(logit_lens_divergence, {**LENS, name: value}, name, got)


def test_lens_rejects_a_layer_axis_that_hidden_has_not():
    arguments = {**LENS, "hidden": X(4, 8)}
    rejects(logit_lens_divergence, arguments, "token_weight", "[2, 4]")


LOGPROB = {"hidden": X(4, 8), "weight": X(11, 8), "labels": longs(0, 1, 2, 10), "bias": X(11)}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("hidden", X(2, 4, 8), "[2, 4, 8]"),
        ("hidden", X(4, 8, dtype=torch.int32), "torch.int32"),
        ("weight", X(11, 7), "[11, 7]"),
        ("weight", "head", "str"),
        ("bias", X(4), "[4]"),
        ("labels", longs(0, 1), "[2]"),
        ("labels", longs(0, 1, 2, 3).int(), "torch.int32"),
        ("labels", longs(0, 1, 2, 11), "11"),
        ("labels", longs(0, -100, 2, 3), "-100"),
        ("labels", X(4, dtype=torch.int64, device="meta"), "meta"),
        ("temperature", 0, "0"),
        ("logit_softcap", -3.0, "-3.0"),
        ("max_bytes", -1, "-1"),
        ("max_bytes", 100, "100"),
        ("impl", "cuda", "'cuda'"),
    ],
)
def test_logprob_rejects(name, value, got):
    rejects(linear_logprob, {**LOGPROB, name: value}, name, got)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_softcap_is_refused_where_float32_has_no_slope_of_it(impl):
    """Just above the bound it has: both are within a thousandth of float64 there."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16), torch.randn(50, 16)
    labels = torch.arange(6)

    def slope(dtype, impl, **options):
        x = hidden.to(dtype, copy=True).requires_grad_()
        linear_logprob(x, weight.to(dtype), labels, impl=impl, **options)[0].sum().backward()
        return x.grad.double()

    for options in ({"logit_softcap": 0.01}, {"logit_softcap": 1.0, "temperature": 100.0}):
        wanted = slope(torch.float64, "reference", **options)
        assert (slope(torch.float32, impl, **options) - wanted).norm() < 1e-3 * wanted.norm()
    with pytest.raises(
        ValueError, match="logit_softcap must be at least 0.01, and 0.01 of the temp"
    ):
        slope(torch.float32, impl, logit_softcap=0.99, temperature=100.0)


DENSE = {
    "q": X(2, 5, 4, 8),
    "k": X(2, 5, 2, 8),
    "q_teacher": X(2, 5, 4, 16),
    "k_teacher": X(2, 5, 1, 16),
}
PACKED = {
    "q": X(5, 4, 8),
    "k": X(5, 2, 8),
    "q_teacher": X(5, 4, 8),
    "k_teacher": X(5, 2, 8),
    "cu_seqlens": longs(0, 2, 5),
}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("q", X(5, 8), "[5, 8]"),
        ("q", None, "NoneType"),
        ("q", X(2, 5, 4, 8, dtype=torch.int64), "torch.int64"),
        ("q", X(2, 5, 0, 8), "[2, 5, 0, 8]"),
        ("k", X(2, 6, 2, 8), "[2, 6, 2, 8]"),
        ("k", X(2, 5, 2, 16), "[2, 5, 2, 16]"),
        ("k", X(2, 5, 3, 8), "J = 3"),
        ("k", X(2, 5, 0, 8), "J = 0"),
        ("k", X(2, 5, 2, 8, device="meta"), "meta"),
        ("q_teacher", X(2, 5, 2, 16), "[2, 5, 2, 16]"),
        ("q_teacher", X(10, 4, 16), "[10, 4, 16]"),
        ("q_teacher", X(2, 5, 4, 16, dtype=torch.bool), "torch.bool"),
        ("k_teacher", X(2, 5, 1, 8), "[2, 5, 1, 8]"),
        ("k_teacher", X(2, 5, 3, 16), "J = 3"),
        ("k_teacher", [1], "list"),
        ("token_weight", X(5), "[5]"),
        ("token_weight", X(5, 2), "[5, 2]"),
        ("token_weight", X(2, 5, dtype=torch.int64), "torch.int64"),
        ("cu_seqlens", longs(0, 5), "a tensor"),
        ("causal", None, "None"),
        ("window", 0, "0"),
        ("window", 2.5, "2.5"),
        ("window", True, "True"),
        ("softcap", 0, "0"),
        ("scale", 0.0, "0.0"),
        ("scale", (0.1, 0.2), "(0.1, 0.2)"),
        ("scale_teacher", -1.0, "-1.0"),
        ("divergence", "js", "'js'"),
        ("beta", 1.5, "1.5"),
        ("key_index", longs(0, 1), "[2]"),
        ("key_index", X(2, 5, 3), "torch.float32"),
        ("key_index", X(2, 5, 3).long() - 2, "-2"),
        ("key_index", X(2, 5, 3).long() + 5, "5"),
        ("lse", X(2, 5, 4), "[2, 5, 4]"),
        ("lse_teacher", X(2, 4), "[2, 4]"),
        ("reduction", None, "None"),
        ("impl", "eager", "'eager'"),
        ("impl", "sdpa", "'sdpa'"),
    ],
)
def test_dense_attention_rejects(name, value, got):
    rejects(attention_divergence, {**DENSE, name: value}, name, got)


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("k", X(1, 5, 2, 8), "[1, 5, 2, 8]"),
        ("token_weight", X(2, 5), "[2, 5]"),
        ("cu_seqlens", [0, 5], "list"),
        ("cu_seqlens", X(3), "torch.float32"),
        ("cu_seqlens", longs(0, 2, 5)[None], "[1, 3]"),
        ("cu_seqlens", longs(), "none"),
        ("cu_seqlens", longs(1, 5), "[1, 5]"),
        ("cu_seqlens", longs(0, 4), "[0, 4]"),
        ("cu_seqlens", longs(0, 3, 2, 5), "[0, 3, 2, 5]"),
        ("cu_seqlens", X(3, dtype=torch.int64, device="meta"), "meta"),
        ("key_index", X(5, 3).long() + 2, "2"),  # the first sequence has 2 tokens
        ("lse", X(1, 4, 5), "[1, 4, 5]"),
        ("lse_teacher", X(5, 4), "[5, 4]"),
    ],
)
def test_packed_attention_rejects(name, value, got):
    rejects(attention_divergence, {**PACKED, name: value}, name, got)


@pytest.mark.parametrize("name", ["lse", "lse_teacher"])
def test_attention_rejects_logsumexp_beside_sampled_keys(name):
    arguments = {**DENSE, "key_index": X(2, 5, 3).long(), name: X(2, 4, 5)}
    rejects(attention_divergence, arguments, name, "a tensor")


@pytest.mark.parametrize(
    "op, arguments",
    [
        pytest.param(logit_lens_divergence, LENS, id="lens"),
        pytest.param(linear_logprob, LOGPROB, id="logprob"),
    ],
)
def test_tiled_is_refused_on_a_cpu(op, arguments):
    with pytest.raises(ValueError, match='hidden must be on a GPU with impl="tiled", got cpu'):
        op(**arguments, impl="tiled")


@pytest.mark.parametrize(
    "op, arguments, first",
    [
        pytest.param(logit_lens_divergence, LENS, "chunked", id="lens"),
        pytest.param(linear_logprob, LOGPROB, "chunked", id="logprob"),
        pytest.param(attention_divergence, DENSE, "torch", id="attention"),
    ],
)
def test_auto_is_the_first(op, arguments, first):
    auto, explicit = op(**arguments), op(**arguments, impl=first)
    for a, b in zip(auto, explicit, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arguments", [DENSE, PACKED], ids=["dense", "packed"])
def test_an_unknown_implementation_is_told_what_there_is(arguments):
    wanted = 'be one of "auto", "torch", "triton", "cuda", "reference", got \'eager\''
    with pytest.raises(ValueError, match=re.escape(wanted)):
        attention_divergence(**arguments, impl="eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [DENSE, PACKED], ids=["dense", "packed"])
def test_cuda_kernels_are_refused_on_a_cpu(arguments):
    with pytest.raises(ValueError, match='q must be on a CUDA device with impl="cuda", got cpu'):
        attention_divergence(**arguments, impl="cuda")


def test_message_names_the_remedy():
    with pytest.raises(ValueError, match='for a pure KL use divergence="forward_kl"'):
        logit_lens_divergence(**LENS, beta=1.0)
