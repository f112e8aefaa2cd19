"""The losses of a micro-batch: one forward of the policy, read through taps.

L = L_GRPO + think_weight * L_think + attention_weight * L_attn                        (eq. 11)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oisd import losses
from oisd.batch import Batch
from oisd.config import ConfigError, TrainConfig
from oisd.losses import Metrics
from oisd.models import Taps, Unembedding, UnsupportedModelError, last_logits_only
from oisd.policy import Policy
from oisd.rollout.sampling import row_keys, uniform
from oisd.run.model_guards import as_setting
from oisd.sharding import release, rounds, shard
from oisd.weights import Weights
from oisd_kernels import linear_logprob


@dataclass(frozen=True)
class Totals:
    """What the losses divide by: over the whole minibatch, on all processes."""

    sequences: int
    tokens: int


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before an optimizer step is taken with it.

    `found` says which, and `batch` holds the rows that had it.
    """

    def __init__(self, found: str, batch: Batch) -> None:
        super().__init__(found)
        self.found, self.batch = found, batch

    def __reduce__(self) -> tuple[type, tuple[str, Batch]]:
        return type(self), (self.found, self.batch)  # for another process


class Objective:
    """The losses that a configuration asks for.

    The taps are open only where they are read: `logprobs` opens them itself; call the objective,
    and run its backward, inside `with objective.taps`. Rollouts run outside and pay nothing.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.sampled_by("generate")
        align, internal = config.oisd, config.grpo.internal_layer
        students = list(align.student_layers) if align.active else []
        try:
            with policy.autocast():  # frozen layers beside adapters run in it alone
                self.taps = Taps(
                    policy.model,
                    student_layers=students if internal is None else [internal],
                    attention=align.attention_weight > 0,
                    lens_norm=align.lens_norm if internal is None else "none",
                    attention_kernel=self._attention_kernel(),
                    divergence=align.divergence,
                    beta=align.beta,
                    attention_student=align.attention_student,
                    attention_teacher=align.attention_teacher,
                )
        except UnsupportedModelError as error:
            raise error.reworded(as_setting) from error
        except ValueError as error:  # names the argument of Taps, which is called as the setting is
            setting = f"oisd.{str(error).removeprefix('Taps: ')}"
            setting = setting if internal is None else f"grpo.internal_layer: {error}"
            raise ConfigError(setting) from error
        if align.attention_weight and align.attention_kernel == "fused":
            self._require_fused()
        self.weights = Weights(config)

    def _require_fused(self) -> None:
        """Raise UnsupportedModelError if the update could not run the fused kernel.

        In training mode, as the update: what the taps see when they are made has no dropout.
        """
        model = self.policy.model
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), self.taps:
                with self.policy.autocast():
                    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except UnsupportedModelError as error:
            raise error.reworded(as_setting) from error

    def split(self) -> None:
        """Split the model over all processes, which then run each forward together."""
        model = self.policy.model
        shard(model, self.taps.layers, self.policy.dtype)
        # FSDP2 settles dtypes in the first forward, by the parameters that are trained then. That
        # of a KL term may run without the adapters, when none is.
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.policy.device)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self.policy.autocast():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        release(model)

    def sampled_by(self, engine: str) -> None:
        """Weight the tokens of that engine's rollouts as `grpo.tis_cap` says."""
        cap = self.config.grpo.importance_cap(engine, self.policy.is_copied)
        self.grpo = replace(self.config.grpo, tis_cap=cap)

    def _forward(self, batch: Batch) -> None:
        with self.policy.autocast():
            self.policy.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                # The losses project the rows that they need themselves.
                **last_logits_only(self.policy.model, batch.input_ids),
            )

    def _head(self) -> Unembedding:
        """The unembedding in the dtype of the forward.

        Under autocast hidden states and parameters are still float32, and so would be the products
        of the ops. The head is rounded as autocast rounds every other layer.
        """
        head, dtype = self.taps.unembedding, self.policy.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        return head._replace(weight=head.weight.to(dtype), bias=bias)

    def _is_internal(self, step: int | None) -> bool:
        return step is not None and step < self.config.grpo.internal_steps

    def _policy_states(self, rows: Tensor, step: int | None) -> Tensor:
        """[N, D] what the unembedding reads at some rows, for the policy that a step trains."""
        internal = self._is_internal(step)
        hidden = self.taps.student_hidden()[0] if internal else self.taps.final_hidden()
        return hidden.flatten(0, 1)[rows].to(self.policy.dtype)

    @torch.no_grad()
    def logprobs(self, batch: Batch, step: int | None = None) -> Tensor:
        """[B, T] log-probs of the completions as the weights are now; 0 where nothing is predicted.

        step: for the policy that this training step trains, which may be an internal layer's; by
            default the model's own.
        """
        result = torch.zeros_like(batch.rollout_logprobs)
        with self.taps:
            for index, micro in self.micro_batches(batch):
                rows = micro.predicting_rows()
                self._forward(micro)
                head = self._head()
                found, _, _ = linear_logprob(
                    self._policy_states(rows, step),
                    head.weight,
                    micro.labels.flatten()[rows],
                    bias=head.bias,
                    temperature=self.config.rollout.temperature,
                    logit_softcap=head.logit_softcap,
                )
                columns = micro.predicts.shape[1]
                result[index[rows // columns], rows % columns] = found.to(result.dtype)
        release(self.policy.model)
        return result

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        """The parts of a batch that are run at once, each with the indices of its rows.

        Where processes share one model, those with fewer parts run an idle one, without indices.
        """
        parts = batch.micro_batches(self.config.run.tokens_per_microbatch)
        idle = rounds(self.policy.model, len(parts)) - len(parts)
        for index in parts:
            yield index, batch.select(index)
        for _ in range(idle):
            yield batch.rows.new_empty(0), batch.idle()

    def __call__(
        self, batch: Batch, totals: Totals, step: int
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The losses by name, unweighted, and their metrics.

        step: counted from 0; it draws the sampled queries, and says whose policy is trained.
        """
        config, align = self.config, self.config.oisd
        rows = batch.predicting_rows()
        self._forward(batch)
        head = self._head()
        final = self._policy_states(rows, step)
        grpo, sampled = self.grpo, batch.rollout_logprobs
        if self._is_internal(step):  # which did not sample: the weight of its tokens would be ~0
            grpo, sampled = replace(grpo, tis_cap=None), None
        students = final.detach().new_empty(0, *final.shape)
        if align.think_weight:
            students = self.taps.student_hidden().flatten(1, 2)[:, rows].to(self.policy.dtype)

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten()[rows]

        sequences = totals.sequences
        weight = losses.token_weights(
            batch.predicts,
            config.grpo.aggregation,
            num_sequences=sequences,
            num_tokens=totals.tokens,
            max_tokens=config.rollout.max_completion_tokens,
        )
        mean = losses.token_weights(batch.predicts, "sequence-mean", num_sequences=sequences)
        joint = losses.grpo_and_think_loss(
            final,
            head.weight,
            batch.labels.flatten()[rows],
            students,
            batch.advantages[rows // batch.predicts.shape[1]],
            grpo,
            align,
            grpo_weight=weight.flatten()[rows],
            think_weight=mean.flatten()[rows],
            think_advantages=batch.aligned[rows // batch.predicts.shape[1]],
            old_logprobs=of_rows(batch.old_logprobs),
            rollout_logprobs=of_rows(sampled),
            ref_logprobs=of_rows(batch.ref_logprobs),
            temperature=config.rollout.temperature,
            bias=head.bias,
            logit_softcap=head.logit_softcap,
        )
        computed, metrics = {"grpo": joint.grpo}, joint.metrics
        if align.think_weight:
            computed["think"] = joint.think
        if align.attention_weight:
            steps = self._attention_steps(batch, step)
            weight = losses.token_weights(steps, "sequence-mean", num_sequences=sequences)
            if joint.importance is not None:
                weight.view(-1)[rows] *= joint.importance.to(weight)
            computed["attention"], more = losses.attention_loss(
                self.taps.attention(),
                batch.aligned,
                align,
                token_weight=weight,
                key_index=self._attention_keys(batch),
                impl="reference" if align.attention_kernel == "reference" else "auto",
            )
            metrics |= more
        return computed, metrics

    def _attention_kernel(self) -> str:
        """What the taps do: keys are sampled beside the attention, never inside it."""
        align = self.config.oisd
        beside = align.key_window is not None or align.attention_kernel == "reference"
        return "separate" if beside else align.attention_kernel

    def _attention_steps(self, batch: Batch, step: int) -> Tensor:
        """[B, T] the queries of the attention loss: all, or the paper's sampled decoding steps."""
        count = self.config.oisd.attention_steps
        if count is None:
            return batch.predicts
        device = batch.predicts.device
        # A stream of its own: the same keys drew the rollout's tokens.
        keys = row_keys(batch.rows.tolist(), self.config.run.seed + 1, step, device)
        return losses.sampled_steps(
            batch.predicts, uniform(keys, 0, batch.predicts.shape[1]), count
        )

    def _attention_keys(self, batch: Batch) -> Tensor | None:
        align = self.config.oisd
        if align.key_window is None or align.key_stride is None:
            return None
        b, t = batch.input_ids.shape
        return losses.sampled_keys(b, t, align.key_window, align.key_stride, batch.input_ids.device)
