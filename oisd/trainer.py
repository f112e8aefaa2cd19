"""One readable loop: sample, grade, take the gradient, log; on one process or under torchrun.

Everything random is a function of (seed, step), so a run that is killed and started again goes on
from its newest checkpoint and ends with the same numbers, bit for bit on a CPU. Rows whose
advantage is 0 carry no gradient and are left out of the update (unless a KL term needs them); the
denominators of the losses still count them.

Left out on purpose: sharding and inference engines. For models that outgrow one device there are
adapters to trainers that have them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from oisd import adapters
from oisd.batch import Batch, assemble
from oisd.config import AlignmentConfig, ConfigError, TrainConfig
from oisd.data import Example, encode_prompts, load_examples, prompt_indices
from oisd.evaluate import Evaluation, evaluate, in_order
from oisd.losses import Mean, Metrics, add_metrics, frac_zero_std
from oisd.losses.advantages import batch_advantages, group_advantages, rloo_advantages
from oisd.models import UnsupportedModelError
from oisd.objective import Objective, Totals
from oisd.optimizer import Learner, NonFiniteError
from oisd.policy import load_policy
from oisd.rewards import MathReward, load_reward
from oisd.run.engine_choice import EngineChoice, choose_engine
from oisd.run.folder import RunFolder
from oisd.run.processes import Processes
from oisd.run.progress import Progress
from oisd.run.stopwatch import Stopwatch
from oisd.run.summary import summarize
from oisd.warmup import warm_up


class Trainer:
    """A run of OISD, or of plain GRPO where both alignment weights are 0.

    Everything that can be wrong with the configuration, the data, the model and the run's folder
    is found here, before any work. Raises ConfigError, DataError, RunFolderError, ValueError.
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config = config
        adapters.refuse_blank(config)
        self.processes = Processes(config.run.device)
        self.folder = RunFolder(config.run.output_dir)
        with _naming("reward.function"):
            self.reward = load_reward(config.reward.function, config.reward.timeout)
        self.examples = self._load_examples(config.data, config.data.limit)
        self.eval_examples = (
            self._load_examples(config.eval, config.eval.limit) if config.eval.source else []
        )
        if self.processes.is_first:
            self.folder.prepare(config)
            self._warn_of_answers()
        self.processes.barrier()

        checkpoint = self.folder.latest()
        self.policy = load_policy(
            config.model, seed=config.run.seed, device=self.processes.device, checkpoint=checkpoint
        )
        adapters.refuse_others(self.policy.model, config.model)
        self.policy.model.train()
        num_bytes = adapters.trained_bytes(self.policy.model)
        if self.processes.is_first and checkpoint is None:
            # Weights and AdamW's two moments, and one checkpoint that is being written.
            self.folder.require_space(3 * num_bytes * (config.run.keep_checkpoints + 1))
        drop = config.data.overlong_prompts == "drop"
        self.examples, self.prompts = self._encode(self.examples, drop)
        self.eval_examples, self.eval_prompts = self._encode(self.eval_examples, drop=False)
        internal = config.grpo.internal_layer is not None
        with _naming("grpo.internal_layer" if internal else "oisd.student_layers"):
            self.objective = Objective(self.policy, config)
        self.learner = Learner(self.objective, config, self.processes)
        self.step, self.engine = 0, "generate"
        self.resumed = checkpoint is not None
        if checkpoint is not None:
            state = self.folder.state(checkpoint)
            self.step = state["step"]
            self.learner.load_state_dict(state["learner"])
        self.reference = self._load_reference() if config.grpo.kl_coef and self.resumed else None

    # ------------------------------------------------------------------ the run

    def train(self) -> dict[str, Any]:
        """Run to the end, from the newest checkpoint if there is one; returns the summary."""
        config, run = self.config, self.config.run
        try:
            if self.processes.is_first:
                self.folder.rewind(self.step if self.resumed else -1)
            with self._progress() as progress:
                if self.resumed:
                    self._settle_engine(progress)
                else:
                    self._begin(progress)
                with self.objective.tapped():
                    while self.step < run.steps:
                        row = self._train_step(progress)
                        self.step += 1
                        every = config.eval.every
                        last = self.step == run.steps
                        if last or (every and self.step % every == 0):
                            row |= self._evaluate(progress)
                        if self.processes.is_first:
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
        """What precedes the first step: warm-up, reference model, first evaluation."""
        if self.config.warmup.steps:
            warm_up(
                self.policy,
                self.examples,
                self.config.warmup,
                seed=self.config.run.seed,
                on_step=progress.warmup,
            )
        # What adapters freeze each process has read from the same files.
        self.processes.broadcast(p.detach() for p in self.learner.parameters)
        if self.config.grpo.kl_coef:
            if self.processes.is_first and not self.config.model.lora_rank:
                self.policy.model.save_pretrained(self.folder.reference)
                self.policy.tokenizer.save_pretrained(self.folder.reference)
            self.processes.barrier()
            self.reference = self._load_reference()
        self._settle_engine(progress)
        row = {"step": 0, **self._evaluate(progress)}
        if self.processes.is_first:
            if len(row) > 1:
                self.folder.log(row)
                progress.log(row)
            if self.config.warmup.steps:
                self._save()
        self.processes.barrier()

    def _settle_engine(self, progress: Progress) -> None:
        """Which engine samples; by a trial on the first step's prompts where that is open."""
        rollout, file = self.config.rollout, self.folder.engine
        if rollout.engine == "generate":
            return
        choice = EngineChoice.read(file) if self.resumed else None
        if choice is None:
            progress.phase("timing engines")
            index, _ = self._shared_out(step=0)

            def logprobs(batch: Batch) -> Tensor:
                with self.objective.tapped():
                    return self._logprobs(self.objective, batch)

            choice = choose_engine(
                self.policy, logprobs, [self.prompts[i] for i in index], rollout, self.processes
            )
            if self.processes.is_first:
                choice.write(file)
            progress.note(f"rollouts by {choice.engine}: {choice.reason}")
        self.engine = choice.engine
        self.objective.sampled_by(self.engine)

    def _train_step(self, progress: Progress) -> dict[str, Any]:
        config = self.config
        clock = Stopwatch()
        learning_rate = self.learner.schedule.get_last_lr()[0]
        torch.manual_seed(_seed_of(config.run.seed, self.step, self.processes.rank))
        try:
            progress.phase("sampling")
            minibatches, metrics = self._roll_out(clock)
            progress.phase("learning")
            with clock("update"):
                losses, norms = self.learner.learn(minibatches, self.step)
        except NonFiniteError as error:
            raise self._report(error) from None
        metrics = self._reduce(add_metrics(metrics, losses))
        row: dict[str, Any] = {"step": self.step + 1}
        row |= {name: mean.item() for name, mean in metrics.items()}
        row |= norms
        row["learning_rate"] = learning_rate
        row |= clock.times()
        return row

    # ------------------------------------------------------------------ rollouts

    def _roll_out(self, clock: Stopwatch) -> tuple[list[tuple[Batch, Totals]], Metrics]:
        """Sample and grade this process's share; its minibatches and metrics."""
        config, rollout = self.config, self.config.rollout
        size, count = rollout.completions_per_prompt, rollout.prompts_per_step
        mine = self.processes.share(range(count))
        index, rows = self._shared_out(self.step)
        prompts = [self.prompts[i] for i in index]
        with clock("rollout"), self.objective.untapped():
            completions = self.policy.sample(
                prompts,
                rows,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                seed=config.run.seed,
                step=self.step,
                batch_size=rollout.batch_size,
                engine=self.engine,
            )
        with clock("reward"):
            texts = self.policy.decode(completions)
            graded = self.reward(texts, [self.examples[i].answer for i in index])
            rewards = torch.tensor(graded, dtype=torch.float32)
        advantages = self._advantages(rewards, completions.lengths.cpu())
        everything = torch.ones_like(rewards, dtype=torch.bool)
        metrics = {
            "reward": Mean.over(rewards, everything),
            "frac_zero_std": frac_zero_std(rewards, size),
            "completion_length": Mean.over(completions.lengths.cpu(), everything),
            "frac_finished": Mean.over(completions.finished.cpu(), everything),
            "reward_timeouts": Mean(
                torch.tensor(float(self.reward.timeouts)),
                torch.tensor(float(self.processes.is_first)),
            ),
        }
        every = config.run.completions_every
        if self.processes.is_first and every and self.step % every == 0:
            table = [
                {
                    "prompt": self.policy.tokenizer.decode(prompts[i]),
                    "completion": texts[i],
                    "answer": self.examples[index[i]].answer,
                    "reward": graded[i],
                    "advantage": round(advantages[i].item(), 4),
                    "tokens": int(completions.lengths[i]),
                }
                for i in range(min(len(texts), 64))
            ]
            self.folder.write_completions(self.step + 1, table)
        batch = assemble(prompts, completions, advantages, rows, self.policy.pad_token_id)
        self._require_finite(batch)
        slots = torch.tensor([slot for slot in mine for _ in range(size)], dtype=torch.int64)
        with clock("logprobs"):
            return self._minibatches(batch, slots), metrics

    def _advantages(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """[B] of this process's completions; Reinforce++ looks at all processes'."""
        config, size = self.config.grpo, self.config.rollout.completions_per_prompt
        if config.advantage == "rloo":
            return rloo_advantages(rewards, size)
        if config.advantage == "reinforce++":
            shares = self.processes.gather((rewards, lengths))
            whole = [torch.cat(parts) for parts in zip(*shares, strict=True)]
            return batch_advantages(rewards, lengths, (whole[0], whole[1]))
        return group_advantages(rewards, size, scale_by_std=config.scale_by_std)

    def _shared_out(self, step: int) -> tuple[list[int], list[int]]:
        """This process's completions of a step: the index of each one's example, and its number."""
        rollout = self.config.rollout
        size, count = rollout.completions_per_prompt, rollout.prompts_per_step
        chosen = prompt_indices(step, count, len(self.examples), self.config.run.seed)
        mine = self.processes.share(range(count))
        index = [chosen[slot] for slot in mine for _ in range(size)]
        return index, [slot * size + i for slot in mine for i in range(size)]

    def _require_finite(self, batch: Batch) -> None:
        """Raise NonFiniteError, on all processes, if one sampled from logits not finite."""
        broken = ~batch.rollout_logprobs.isfinite().all(dim=1)
        count = broken.sum()
        self.processes.sum_([count])
        if count:
            part = batch.select(broken.nonzero().flatten())
            rows = part.rows.tolist()
            raise NonFiniteError(
                f"the model's logits are not finite in the rollout (completions {rows})", part
            )

    def _minibatches(self, batch: Batch, slots: Tensor) -> list[tuple[Batch, Totals]]:
        """Split by prompt, leave out what carries no gradient, count what the losses divide by."""
        grpo, device = self.config.grpo, batch.input_ids.device
        part = slots * grpo.minibatches // self.config.rollout.prompts_per_step
        tokens = batch.predicts.sum(dim=1).cpu()
        sizes = [[(part == m).sum(), tokens[part == m].sum()] for m in range(grpo.minibatches)]
        totals = torch.tensor(sizes, device=device)
        self.processes.sum_([totals])
        live = torch.ones(len(batch), dtype=torch.bool)
        if grpo.skip_zero_advantage and not grpo.kl_coef:
            live = (batch.advantages != 0).cpu()
        minibatches = []
        for m, (sequences, num_tokens) in enumerate(totals.tolist()):
            own = batch.select(((part == m) & live).nonzero().flatten().to(device))
            if self.reference is not None:
                with self._as_reference(self.reference):
                    own = replace(own, ref_logprobs=self._logprobs(self.reference, own))
            # The first step is taken from the policy that sampled: its ratios are 1 by definition.
            if m > 0:
                own = replace(own, old_logprobs=self._logprobs(self.objective, own, self.step))
            minibatches.append((own, Totals(sequences, num_tokens)))
        return minibatches

    def _logprobs(self, objective: Objective, batch: Batch, step: int | None = None) -> Tensor:
        """[B, T] log-probs without gradient, by micro-batches; 0 where no token is predicted."""
        result = torch.zeros_like(batch.rollout_logprobs)
        for index in batch.micro_batches(self.config.run.tokens_per_microbatch):
            micro = batch.select(index)
            found = objective.logprobs(micro, step)
            result[index, : found.shape[1]] = found.to(result.dtype)
        return result

    def _report(self, error: NonFiniteError) -> NonFiniteError:
        """Write down the batch in which a loss was not finite; say what is left to go on from."""
        name = f"nonfinite-step-{self.step + 1}-rank-{self.processes.rank}.json"
        texts = [self.policy.tokenizer.decode(ids) for ids in error.batch.token_ids()]
        rows = dict(zip(error.batch.rows.tolist(), texts, strict=True))
        report = {"step": self.step + 1, "found": error.found, "completions": rows}
        (self.folder.path / name).write_text(json.dumps(report, indent=1), encoding="utf-8")
        return NonFiniteError(
            f"step {self.step + 1}: {error.found}. No optimizer step was taken with it; the last "
            f"good checkpoint is {self.folder.latest() or 'the initial model'}; the batch is in "
            f"{self.folder.path / name}. A lower optimizer.learning_rate may help.",
            error.batch,
        )

    def _reduce(self, metrics: Metrics) -> Metrics:
        """The metrics over all processes."""
        names = list(metrics)
        flat = [torch.stack([m.total.cpu(), m.count.cpu()]) for m in metrics.values()]
        ours = dict(zip(names, torch.stack(flat).tolist(), strict=True))
        total: Metrics = {}
        for theirs in self.processes.gather(ours):
            total = add_metrics(
                total, {k: Mean(torch.tensor(t), torch.tensor(n)) for k, (t, n) in theirs.items()}
            )
        return total

    # ------------------------------------------------------------------ the rest

    def _load_examples(self, source: Any, limit: int | None) -> list[Example]:
        return load_examples(
            source.source,
            split=source.split,
            subset=source.subset,
            prompt_field=source.prompt_field,
            answer_field=source.answer_field,
            answer_pattern=source.answer_pattern,
            limit=limit,
            seed=self.config.run.seed,
        )

    def _encode(self, examples: list[Example], drop: bool) -> tuple[list[Example], list[list[int]]]:
        """The examples with their prompts' token ids, without those that are too long."""
        data = self.config.data
        encoded = encode_prompts(
            self.policy.tokenizer,
            examples,
            system_prompt=data.system_prompt,
            chat_template=data.chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            overlong="drop" if drop else "error",
        )
        if encoded.dropped:
            warnings.warn(
                f"{len(encoded.dropped)} prompts are longer than data.max_prompt_tokens = "
                f"{data.max_prompt_tokens} and were dropped",
                stacklevel=2,
            )
        return encoded.examples, encoded.token_ids

    def _warn_of_answers(self) -> None:
        """A gold answer that the grader cannot read would earn every completion 0, in silence."""
        if isinstance(self.reward, MathReward):
            answers = [e.answer for e in [*self.examples[:256], *self.eval_examples[:256]]]
            problems = self.reward.check_answers(answers)
            if problems:
                warnings.warn(
                    f"{len(problems)} of {len(answers)} gold answers looked at do not grade as "
                    f"equal to themselves, so no completion can earn their reward: {problems[:3]}",
                    stacklevel=2,
                )

    def _load_reference(self) -> Objective:
        """The initial policy, frozen, for the KL term: a copy, or this one without its adapters."""
        if self.config.model.lora_rank:
            return self.objective
        policy = load_policy(
            replace(self.config.model, gradient_checkpointing=False),
            seed=self.config.run.seed,
            device=self.processes.device,
            checkpoint=self.folder.reference,
        )
        policy.model.requires_grad_(False).eval()
        off = AlignmentConfig(think_weight=0.0, attention_weight=0.0)
        return Objective(policy, replace(self.config, oisd=off))

    def _as_reference(self, reference: Objective) -> AbstractContextManager[Any]:
        is_policy = reference is self.objective  # whose taps are open already
        return adapters.disabled(self.policy.model) if is_policy else reference.tapped()

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        if not self.eval_examples:
            return {}
        settings = self.config.eval
        progress.phase("evaluating")
        taps = self.objective.untapped() if self.objective.is_tapped else nullcontext()
        with taps:
            mine = evaluate(
                self.policy,
                self.eval_examples,
                self.eval_prompts,
                self.reward,
                samples=settings.samples,
                max_completion_tokens=self.config.rollout.max_completion_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                # Another stream than the rollouts', and the same at every step.
                seed=self.config.run.seed + 2,
                batch_size=self.config.rollout.batch_size,
                engine=self.engine,
                rank=self.processes.rank,
                world_size=self.processes.size,
            )
        result = in_order(self.processes.gather(mine), self.eval_examples)
        if self.processes.is_first:
            self._write_evaluation(result)
        return {
            "eval/avg_at_k": result.avg_at_k(),
            f"eval/pass_at_{result.samples}": result.pass_at(result.samples),
        }

    def _write_evaluation(self, result: Evaluation) -> None:
        folder = self.folder.path / "evaluations"
        folder.mkdir(exist_ok=True)
        rows = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in result.problems)
        (folder / f"step-{self.step}.jsonl").write_text(rows, encoding="utf-8")
        (folder / f"step-{self.step}.json").write_text(
            json.dumps(result.summary(), indent=1), encoding="utf-8"
        )

    def _save(self) -> None:
        self.folder.save(
            self.step,
            self.policy.model,
            self.policy.tokenizer,
            {"learner": self.learner.state_dict()},
            keep=self.config.run.keep_checkpoints,
        )

    def _progress(self) -> Progress:
        return Progress(
            total=self.config.run.steps,
            start=self.step,
            warmup=0 if self.resumed else self.config.warmup.steps,
            enabled=self.processes.is_first,
            tensorboard=self.folder.tensorboard,
        )


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Turn a ValueError into one that names the setting that it comes from."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _seed_of(seed: int, step: int, rank: int) -> int:
    """For what draws from torch's own generator, such as dropout."""
    return (seed * 1_000_003 + step * 4099 + rank) % 2**63
