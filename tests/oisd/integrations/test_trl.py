"""OISD inside TRL: real runs on a CPU, one process. Several are in test_trl_processes.py."""

from __future__ import annotations

import functools
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from oisd.config import AlignmentConfig
from oisd.integrations import trl as adapter
from oisd.integrations.alignment import OF_THE_TRAINER
from oisd.integrations.trl import OISDConfig, rollouts_of
from tests.oisd.integrations.trl_runs import Run, config, difference, make, tiny_policy, train

LAYERS = 4
STUDENT = 2
HEAVY = dict(think_weight=3.0, attention_weight=3.0)
OFF = dict(think_weight=0.0, attention_weight=0.0)
LORA = ["q_proj", "k_proj", "up_proj"]
METRICS = {
    "loss/grpo",
    "loss/think",
    "loss/attention",
    "js/think_pos",
    "js/think_neg",
    "js/attention_pos",
    "js/attention_neg",
    "entropy/student",
    "entropy/teacher",
    "agreement/top1",
}


@functools.cache
def reference(heavy: bool, lora: bool = False) -> Run:
    """One step with heavy terms or with none, which several tests compare with."""
    return train(**(HEAVY if heavy else OFF), **(dict(lora=LORA) if lora else {}))


# ---- against an eager implementation -----------------------------------------------------------


def micro_batch() -> dict[str, Tensor]:
    """Four rollouts with all kinds of masks, as TRL hands them to `compute_loss`."""
    prompt = torch.tensor([[12, 12, 3, 10], [1, 2, 10, 4], [12, 5, 10, 6], [7, 8, 10, 9]])
    completion = torch.tensor([[1, 2, 3, 13], [4, 13, 12, 12], [5, 6, 7, 8], [9, 1, 13, 12]])
    completion_mask = (completion != 12).int()
    completion_mask[2] = 0  # truncated, and masked by mask_truncated_completions
    tool_mask = torch.ones_like(completion)
    tool_mask[0, 1] = 0  # written by a tool
    return {
        "prompt_ids": prompt,
        "prompt_mask": (prompt != 12).int(),
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.5, -0.7, 2.0, 0.0]),
        "num_items_in_batch": torch.tensor(8),
    }


def js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    terms = (torch.where(x > 0, x, 1.0).log() - torch.where(m > 0, m, 1.0).log() for x in (p, q))
    p_over, q_over = terms
    return ((p * p_over + q * q_over) / 2).sum(-1)


def eager_terms(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L_think and L_attn of eq. 7 and 10, from transformers' hidden states and attention maps."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True
    )
    norm, head = model.model.norm, model.lm_head.weight.detach()
    frozen = {"weight": norm.weight.detach()}
    student = torch.func.functional_call(norm, frozen, (out.hidden_states[STUDENT],))
    q = (student @ head.T).softmax(-1)
    p = (out.hidden_states[-1].detach() @ head.T).softmax(-1)
    a, a_teacher = out.attentions[STUDENT - 1], out.attentions[-1].detach()
    counts = inputs["completion_mask"] * inputs["tool_mask"]
    think, attention = torch.zeros(()), torch.zeros(())
    width = inputs["prompt_ids"].shape[1]
    for b, tokens in enumerate(counts.bool()):
        for j in tokens.nonzero().flatten().tolist():
            share = inputs["advantages"][b] / tokens.sum() / len(counts)
            t = width + j - 1
            think = think + share * js(p[b, t], q[b, t])
            attention = attention + share * js(a_teacher[b, :, t], a[b, :, t]).mean()
    return think, attention


def trained_gradient(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the parameters that are trained, by name."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    named = trainer.model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None}


def gradient(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"key_window": 8, "key_stride": 1},  # all keys
        {"attention_steps": 4},  # all steps
    ],
    ids=str,
)
@pytest.mark.parametrize("term", ["think", "attention"])
def test_terms_and_their_gradients_are_eq_7_and_10(term, options, tmp_path):
    inputs = micro_batch()
    weight = OFF | {f"{term}_weight": 5.0}
    policy = {"attn_implementation": "eager"}
    trainer = make(str(tmp_path), policy=policy, **(weight | options))
    found = gradient(trainer, inputs)
    plain = gradient(make(str(tmp_path), policy=policy, **OFF), inputs)

    model = tiny_policy(**policy)
    want = eager_terms(model, inputs)[term == "attention"]
    (5.0 * want).backward()
    logged = trainer._metrics["train"][f"loss/{term}"]
    assert len(logged) == 1
    assert logged[0] == pytest.approx(want.item(), rel=1e-5)
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in
                 model.named_parameters()}  # fmt: skip
    norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
    grpo = torch.cat([g.flatten() for g in plain.values()]).norm()
    assert norm > 0.05 * grpo > 0.01
    error = torch.cat([(found[n] - plain[n] - wanted[n]).flatten() for n in wanted]).norm()
    assert error < 1e-4 * norm


