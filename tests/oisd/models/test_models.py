"""Taps against what transformers itself returns, on tiny random models of ten architectures."""

from __future__ import annotations

import copy

import pytest
import torch

from oisd.models import Taps, pack_padded, unpack_padded
from tests.tiny_models import LAYERS, TINY, VOCAB, WINDOW, tiny_model

torch.set_num_threads(1)

STUDENTS = [1, 3]
T = 9
architectures = pytest.mark.parametrize("name", list(TINY))
# The boundary cases of attention: plain, windows everywhere, softcap and alternating windows.
attentions = pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3"])


def tokens(batch: int = 2, length: int = T, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def logits_of(hidden, unembedding):
    logits = hidden @ unembedding.weight.T
    if unembedding.bias is not None:
        logits = logits + unembedding.bias
    cap = unembedding.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def distribution(q, k, scale, softcap, window, sink=None):
    """softmax over the causal keys and a sink, whose column is left out: [B, H, T, T].

    From q [B, T, H, K], k [B, T, J, K] and sink [H].
    """
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    keep = (j <= i) & (j > i - (window or q.shape[2]))
    scores = scores.masked_fill(~keep, -torch.inf)
    if sink is None:
        return scores.softmax(-1)
    column = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def auxiliary_loss(taps):
    """A loss that reaches student hidden states, their queries and keys, and the policy."""
    loss = taps.student_hidden().sin().sum() + taps.final_hidden().cos().sum()
    for pair in taps.attention():
        loss = loss + (pair.q.sin().sum() + pair.k.cos().sum()) * pair.q_teacher.mean()
    return loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    assert sum(g.norm() for g in expected.values()) > 1
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


# ---------------------------------------------------------------- values


@architectures
def test_hidden_states_and_logits(name):
    model, ids = tiny_model(name), tokens()
    with Taps(model, STUDENTS, lens_norm="none") as taps:
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        scale = taps._layout.scale
        for student, layer in zip(taps.student_hidden(), STUDENTS, strict=True):
            torch.testing.assert_close(student, scale * out.hidden_states[layer], rtol=0, atol=0)
        final = taps.final_hidden()
        torch.testing.assert_close(final, scale * out.hidden_states[-1], rtol=0, atol=0)
        logits = logits_of(final, taps.unembedding)
    assert out.logits.std() > 0.1
    torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)


@architectures
def test_lens_is_the_models_own_norm(name):
    model, ids = tiny_model(name), tokens()
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        expected = taps._layout.scale * model.model.norm(out.hidden_states[STUDENTS[1]])
        torch.testing.assert_close(taps.student_hidden()[1], expected)
        assert taps.student_hidden().shape == (len(STUDENTS), *ids.shape, 32)


@architectures
def test_attention_equals_output_attentions(name):
    model, ids = tiny_model(name, attn_implementation="eager").eval(), tokens()
    with Taps(model, [1, 2, 3]) as taps:
        out = model(input_ids=ids, use_cache=False, output_attentions=True)
        pairs = taps.attention()
        windows = {n: taps._calls[n].window for n in (1, 2, 3, 4)}
    for layer, pair in zip((1, 2, 3), pairs, strict=True):
        # Each distribution over its own window; the pair names the smaller of the two.
        student = distribution(pair.q, pair.k, pair.scale, pair.softcap, windows[layer], pair.sink)
        torch.testing.assert_close(student, out.attentions[layer - 1], rtol=1e-4, atol=1e-6)
        teacher = distribution(
            pair.q_teacher, pair.k_teacher, pair.scale_teacher, pair.softcap, windows[LAYERS],
            pair.sink_teacher,
        )  # fmt: skip
        torch.testing.assert_close(teacher, out.attentions[-1], rtol=1e-4, atol=1e-6)
        finite = [w for w in (windows[layer], windows[LAYERS]) if w is not None]
        assert pair.window == min(finite, default=None)
    assert (windows[1] == WINDOW) == (name in ("mistral", "phi3", "gemma2", "gemma3", "gpt_oss"))
    assert (windows[2] == WINDOW) == (name in ("mistral", "phi3"))
    assert (pairs[0].softcap == 2.0) == (name == "gemma2")


