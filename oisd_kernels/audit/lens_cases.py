"""The launches that `oisd_kernels.audit` compiles: one function a kernel file, listed in CASES.

A case calls a launcher with "meta" tensors, whose addresses count as aligned. Where a launcher
picks tiles by architecture, it is told `capability` (90 for sm_90). Numbers that do not enter the
binary (shapes and strides, beyond their divisibility by 16) are those of Qwen3-4B. Cases marked
`full` resemble one that is not.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from oisd_kernels.audit.attention_cases import attention_cases
from oisd_kernels.audit.case import DTYPES, Case
from oisd_kernels.audit.case import empty as _empty
from oisd_kernels.gpu import GFX942
from oisd_kernels.lens.chunked import rows_split, rows_triton
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath
from oisd_kernels.lens.tiled import gradient, values
from oisd_kernels.lens.tiled.tiles import Head, Scores

VOCABULARY, ROWS = 151936, 1024
SLICED = 10_000  # a vocabulary that a gradient takes in few slices, the last of them in part
PLAIN, ALL = "plain", "bias, softcap, temperature"


def row_cases(capability: int) -> Iterator[Case]:
    """The row kernels: logits in fp32, gradient in the dtype of the matmul's operands."""
    del capability
    z, factor, index = _empty(ROWS, VOCABULARY), _empty(ROWS), _empty(ROWS, dtype=torch.int64)
    final = FinalRows(factor, factor, index, factor, factor)
    for options in (PLAIN, ALL):
        math_ = partial(RowMath, beta=0.5, temperature=1.0, softcap=None)
        bias, full = None, options == PLAIN
        if options == ALL:
            math_ = partial(RowMath, beta=0.25, temperature=0.5, softcap=30.0)
            bias = _empty(VOCABULARY)
        for labels in (None, index):
            name = f"{'no ' if labels is None else ''}labels, {options}"
            yield Case(
                name,
                partial(rows_triton.final_rows, z, bias, labels, math_("jsd"), True, True),
                full or labels is None,
            )
        for name, operand in DTYPES.items():
            yield Case(
                f"gradient {name}, {options}",
                partial(
                    rows_triton.final_gradient,
                    z, final, bias, index, factor, math_("jsd"), operand,
                ),
                full,
            )  # fmt: skip
        for divergence, (name, operand) in itertools.product(
            ("jsd", "forward_kl", "reverse_kl"), {"no": None, **DTYPES}.items()
        ):
            yield Case(
                f"{divergence}, gradient {name}, {options}",
                partial(
                    rows_triton.student_rows,
                    z, z, final, bias, index, factor, math_(divergence), operand is not None,
                    True, operand or torch.float32,
                ),
                full or (divergence != "jsd" and name != "bf16"),
            )  # fmt: skip


def _split_rows(
    math_: RowMath, operand: torch.dtype | None, labels: bool, everything: bool, nvidia: bool
) -> None:
    device = torch.device("meta")
    rows = rows_split.SplitRows(1, ROWS, VOCABULARY, torch.float32, operand, device, nvidia)
    z, z_final = _empty(ROWS + rows.spare, VOCABULARY)[:ROWS], _empty(ROWS, VOCABULARY)
    bias = _empty(VOCABULARY) if everything else None
    factor, index = _empty(ROWS), _empty(ROWS, dtype=torch.int64)
    final = rows.final_rows(z_final, bias, index if labels else None, math_, True, True)
    rows.student_rows(
        z, z_final, final, bias, index, factor, math_, operand is not None, True,
        operand or torch.float32,
    )  # fmt: skip


def split_row_cases(capability: int) -> Iterator[Case]:
    """The row kernel of three stages."""
    nvidia = capability != GFX942
    for options, divergence, (name, operand) in itertools.product(
        (PLAIN, ALL), ("jsd", "forward_kl", "reverse_kl"), {"no": None, **DTYPES}.items()
    ):
        everything = options == ALL
        math_ = RowMath(divergence, 0.5, 1.0, None)
        if everything:
            math_ = RowMath(divergence, 0.25, 0.5, 30.0)
        # Labels concern the final rows, whatever the divergence.
        for labels in (False, True) if divergence == "jsd" else (everything,):
            yield Case(
                f"{divergence}, {'' if labels else 'no '}labels, gradient {name}, {options}",
                partial(_split_rows, math_, operand, labels, everything, nvidia),
                (divergence, name) != ("jsd", "bf16") or labels != everything,
            )