def test_masks_say_which_positions_predict():
    rollouts = rollouts_of(micro_batch())
    assert rollouts.predicts.nonzero().tolist() == [
        [0, 3], [0, 5], [0, 6], [1, 3], [1, 4], [3, 3], [3, 4], [3, 5],
    ]  # fmt: skip
    signed = rollouts.advantages[rollouts.predicts]
    torch.testing.assert_close(signed, torch.tensor([1.5] * 3 + [-0.7] * 2 + [0.0] * 3))
    assert rollouts.advantages[~rollouts.predicts].eq(0).all()


def test_a_step_without_a_token_that_counts(tmp_path):
    inputs = micro_batch() | {"advantages": torch.zeros(4)}
    trainer = make(str(tmp_path), **HEAVY)
    found = gradient(trainer, inputs)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert trainer._metrics["train"]["loss/think"] == [0.0]
    assert "js/think_pos" not in trainer._metrics["train"]


# ---- beside GRPOTrainer ------------------------------------------------------------------------


def test_without_weights_it_is_grpo_to_the_bit():
    grpo = train(GRPOTrainer, max_steps=2)
    ours = train(max_steps=2, **OFF)
    assert all(torch.equal(grpo.after[n], ours.after[n]) for n in grpo.after)
    assert any(grpo.moved(n).norm() > 1e-3 for n in grpo.after)
    assert grpo.log[0]["loss"] == ours.log[0]["loss"] != 0


def test_only_the_layers_up_to_the_student_learn_from_it():
    grpo, ours = reference(heavy=False), reference(heavy=True)
    for name in grpo.after:
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else None
        below = "embed_tokens" in name if layer is None else layer <= STUDENT
        extra = ours.moved(name) - grpo.moved(name)
        if below:
            assert extra.norm() > 1e-3 * grpo.moved(name).norm() > 0, name
        else:
            assert torch.equal(ours.after[name], grpo.after[name]), name


def test_the_terms_are_the_same_in_every_loss_type(tmp_path):
    """Their gradient does not depend on what TRL divides its own loss by."""
    ours, grpo = make(str(tmp_path), **HEAVY), make(str(tmp_path), **OFF)
    inputs = micro_batch()
    found: dict[str, Tensor] = {}
    norms: set[float] = set()
    for loss_type in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        ours.loss_type = grpo.loss_type = loss_type
        with_terms, without = gradient(ours, inputs), gradient(grpo, inputs)
        parts = [(with_terms[n] - without[n]).flatten() for n in without]
        found[loss_type] = torch.cat(parts)
        norms.add(round(float(torch.cat([g.flatten() for g in without.values()]).norm()), 3))
    assert len(norms) > 4  # the loss types do differ
    reference = found["grpo"]
    assert reference.norm() > 0.1
    for loss_type, terms in found.items():
        assert (terms - reference).norm() < 1e-4 * reference.norm(), loss_type