def test_pair_has_the_smaller_of_two_windows():
    model = tiny_model("mistral")
    for layer, window in ((1, 4), (3, None)):
        attention = model.model.layers[layer - 1].self_attn
        attention.config = copy.copy(attention.config)
        attention.config.sliding_window = window
    with Taps(model, [1, 2, 3]) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert [pair.window for pair in taps.attention()] == [4, WINDOW, WINDOW]


@architectures
def test_outputs_do_not_change(name):
    model, ids = tiny_model(name).eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model(input_ids=ids, attention_mask=mask).logits
    with Taps(model, STUDENTS):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)


# ---------------------------------------------------------------- padding and packing


@attentions
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    model = tiny_model(name).eval()
    lengths, ids = [T, 4], tokens()
    index = torch.arange(T)
    real = [index >= T - n if side == "left" else index < n for n in lengths]
    mask = torch.stack(real).long()
    with torch.no_grad(), Taps(model, STUDENTS) as taps:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        pair = taps.attention()[0]
        packed = pack_padded(mask, taps.student_hidden()[0], taps.final_hidden(), *pair[:4])
        *packed, cu_seqlens = packed
        assert cu_seqlens.tolist() == [0, T, T + 4] and cu_seqlens.dtype == torch.int32
        for row, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
            model(input_ids=ids[row, real[row]][None], use_cache=False)
            alone = (taps.student_hidden()[0], taps.final_hidden(), *taps.attention()[0][:4])
            for tensor, expected in zip(packed, alone, strict=True):
                torch.testing.assert_close(tensor[start:end], expected[0], rtol=1e-4, atol=1e-4)


@attentions
def test_packed_positions_equal_separate_sequences(name):
    model, ids, lengths = tiny_model(name).eval(), tokens(batch=1), [4, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad(), Taps(model, STUDENTS) as taps:
        model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
        together = (taps.student_hidden()[0], taps.final_hidden(), *taps.attention()[0][:4])
        for piece in (slice(0, 4), slice(4, 9)):
            model(input_ids=ids[:, piece], use_cache=False)
            alone = (taps.student_hidden()[0], taps.final_hidden(), *taps.attention()[0][:4])
            for tensor, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(tensor[:, piece], expected, rtol=1e-4, atol=1e-4)


def test_unpack_padded_undoes_pack_padded():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    x, y = torch.randn(3, 4, 2, 5, requires_grad=True), torch.randn(3, 4)
    *packed, _ = pack_padded(mask, x, y)
    wide, flat = unpack_padded(mask, *packed)
    assert torch.equal(wide, x * mask[..., None, None]) and torch.equal(flat, y * mask)
    wide.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * mask[..., None, None]) and x.grad.any()
    with pytest.raises(ValueError, match=r"N = 5, the mask's tokens, got \[4\]"):
        unpack_padded(mask, torch.zeros(4))


def test_pack_padded_keeps_the_graph_and_checks_shapes():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    x = torch.randn(3, 3, 2, requires_grad=True)
    packed, cu_seqlens = pack_padded(mask, x)
    assert torch.equal(packed, torch.stack([x[0, 1], x[0, 2], x[2, 0]]))
    assert cu_seqlens.tolist() == [0, 2, 2, 3]
    packed.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
    with pytest.raises(ValueError, match=r"tensors must be \[B, T, ...\]"):
        pack_padded(mask, torch.randn(3, 4))
    with pytest.raises(ValueError, match="attention_mask must be"):
        pack_padded(mask[0], x)


# ---------------------------------------------------------------- gradients


@architectures
def test_gradients_equal_output_hidden_states(name):
    model, ids = tiny_model(name), tokens()
    with Taps(model, [2], attention=False, lens_norm="none") as taps:
        model(input_ids=ids, use_cache=False)
        actual = gradients(model, taps.student_hidden().sin().sum())
        scale = taps._layout.scale
    hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[2]
    assert_equal_gradients(actual, gradients(model, (hidden * scale)[None].sin().sum()))


