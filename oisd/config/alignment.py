"""Settings of internal self-distillation: the `[oisd]` table of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oisd.schema import above_0, at_least, require

# Of a term's gradient in GRPO's, that a weight may be made to keep.
MOST_SHARE = 10


@dataclass(frozen=True)
class AlignmentConfig:
    """Internal self-distillation: an intermediate layer learns from the final one."""

    student_layers: tuple[int, ...] = (6,)
    """Layers that learn, counted from 1 (`hidden_states[l]` of transformers)."""
    think_weight: float = 1.0
    """Weight of the logit-lens divergence (lambda_think of eq. 11); 0 turns it off."""
    attention_weight: float = 0.1
    """Weight of the attention divergence (lambda_attn of eq. 11); 0 turns it off."""
    think_share: float | None = None
    """Instead of a constant weight, one that keeps the norm of the weighted gradient at this share
    of GRPO's, say 0.1. `think_weight` is then the weight until the first measurement."""
    attention_share: float | None = None
    """As `think_share`, of the attention divergence."""
    think_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Anneal the weight, or the share, to 0 over `run.steps`: multiplied by 1 - step / steps or by
    (1 + cos(pi step / steps)) / 2."""
    attention_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """As `think_schedule`, of the attention divergence."""
    share_every: int = 20
    """Measure the share of each divergence's weighted gradient in the update, as a part of GRPO's,
    every n steps; 0 for never. Changes nothing else, unless a share is set."""
    advantage: Literal["signed", "absolute", "shuffled"] = "signed"
    """How the advantage weighs the divergences. "signed" is the method, the others are controls for
    studies: "absolute" always pulls toward the final layer, "shuffled" gives each completion the
    advantage of another one of the step, drawn at random. GRPO keeps its own advantages."""
    advantage_clip: float | None = None
    """Clip the signed advantage to [-c, c]; the paper states no c, so by default it is not."""
    lens_temperature: float = 1.0
    lens_norm: Literal["final", "none"] = "final"
    """Norm of the logit lens: the model's own final norm (OISD) or none (BuPO)."""
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    beta: float = 0.5
    """The teacher's share of the mixture in the Jensen-Shannon divergence."""
    attention_kernel: Literal["auto", "fused", "separate", "reference"] = "auto"
    """Where the attention loss is computed: in the student layers' own attention ("fused"), beside
    it ("separate"), or from whole attention maps in memory ("reference"). "auto" fuses on a GPU
    where a layer allows it; elsewhere, and with sampled keys, it is "separate"."""
    attention_steps: int | None = None
    """Decoding steps per rollout in the attention loss, drawn at random; all by default."""
    key_window: int | None = None
    """With `key_stride`: the nearest keys, in the attention loss; all keys by default."""
    key_stride: int | None = None
    """With `key_window`: take every n-th position of the keys farther away."""
    attention_student: tuple[int, ...] | None = None
    """For each student layer, the layer whose attention learns; by default the nearest at or below
    it that attends by softmax: itself, unless the model is a hybrid. Hybrids extend the paper."""
    attention_teacher: int | None = None
    """The layer whose attention is learned from; by default the last that attends by softmax."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "student_layers", tuple(self.student_layers))
        layers, key = list(self.student_layers), "oisd.student_layers"
        require(all(layer >= 1 for layer in layers), key, "layers counted from 1", layers)
        require(len(set(layers)) == len(layers), key, "distinct layers", layers)
        require(bool(layers) or not self.active, key, "at least one layer", layers)
        at_least(0, self, "oisd.think_weight", "oisd.attention_weight")
        above_0(self, "oisd.advantage_clip", "oisd.lens_temperature")
        self._check_shares()
        wanted = 'in (0, 1); for a pure KL use divergence = "forward_kl" or "reverse_kl"'
        require(0 < self.beta < 1, "oisd.beta", wanted, self.beta)
        sampled = self.key_window, self.key_stride
        together = (self.key_window is None) == (self.key_stride is None)
        require(together, "oisd.key_window and oisd.key_stride", "given together", sampled)
        kernel = self.attention_kernel
        wanted = '"auto", "separate" or "reference" with sampled keys (oisd.key_window)'
        fits = kernel != "fused" or self.key_window is None
        require(fits, "oisd.attention_kernel", wanted, kernel)
        at_least(1, self, "oisd.attention_steps", "oisd.key_window", "oisd.key_stride")
        self._check_attention_layers()

    def _check_shares(self) -> None:
        at_least(0, self, "oisd.share_every")
        for term in ("think", "attention"):
            key, share = f"oisd.{term}_share", getattr(self, f"{term}_share")
            wanted = f'above 0 and at most {MOST_SHARE}, or "none" for a constant weight'
            require(share is None or 0 < share <= MOST_SHARE, key, wanted, share)
            on = share is None or getattr(self, f"{term}_weight") > 0
            require(on, key, f'"none" with oisd.{term}_weight = 0', share)
            wanted = f"at least 1 with {key}, which needs measurements"
            require(share is None or self.share_every > 0, "oisd.share_every", wanted, 0)
            key, schedule = f"oisd.{term}_schedule", getattr(self, f"{term}_schedule")
            on = schedule == "constant" or getattr(self, f"{term}_weight") > 0
            require(on, key, f'"constant" with oisd.{term}_weight = 0', schedule)

    def _check_attention_layers(self) -> None:
        own, teacher = self.attention_student, self.attention_teacher
        for key, given in (("student", own), ("teacher", teacher)):
            used = given is None or self.attention_weight > 0
            require(used, f"oisd.attention_{key}", '"none" with oisd.attention_weight = 0', given)
        wanted = "at least 2, above the layers that learn from it"
        require(teacher is None or teacher > 1, "oisd.attention_teacher", wanted, teacher)
        if own is None:
            return
        object.__setattr__(self, "attention_student", tuple(own))
        key, count = "oisd.attention_student", len(self.student_layers)
        wanted = f"one layer for each of the {count} oisd.student_layers"
        require(len(own) == count, key, wanted, list(own))
        require(all(layer >= 1 for layer in own), key, "layers counted from 1", list(own))
        wanted = f"below oisd.attention_teacher ({teacher})"
        require(teacher is None or max(own) < teacher, key, wanted, list(own))

    @property
    def active(self) -> bool:
        """Whether any alignment loss is on."""
        return bool(self.think_weight or self.attention_weight)

    @property
    def follows_share(self) -> bool:
        """Whether any weight follows a measured share."""
        return self.think_share is not None or self.attention_share is not None

    @property
    def anneals(self) -> bool:
        """Whether any weight depends on the length of the run."""
        return (self.think_schedule, self.attention_schedule) != ("constant", "constant")
