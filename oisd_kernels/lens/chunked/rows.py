"""The row arithmetic of a chunk: what each of its implementations offers.

    rows_torch      in place, in torch, for machines without a GPU
    rows_triton     one program a row, on GPUs and in the interpreter
    rows_split      several programs a row, which reads memory once; not chosen yet
    rows_parallel   in torch, for a vocabulary in parts on the ranks of a process group

A pass calls `final_rows` for the final layer's rows of a chunk, `student_rows` for the student
rows beside them, once or in parts, `final_rows_again` where the log-probability has another
temperature than the divergence, and `final_gradient` last. Between the calls it leaves the memory
of the logits alone, because what `z` holds then is for the next call of the same implementation:
log-probabilities in torch, so that they are formed once; the logits in Triton, where forming them
again costs less than writing them.

Letters: C final rows, R student rows, V vocabulary (of this rank, where it is in parts).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RowMath(NamedTuple):
    """What is done to a row."""

    divergence: str
    beta: float
    temperature: float
    softcap: float | None


class FinalRows(NamedTuple):
    """Statistics of the final layer's rows, each [C]."""

    logsumexp: Tensor
    entropy: Tensor
    top1: Tensor
    logprob: Tensor  # of the labels; empty without them
    top_logprob: Tensor  # of the likeliest token


class StudentRows(NamedTuple):
    divergence: Tensor  # [R]
    entropy: Tensor  # [R]
    agreement: Tensor  # [R]: 1 where the likeliest token is the teacher's
    top1: Tensor  # [R], the likeliest token
    top_logprob: Tensor  # [R], of it
    d_logits: Tensor | None  # [R, V], in the memory of the logits
    scale: Tensor  # what d_logits is still to be multiplied by, [R]; empty for ones


class Rows(Protocol):
    """The functions; every `math_` is of the rows at hand, `bias` [V] is added to their logits."""

    def final_rows(
        self,
        z: Tensor,  # [C, V]: logits; for this implementation's other functions afterwards
        bias: Tensor | None,
        labels: Tensor | None,  # [C]
        math_: RowMath,
        entropies: bool,
        top1s: bool,
    ) -> FinalRows:
        """Statistics; entropies and likeliest tokens may be missing (0) if not asked for."""
        ...

    def final_rows_again(
        self,
        z: Tensor,  # [C, V]: as `final_rows` left it with `old`; as it leaves it with `new`
        final: FinalRows,  # what it returned
        bias: Tensor | None,
        labels: Tensor,  # [C]
        old: RowMath,
        new: RowMath,  # differs in the temperature alone
        entropies: bool,
    ) -> FinalRows:
        """Statistics of the same logits at another temperature, without likeliest tokens."""
        ...

    def student_rows(
        self,
        z: Tensor,  # [R, V]: logits; their gradient afterwards, or nothing of use without it
        z_final: Tensor,  # [C, V]: as `final_rows` left it, before and afterwards
        final: FinalRows,
        bias: Tensor | None,
        slot: Tensor,  # [R], into C: each row's teacher
        factor: Tensor,  # [R], folded into the gradient
        math_: RowMath,
        gradient: bool,
        stats: bool,  # entropy, agreement, likeliest token; they may be missing (0) otherwise
        operand: torch.dtype,  # of the gradient where it is a tensor core's operand
    ) -> StudentRows:
        """Divergence of each row from its teacher, and the gradient of sum(factor * divergence)."""
        ...

    def final_gradient(
        self,
        z: Tensor,  # [C, V]: as `final_rows` or `final_rows_again` left it; the gradient afterwards
        final: FinalRows,  # what that returned
        bias: Tensor | None,
        labels: Tensor,  # [C]
        factor: Tensor,  # [C]
        math_: RowMath,
        operand: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of sum(factor * logprob) to the logits, and its scale as in `StudentRows`."""
        ...


def in_place(z: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient's place in the logits' memory, and its rows' scale: empty but for float16."""
    d_logits = z if operand == z.dtype else z.view(operand)[:, : z.shape[1]]
    return d_logits, z.new_empty(len(z) if operand == torch.float16 else 0)