@architectures
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_checkpointing_gives_identical_gradients(name, backward):
    model, ids = tiny_model(name), tokens()
    taps = Taps(model, STUDENTS, freeze_norm=False)
    with taps:
        model(input_ids=ids, use_cache=False)
        expected = gradients(model, auxiliary_loss(taps))
        model.gradient_checkpointing_enable()
        model(input_ids=ids, use_cache=False)
        loss = auxiliary_loss(taps)
        if backward == "inside":
            kept = taps.attention()[0].q
            actual = gradients(model, loss)
            assert taps.attention()[0].q is not kept  # a fresh view ...
            assert taps.attention()[0].q._base is kept._base  # ... of the same first capture
    if backward == "outside":
        actual = gradients(model, loss)
    assert_equal_gradients(actual, expected)
    q_weights = [n for n in expected if "q_proj" in n or "qkv_proj" in n]
    assert len(q_weights) >= LAYERS and all(expected[n].norm() > 1e-3 for n in q_weights)


def test_teacher_is_detached():
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS) as taps:
        model(input_ids=tokens(), use_cache=False)
        for pair in taps.attention():
            assert pair.q.requires_grad and pair.k.requires_grad
            assert not pair.q_teacher.requires_grad and not pair.k_teacher.requires_grad


def test_a_norm_in_parts_is_used_as_it_was_in_the_forward():
    """As under ZeRO-3, whose parameters are empty unless a hook gathers them for a forward."""
    model = tiny_model("qwen3")
    norm = model.model.norm
    norm.weight.data.uniform_(0.5, 2.0)
    ids, calls, whole = tokens(), [], norm.weight.data
    with Taps(model, STUDENTS) as taps:
        model(input_ids=ids, use_cache=False)
        wanted = taps.student_hidden().detach()

    def fetch(*_):
        calls.append("fetch")
        norm.weight.data = whole

    def release(*_):
        norm.weight.data = torch.empty(0)

    taps, trained = (Taps(model, STUDENTS, freeze_norm=freeze) for freeze in (True, False))
    norm.weight.ds_id = 0  # DeepSpeed's mark
    norm.register_forward_pre_hook(fetch)
    norm.register_forward_hook(release)
    release()
    with taps:
        model(input_ids=ids, use_cache=False)
        found = taps.student_hidden()
        assert torch.equal(found, wanted)
        assert calls == ["fetch"] and norm.weight.numel() == 0
        found.sin().sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 1e-3
    assert norm.weight.grad is None
    with trained:
        model(input_ids=ids, use_cache=False)
        with pytest.raises(RuntimeError, match="under ZeRO-3.*freeze_norm=True"):
            trained.student_hidden()


@pytest.mark.parametrize("freeze_norm", [True, False])
def test_freeze_norm(freeze_norm):
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS, attention=False, freeze_norm=freeze_norm) as taps:
        model(input_ids=tokens(), use_cache=False)
        actual = gradients(model, taps.student_hidden().sin().sum())
    assert actual["model.layers.0.mlp.up_proj.weight"].norm() > 0.1
    assert ("model.norm.weight" in actual) is not freeze_norm


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {}], ids=["reentrant", "default"])
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:None of the inputs")
def test_reentrant_checkpointing_is_refused(kwargs):
    model = tiny_model("qwen3")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with Taps(model, STUDENTS) as taps:
        with pytest.raises(RuntimeError, match="reentrant"):
            model(input_ids=tokens(), use_cache=False)
        with pytest.raises(RuntimeError, match="nothing captured"):
            taps.final_hidden()
        with torch.no_grad():  # without gradients there is none to lose
            model(input_ids=tokens(), use_cache=False)
            assert taps.attention()[0].q.shape == (2, T, 4, 8)


# ---------------------------------------------------------------- dtypes


@architectures
def test_bfloat16(name):
    model, ids = tiny_model(name, dtype=torch.bfloat16), tokens()
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=ids, use_cache=False)
        logits = logits_of(taps.final_hidden(), taps.unembedding)
        assert taps.student_hidden().dtype == torch.bfloat16
    error = (logits.float() - out.logits.float()).norm() / out.logits.float().norm()
    assert error < 1e-2


@pytest.mark.parametrize("made_inside", [True, False])
def test_autocast(made_inside):
    model, ids = tiny_model("qwen3"), tokens()
    taps = None if made_inside else Taps(model, STUDENTS)
    with torch.autocast("cpu", torch.bfloat16):
        with taps or Taps(model, STUDENTS) as taps:
            out = model(input_ids=ids, use_cache=False)
            logits = logits_of(taps.final_hidden(), taps.unembedding)
            torch.testing.assert_close(logits, out.logits, rtol=0, atol=0)
            grads = gradients(model, auxiliary_loss(taps))
    assert sum(g.norm() for g in grads.values()) > 1


