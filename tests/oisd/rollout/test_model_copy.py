"""The half-precision copy against what `from_pretrained` reads of the same model, saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from oisd.config import ModelConfig
from oisd.policy import Sampler, load_policy
from oisd.rollout.model_copy import ModelCopy
from tests.tiny_models import TINY, tiny_model

BF16 = torch.bfloat16
_EXPERTS = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2, pad_token_id=0,
    moe_intermediate_size=16, max_position_embeddings=64, eos_token_id=2, bos_token_id=1,
)  # fmt: skip
_ROUTED = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
# Experts, a router's bias in float32, learned positions, masks kept as buffers.
OTHERS = {
    "qwen3_moe": dict(num_experts=4, **_EXPERTS),
    "deepseek_v3": dict(
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        **_ROUTED, **_EXPERTS,
    ),
    "glm4_moe": dict(head_dim=8, **_ROUTED, **_EXPERTS),
    "gpt2": dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neo": dict(
        vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    ),
}  # fmt: skip


def model_of(kind: str, **changes):
    if kind in TINY:
        return tiny_model(kind, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OTHERS[kind]))


def tensors(model) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same_model(ours, theirs) -> None:
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def read(model, folder):
    """The model as it would be read in bfloat16 if it were saved now."""
    model.save_pretrained(folder)
    attention = model.config._attn_implementation
    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, attn_implementation=attention)


@pytest.mark.parametrize("kind", [*TINY, *OTHERS])
def test_is_what_from_pretrained_reads(kind, tmp_path):
    model = model_of(kind)
    copied = ModelCopy(model, BF16)
    with torch.no_grad():  # as training would, after the copy was made
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = read(model, tmp_path)
    with copied.filled() as made:
        assert not made.training
        assert_same_model(made, wanted)
        ids = torch.arange(3, 12)[None]
        ours, theirs = made(input_ids=ids).logits, wanted(input_ids=ids).logits
        assert ours.dtype == BF16 and theirs.float().std() > 1e-3
        assert torch.equal(ours, theirs)
        held = {t.untyped_storage().data_ptr() for t in tensors(made).values()}
        assert not held & {t.untyped_storage().data_ptr() for t in tensors(model).values()}


def test_a_router_keeps_its_bias_in_float32():
    with ModelCopy(model_of("deepseek_v3"), BF16).filled() as made:
        kept = {n: t.dtype for n, t in tensors(made).items() if t.dtype != BF16}
    assert any("e_score_correction_bias" in name for name in kept)
    assert any("inv_freq" in name for name in kept)
    assert set(kept.values()) == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied):
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    copied = ModelCopy(model, BF16)
    with copied.filled() as made:
        assert (made.get_input_embeddings().weight is made.lm_head.weight) == tied
        assert torch.equal(made.lm_head.weight, model.lm_head.weight.to(BF16))
        held = sum({t.data_ptr(): t.nbytes for t in made.parameters()}.values())
        assert held == sum(2 * p.numel() for p in model.parameters())


def test_a_head_of_its_own_stays_so_whatever_the_configuration_says(tmp_path):
    model = tiny_model("qwen3", tie_word_embeddings=True)
    head = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(head)
    wanted = read(model, tmp_path)
    assert not torch.equal(wanted.lm_head.weight, wanted.get_input_embeddings().weight)
    with ModelCopy(model, BF16).filled() as made:
        assert_same_model(made, wanted)


def test_each_use_reads_the_weights_as_they_are_and_gives_the_memory_back():
    model = tiny_model("llama")
    copied, weight = ModelCopy(model, BF16), model.model.layers[1].mlp.up_proj.weight
    for _ in range(2):
        with torch.no_grad():
            weight.mul_(2)
        with copied.filled() as made:
            assert torch.equal(made.model.layers[1].mlp.up_proj.weight, weight.to(BF16))
        held = [p.untyped_storage().nbytes() for p in made.parameters()]
        assert len(held) > 10 and not any(held)


def test_weights_that_a_saved_model_lacks_are_refused():
    model = tiny_model("llama")
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"a copy of LlamaForCausalLM .*\(extra\); use float32"):
        ModelCopy(model, BF16)


# ---- with adapters ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that holds a tiny model and a tokenizer."""
    from oisd.arithmetic import arithmetic_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("base"), arithmetic_tokenizer()
    ends = tokenizer.eos_token_id
    tiny_model("qwen3", vocab_size=len(tokenizer), eos_token_id=ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy_of(base, **options):
    return load_policy(ModelConfig(path=str(base), dtype="bfloat16", **options), seed=0)


def test_adapters_are_merged_as_peft_merges_them(base, tmp_path):
    policy = policy_of(base, lora_rank=3, lora_targets=("q_proj", "down_proj"))
    plain = load_policy(ModelConfig(path=str(base), dtype="bfloat16"), seed=0)
    sampler = Sampler(policy)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with sampler.ready() as made:
        ours = {name: t.clone() for name, t in tensors(made.model).items()}
    model = policy.model.float().merge_and_unload()  # the frozen weights are rounded already
    wanted = tensors(read(model, tmp_path))
    assert ours.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(ours[name], wanted[name]), name
    name = "model.layers.0.mlp.down_proj.weight"
    moved = ours[name].float() - tensors(plain.model)[name]
    assert moved.norm() > 0.1


# ---- as a policy -----------------------------------------------------------------------------


def test_float32_samples_from_the_model_itself(base):
    policy = load_policy(ModelConfig(path=str(base)), seed=0)
    with Sampler(policy).ready() as ready:
        assert ready is policy
    assert policy.cast("cpu") is policy


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_samples_what_the_model_that_is_read_in_bfloat16_does(base, engine, monkeypatch):
    from oisd import rollout

    policy = policy_of(base)
    prompts, settings = [[3, 4, 5], [6, 7]], dict(max_completion_tokens=6, engine=engine)
    read = AutoModelForCausalLM.from_pretrained(base, dtype=BF16, attn_implementation="sdpa")
    wanted = rollout.sample(
        read, prompts, [0, 1], pad_token_id=policy.pad_token_id,
        eos_token_ids=policy.eos_token_ids, **settings,
    )  # fmt: skip
    kept = []
    update = DynamicCache.update

    def watched(self, keys, values, *rest, **named):
        kept.append((keys.dtype, values.dtype))
        return update(self, keys, values, *rest, **named)

    monkeypatch.setattr(DynamicCache, "update", watched)
    with Sampler(policy).ready() as ready:
        for sampling in (ready, policy.cast("cpu")):
            made = sampling.sample(prompts, [0, 1], **settings)
            assert torch.equal(made.ids, wanted.ids)
            assert torch.equal(made.logprobs, wanted.logprobs) and made.logprobs.abs().sum() > 1
    if engine == "generate":
        assert set(kept) == {(BF16, BF16)}
        kept.clear()
        policy.sample(prompts, [0, 1], **settings)
        assert torch.float32 in {dtype for pair in kept for dtype in pair}


def test_quantised_weights_are_not_copied(base):
    policy = policy_of(base)
    assert policy.is_copied and not replace(policy, dtype=torch.float32).is_copied
    policy.model.config.quantization_config = {"quant_method": "any"}
    assert not policy.is_copied
    with Sampler(policy).ready() as ready:
        assert ready is policy


def test_the_head_is_not_multiplied_row_by_row(base):
    from torch.utils._python_dispatch import TorchDispatchMode

    widths = {"bmm": set(), "mm": set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            name = function.overloadpacket.__name__
            if name in widths:
                widths[name].add(given[1].shape[-1])
            return function(*given, **(named or {}))

    policy = policy_of(base)
    with Sampler(policy).ready() as ready, Watch():
        ready.sample([[3, 4, 5]] * 8, range(8), max_completion_tokens=2)
    vocabulary = policy.model.config.vocab_size
    assert vocabulary in widths["mm"] and vocabulary not in widths["bmm"]