def _tiled_values(
    states: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    of: str,
    scores: Scores,
    stats: bool,
    capability: int,
) -> None:
    head = Head(states, weight, bias, torch.float32, capability)
    if of == "logprob":
        labels = _empty(states[0].shape[1], dtype=torch.int64)
        values.logprob_values(head, labels, scores, None)
        return
    keep = _empty(*states[0].shape[:-1], dtype=torch.bool)
    values.lens_values(head, keep, of, 0.5, scores, stats, stats, None)


def _tiled_gradient(
    states: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    of: str,
    scores: Scores,
    capability: int,
) -> None:
    head = Head(states, weight, bias, torch.float32, capability)
    rows = states[0].shape[:-1]
    if of == "logprob":
        labels = _empty(rows[1], dtype=torch.int64)
        loss = gradient.LogprobLoss(labels, _empty(rows[1]), _empty(rows[1]))
    else:
        loss = gradient.LensLoss(of, 0.5, _empty(rows[1]), _empty(*rows), _empty(*rows))
    wanted = True, True, bias is not None
    out = gradient.allocate_gradients(states[0], weight, torch.float32, wanted)
    gradient.Backward("audit", head, loss, _empty(*rows), None, scores, out, None).run()


# Dtypes of the states and of the unembedding, and a width whose rows are aligned or not.
TILED_KINDS = [
    *((name, name, 2560) for name in DTYPES),
    ("bf16", "fp32", 2560),
    ("fp32", "bf16", 2560),
    *((name, name, 2555) for name in DTYPES),
]


def _tiled_inputs(
    states: str, head: str, width: int, layers: int, everything: bool, vocabulary: int
) -> tuple[list[Tensor], Tensor, Tensor | None, Scores]:
    dtype = DTYPES[head]
    hidden = _empty(max(layers, 1), ROWS, width, dtype=DTYPES[states])
    bias = _empty(vocabulary, dtype=dtype) if everything else None
    scores = Scores(1.0, 30.0 if everything else None)
    weight = _empty(vocabulary, width, dtype=dtype)
    return [hidden, hidden[:1]] if layers else [hidden], weight, bias, scores


def _kind_name(states: str, head: str, width: int) -> str:
    name = states if states == head else f"{states} against {head}"
    return f"{name}, odd width" if width % 16 else name


def tiled_cases(capability: int) -> Iterator[Case]:
    """Operands of one dtype or mixed, aligned or odd; the two KLs are one kernel."""
    for kind, of, stats, options in itertools.product(
        TILED_KINDS, ("jsd", "forward_kl", "logprob"), (False, True), (PLAIN, ALL)
    ):
        everything, name = options == ALL, _kind_name(*kind)
        layers = 0 if of == "logprob" else 2
        states, weight, bias, scores = _tiled_inputs(*kind, layers, everything, VOCABULARY)
        run = partial(_tiled_values, states, weight, bias, of, scores, stats, capability)
        wanted = ", statistics" if stats else ""
        extreme = everything == stats if name == "bf16" else everything and stats
        full = name not in ("bf16", "fp32") or not extreme or (of == "logprob" and not stats)
        yield Case(f"{of}, {name}{wanted}, {options}", run, full)


def tiled_gradient_cases(capability: int) -> Iterator[Case]:
    """To hidden, to weight and to bias, of the same operands."""
    for kind, of, options in itertools.product(
        TILED_KINDS, ("jsd", "forward_kl", "reverse_kl", "logprob"), (PLAIN, ALL)
    ):
        everything, name = options == ALL, _kind_name(*kind)
        layers = 0 if of == "logprob" else 2
        states, weight, bias, scores = _tiled_inputs(*kind, layers, everything, SLICED)
        run = partial(_tiled_gradient, states, weight, bias, of, scores, capability)
        full = name not in ("bf16", "fp32") or of.endswith("kl") or not everything
        yield Case(f"gradient of {of}, {name}, {options}", run, full)


Cases = Callable[[int], Iterator[Case]]
CASES: list[Cases] = [
    row_cases,
    split_row_cases,
    tiled_cases,
    tiled_gradient_cases,
    attention_cases,
]
