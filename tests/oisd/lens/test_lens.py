"""The lens of every layer, attention overlap, and the pictures and page made of them."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.cli import main
from oisd.lens import LayerLens, Lens, _before_feed_forward, plots, summarise
from oisd.lens.attention import LayerAttention
from oisd.lens.plots import shown_layers, visible_controls
from oisd.models import Taps, attending
from oisd_kernels import reference
from tests.tiny_models import LAYERS, TINY, VOCAB, tiny_model

TEXT = [5, 17, 3, 99, 42, 8, 61]


@pytest.mark.parametrize("lens_norm", ["final", "none"])
@pytest.mark.parametrize("name", TINY)
def test_lens_of_every_layer(name, lens_norm):
    model = tiny_model(name).eval()
    found = LayerLens(model, lens_norm=lens_norm)(TEXT, picture=5)
    hidden = []
    with torch.no_grad(), Taps(model, range(1, LAYERS), False, lens_norm) as taps:
        logits = model(torch.tensor([TEXT])).logits[0].float()
        head = taps.unembedding
        for rows in [*taps.student_hidden()[:, 0], taps.final_hidden()[0]]:
            scores = rows @ head.weight.T + (0 if head.bias is None else head.bias)
            if head.logit_softcap is not None:
                scores = head.logit_softcap * torch.tanh(scores / head.logit_softcap)
            hidden.append(scores.double().log_softmax(-1))
    lq = torch.stack(hidden)
    torch.testing.assert_close(lq[-1], logits.double().log_softmax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.entropy.double(), -(lq.exp() * lq).sum(-1), rtol=1e-4, atol=1e-5
    )
    p, q = lq[-1:].exp(), lq.exp()
    m = ((p + q) / 2).log()
    js = ((p * (lq[-1:] - m)).sum(-1) + (q * (lq - m)).sum(-1)) / 2
    assert js[:-1].mean(1).min() > 1e-4
    torch.testing.assert_close(found.divergence.double(), js, rtol=1e-3, atol=1e-6)
    assert found.top.shape == (LAYERS, 5)
    assert torch.equal(found.top, lq.argmax(-1)[:, -5:])
    torch.testing.assert_close(found.probability.double(), q.amax(-1)[:, -5:], rtol=1e-4, atol=1e-6)
    assert torch.equal(found.agreement, (lq.argmax(-1) == lq[-1].argmax(-1)).float())


@pytest.mark.parametrize("name", ["qwen3", "llama", "phi3", "olmo2", "gemma2", "gemma3"])
def test_residual_before_the_feed_forward_block(name):
    """It and what the block adds are the layer's output."""
    model = tiny_model(name).eval()
    layers = model.model.layers
    outputs, added = {}, {}
    for number, layer in enumerate(layers):
        last = getattr(layer, "post_feedforward_layernorm", layer.mlp)
        last.register_forward_hook(lambda *a, n=number: added.__setitem__(n, a[-1]))
        layer.register_forward_hook(lambda *a, n=number: outputs.__setitem__(n, a[-1]))
    with torch.no_grad(), _before_feed_forward(layers) as before:
        model(torch.tensor([TEXT]), use_cache=False)
        residuals = before()
        assert residuals is not None
        for number, residual in enumerate(residuals):
            assert added[number].norm() > 1e-2
            torch.testing.assert_close(residual + added[number], outputs[number])


def test_without_the_boundary_layer_the_rest_is_the_same():
    model = tiny_model("qwen3").eval()
    whole, part = LayerLens(model)(TEXT, 3), LayerLens(model, boundary=False)(TEXT, 3)
    assert whole.entropy_before.isfinite().all() and part.entropy_before.isnan().all()
    for name in ("top", "probability", "divergence", "entropy", "agreement"):
        assert torch.equal(getattr(whole, name), getattr(part, name))
    assert summarise([part]).boundary_layer is None


def test_control_characters_are_spelled_out():
    assert visible_controls("a\x05b\n") == "a\\x05b\u21b5"


def look(entropy: list[float], before: list[float]) -> Lens:
    rows = [torch.tensor(x)[:, None] for x in (entropy, before)]
    zero = torch.zeros_like(rows[0])
    return Lens(zero.long(), zero, zero, rows[0], rows[1], zero)


