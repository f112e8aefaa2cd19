"""The attention loss of whole models: in the student's attention, beside it, and from maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from oisd.config import AlignmentConfig, ConfigError, TrainConfig
from oisd.losses import attention_loss
from oisd.models import Taps, UnsupportedModelError, pack_padded
from oisd.models.attention import offsets_mask, offsets_of_forward
from oisd.objective import Objective
from oisd.policy import Policy
from tests.oisd.models.test_models import STUDENTS, gradients, tokens
from tests.tiny_models import TINY, tiny_model

T = 9
architectures = pytest.mark.parametrize("name", list(TINY))
# Windows everywhere, softcap and alternating windows; in "gemma2" and "gemma3" the last layer has
# none, so that a window of its own is student 1's and 3's.
boundaries = pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2"])


def model_of(name: str, **overrides) -> torch.nn.Module:
    """float64; its eager attention, which takes softmax in float32, is no truth for Gemma 2."""
    dtype = torch.float32 if name == "gemma2" else torch.float64
    return tiny_model(name, dtype=dtype, **overrides)


def tolerance_of(model) -> float:
    return 1e-9 if model.dtype == torch.float64 else 1e-4


def weights(mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Signed advantages [B] and token weights [B, T] of which some are 0."""
    token_weight = torch.rand(2, T, generator=torch.Generator().manual_seed(3)).double() / T
    token_weight[:, :2] = 0
    if mask is not None:
        token_weight = token_weight * mask
    return torch.tensor([1.5, -0.7]).double(), token_weight


def loss_of(model, kernel: str, divergence: str = "jsd", factor: float = 1.0, **inputs):
    """A policy's loss with the attention loss beside it, its gradients, its metrics."""
    advantages, token_weight = weights(inputs.get("attention_mask"))
    config = AlignmentConfig(divergence=divergence)
    taps = Taps(
        model,
        STUDENTS,
        attention_kernel="separate" if kernel == "reference" else kernel,
        divergence=divergence,
    )
    inputs = {"input_ids": tokens(), "use_cache": False} | inputs
    with taps:
        model(**inputs)
        pairs = taps.attention()
        assert all((pair.alignment is not None) == (kernel == "fused") for pair in pairs)
        mask = inputs.get("attention_mask")
        real = torch.ones_like(token_weight) if mask is None else mask
        policy = (taps.final_hidden().cos() * real[..., None]).mean()
        if kernel != "fused" and mask is not None:  # they do not handle padding on the left
            *packed, offsets = pack_padded(mask, *(x for pair in pairs for x in pair[:4]))
            pairs = [
                pair._replace(**dict(zip(pair._fields[:4], packed[4 * i :], strict=False)))
                for i, pair in enumerate(pairs)
            ]
            signs = advantages[:, None].expand_as(mask)
            (signs, flat), more = pack_padded(mask, signs, token_weight)[:2], {}
            more = {"cu_seqlens": offsets, "token_weight": flat}
        else:
            signs, more = advantages, {"token_weight": token_weight}
        impl = "reference" if kernel == "reference" else "auto"
        loss, metrics = attention_loss(pairs, signs, config, impl=impl, **more)
        total = factor * (policy + 20 * loss)
        found = gradients(model, total)
    return total.detach(), found, {key: mean.item() for key, mean in metrics.items()}


def assert_same(found, wanted, tolerance):
    (loss, gradient, metrics), (loss_, gradient_, metrics_) = found, wanted
    torch.testing.assert_close(loss, loss_, rtol=tolerance, atol=0)
    assert metrics == pytest.approx(metrics_, rel=max(tolerance, 1e-5))  # in float32
    assert gradient.keys() == gradient_.keys()
    q_weights = [n for n in gradient_ if "q_proj" in n or "qkv_proj" in n]
    assert q_weights and all(gradient_[n].norm() > 1e-4 for n in q_weights[:1])
    for name, wanted_one in gradient_.items():
        error = (gradient[name] - wanted_one).norm()
        assert error <= tolerance * wanted_one.norm() + 1e-4 * tolerance, name


