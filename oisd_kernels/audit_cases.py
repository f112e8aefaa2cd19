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

from oisd_kernels import rows_triton, tiled
from oisd_kernels.audit_attention import attention_cases
from oisd_kernels.audit_case import DTYPES, Case
from oisd_kernels.audit_case import empty as _empty
from oisd_kernels.rows_torch import FinalRows, RowMath

VOCABULARY, ROWS = 151936, 1024
PLAIN, ALL = "plain", "bias, softcap, temperature"


def row_cases(capability: int) -> Iterator[Case]:
    """The row kernels: logits in fp32, gradient in the dtype of the matmul's operands."""
    del capability
    z, factor, index = _empty(ROWS, VOCABULARY), _empty(ROWS), _empty(ROWS, dtype=torch.int64)
    final = FinalRows(factor, factor, index, factor)
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
                full,
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
                full or (divergence != "jsd" and name in ("no", "fp32")),
            )  # fmt: skip


def _tiled(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divergence: str,
    softcap: float | None,
    stats: bool,
    capability: int,
) -> None:
    run = tiled.Run(hidden, hidden[0], weight, bias, torch.float32, None, capability)
    run(_empty(*hidden.shape[:-1]), divergence, 0.5, 1.0, softcap, stats)


def tiled_cases(capability: int) -> Iterator[Case]:
    """Operands of one dtype or mixed, aligned or odd; the two KLs are one kernel."""
    kinds = [(name, name, 2560) for name in DTYPES] + [
        ("bf16", "fp32", 2560),
        ("fp32", "bf16", 2560),
    ]
    kinds += [("bf16", "bf16", 2555), ("fp16", "fp16", 2555), ("fp32", "fp32", 2555)]
    for (states, head, width), divergence, stats, options in itertools.product(
        kinds, ("jsd", "forward_kl"), (False, True), (PLAIN, ALL)
    ):
        dtype, hidden = DTYPES[head], _empty(2, ROWS, width, dtype=DTYPES[states])
        everything = options == ALL
        bias = _empty(VOCABULARY, dtype=dtype) if everything else None
        run = partial(
            _tiled, hidden, _empty(VOCABULARY, width, dtype=dtype), bias, divergence,
            30.0 if everything else None, stats, capability,
        )  # fmt: skip
        name = states if states == head else f"{states} against {head}"
        odd = ", odd width" if width % 16 else ""
        wanted = ", statistics" if stats else ""
        extreme = everything == stats if name == "bf16" and not odd else everything and stats
        full = name not in ("bf16", "fp32") or not extreme
        yield Case(f"{divergence}, {name}{odd}{wanted}, {options}", run, full)


CASES: list[Callable[[int], Iterator[Case]]] = [row_cases, tiled_cases, attention_cases]