@pytest.mark.parametrize(
    "entropy, before, boundary",
    [
        ([3, 3, 2, 1], [2, 2, 3, 2], 2),
        ([3, 3, 2, 4], [2, 4, 3, 2], 1),
        ([1, 1, 1, 4], [2, 2, 3, 2], None),
    ],
    ids=["the-last-that-raises", "never-the-final-layer", "none"],
)
def test_boundary_layer(entropy, before, boundary):
    summary = summarise([look([float(x) for x in entropy], [float(x) for x in before])])
    assert summary.boundary_layer == boundary
    assert summary.tokens == 1


def test_summary_is_the_mean_over_all_tokens():
    lens = LayerLens(tiny_model("qwen3").eval())
    looks = [lens(TEXT), lens(TEXT[:2])]
    entropy = torch.cat([x.entropy for x in looks], 1)
    summary = summarise(looks)
    assert summary.tokens == 9 and summary.divergence[-1] == 0 and summary.agreement[-1] == 1
    assert summary.entropy == pytest.approx(entropy.mean(1).tolist())
    assert max(summary.entropy) <= math.log(VOCAB)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3"])
def test_attention_overlap(name):
    model = tiny_model(name).eval()
    found = LayerAttention(model, range(1, LAYERS))(TEXT)
    with torch.no_grad(), Taps(model, range(1, LAYERS)) as taps:
        model(torch.tensor([TEXT]))
        pairs = taps.attention()
    for place, pair in enumerate(pairs):
        wanted = reference.attention_divergence(
            pair.q, pair.k, pair.q_teacher, pair.k_teacher, window=pair.window,
            softcap=pair.softcap, scale=pair.scale, scale_teacher=pair.scale_teacher,
        )[0]  # fmt: skip
        torch.testing.assert_close(found.divergence[place], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.maps.sum(-1), torch.ones(LAYERS - 1, len(TEXT)))
    assert (found.overlap[:, 0] > 1 - 1e-6).all(), "the first token sees itself alone"
    assert (found.overlap[:, 3:] < 1 - 1e-3).all()
    # Pinsker: 1 - overlap is the total variation, which bounds the divergence on both sides.
    far = 1 - found.overlap
    assert (found.divergence <= math.log(2) * far + 1e-6).all()


def test_many_layers_are_thinned_and_the_final_one_stays():
    assert shown_layers(6) == [1, 2, 3, 4, 5, 6]
    assert shown_layers(36) == [*range(2, 37, 2)]
    assert shown_layers(36, also=5) == sorted([*range(2, 37, 2), 5])
    assert len(shown_layers(61)) <= 20 and shown_layers(61)[-1] == 61