@pytest.mark.parametrize(
    "options",
    [
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(gradient_checkpointing=True),
    ],
    ids=["accumulation", "checkpointing"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_does_not_depend_on_how_it_is_computed(options, lora):
    whole, grpo = reference(True, lora), reference(False, lora)
    split = train(**HEAVY, **options, **(dict(lora=LORA) if lora else {}))
    terms = difference(whole, grpo).norm()
    assert terms > 0.01
    assert difference(split, whole).norm() < 1e-4 * terms
    for name in METRICS:
        assert split.log[0][name] == pytest.approx(whole.log[0][name], rel=1e-4), name


def test_masked_truncated_completions_have_no_share(tmp_path):
    """The scripted third completion of each group has no end."""
    run = train(mask_truncated_completions=True, **HEAVY)
    kept = reference(heavy=True)
    assert run.log[0]["loss/think"] != kept.log[0]["loss/think"]
    assert run.log[0]["completions/clipped_ratio"] == 0.25


def test_several_steps_a_rollout_and_several_students():
    run = train(max_steps=4, num_iterations=2, student_layers=[1, 3], **HEAVY)
    steps = [row for row in run.log if "loss/think" in row]
    assert len(steps) == 4
    assert steps[0]["js/think_pos"] != steps[1]["js/think_pos"]


# ---- logging and evaluation --------------------------------------------------------------------


def test_metrics_are_logged_and_the_loss_is_their_sum():
    row = reference(heavy=True).log[0]
    assert row.keys() >= METRICS
    total = row["loss/grpo"] + 3.0 * row["loss/think"] + 3.0 * row["loss/attention"]
    assert row["loss"] == pytest.approx(total, rel=1e-4)
    assert 0 < row["js/think_pos"] < 0.694 and 0 <= row["agreement/top1"] <= 1
    assert 0 < row["entropy/student"] < 2.7


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_share_of_each_term_is_that_of_its_step(lora):
    """A step of plain SGD is the gradient; the terms' share is what they add to GRPO's step."""
    without = reference(heavy=False, lora=lora)
    grpo = torch.cat([without.moved(name).flatten() for name in sorted(without.before)]).norm()
    for term in ("think", "attention"):
        alone = OFF | {f"{term}_weight": 3.0} | (dict(lora=LORA) if lora else {})
        parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
        found = train(**alone, **parts)
        wanted = difference(found, without).norm() / grpo
        assert wanted > 0.05
        assert found.log[0][f"share/{term}"] == pytest.approx(wanted.item(), rel=1e-3)
        assert len([name for name in found.log[0] if name.startswith("share/")]) == 1
    off = train(**alone, **parts, share_every=0)
    assert difference(found, off).norm() == 0
    assert "share/think" not in off.log[0]


def test_shares_are_measured_every_n_steps():
    run = train(max_steps=5, num_iterations=2, share_every=2)
    assert ["share/think" in row for row in run.log[:5]] == [True, False, True, False, True]


def test_evaluation_is_grpos(tmp_path):
    trainer = make(str(tmp_path), per_device_eval_batch_size=4, **HEAVY)
    twin = make(str(tmp_path), per_device_eval_batch_size=4, **OFF)
    found, want = (t.evaluate(t.train_dataset) for t in (trainer, twin))
    assert found["eval_loss"] == want["eval_loss"]
    assert not any("think" in name for name in found)


def test_reward_rises():
    """From random weights, with sampling by `generate`: the more sevens the better."""

    def sevens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [ids.count(7) / 6 for ids in completion_ids]

    run = train(
        scripted=False,
        keywords={"reward_funcs": sevens},
        per_device_train_batch_size=32,
        num_generations=8,
        max_steps=10,
        learning_rate=3e-3,
        optim="adamw_torch",
        generation_kwargs={"min_new_tokens": 6},
    )
    rewards = [row["reward"] for row in run.log if "reward" in row]
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.6
    assert all(row["loss/think"] != 0 != row["loss/attention"] for row in run.log[:3])


def test_a_checkpoint_says_where_it_comes_from_and_resumes(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    whole = make(str(tmp_path), **options)
    whole.train()
    assert "2605.29089" in (tmp_path / "README.md").read_text()
    again = make(str(tmp_path), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_head_trained_beside_an_adapter(tmp_path):
    """PEFT's modules_to_save: a copy of the whole head, which both losses read."""
    keywords = dict(peft_config=LoraConfig(target_modules=LORA, modules_to_save=["lm_head"]))
    trainer = make(str(tmp_path), keywords=keywords, **HEAVY)
    found = trained_gradient(trainer, micro_batch())
    grpo = trained_gradient(make(str(tmp_path), keywords=keywords, **OFF), micro_batch())
    head = next(name for name in found if "lm_head.modules_to_save" in name)
    assert torch.equal(found[head], grpo[head]) and grpo[head].norm() > 0.1


def test_norms_in_float32_over_a_model_in_bf16(tmp_path):
    """As QLoRA leaves a model, which runs only under autocast."""
    inputs = micro_batch()
    found, drawn = [], []
    for dtype in ("bfloat16", "float32"):
        trainer = make(str(tmp_path), policy={"dtype": dtype}, lora=LORA, bf16=True, **HEAVY)
        for parameter in trainer.model.parameters():
            if parameter.dim() == 1:
                parameter.data = parameter.data.float()
        # torch 2.11 draws other numbers in bfloat16 than in float32.
        drawn = drawn or [p.detach().clone() for p in trainer.model.parameters()]
        for parameter, first in zip(trainer.model.parameters(), drawn, strict=True):
            parameter.data.copy_(first)
        trainer._taps = None  # made again with the model as it is now
        gradients = trained_gradient(trainer, inputs)
        found.append(torch.cat([g.flatten().float() for g in gradients.values()]))
    assert found[1].norm() > 0.1
    assert (found[0] - found[1]).norm() < 0.2 * found[1].norm()


# ---- refusals ----------------------------------------------------------------------------------


def test_options_are_named_as_in_recipes():
    defaults = OISDConfig("x", use_cpu=True, bf16=False)
    assert defaults.alignment() == AlignmentConfig()
    absent = {f.name for f in fields(AlignmentConfig)} - set(OISDConfig.__annotations__)
    assert absent == {"beta", "attention_kernel", *OF_THE_TRAINER}
    assert OISDConfig("x", use_cpu=True, bf16=False, jsd_beta=0.2).alignment().beta == 0.2
    assert defaults.beta == GRPOConfig("x", use_cpu=True, bf16=False).beta  # of the KL term


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(jsd_beta=1.0), r"OISDConfig: jsd_beta must be in \(0, 1\)"),
        (dict(student_layers=[0]), "OISDConfig: student_layers must be layers counted from 1"),
        (dict(divergence="js"), "divergence must be one of .*'forward_kl'.* got 'js'"),
        (dict(key_window=3), "key_window and key_stride"),
    ],
)
def test_config_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(student_layers=[LAYERS]), r"student_layers must lie in 1..3"),
        (dict(lora=["lm_head"]), "lm_head"),
        (
            dict(
                gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
            ),
            "use_reentrant.: False",
        ),
        (dict(keywords={"args": GRPOConfig("x", use_cpu=True, bf16=False)}), "an OISDConfig"),
    ],
)
def test_trainer_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path), **options)