# ---------------------------------------------------------------- the context


def test_nothing_is_left_behind_even_after_an_exception():
    model = tiny_model("qwen3")
    state = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    configs = [id(vars(m).get("config")) for m in model.modules()]
    training = [m.training for m in model.modules()]
    taps = Taps(model, STUDENTS)
    with pytest.raises(KeyError):
        with taps:
            assert model.config._attn_implementation == "sdpa"
            assert model.model.layers[0].self_attn.config._attn_implementation == "oisd"
            assert model.model.layers[1].self_attn.config._attn_implementation == "sdpa"
            model(input_ids=tokens(), use_cache=False)
            raise KeyError
    assert state == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert configs == [id(vars(m).get("config")) for m in model.modules()]
    assert training == [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="nothing captured"):
        taps.final_hidden()


def test_construction_keeps_random_state_and_modes():
    model = tiny_model("qwen3", attention_dropout=0.5)
    model.model.layers[2].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    Taps(model, STUDENTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]


def test_reading_before_a_forward_after_clear_and_without_parts():
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS) as taps:
        for read in (taps.student_hidden, taps.final_hidden, taps.attention):
            with pytest.raises(RuntimeError, match="nothing captured"):
                read()
        model(input_ids=tokens(), use_cache=False)
        taps.clear()
        with pytest.raises(RuntimeError, match="nothing captured"):
            taps.final_hidden()
        with pytest.raises(RuntimeError, match="already open"):
            taps.__enter__()
    with Taps(model, [], attention=False) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert taps.final_hidden().shape == (2, T, 32)
        with pytest.raises(RuntimeError, match="student_layers is empty"):
            taps.student_hidden()
        with pytest.raises(RuntimeError, match="attention=False"):
            taps.attention()


def test_a_forward_that_raises_leaves_no_captures():
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS) as taps:
        model(input_ids=tokens(), use_cache=False)
        with pytest.raises(IndexError):
            model(input_ids=tokens() + VOCAB, use_cache=False)
        with pytest.raises(RuntimeError, match="nothing captured"):
            taps.final_hidden()


def test_last_forward_counts_and_pause_keeps_it():
    model = tiny_model("qwen3")
    with Taps(model, STUDENTS) as taps:
        model(input_ids=tokens(), use_cache=False)
        model(input_ids=tokens(length=5), use_cache=False)
        assert taps.final_hidden().shape[1] == taps.attention()[0].k.shape[1] == 5
        taps.enabled = False
        model(input_ids=tokens(length=7), use_cache=False)
        assert taps.final_hidden().shape[1] == taps.student_hidden().shape[2] == 5
        taps.enabled = True
        model(input_ids=tokens(length=7), use_cache=False)
        assert taps.final_hidden().shape[1] == 7


@attentions
def test_generate_inside(name):
    model, ids = tiny_model(name).eval(), tokens()
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    with Taps(model, STUDENTS) as taps:
        assert torch.equal(model.generate(ids, **options), plain)
        with pytest.raises(RuntimeError, match="as many keys as queries"):
            taps.attention()
        taps.enabled = False
        assert torch.equal(model.generate(ids, **options), plain)


def test_two_models_that_share_a_config():
    one = tiny_model("qwen3")
    two = type(one)(one.config)
    with Taps(one, [1]) as first, Taps(two, [3]) as second:
        a = one(input_ids=tokens(), use_cache=False, output_hidden_states=True)
        b = two(input_ids=tokens(length=5), use_cache=False, output_hidden_states=True)
        assert first.attention()[0].q.shape[1] == T and second.attention()[0].q.shape[1] == 5
        assert torch.equal(first.final_hidden(), a.hidden_states[-1])
        assert torch.equal(second.final_hidden(), b.hidden_states[-1])


def test_nested_taps_on_one_model():
    model = tiny_model("qwen3")
    with Taps(model, [1, 2]) as outer:
        with Taps(model, [2, 3]) as inner:
            model(input_ids=tokens(), use_cache=False)
            assert torch.equal(outer.student_hidden()[1], inner.student_hidden()[0])
            assert torch.equal(outer.attention()[1].q, inner.attention()[0].q)
        model(input_ids=tokens(length=4), use_cache=False)
        assert outer.attention()[0].q.shape[1] == 4