def test_commands(tmp_path, capsys):
    """The built-in model, untrained, against itself with another seed's tokens."""
    text = ["--prompt", "12+34=", "--completion-tokens", "3"]
    assert main(["lens", "arithmetic", *text, "--output-dir", str(tmp_path / "a"),
                 "--compare", "arithmetic"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "boundary layer" in printed
    names = {path.name for path in (tmp_path / "a").iterdir()}
    wanted = {"lens.png", "layers.png", "compare.png", "attention.png", "lens.json", "index.html"}
    assert names == wanted
    report = json.loads((tmp_path / "a" / "lens.json").read_text())
    page = (tmp_path / "a" / "index.html").read_text()
    assert report["tokens"] >= 6
    (name,) = {*report["first_text"]["layers"]} - {"arithmetic-2"}
    first = report["first_text"]["layers"][name]
    assert len(report["first_text"]["tokens"]) == report["tokens"]
    for what, rows in first.items():
        assert len(rows) == 6 and {len(row) for row in rows} == {report["tokens"]}
        mean = report["layers"][name][what]
        assert [sum(row) / len(row) for row in rows] == pytest.approx(mean, abs=1e-5)
    assert "http" not in page.replace("<!doctype html>", ""), "nothing from outside"
    payload = page.split('id="attention">')[1].split("</script>")[0]
    attention = json.loads(payload)
    assert len(attention["overlap"]) == report["tokens"]
    assert sum(attention["final"][-1]) == pytest.approx(1, abs=1e-2)

    assert main(["attention", "arithmetic", *text, "--output-dir", str(tmp_path / "b"),
                 "--layer", "2"]) == 0  # fmt: skip
    assert "overlap of layer 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give either --prompt or --data"),
        (["--prompt", "1", "--data", "arithmetic"], "give either --prompt or --data"),
        (
            ["--prompt", "1", "--layer", "6"],
            "--layer must lie in 1..5, below the final layer of every model, got 6",
        ),
        (
            ["--prompt", "1", "--layer", "0"],
            "--layer must lie in 1..5, below the final layer of every model, got 0",
        ),
        (["--prompt", "1", "--picture-tokens", "0"], "--picture-tokens must be at least 1, got 0"),
        (["--prompt", "1", "--completion-tokens", "-1"], "--completion-tokens must be at least 0"),
        (["--prompt", "1", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--prompt", "1", "--device", "cudda"], '--device must be "auto", "cpu", "cuda"'),
        (["--prompt", ""], "a text without tokens"),
        (["--prompt", "12+34=", "--max-prompt-tokens", "3"], "raise --max-prompt-tokens"),
    ],
)
@pytest.mark.parametrize("command", ["lens", "attention"])
def test_refuses(command, options, message, tmp_path, capsys):
    status = main([command, "arithmetic", *options, "--output-dir", str(tmp_path)])
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_shallower_model_to_compare_with(tmp_path, capsys):
    """The layer drawn is one that both have below their final one, or the request is refused."""
    config = arithmetic_model().config
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shallow")
    arithmetic_tokenizer().save_pretrained(tmp_path / "shallow")
    command = ["lens", "arithmetic", "--prompt", "12+34=", "--compare", str(tmp_path / "shallow")]
    command += ["--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "lens.json").read_text())["layer"] == 1
    capsys.readouterr()
    assert main([*command, "--layer", "3"]) == 2
    assert "--layer must lie in 1..1, below the final layer of every" in capsys.readouterr().err


def test_a_command_probes_its_model_once(tmp_path, monkeypatch):
    arithmetic_model(1).save_pretrained(tmp_path / "m")
    arithmetic_tokenizer().save_pretrained(tmp_path / "m")
    counted = Counter()
    for name in ("find_layout", "find_attention"):
        found = getattr(attending, name)

        def count(*args, name=name, found=found):
            counted[name] += 1
            return found(*args)

        monkeypatch.setattr(attending, name, count)
    rest = [str(tmp_path / "m"), "--prompt", "12+34=", "--output-dir"]
    assert main(["attention", *rest, str(tmp_path / "a")]) == 0
    assert main(["lens", *rest, str(tmp_path / "l")]) == 0
    assert counted == {"find_layout": 2, "find_attention": 2}


def test_attention_that_cannot_be_read_is_said(tmp_path, capsys):
    """Gemma 2 under SDPA: the lens goes on without, the other command names the option."""
    tiny_model("gemma2", vocab_size=64).save_pretrained(tmp_path / "gemma")
    arithmetic_tokenizer().save_pretrained(tmp_path / "gemma")
    rest = [str(tmp_path / "gemma"), "--prompt", "12+34=", "--output-dir", str(tmp_path / "out")]
    status = main(["lens", *rest])
    said = capsys.readouterr()
    if status == 2:  # transformers 5.24 does not load it with SDPA
        assert "cannot be loaded" in said.err and 'attn_implementation="eager"' in said.err
    else:
        assert status == 0 and "pass --attn-implementation eager" in said.out
        assert main(["attention", *rest]) == 1
        refused = capsys.readouterr().err
        assert "pass --attn-implementation eager" in refused and "attention=False" not in refused
    assert main(["attention", *rest, "--attn-implementation", "eager"]) == 0


# ---- the pictures ----------------------------------------------------------------------------


@pytest.fixture
def figure(monkeypatch) -> list:
    """The last figure that was drawn, in place of a file."""
    drawn: list = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def test_the_picture_shows_the_layer_and_says_what_the_outline_means(figure):
    layers, cells = 36, ["a", "b"]
    picture = plots.Picture(
        cells, [cells] * layers, [[0.1, 0.9]] * layers, [[True, False]] * layers
    )
    plots.plot_lens(picture, "x.png", layer=5)
    axes = figure[0].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "final" and "5 \u25c0" in names and names[-1] == "2"
    assert "outlined: the final layer's choice" in axes.get_xlabel()


def test_markers_of_nearly_equal_entropies_are_not_cut(figure):
    summary = summarise([look([5.31, 5.32, 5.30], [5.30, 5.30, 5.30])])
    plots.plot_layers([("model", summary)], "x.png")
    assert figure[0].axes[1].get_ylim()[1] > 1.05 * 5.32


def test_a_character_without_a_glyph_is_spelled():
    assert plots._readable("a\U0010fffd", 12) == "aU+10FFFD"
    assert plots._readable("\u00e9\u2423", 12) == "\u00e9\u2423"