def test_without_args_the_defaults_are_oisds(monkeypatch):
    class OnCPU(OISDConfig):
        def __init__(self, folder: str) -> None:
            super().__init__(folder, use_cpu=True, bf16=False)

    monkeypatch.setattr(adapter, "OISDConfig", OnCPU)
    with pytest.raises(ValueError, match=r"student_layers must lie in 1..3.* got 6"):
        make("x", keywords={"args": None})


def test_images_are_refused():
    with pytest.raises(ValueError, match="images are not supported"):
        rollouts_of(micro_batch() | {"pixel_values": torch.zeros(1)})


def test_a_processor_is_refused(tmp_path, monkeypatch):
    trainer = make(str(tmp_path))
    monkeypatch.setattr(adapter, "ProcessorMixin", type(trainer.processing_class))
    with pytest.raises(ValueError, match="multimodal models are not supported"):
        trainer._refuse()


def test_a_quantised_unembedding_is_refused(tmp_path):
    trainer = make(str(tmp_path))
    head = trainer.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="unembedding is quantised"):
        trainer._refuse()


# ---- the contract with TRL ---------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, "0.29.1", "1.15.2", "2.0.0"])
def test_versions_that_are_refused(found):
    with pytest.raises(ImportError, match=r"needs trl >= 1.16, < 2.*pip install 'trl>=1.16,<2'"):
        adapter.VERSIONS.check(found)


def test_contract_of_the_class():
    adapter.VERSIONS.check("1.16.0")
    assert adapter.moved() == []


def test_a_broken_contract_is_named(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_loss", lambda self, model, inputs: None)
    monkeypatch.setattr(GRPOTrainer, "loss_is_scaled_for_ga", False)
    found = adapter.moved()
    assert len(found) == 2 and "compute_loss must take" in found[0] and "accumulation" in found[1]


def test_contract_of_a_run(tmp_path, monkeypatch):
    """The attributes and inputs that the trainer reads, and one forward for each loss."""
    seen: list[set[str]] = []
    forwards: list[set[str]] = []
    compute = GRPOTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(set(inputs))
        assert self.current_gradient_accumulation_steps == 2
        handle = model.register_forward_pre_hook(
            lambda m, a, kwargs: forwards.append(set(kwargs)), with_kwargs=True
        )
        loss = compute(self, model, inputs, *args, **kwargs)
        handle.remove()
        return loss

    monkeypatch.setattr(GRPOTrainer, "compute_loss", watched)
    trainer = make(str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert "train" in trainer._metrics
    trainer.train()
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    assert len(seen) == 2 and all(found >= keys for found in seen)
    assert len(forwards) == 2  # one per loss
    assert all(found >= {"input_ids", "attention_mask"} for found in forwards)


def test_a_trl_that_calls_another_forward_fails_loudly(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_loss", lambda *a, **k: torch.zeros(()))
    trainer = make(str(tmp_path))
    trainer.model.train()
    with pytest.raises(RuntimeError, match="did not call the model's forward"):
        trainer.compute_loss(trainer.model, micro_batch())
    with pytest.raises(RuntimeError, match="no 'advantages'"):
        rollouts_of({k: v for k, v in micro_batch().items() if k != "advantages"})


# ---- dropout -----------------------------------------------------------------------------------


def test_a_models_dropout_is_warned_of_and_turned_off(tmp_path):
    policy = dict(attention_dropout=0.2)
    with pytest.warns(UserWarning, match=r"attention_dropout 0\.2.*disable_dropout=True"):
        make(str(tmp_path), policy=policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "OISDTrainer: the model's dropout")
        model = make(str(tmp_path), policy=policy, disable_dropout=True).model
        make(str(tmp_path))
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.0}
