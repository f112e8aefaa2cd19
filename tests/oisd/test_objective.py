"""The gradient of a batch: by hand from the model's own outputs, and whatever the split."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.batch import Batch, assemble
from oisd.config import (
    AlignmentConfig,
    GRPOConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from oisd.losses import Metrics
from oisd.objective import NonFiniteError, Objective, Totals
from oisd.optimizer import Optimizer
from oisd.policy import Policy
from oisd.rollout import Completions
from oisd.run.processes import Processes
from oisd.trainer import learn

PAD, ROWS, MAX_TOKENS = 12, 11, 8
AGGREGATIONS = ["token-mean", "sequence-mean", "dr-grpo"]
# transformers takes the norms and the softmax of attention in float32, whatever the model's dtype.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def policy():
    model = arithmetic_model(
        0,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        head_dim=8,
        initializer_range=0.25,
        attn_implementation="eager",
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones as they are made, which would hide their place
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return Policy(model.double().train(), arithmetic_tokenizer(), torch.float64)


def config_of(*, tokens=10**6, aggregation="token-mean", run=None, **oisd):
    oisd = {"student_layers": (2, 3), "advantage_clip": 1.5, "attention_weight": 0.7} | oisd
    return TrainConfig(
        oisd=AlignmentConfig(**oisd),
        grpo=GRPOConfig(aggregation=aggregation, dual_clip=1.5, tis_cap=1.1),
        rollout=replace(TrainConfig().rollout, max_completion_tokens=MAX_TOKENS, temperature=1.3),
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=1e9),
        run=RunConfig(tokens_per_microbatch=tokens, steps=100, **(run or {})),
    )


@pytest.fixture(scope="module")
def batch(policy):
    """Ragged rows whose ratios reach the clips; rows 3 and 6 have advantage 0."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(1, MAX_TOKENS + 1, (ROWS, 2), generator=generator).tolist()
    prompts = [torch.randint(0, 12, (m,), generator=generator).tolist() for m, _ in sizes]
    lengths = torch.tensor([n for _, n in sizes])
    ids = torch.randint(0, 12, (ROWS, MAX_TOKENS), generator=generator)
    ids = ids.masked_fill(torch.arange(MAX_TOKENS) >= lengths[:, None], PAD)
    advantages = 1.5 * torch.randn(ROWS, generator=generator)
    advantages[[3, 6]] = 0.0
    sampled = Completions(
        ids, torch.zeros(ids.shape, dtype=torch.float64), lengths, lengths < MAX_TOKENS
    )
    batch = assemble(prompts, sampled, advantages, range(ROWS), PAD)
    now = Objective(policy, config_of()).logprobs(batch)
    noise = torch.randn((2, *now.shape), generator=generator, dtype=torch.float64)
    old = now + 0.4 * noise[0]
    return replace(batch, old_logprobs=old, rollout_logprobs=old + 0.2 * noise[1])


def totals_of(batch):
    return Totals(len(batch), int(batch.predicts.sum()))


