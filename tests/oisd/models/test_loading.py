"""A model is refused, in one line, unless all its weights were read and are finite."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from oisd import adapters
from oisd.arithmetic import arithmetic_tokenizer
from oisd.config import ConfigError, ModelConfig
from oisd.models.layout import learned_positions
from oisd.models.loading import read_model
from oisd.policy import load_policy
from tests.tiny_models import VOCAB, tiny_model

GPT2 = dict(type="gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=40)


def save(folder: Path, name: str = "llama", **changes) -> Path:
    tiny_model(name, eos_token_id=13, **changes).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    changed = {name: weight.clone() for name, weight in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(folder: Path, **options):
    return load_policy(ModelConfig(path=str(folder), **options), seed=0)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ConfigError) as found:
        load(folder, **options)
    text = str(found.value)
    assert str(folder) in text and "\n" not in text and len(text) < 1000
    return text


def renamed(prefix: str):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def without(part: str, **more: torch.Tensor):
    return lambda weights: {n: w for n, w in weights.items() if part not in n} | more


# ---------------------------------------------------------------- keys that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            renamed("_orig_mod."),
            ["lacks 39", "39 unknown", "prefix '_orig_mod.'"],
        ),
        (renamed("module."), ["has 39 unknown weights", "prefix 'module.'"]),
        (without("lm_head"), ["lacks 1 weight (lm_head.weight)", "random"]),
        (
            without("lm_head", score=torch.zeros(2, 32)),
            ["lm_head.weight", "1 unknown weight (score"],
        ),
        (without("layers.1.mlp"), ["lacks 3", "layers.1.mlp.down_proj"]),
        (without("-", value_head=torch.zeros(3)), ["has 1 unknown weight (value_head)"]),
    ],
    ids=["compiled", "DDP", "no head", "classifier", "no block", "one more"],
)
def test_keys_that_do_not_fit_are_named_and_counted(change, words, tmp_path, capfd):
    change_weights(save(tmp_path), change)
    text = refusal(tmp_path)
    assert all(word in text for word in words), text
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(intermediate_size=64), ["other shapes of 12", "[48, 32], wanted [64, 32]"]),
        (dict(num_hidden_layers=5), ["lacks 9", "layers.4."]),
        (dict(num_hidden_layers=3), ["has 9 unknown", "layers.3."]),
        (dict(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]), ["lacks", "unknown"]),
        (dict(num_attention_heads="four"), ["expected int"]),
        (dict(model_type="nonesuch"), ["nonesuch"]),
        (dict(quantization_config={"quant_method": "awq", "bits": 4}), ["cannot be loaded"]),
    ],
    ids=["wider", "deeper", "shallower", "another", "no number", "unknown", "quantised"],
)
def test_a_config_of_another_model_is_refused(changes, words, tmp_path):
    change_json(save(tmp_path) / "config.json", **changes)
    text = refusal(tmp_path)
    assert all(word in text for word in words), text


def test_an_attention_that_the_model_lacks_is_named_with_the_remedy(tmp_path):
    """gpt-oss has no SDPA, which is the default."""
    text = refusal(save(tmp_path, "gpt_oss"))
    words = ["attn_implementation must be one that GptOssForCausalLM has", "got 'sdpa'"]
    assert all(word in text for word in words), text
    assert text.endswith('set attn_implementation="eager"') and len(text) < 400
    assert load(tmp_path, attn_implementation="eager").model.config.num_local_experts == 3


def test_what_ties_and_classes_make_good_is_loaded(tmp_path):
    tied = save(tmp_path / "tied", "qwen2")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(tied)
    bare = tmp_path / "bare"  # as the hub's gpt2: a decoder whose head is tied
    model = tiny_model("qwen2", eos_token_id=13)
    model.model.save_pretrained(bare)
    arithmetic_tokenizer().save_pretrained(bare)
    assert torch.equal(load(bare).model.lm_head.weight, model.lm_head.weight)
    old = save(tmp_path / "old")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(old, without("-", **frequencies))
    load(old)


# ---------------------------------------------------------------- files


def pointer(name: str):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickled(folder: Path) -> None:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def state_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "trainer_state.pt")


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def a_run(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").rename(checkpoint / "config.json")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (pointer("model.safetensors"), "model.safetensors is a Git LFS pointer"),
        (pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
        (cut, "model.safetensors is cut off or damaged"),
        (only_pickled, "its weights are in pytorch_model.bin"),
        (state_without_weights, "the folder has no .safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{ "), "not a valid JSON file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "its tokenizer"),
        (a_file, "it is a file"),
        (a_run, "checkpoints/step-3'?"),
        (shutil.rmtree, "there is no such folder"),
    ],
    ids=["LFS", "LFS of the tokenizer", "cut", "bin", "state", "no config", "no JSON", "tokenizer",
         "file", "run", "gone"],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(damage, word, tmp_path):
    damage(save(tmp_path / "model"))
    assert word in refusal(tmp_path / "model")


# ---------------------------------------------------------------- weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named_and_counted(value, dtype, tmp_path):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][:2, 3] = value
        weights["model.norm.weight"][0] = value
        return weights

    change_weights(save(tmp_path), spoil)
    text = refusal(tmp_path, dtype=dtype)
    assert "model.layers.1.mlp.up_proj.weight: 2 of 1536, model.norm.weight: 1 of 32" in text
    assert "in 2 of its tensors" in text


def test_large_weights_are_finite(tmp_path):
    def grow(weights):
        weights["lm_head.weight"].fill_(3e38)  # whose sum is not
        return weights

    change_weights(save(tmp_path), grow)
    load(tmp_path)


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    policy = load(save(tmp_path / "base"), lora_rank=2)
    adapters.save(policy.model, tmp_path / "adapter")
    load(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layers.1.mlp"), ["lacks 6 of 56", "layers.1.mlp"]),
        (renamed("_orig_mod."), ["lacks 56 of 56", "56 unknown"]),
        (without("-", odd=torch.zeros(2)), ["lacks 0 of 56", "1 unknown", "odd"]),
    ],
    ids=["part", "none", "more"],
)
def test_an_adapters_keys_have_to_fit(change, words, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    text = refusal(adapter)
    assert all(word in text for word in words), text


def test_an_adapters_files_and_numbers_are_looked_at(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    next(iter(whole.values()))[0, 0] = float("nan")
    save_file(whole, file, metadata={"format": "pt"})
    assert "lora_A.default.weight: 1 of" in refusal(adapter)
    pointer(file.name)(adapter)
    assert "is a Git LFS pointer" in refusal(adapter)
    file.unlink()
    assert "cannot be loaded" in refusal(adapter)


# ---------------------------------------------------------------- settings that cannot be saved


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=False, temperature=0.7, top_k=20),
        dict(top_p=0.8),
        dict(do_sample=False, temperature=0.0),
        dict(length_penalty=2.0, early_stopping=True),
        dict(pad_token_id=-1),
    ],
    ids=["sampling", "top_p", "greedy", "beams", "padding"],
)
def test_a_model_can_be_saved_whatever_its_generation_settings(settings, tmp_path):
    folder = save(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 13, **settings}))
    policy = load(folder)
    policy.model.save_pretrained(tmp_path / "copy")
    saved = GenerationConfig.from_pretrained(tmp_path / "copy")
    assert saved.eos_token_id == 13
    assert policy.eos_token_ids == [13]
    if settings.get("temperature") or "top_p" in settings:
        kept = {name: getattr(saved, name) for name in settings if name != "do_sample"}
        assert saved.do_sample and kept == {n: v for n, v in settings.items() if n != "do_sample"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


# ---------------------------------------------------------------- positions


LEARNED = {
    "gpt2": dict(n_positions=40),
    "gpt_neo": dict(max_position_embeddings=40, num_layers=2, num_heads=4,
                    attention_types=[[["global", "local"], 1]]),
    "gpt_bigcode": dict(n_positions=40),
    "opt": dict(max_position_embeddings=40, ffn_dim=48, word_embed_proj_dim=32),
    "biogpt": dict(max_position_embeddings=40),
    "gptj": dict(n_positions=40, rotary_dim=4),
    "ctrl": dict(n_positions=40, dff=48),
    "mpt": dict(max_seq_len=40),
    "llama": dict(max_position_embeddings=40),
    "bloom": dict(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_the_longest_text_of_learned_positions(name):
    from transformers import AutoConfig

    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    if name == "gpt_neo":
        size = dict(hidden_size=32, vocab_size=VOCAB)
    elif name not in ("llama", "opt", "biogpt", "gpt_neo"):
        size = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    if name == "mpt":
        size = dict(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCAB)
    if name in ("llama", "biogpt"):
        size["intermediate_size"] = 48
    config = AutoConfig.for_model(name, **size, **LEARNED[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    limit = learned_positions(model)
    assert limit == (None if name in ("llama", "bloom") else 40)

    def forward(length: int) -> None:
        ids = torch.full((1, length), 5)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    forward(limit or 50)
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            forward(limit + 1)


TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            num_key_value_heads=2, head_dim=8, vocab_size=64)  # fmt: skip
# A picture of 28 pixels in patches of 14: four positions, or five with that of the whole.
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
              image_size=28, patch_size=14)  # fmt: skip
CLIP = dict(VISION, model_type="clip_vision_model", projection_dim=32)
MULTIMODAL = {
    "gemma3": (dict(text_config=dict(TEXT, sliding_window=8), vision_config=VISION,
                    mm_tokens_per_image=4, image_token_index=60), None),
    "llava": (dict(text_config=dict(TEXT, model_type="llama"), vision_config=CLIP,
                   image_token_index=60), None),
    "idefics3": (dict(text_config=dict(TEXT, model_type="llama"), vision_config=VISION,
                      image_token_id=60), None),
    # One whose text has learned positions, beside fewer of the picture.
    "git": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 vocab_size=64, bos_token_id=1, eos_token_id=2, max_position_embeddings=40,
                 vision_config=VISION), 40),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIMODAL)
def test_positions_of_a_picture_limit_no_text(name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    size, limit = MULTIMODAL[name]
    config = AutoConfig.for_model(name, **size)
    kind = AutoModelForCausalLM if name == "git" else AutoModelForImageTextToText
    model = kind.from_config(config).eval()
    vision = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)
              and "vision" in n and m.num_embeddings < 6]  # fmt: skip
    assert vision and learned_positions(model) == limit
    ids = torch.full((1, limit or 50), 5)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if limit:
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_a_completion_may_fill_the_learned_positions(engine, tmp_path):
    folder = tmp_path / "gpt2"
    config = {k: v for k, v in GPT2.items() if k != "type"}
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=14, eos_token_id=13, bos_token_id=12, **config)
    )
    model.save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    policy = load(folder)
    policy.model.eval()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    policy.require_positions([prompt], 31, "tokens")
    with pytest.raises(ConfigError, match=r"prompt of 10 .* tokens = 32 .* to at most 31, or"):
        policy.require_positions([prompt], 32, "tokens")
    with pytest.raises(ConfigError, match=r"are 40; shorten the prompt"):
        policy.require_positions([prompt * 5], 1, "tokens")
    policy.require_positions([prompt], 30, "tokens", reads_last=True)
    with pytest.raises(ConfigError, match=r"prompt of 10 .* tokens = 31 .* to at most 30, or"):
        policy.require_positions([prompt], 31, "tokens", reads_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = policy.sample([prompt] * 3, [0, 1, 2], max_completion_tokens=31, engine=engine)
    assert made.ids.shape[0] == 3


# ---------------------------------------------------------------- a config that says quantised


@pytest.mark.parametrize(
    "claimed", [{"quant_method": "fp8"}, {"quant_method": "home-made", "bits": 3}], ids=str
)
def test_plain_weights_under_a_config_that_says_quantised_are_named(claimed, tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_model(tmp_path, "model.path 'm'")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": claimed}))
    method = claimed["quant_method"]
    with pytest.warns(UserWarning, match=f"'m': .*quantised \\({method}\\), but .*plain"):
        read_model(tmp_path, "model.path 'm'")