@architectures
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_fused_is_separate_is_reference(name, checkpointing):
    model = model_of(name)
    wanted = loss_of(model, "reference")
    without = loss_of(model, "reference", factor=0.0)
    assert wanted[0] != without[0]
    assert_same(loss_of(model, "separate"), wanted, tolerance_of(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_of(model, "fused"), wanted, tolerance_of(model))


def test_the_attention_loss_has_a_gradient_of_its_own():
    """Otherwise the tests above would pass without one."""
    model = model_of("qwen3")
    advantages, token_weight = weights()
    with Taps(model, STUDENTS, attention_kernel="fused") as taps:
        model(input_ids=tokens(), use_cache=False)
        loss, _ = attention_loss(taps.attention(), advantages, token_weight=token_weight)
        found = gradients(model, loss)
    norms = {n: float(g.norm()) for n, g in found.items() if "q_proj" in n or "k_proj" in n}
    assert all(norms[f"model.layers.{n - 1}.self_attn.q_proj.weight"] > 1e-3 for n in STUDENTS)
    assert f"model.layers.{max(STUDENTS)}.self_attn.q_proj.weight" not in norms


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_other_divergences(divergence):
    model = model_of("qwen3")
    wanted = loss_of(model, "reference", divergence)
    assert_same(loss_of(model, "fused", divergence), wanted, 1e-9)


@boundaries
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(name, side):
    model, index = model_of(name), torch.arange(T)
    begins, ends = {"left": ([0, 4], [T, T]), "right": ([0, 0], [T, 5]), "both": ([2, 1], [T, 7])}[
        side
    ]
    mask = torch.stack([(index >= a) & (index < b) for a, b in zip(begins, ends, strict=True)])
    mask = mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    wanted = loss_of(model, "reference", **options)
    assert_same(loss_of(model, "fused", **options), wanted, tolerance_of(model))


def test_packed_positions():
    """One row of two sequences is two rows."""
    model, lengths = model_of("gemma3"), [4, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids, token_weight = tokens(batch=1), weights()[1][:1]

    def run(kernel, **more):
        options = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with Taps(model, STUDENTS, attention_kernel=kernel) as taps:
            model(**options)
            pairs, weight = taps.attention(), token_weight
            if kernel == "separate":
                pairs = [p._replace(**{n: getattr(p, n)[0] for n in p._fields[:4]}) for p in pairs]
                weight = weight[0]
                more = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
            signs = torch.ones_like(weight)
            loss, _ = attention_loss(pairs, signs, token_weight=weight, **more)
            return gradients(model, 20 * loss + taps.final_hidden().cos().mean())

    found, wanted = run("fused"), run("separate")
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_loss_scale_and_accumulation():
    model = model_of("qwen3")
    _, wanted, _ = loss_of(model, "reference")
    _, scaled, _ = loss_of(model, "fused", factor=2.0**10)
    for name, gradient in wanted.items():
        torch.testing.assert_close(scaled[name] / 2**10, gradient, rtol=1e-9, atol=1e-12)
    advantages, token_weight = weights()
    total = {}
    with Taps(model, STUDENTS, attention_kernel="fused") as taps:
        model.zero_grad()
        for row in range(2):
            model(input_ids=tokens()[row : row + 1], use_cache=False)
            policy = taps.final_hidden().cos().mean() / 2
            loss, _ = attention_loss(
                taps.attention(),
                advantages[row : row + 1],
                token_weight=token_weight[row : row + 1],
            )
            (policy + 20 * loss).backward()
        total = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(total[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_loss_of_its_own_and_then_all_of_them():
    """As the learner does for gradient norms: the graph is used twice."""
    model = model_of("qwen3")
    wanted = loss_of(model, "reference")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    advantages, token_weight = weights()
    with Taps(model, STUDENTS, attention_kernel="fused") as taps:
        model(input_ids=tokens(), use_cache=False)
        loss, _ = attention_loss(taps.attention(), advantages, token_weight=token_weight)
        policy = taps.final_hidden().cos().mean()
        parameters = list(model.parameters())
        own = torch.autograd.grad(20 * loss, parameters, retain_graph=True, allow_unused=True)
        rest = torch.autograd.grad(policy, parameters, retain_graph=True, allow_unused=True)
        found = gradients(model, policy + 20 * loss)
    for parts, (name, gradient) in zip(
        zip(own, rest, strict=True), wanted[1].items(), strict=False
    ):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        # The model's norms run in float32, so gradients add up only to its rounding.
        together = sum(part for part in parts if part is not None)
        assert (together - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, name


def test_alignment_that_no_loss_uses_changes_nothing():
    model = model_of("qwen3")

    def policy(kernel):
        with Taps(model, STUDENTS, attention_kernel=kernel) as taps:
            model(input_ids=tokens(), use_cache=False)
            return gradients(model, taps.final_hidden().cos().sum())

    found, wanted = policy("fused"), policy("separate")
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_generation_inside_a_fused_context():
    model = model_of("qwen3").eval()
    ids = tokens(length=4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(ids, attention_mask=mask, **options)
    with Taps(model, STUDENTS, attention_kernel="fused"):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), wanted)


def test_autocast_gives_the_dtype_of_sdpa():
    model = tiny_model("qwen3")
    with torch.autocast("cpu", torch.bfloat16):
        with Taps(model, STUDENTS, attention_kernel="fused") as taps:
            fused = model(input_ids=tokens(), use_cache=False).logits
            assert taps.attention()[0].q.dtype == torch.bfloat16
        plain = model(input_ids=tokens(), use_cache=False).logits
    assert fused.dtype == plain.dtype
    assert (fused - plain).norm() < 3e-2 * plain.norm()


# ---------------------------------------------------------------- what cannot be fused


def test_a_window_wider_than_the_teachers_is_not_fused():
    model = tiny_model("gemma3", layer_types=["full_attention"] * 3 + ["sliding_attention"])
    with pytest.raises(UnsupportedModelError, match=r"got layers \[1, 3\] of which \[\] can"):
        Taps(model, STUDENTS, attention_kernel="fused")
    assert Taps(model, STUDENTS, attention_kernel="auto")._fusable == ()


def test_dropout_is_not_fused():
    model = tiny_model("qwen3", attention_dropout=0.5)
    with Taps(model, STUDENTS, attention_kernel="fused"):
        with pytest.raises(UnsupportedModelError, match="dropout is on"):
            model(input_ids=tokens(), use_cache=False)
        model.eval()(input_ids=tokens(), use_cache=False)


@pytest.mark.parametrize("what", ["holes", "maps"])
def test_masks_that_are_not_padding_are_not_fused(what):
    model = tiny_model("qwen3")
    mask = torch.ones(2, T).long()
    mask[1, 3] = 0
    if what == "maps":
        mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    with Taps(model, STUDENTS, attention_kernel="fused"):
        with pytest.raises(UnsupportedModelError, match="attention_mask"):
            model(input_ids=tokens(), attention_mask=mask, use_cache=False)


def test_auto_is_separate_on_a_cpu():
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS, attention_kernel="auto") as taps:
        out = model(input_ids=tokens(), use_cache=False).logits
        assert all(pair.alignment is None for pair in taps.attention())
    assert torch.equal(out, model(input_ids=tokens(), use_cache=False).logits)


def test_bad_choices():
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match='must be "auto", "fused" or "separate", got \'flash\''):
        Taps(model, STUDENTS, attention_kernel="flash")
    with pytest.raises(ConfigError, match="oisd.attention_kernel"):
        AlignmentConfig(attention_kernel="fused", key_window=2, key_stride=2)
    advantages, token_weight = weights()
    with Taps(model, STUDENTS, attention_kernel="fused") as taps:
        model(input_ids=tokens(), use_cache=False)
        pairs = taps.attention()
        with pytest.raises(ValueError, match="key_index"):
            index = torch.zeros(2, T, 1).long()
            attention_loss(pairs, advantages, token_weight=token_weight, key_index=index)
        with pytest.raises(ValueError, match="divergence and beta"):
            config = AlignmentConfig(divergence="forward_kl")
            attention_loss(pairs, advantages, config, token_weight=token_weight)


@pytest.mark.parametrize(
    "kernel, sampled, taps",
    [("auto", {}, "auto"), ("fused", {}, "fused"), ("reference", {}, "separate"),
     ("auto", {"key_window": 2, "key_stride": 2}, "separate")],
)  # fmt: skip
def test_objective_chooses(kernel, sampled, taps):
    align = AlignmentConfig(student_layers=(1,), attention_kernel=kernel, **sampled)
    config = replace(TrainConfig(), oisd=align)
    objective = Objective(Policy(tiny_model("qwen3"), None, torch.float32), config)
    assert objective.taps._kernel == taps


# ---------------------------------------------------------------- in every layer of a model


@architectures
@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
def test_implementation_of_a_whole_model(name, side):
    model, ids = model_of(name).eval(), tokens()
    mask = torch.ones_like(ids)
    mask[1, {"none": [], "left": [0, 1, 2], "right": [7, 8], "holes": [2, 5]}[side]] = 0
    wanted = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("oisd")
    found = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    tolerance = tolerance_of(model)
    torch.testing.assert_close(found[real], wanted[real], rtol=tolerance, atol=tolerance)


def test_whole_model_reads_packed_positions_and_generates():
    model, ids = model_of("gemma3").eval(), tokens(batch=1)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones(2, 4).long()
    mask[1, :2] = 0
    short = tokens(length=4)

    def run():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return packed, model.generate(short, attention_mask=mask, **options)

    wanted, generated = run()
    model.set_attn_implementation("oisd")
    found, again = run()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(generated, again)


def test_taps_on_a_whole_model_of_it():
    model = model_of("mistral")
    wanted = loss_of(model, "reference")
    model.set_attn_implementation("oisd")
    assert_same(loss_of(model, "separate"), wanted, tolerance_of(model))
    assert_same(loss_of(model, "fused"), wanted, tolerance_of(model))


def test_whole_model_refuses_dropout():
    model = tiny_model("qwen3", attn_implementation="oisd", attention_dropout=0.5)
    with pytest.raises(UnsupportedModelError, match="dropout is on"):
        model(input_ids=tokens())


def test_offsets():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert offsets_of_forward({"attention_mask": mask}).tolist() == [0, 1, 3, 6, 7, 9]
    assert offsets_of_forward({"attention_mask": torch.ones(2, 3)}) is None
    assert offsets_of_forward({}) is None
    positions = torch.tensor([[0, 1, 0], [5, 6, 7]])
    packed = {"position_ids": positions, "use_cache": False}
    assert offsets_of_forward(packed).tolist() == [0, 2, 3, 6]
    assert offsets_of_forward({"position_ids": positions[1:]}) is None
    packed |= {"position_ids": positions[:1], "input_ids": positions}
    assert offsets_of_forward(packed).tolist() == [0, 2, 3, 5, 6]
    with pytest.raises(UnsupportedModelError, match="with a cache"):
        offsets_of_forward({"position_ids": positions})
    assert offsets_mask(3, 3, 3, attention_mask=mask).tolist() == [0, 1, 3, 6, 7, 9]
    assert offsets_mask(3, 3, 3) is None
    assert offsets_mask(1, 1, 4, q_offset=3).shape == (1, 1, 1, 4)
