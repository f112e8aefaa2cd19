"""The lens on models that also see: batches of text alone, and an image in the prompt."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.models.examine import error, logits_of, replaced, watched
from benchmarks.models.sizes import FIELDS, small
from oisd.models import Taps, UnsupportedModelError, last_logits_only
from oisd.models.probe import first_tensor

torch.set_num_threads(1)

IMAGE, STUDENT, TOKENS = 120, 4, 4
_TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
    image_size=16,
)  # fmt: skip
_QWEN = dict(
    hidden_size=32, intermediate_size=48, depth=2, num_heads=2, patch_size=4, out_hidden_size=64,
    num_position_embeddings=16,
)  # fmt: skip
_GEMMA4 = dict(
    model_type="gemma4_vision", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, patch_size=4,
    position_embedding_size=64, pooling_kernel_size=2,
)  # fmt: skip
_LLAMA4 = dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)

# The vision tower, then what the whole config needs; each image is 16 x 16 and becomes TOKENS.
VISION = {
    "qwen3_vl": (_QWEN | {"deepstack_visual_indexes": [0]}, {}),
    "qwen3_5": (_QWEN, {}),
    "gemma3": (_TOWER, {"mm_tokens_per_image": TOKENS}),
    "gemma4": (_GEMMA4, {}),
    "mistral3": (_TOWER | {"head_dim": 16}, {"spatial_merge_size": 2}),
    "llama4": (_TOWER | _LLAMA4 | {"intermediate_size": 128}, {"image_token_index": IMAGE}),
}
kinds = pytest.mark.parametrize("model_type", VISION)


def seeing(model_type):
    tower, settings = VISION[model_type]
    base = AutoConfig.for_model(model_type)
    text_config = base.text_config or AutoConfig.for_model(f"{model_type}_text")
    text = {**small(text_config, FIELDS, {}), "model_type": text_config.model_type}
    if base.vision_config is not None:
        tower = {"model_type": base.vision_config.model_type} | tower
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": 122, "video_token_id": 121}
    tokens |= {"boi_token_index": 123, "eoi_token_index": 124}
    config = type(base)(text_config=text, vision_config=tower, **tokens, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # a projection of zeros would hide the image
                if not parameter.any():
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text(rows=2):
    return torch.randint(3, 100, (rows, 11), generator=torch.Generator().manual_seed(0))


def refused_with_its_own_error(model):
    """Whether the model itself cannot run (Llama 4 in transformers 5.24), and taps say so."""
    try:
        with torch.no_grad():
            model(input_ids=text(), use_cache=False)
    except AttributeError as failure:
        with pytest.raises(UnsupportedModelError, match=f"four tokens ends in .*{failure}"):
            Taps(model, [STUDENT], attention=False)
        return True
    return False


def prompt_with_image(model_type, model):
    ids = text(1)
    ids[0, 2 : 2 + TOKENS] = IMAGE
    kind = (ids == IMAGE).long()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "pixel_values": pixels}
    if model_type in ("qwen3_vl", "qwen3_5"):
        given["pixel_values"] = pixels.repeat(1, 1, 1, 2).reshape(16, 96)  # patches of two frames
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    if model_type == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    if model_type == "gemma4":
        place = torch.arange(16)
        given["pixel_values"] = pixels.reshape(1, 16, 48).sigmoid()
        given["image_position_ids"] = torch.stack([place % 4, place // 4], -1)[None]
    takes = inspect.signature(model.forward).parameters
    kinds = {"token_type_ids": kind, "mm_token_type_ids": kind}
    return given | {name: x for name, x in kinds.items() if name in takes}


@kinds
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_lens_is_what_the_model_would_say(model_type, image):
    model = seeing(model_type)
    if refused_with_its_own_error(model):
        return
    given = prompt_with_image(model_type, model) if image else {"input_ids": text()}
    taps = Taps(model, [STUDENT], attention=False)
    layers, seen = taps._layout.layers, []
    with (
        taps,
        torch.no_grad(),
        watched(layers[STUDENT - 1], lambda out: seen.append(first_tensor(out))),
    ):
        plain = model(**given, use_cache=False).logits
        mine, final = logits_of(taps.student_hidden()[0], taps), taps.final_hidden()
        assert error(logits_of(final, taps), plain) < 1e-5
        model(**given, use_cache=False, **last_logits_only(model, given["input_ids"]))
        assert error(taps.final_hidden(), final) < 1e-6
    with torch.no_grad(), watched(layers[-1], lambda out: replaced(out, seen[0])):
        wanted = model(**given, use_cache=False).logits
    assert error(mine, wanted) < 1e-5 and error(plain, wanted) > 0.05
    if image:  # which the model has seen
        others = given | {"pixel_values": -given["pixel_values"]}
        with torch.no_grad():
            assert error(model(**others, use_cache=False).logits, plain) > 1e-3


@kinds
def test_gradients_of_text_reach_the_layers_below_alone(model_type):
    model = seeing(model_type)
    if refused_with_its_own_error(model):
        return
    with Taps(model, [STUDENT], attention=False) as taps:
        model(input_ids=text(), use_cache=False)
        taps.student_hidden().square().mean().backward()
    for number, layer in enumerate(taps._layout.layers, 1):
        reached = any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
        assert reached is (number <= STUDENT)
