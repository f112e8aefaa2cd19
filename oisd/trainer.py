"""The training loop: sample, grade, take the gradient, log; on one process or under torchrun.

Everything random is a function of (seed, step). A run that was killed resumes from its newest
checkpoint when the same command is run again, and ends with the same numbers, bit for bit on a CPU.

Rows whose advantage is 0 have no gradient and are left out of the update, unless a KL term or a
shuffled advantage needs them; the denominators of the losses still count them.

With `run.sharding = "fsdp2"` processes share one model. Left out on purpose: several machines and
inference engines. There are adapters to trainers that have them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oisd import adapters
from oisd.batch import Batch, assemble
from oisd.config import TrainConfig
from oisd.data import prompt_indices
from oisd.data.problems import (
    encode_problems,
    load_problems,
    require_fitting_reward,
    warn_of_answers,
)
from oisd.evaluate import evaluate, in_order
from oisd.losses import Mean, Metrics, add_metrics, frac_zero_std
from oisd.losses.advantages import completion_advantages, shuffled_advantages
from oisd.objective import NonFiniteError, Objective, Totals
from oisd.optimizer import Optimizer
from oisd.policy import Sampler, load_for_training
from oisd.reference_policy import ReferencePolicy
from oisd.rewards import load_reward
from oisd.run.alarms import RunAlarms
from oisd.run.checkpoints import load_optimizer, read_state, save_model
from oisd.run.engine_choice import EngineChoice, choose_engine
from oisd.run.folder import RunFolder
from oisd.run.model_guards import guard_model
from oisd.run.processes import Processes
from oisd.run.progress import Progress, Stopwatch
from oisd.run.summary import summarize
from oisd.run.trackers import Trackers
from oisd.schema import naming
from oisd.sharding import same_batch
from oisd.term_gradients import TermGradients
from oisd.warmup import warm_up


class Trainer:
    """A run of OISD, or of plain GRPO where both alignment weights are 0.

    Checks the configuration, the data, the model and the run's folder before any work.
    Raises ConfigError, DataError, RunFolderError, ValueError.
    """

    def __init__(self, config: TrainConfig) -> None:
        run = config.run
        if run.threads:
            torch.set_num_threads(run.threads)
        self.config = config
        adapters.refuse_blank(config)
        self.processes = Processes(run.device)
        self.folder = RunFolder(run.output_dir)
        self.trackers = Trackers(config, self.folder.path)
        with naming("reward.function"):
            self.reward = load_reward(config.reward.function, config.reward.timeout)
        self.examples = load_problems(config.data.source, config.data, run.seed)
        self.eval_examples = []
        if config.eval.source:
            self.eval_examples = load_problems(config.eval.source, config.eval, run.seed)
        self.processes.on_first(self._prepare_folder)
        checkpoint = self.folder.latest()
        seen, device = [*self.examples, *self.eval_examples], self.processes.device
        self.policy = load_for_training(
            config.model, examples=seen, seed=run.seed, device=device, checkpoint=checkpoint
        )
        # The commit of a Hub model may be known, and may have moved on, only now.
        self.processes.on_first(self._require_sources)
        if self.processes.is_first and checkpoint is None:
            # Weights and AdamW's two moments, for each checkpoint kept and one being written.
            size = 3 * adapters.trained_bytes(self.policy.model)
            self.folder.require_space(size * (run.keep_checkpoints + 1))
        encode = partial(encode_problems, self.policy.tokenizer, config.data)
        self.examples, self.prompts = encode(self.examples, config.data.overlong_prompts)
        self.eval_examples, self.eval_prompts = encode(self.eval_examples, "error")
        self.policy.require_positions(
            [*self.prompts, *self.eval_prompts],
            config.rollout.max_completion_tokens,
            "rollout.max_completion_tokens",
        )
        guard_model(self.policy, config, self.folder.path if self.processes.is_first else None)
        self.objective = Objective(self.policy, config)
        taps = self.objective.taps
        compared = taps.attention_layers, taps.attention_words
        self.processes.on_first(partial(self.folder.record_attention, *compared))
        self._is_sharded = self.processes.share_model(run.sharding)
        self.sampler = Sampler(self.policy, copied=self._is_sharded)
        if self._is_sharded:
            with naming("run.sharding"):
                self.objective.split()
        self.optimizer = Optimizer(self.policy.model, config, self.processes)
        self.step, self.engine = 0, "generate"
        self.resumed = checkpoint is not None
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.step = state["step"]
            load_optimizer(checkpoint, state, self.optimizer)
            self.objective.weights.load_state_dict(state.get("weights", {}))
        self.reference = self._load_reference() if self.resumed else None

    def _load_reference(self) -> ReferencePolicy | None:
        if not self.config.grpo.kl_coef:
            return None
        return ReferencePolicy(self.objective, self.folder.reference, split=self._is_sharded)

    def _prepare_folder(self) -> None:
        require_fitting_reward(self.reward, self.config, self.examples)
        self.folder.prepare(self.config)
        self._require_sources()
        warn_of_answers(self.reward, [*self.examples[:256], *self.eval_examples[:256]])

    def _require_sources(self) -> None:
        problems = {"data.source": self.examples, "eval.source": self.eval_examples}
        self.folder.require_sources(self.config.model.path, problems, self.config.reward.function)

    # ------------------------------------------------------------------ the run

    def train(self) -> dict[str, Any]:
        """Train to the last step, from the newest checkpoint if there is one; returns the summary.

        The summary is on the first process; others return {}.
        """
        run, every = self.config.run, self.config.eval.every
        try:
            self.reward.start()  # its workers are there before the first completion is
            if self.processes.is_first:
                self.folder.rewind(self.step if self.resumed else -1)
            self.processes.on_first(partial(self.trackers.start, self.step))
            alarms = RunAlarms(self.config, self.folder.metrics())
            with self._progress() as progress:
                if self.objective.taps.attention_words:
                    progress.say(self.objective.taps.attention_words)
                if self.resumed:
                    self._settle_engine(progress)
                else:
                    self._begin(progress)
                while self.step < run.steps:
                    row = self._train_step(progress)
                    self.step += 1
                    last = self.step == run.steps
                    if last or (every and self.step % every == 0):
                        row |= self._evaluate(progress)
                    if self.processes.is_first:
                        row |= alarms.new(row)
                        self.folder.log(row)
                        progress.log(row)
                    if last or (run.save_every and self.step % run.save_every == 0):
                        self._save()
                    self.processes.barrier()
            return summarize(self.folder, self.step) if self.processes.is_first else {}
        finally:
            self.reward.close()
            self.processes.close()

    def _begin(self, progress: Progress) -> None:
        """Warm up, save the reference model and evaluate, before the first step."""
        config = self.config
        if config.warmup.steps:
            seed, show = config.run.seed, progress.warmup
            with same_batch(self.policy.model):
                warm_up(self.policy, self.examples, config.warmup, seed=seed, on_step=show)
        if not self._is_sharded:
            # Weights frozen beside adapters are equal already: each process read the same files.
            self.processes.broadcast(p.detach() for p in self.optimizer.parameters)
        if config.grpo.kl_coef:
            if not config.model.lora_rank:
                reference = self.folder.reference
                save_model(self.policy.model, self.policy.tokenizer, reference, self.processes)
            self.reference = self._load_reference()
        self._settle_engine(progress)
        row = {"step": 0, **self._evaluate(progress)}
        if self.processes.is_first:
            if len(row) > 1:
                self.folder.log(row)
                progress.log(row)
        if config.warmup.steps:
            self._save()
        self.processes.barrier()

    def _settle_engine(self, progress: Progress) -> None:
        """Choose the engine that samples; by a trial on the first step's prompts if need be."""
        rollout, file = self.config.rollout, self.folder.engine
        if rollout.engine == "generate":
            return
        choice = EngineChoice.read(file) if self.resumed else None
        if choice is None:
            progress.phase("timing engines")
            prompts = [self.prompts[i] for i in self._share_of(step=0)[0]]
            logprobs = self.objective.logprobs
            with self.sampler.ready() as policy:
                choice = choose_engine(policy, logprobs, prompts, rollout, self.processes)
            if self.processes.is_first:
                choice.write(file)
            progress.say(f"rollouts by {choice.engine}: {choice.reason}")
        self.engine = choice.engine
        self.objective.sampled_by(self.engine)

    # ------------------------------------------------------------------ a step

    def _train_step(self, progress: Progress) -> dict[str, Any]:
        """Sample, grade and learn; returns the step's row of metrics."""
        clock, seed = Stopwatch(), self.config.run.seed
        learning_rate = self.optimizer.schedule.get_last_lr()[0]
        # For what draws from torch's own generator, such as dropout.
        torch.manual_seed((seed * 1_000_003 + self.step * 4099 + self.processes.rank) % 2**63)
        try:
            progress.phase("sampling")
            batch, metrics = self._roll_out(clock)
            with clock("logprobs"):
                minibatches = self._minibatches(batch)
            progress.phase("learning")
            with clock("update"):
                losses, norms = learn(self.objective, self.optimizer, minibatches, self.step)
        except NonFiniteError as error:
            raise self._report(error) from None
        metrics = self.processes.reduce(add_metrics(metrics, losses))
        row: dict[str, Any] = {"step": self.step + 1}
        row |= {name: mean.item() for name, mean in metrics.items()}
        return row | norms | {"learning_rate": learning_rate} | clock.times()

    def _share_of(self, step: int) -> tuple[list[int], list[int]]:
        """This process's completions of a step: the index of each one's example, and its number."""
        rollout = self.config.rollout
        size, count = rollout.completions_per_prompt, rollout.prompts_per_step
        chosen = prompt_indices(step, count, len(self.examples), self.config.run.seed)
        rows = [slot * size + i for slot in self.processes.share(range(count)) for i in range(size)]
        return [chosen[row // size] for row in rows], rows

    def _roll_out(self, clock: Stopwatch) -> tuple[Batch, Metrics]:
        """Sample and grade this process's completions."""
        config, rollout = self.config, self.config.rollout
        index, rows = self._share_of(self.step)
        prompts = [self.prompts[i] for i in index]
        answers = [self.examples[i].answer for i in index]
        draw = {"seed": config.run.seed, "step": self.step}
        with clock("rollout"), self.sampler.ready() as policy:
            completions = policy.roll_out(prompts, rows, rollout, engine=self.engine, **draw)
        with clock("reward"):
            earlier = self.reward.timeouts
            texts = self.policy.decode(completions)
            graded = self.reward(texts, answers)
            rewards = torch.tensor(graded, dtype=torch.float32)
        lengths, size = completions.lengths.cpu(), rollout.completions_per_prompt
        shares = self.processes.gather((rewards, lengths))
        advantages = completion_advantages(rewards, lengths, shares, config.grpo, size)
        timeouts = torch.tensor([float(self.reward.timeouts), float(self.processes.is_first)])
        metrics = {
            "reward": Mean.over(rewards),
            "frac_zero_std": frac_zero_std(rewards, size),
            "completion_length": Mean.over(lengths),
            "frac_finished": Mean.over(completions.finished.cpu()),
            "reward_timeouts": Mean(*timeouts),
            "frac_timeouts": Mean(timeouts[0] - earlier, torch.tensor(float(len(rewards)))),
        }
        every = config.run.completions_every
        if self.processes.is_first and every and self.step % every == 0:
            self.folder.write_completions(
                self.step + 1,
                prompt=map(self.policy.tokenizer.decode, prompts),
                completion=texts,
                answer=answers,
                reward=graded,
                advantage=(round(a, 4) for a in advantages.tolist()),
                tokens=lengths.tolist(),
            )
        batch = assemble(prompts, completions, advantages, rows, self.policy.pad_token_id)
        if config.oisd.active and config.oisd.advantage == "shuffled":
            everyone = self.processes.gather((batch.rows.cpu(), advantages))
            others = shuffled_advantages(batch.rows.cpu(), everyone, **draw)
            batch = replace(batch, shuffled=others.to(batch.rows.device))
        self._require_finite(batch)
        return batch, metrics

    def _require_finite(self, batch: Batch) -> None:
        """Raise NonFiniteError, on all processes, if logits of the rollout are not finite."""
        broken = ~batch.rollout_logprobs.isfinite().all(dim=1)
        count = broken.sum()
        self.processes.sum_([count])
        if count:
            part = batch.select(broken.nonzero().flatten())
            rows = part.rows.tolist()
            raise NonFiniteError(
                f"the model's logits are not finite in the rollout (completions {rows})", part
            )

    def _minibatches(self, batch: Batch) -> list[tuple[Batch, Totals]]:
        """Split by prompt, drop rows without gradient, count what the losses divide by."""
        grpo, rollout, device = self.config.grpo, self.config.rollout, batch.input_ids.device
        slots = batch.rows.cpu() // rollout.completions_per_prompt
        part = slots * grpo.minibatches // rollout.prompts_per_step
        tokens = batch.predicts.sum(dim=1).cpu()
        sizes = [[(part == m).sum(), tokens[part == m].sum()] for m in range(grpo.minibatches)]
        totals = torch.tensor(sizes, device=device)
        self.processes.sum_([totals])
        live = torch.ones_like(part, dtype=torch.bool)
        if grpo.skip_zero_advantage and not grpo.kl_coef:
            live = ((batch.advantages != 0) | (batch.aligned != 0)).cpu()
        minibatches = []
        for m, (sequences, num_tokens) in enumerate(totals.tolist()):
            own = batch.select(((part == m) & live).nonzero().flatten().to(device))
            if self.reference is not None:
                own = replace(own, ref_logprobs=self.reference.logprobs(own))
            # The first minibatch's policy is the one before the update: its ratios are 1.
            if m > 0:
                own = replace(own, old_logprobs=self.objective.logprobs(own, self.step))
            minibatches.append((own, Totals(sequences, num_tokens)))
        return minibatches

    def _report(self, error: NonFiniteError) -> NonFiniteError:
        """The error with its step, where its batch was written, and what to continue from."""
        texts = [self.policy.tokenizer.decode(ids) for ids in error.batch.token_ids()]
        rows = dict(zip(error.batch.rows.tolist(), texts, strict=True))
        file = self.folder.write_nonfinite(self.step + 1, self.processes.rank, error.found, rows)
        return NonFiniteError(
            f"step {self.step + 1}: {error.found}. No optimizer step was taken with it; the last "
            f"good checkpoint is {self.folder.latest() or 'the initial model'}; the batch is in "
            f"{file}. A lower optimizer.learning_rate may help.",
            error.batch,
        )

    # ------------------------------------------------------------------ evaluation and files

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        if not self.eval_examples:
            return {}
        settings, rollout = self.config.eval, self.config.rollout
        progress.phase("evaluating")
        with self.sampler.ready() as policy:
            mine = evaluate(
                policy,
                self.eval_examples,
                self.eval_prompts,
                self.reward,
                samples=settings.samples,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                # Another stream than the rollouts', and the same at every step.
                seed=self.config.run.seed + 2,
                batch_size=rollout.batch_size,
                engine=self.engine,
                rank=self.processes.rank,
                world_size=self.processes.size,
            )
        result = in_order(self.processes.gather(mine), self.eval_examples)
        if self.processes.is_first:
            result.write(self.folder.evaluations, f"step-{self.step}")
        return {
            "eval/avg_at_k": result.avg_at_k(),
            f"eval/pass_at_{result.samples}": result.pass_at(result.samples),
        }

    def _save(self) -> None:
        self.folder.save(
            self.step,
            self.policy.model,
            self.policy.tokenizer,
            self.optimizer,
            self.processes,
            {"weights": self.objective.weights.state_dict()},
            keep=self.config.run.keep_checkpoints,
        )

    def _progress(self) -> Progress:
        warmup = 0 if self.resumed else self.config.warmup.steps
        first = self.processes.is_first
        return Progress(self.config.run.steps, self.step, warmup, first, self.trackers)


def learn(
    objective: Objective,
    optimizer: Optimizer,
    minibatches: Sequence[tuple[Batch, Totals]],
    step: int,
) -> tuple[Metrics, dict[str, float]]:
    """One optimizer step for each minibatch, of which this process has a part.

    step: counted from 0; it draws what the losses sample.

    Returns the metrics of the losses, loss/<name> among them; and numbers: the gradient's norm
    before clipping, grad_norm, on every `grad_norm_every`-th step grad_norm/<name> of each loss,
    and what `Weights` has to say, share/<term> of the first minibatch that has one among it.
    Raises NonFiniteError on all processes when any of them has a loss that is not finite.
    """
    run = objective.config.run
    separately = bool(run.grad_norm_every) and step % run.grad_norm_every == 0
    weights, measuring = objective.weights, objective.weights.are_measured(step)
    coefficients, numbers = weights.at(step), weights.metrics(step)
    processes, device = optimizer.processes, optimizer.parameters[0].device
    sums = {name: torch.zeros((), device=device) for name in coefficients}
    norms: dict[str, list[float]] = defaultdict(list)
    metrics: Metrics = {}
    for batch, totals in minibatches:
        alone = weights.names if separately else weights.terms if measuring else ()
        apart = TermGradients(optimizer, alone, entire=separately)
        parts, found = [], []
        with objective.taps:  # in the backward too: checkpointing runs layers again
            for index, micro in objective.micro_batches(batch):
                losses, more = objective(micro, totals, step)
                apart.add(losses, objective.policy.model)
                values = _backward(losses, coefficients)
                if len(index):  # else it is idle
                    parts.append(index)
                    found.append(values)
                    metrics = add_metrics(metrics, more)
                del losses  # and with them the graph, before the next forward
        norm = optimizer.sum_gradients()
        optimizer.require_finite(batch, parts, found, norm)
        norms["grad_norm"].append(norm.item())
        if apart:
            each = apart.norms(coefficients, objective.policy.dtype)
            for name, value in each.items() if separately else ():
                norms[f"grad_norm/{name}"].append(value)
            if measuring and (shares := weights.observe(each, step)):
                numbers, measuring = numbers | shares, False
        optimizer.step(norm)
        for values in found:
            for name, loss in values.items():
                sums[name] += loss
    # Each loss is a sum over the processes' parts, so it is counted on one of them alone.
    count = torch.tensor(float(len(minibatches) if processes.is_first else 0), device=device)
    metrics |= {f"loss/{name}": Mean(total, count) for name, total in sums.items()}
    return metrics, {name: sum(values) / len(values) for name, values in norms.items()} | numbers


def _backward(losses: dict[str, Tensor], coefficients: dict[str, float]) -> dict[str, Tensor]:
    """Add the gradient of the weighted losses to the parameters; returns them without graph."""
    weighted = [coefficients[name] * loss for name, loss in losses.items()]
    torch.stack(weighted).sum().backward()
    return {name: loss.detach().float() for name, loss in losses.items()}