class Unmoved(Optimizer):
    """An optimizer that keeps each gradient and leaves the parameters as they are."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        super().__init__(policy.model, config, Processes("cpu"))
        self.gradients: list[torch.Tensor] = []
        self.adamw.register_step_pre_hook(self._keep)

    def _keep(self, *_):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters]))
        for parameter in self.parameters:
            parameter.grad.zero_()  # AdamW without a gradient and without a past does not move


def gradient_of(policy, config, minibatches, step=0):
    """Gradients of all minibatches one after the other, the metrics and the norms."""
    optimizer = Unmoved(policy, config)
    metrics, norms = learn(Objective(policy, config), optimizer, minibatches, step)
    assert len(optimizer.gradients) == len(minibatches)
    return torch.cat(optimizer.gradients), metrics, norms


def values(metrics: Metrics):
    return {name: mean.item() for name, mean in metrics.items()}


def assert_same(found, wanted, tolerance=TOLERANCE):
    assert wanted.norm() > 1e-2, "the truth is too small to test against"
    assert (found - wanted).norm() / wanted.norm() < tolerance


# ---------------------------------------------------------------- by hand


def rms_norm(norm, hidden):
    """The final norm with its weight frozen, as the student branch has it."""
    scale = torch.rsqrt((hidden**2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return hidden * scale * norm.weight.detach()


def jensen_shannon(p, q):
    m = (p + q) / 2

    def kl(a):
        return torch.where(a > 0, a * (a.clamp(min=1e-300) / m.clamp(min=1e-300)).log(), 0).sum(-1)

    return (kl(p) + kl(q)) / 2


def by_hand(model, batch, config):
    """The three losses, from hidden states and attention maps of one unpadded row at a time."""
    grpo = think = attention = torch.zeros((), dtype=torch.float64)
    tokens = int(batch.predicts.sum())
    align = config.oisd
    for row in range(len(batch)):
        ids = batch.input_ids[row, : int(batch.lengths[row])]
        where = batch.predicts[row].nonzero().flatten()
        out = model(
            input_ids=ids[None], output_hidden_states=True, output_attentions=True, use_cache=False
        )
        advantage = batch.advantages[row].item()
        aligned = max(-align.advantage_clip, min(align.advantage_clip, advantage))

        logprobs = (out.logits[0] / config.rollout.temperature).log_softmax(-1)
        importance = (batch.old_logprobs - batch.rollout_logprobs)[row, where].exp()
        importance = importance.clamp(max=config.grpo.tis_cap)
        for t in where.tolist():
            new = logprobs[t, batch.labels[row, t]]
            old = batch.old_logprobs[row, t].item()
            ratio = (new - old).exp()
            value = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
            if advantage < 0:
                value = value.clamp(max=-advantage * config.grpo.dual_clip)
            value = value * min(
                math.exp(old - batch.rollout_logprobs[row, t].item()), config.grpo.tis_cap
            )
            grpo = (
                grpo
                + value
                / {
                    "token-mean": tokens,
                    "sequence-mean": len(batch) * len(where),
                    "dr-grpo": len(batch) * MAX_TOKENS,
                }[config.grpo.aggregation]
            )

        weight = model.lm_head.weight.detach()
        teacher = (out.hidden_states[-1][0, where].detach() @ weight.T).softmax(-1)
        teacher_attention = out.attentions[-1][0][:, where].detach()
        for layer in align.student_layers:
            hidden = rms_norm(model.model.norm, out.hidden_states[layer][0, where])
            share = aligned / len(where) / len(batch) / len(align.student_layers)
            rows = jensen_shannon(teacher, (hidden @ weight.T).softmax(-1))
            think = think + share * (importance * rows).sum()
            maps = out.attentions[layer - 1][0][:, where]
            rows = jensen_shannon(teacher_attention, maps).mean(0)
            attention = attention + share * (importance * rows).sum()
    return {"grpo": grpo, "think": think, "attention": attention}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses_and_gradient_are_those_computed_by_hand(policy, batch, aggregation):
    config = config_of(aggregation=aggregation, tokens=40)
    model = policy.model
    wanted = by_hand(model, batch, config)
    model.zero_grad()
    total = wanted["grpo"] + 1.0 * wanted["think"] + 0.7 * wanted["attention"]
    total.backward()
    wanted_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    found, metrics, norms = gradient_of(policy, config, [(batch, totals_of(batch))])
    for name, value in wanted.items():
        assert abs(value.item()) > 1e-3
        assert metrics[f"loss/{name}"].item() == pytest.approx(value.item(), rel=1e-5), name
    assert_same(found, wanted_gradient)
    assert norms["grad_norm"] == pytest.approx(wanted_gradient.norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "think", "attention"])
def test_gradient_norms_of_each_loss(policy, batch, name):
    config = config_of(run={"grad_norm_every": 2}, tokens=40)
    (wanted,) = [
        torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True)
        for loss in [by_hand(policy.model, batch, config)[name]]
    ]
    norm = math.sqrt(sum(float((g**2).sum()) for g in wanted if g is not None))
    assert norm > 1e-2
    _, _, norms = gradient_of(policy, config, [(batch, totals_of(batch))], step=4)
    assert norms[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
    _, _, norms = gradient_of(policy, config, [(batch, totals_of(batch))], step=3)
    assert norms.keys() == {"grad_norm"}


# ---------------------------------------------------------------- whatever the split


SAMPLED = dict(attention_steps=2, key_window=3, key_stride=4)


@pytest.mark.parametrize("tokens", [1, 40, 90])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["all-keys", "sampled"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_does_not_depend_on_the_micro_batches(
    policy, batch, aggregation, sampling, tokens
):
    assert 1 < len(batch.micro_batches(tokens)) <= ROWS
    minibatches = [(batch, totals_of(batch))]
    settings = dict(aggregation=aggregation, **sampling)
    wanted, metrics, _ = gradient_of(policy, config_of(**settings), minibatches)
    found, more, _ = gradient_of(policy, config_of(tokens=tokens, **settings), minibatches)
    assert_same(found, wanted)
    assert more.keys() == metrics.keys()
    for name, value in values(metrics).items():
        assert values(more)[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kernel", ["fused", "reference"])
def test_gradient_does_not_depend_on_the_attention_kernel(policy, batch, kernel):
    minibatches = [(batch, totals_of(batch))]

    def run(kernel):
        # The norm of each loss's gradient takes the graph twice.
        config = config_of(attention_kernel=kernel, tokens=40, run={"grad_norm_every": 1})
        return gradient_of(policy, config, minibatches)

    (wanted, metrics, norms), (found, more, more_norms) = run("separate"), run(kernel)
    assert norms["grad_norm/attention"] > 1e-2
    assert_same(found, wanted)
    assert more_norms == pytest.approx(norms, rel=1e-5)
    assert values(more) == pytest.approx(values(metrics), rel=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rows_of_advantage_zero_can_be_left_out(policy, batch, aggregation):
    config, totals = config_of(aggregation=aggregation), totals_of(batch)
    live = (batch.advantages != 0).nonzero().flatten()
    assert len(live) == ROWS - 2
    wanted, metrics, _ = gradient_of(policy, config, [(batch, totals)])
    found, more, _ = gradient_of(policy, config, [(batch.select(live), totals)])
    assert_same(found, wanted)
    for name in ("loss/grpo", "loss/think", "loss/attention", "js/think_pos", "js/attention_neg"):
        assert values(more)[name] == pytest.approx(values(metrics)[name], rel=1e-5)


def test_two_processes_parts_add_up(policy, batch):
    config, totals = config_of(), totals_of(batch)
    wanted, _, _ = gradient_of(policy, config, [(batch, totals)])
    parts = [batch.select(torch.arange(rank, ROWS, 2)) for rank in (0, 1)]
    found = sum(gradient_of(policy, config, [(part, totals)])[0] for part in parts)
    assert_same(found, wanted)


def test_sampled_steps_change_with_the_step_and_not_with_the_place(policy, batch):
    config = config_of(**SAMPLED)
    minibatches = [(batch, totals_of(batch))]
    first, _, _ = gradient_of(policy, config, minibatches, step=0)
    again, _, _ = gradient_of(policy, config, minibatches, step=0)
    later, _, _ = gradient_of(policy, config, minibatches, step=1)
    assert torch.equal(first, again)
    assert (first - later).norm() > 1e-3 * first.norm()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    moved, _, _ = gradient_of(policy, config, [(batch.select(order), totals_of(batch))], step=0)
    assert_same(moved, first)


def test_minibatches_are_steps_of_their_own(policy, batch):
    config = config_of()
    halves = [batch.select(torch.arange(0, 5)), batch.select(torch.arange(5, ROWS))]
    minibatches = [(half, totals_of(half)) for half in halves]
    found, metrics, norms = gradient_of(policy, config, minibatches)
    alone = [gradient_of(policy, config, [one]) for one in minibatches]
    assert_same(found, torch.cat([gradient for gradient, _, _ in alone]))
    losses = [metrics["loss/grpo"].item() for _, metrics, _ in alone]
    assert metrics["loss/grpo"].item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    each = [norms["grad_norm"] for _, _, norms in alone]
    assert norms["grad_norm"] == pytest.approx(sum(each) / 2, rel=1e-6)


@pytest.mark.parametrize("off", ["think", "attention"])
def test_a_loss_of_weight_zero_is_not_computed(policy, batch, off):
    config = config_of(**{f"{off}_weight": 0.0})
    _, metrics, _ = gradient_of(policy, config, [(batch, totals_of(batch))])
    there = {"think", "attention"} - {off}
    assert {name for name in metrics if name.startswith("loss/")} == {
        "loss/grpo", *(f"loss/{name}" for name in there)
    }  # fmt: skip
    assert not any(name.startswith(f"js/{off}") for name in metrics)


def test_a_batch_without_rows_has_gradient_zero(policy, batch):
    nothing = batch.select(torch.tensor([], dtype=torch.int64))
    gradient, _, norms = gradient_of(policy, config_of(), [(nothing, totals_of(batch))])
    assert gradient.abs().max() == 0 and norms["grad_norm"] == 0


def test_the_gradient_is_clipped_before_the_step(policy, batch):
    minibatches = [(batch, totals_of(batch))]
    config = config_of()
    whole, _, norms = gradient_of(policy, config, minibatches)
    clip = norms["grad_norm"] / 3
    config = replace(config, optimizer=OptimizerConfig(max_grad_norm=clip))
    found, _, clipped_norms = gradient_of(policy, config, minibatches)
    assert_same(found, whole / 3)
    assert clipped_norms == norms


def test_forwards_outside_the_taps_leave_no_captures(policy, batch):
    objective = Objective(policy, config_of())
    wanted = objective.logprobs(batch)
    policy.model(input_ids=batch.input_ids[:2])
    with pytest.raises(RuntimeError, match="nothing captured"):
        objective.taps.final_hidden()
    assert torch.equal(objective.logprobs(batch), wanted)
    assert wanted[batch.predicts].max() < 0 and not wanted[~batch.predicts].any()


# ---------------------------------------------------------------- what is not finite


@pytest.fixture
def own_policy(policy):
    """A copy that a test may damage."""
    model = arithmetic_model(0, num_hidden_layers=4).double().train()
    return Policy(model, policy.tokenizer, torch.float64)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int64), before[name].view(torch.int64)), name


class Learner:
    """An objective with its optimizer."""

    def __init__(self, policy: Policy, config: TrainConfig | None = None) -> None:
        config = config or config_of(tokens=40)
        self.objective = Objective(policy, config)
        self.optimizer = Optimizer(policy.model, config, Processes("cpu"))

    def learn(self, minibatches, step):
        return learn(self.objective, self.optimizer, minibatches, step)


def poisoned(batch: Batch, row: int) -> Batch:
    old = batch.old_logprobs.clone()
    old[row] = math.nan
    return replace(batch, old_logprobs=old)


def test_a_loss_that_is_not_finite_is_named_with_its_rows(own_policy, batch):
    learner, before = Learner(own_policy), snapshot(own_policy.model)
    with pytest.raises(NonFiniteError) as caught:
        learner.learn([(poisoned(batch, 4), totals_of(batch))], 0)
    assert "loss/grpo is nan" in caught.value.found
    assert 4 in caught.value.batch.rows.tolist()
    assert len(caught.value.batch) < ROWS
    assert_untouched(own_policy.model, before)


def test_a_learner_that_was_stopped_can_go_on_with_a_good_batch(own_policy, batch):
    learner = Learner(own_policy)
    with pytest.raises(NonFiniteError):
        learner.learn([(poisoned(batch, 4), totals_of(batch))], 0)
    _, norms = learner.learn([(batch, totals_of(batch))], 0)
    assert math.isfinite(norms["grad_norm"]) and norms["grad_norm"] > 1e-2


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_a_parameter_that_is_not_finite_stops_the_step(own_policy, batch, name):
    learner = Learner(own_policy)
    with torch.no_grad():
        own_policy.model.get_parameter(name)[0, 0] = math.nan
    before = snapshot(own_policy.model)
    with pytest.raises(NonFiniteError, match="loss/grpo is nan"):
        learner.learn([(batch, totals_of(batch))], 0)
    assert_untouched(own_policy.model, before)


def test_a_gradient_that_is_not_finite_is_named(own_policy, batch):
    name = "model.layers.1.self_attn.o_proj.weight"
    parameter = own_policy.model.get_parameter(name)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    learner, before = Learner(own_policy), snapshot(own_policy.model)
    with pytest.raises(NonFiniteError) as caught:
        learner.learn([(batch, totals_of(batch))], 0)
    assert f"the gradient of {name} is not finite" in caught.value.found
    assert_untouched(own_policy.model, before)


def test_a_step_moves_the_parameters_and_the_schedule(own_policy, batch):
    config = config_of(tokens=40)
    config = replace(config, optimizer=replace(config.optimizer, schedule="cosine"))
    learner, before = Learner(own_policy, config), snapshot(own_policy.model)
    learner.learn([(batch, totals_of(batch))] * 2, 0)
    moved = [n for n, p in own_policy.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    wanted = 1e-2 * (1 + math.cos(math.pi * 2 / 100)) / 2
    assert learner.optimizer.schedule.get_last_lr()[0] == pytest.approx(wanted)
    assert all(p.grad is None for p in learner.optimizer.parameters)


def test_a_learner_goes_on_from_its_state(own_policy, batch):
    def steps(learner, count):
        for step in range(count):
            learner.learn([(batch, totals_of(batch))], step)

    learner = Learner(own_policy)
    steps(learner, 2)
    state, middle = learner.optimizer.state_dict(), snapshot(own_policy.model)
    state = {part: _copied(inner) for part, inner in state.items()}
    steps(learner, 2)
    wanted = snapshot(own_policy.model)

    with torch.no_grad():
        for name, parameter in own_policy.model.named_parameters():
            parameter.copy_(middle[name])
    fresh = Learner(own_policy)
    fresh.optimizer.load_state_dict(state)
    steps(fresh, 2)
    assert any(not torch.equal(wanted[name], middle[name]) for name in wanted)
    assert_untouched(own_policy.model, wanted)


def _copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(x) for x in state] if isinstance(state, list) else state
