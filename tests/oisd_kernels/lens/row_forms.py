"""The two forms of the Triton row kernels, for tests in the interpreter."""

import pytest
import torch
from torch import Tensor

from oisd_kernels.lens.chunked import head_pass
from oisd_kernels.lens.chunked.rows import Rows

FORMS = ["whole", "split"]  # of `rows_triton` and `rows_split`


def choose(form: str, patch: pytest.MonkeyPatch, part: int = 128, lag: int = 1) -> None:
    """Makes the operations take a form; that of split rows with parts of so many columns."""
    patch.setattr(head_pass, "SPLIT_ROWS", form == "split")
    if form == "split":
        from oisd_kernels.lens.chunked import rows_split

        patch.setattr(rows_split, "PART", part)
        patch.setattr(rows_split, "BLOCK", min(part // 2, 1024))
        patch.setattr(rows_split, "LAG", lag)


def functions(form: str, z_final: Tensor, layers: int, operand: torch.dtype | None) -> Rows:
    """Row functions for a chunk with these final rows; operand None: no gradient."""
    if form == "whole":
        return head_pass.row_functions(z_final.device)
    from oisd_kernels.lens.chunked.rows_split import SplitRows

    tokens, vocabulary = z_final.shape
    return SplitRows(layers, tokens, vocabulary, z_final.dtype, operand, z_final.device)


def in_room(z: Tensor, rows: Rows, stride: int) -> Tensor:
    """z [R, V] in rows of `stride` entries with the spare rows of `rows` behind, all NaN else."""
    wide = z.new_full((len(z) + getattr(rows, "spare", 0), stride), torch.nan)
    wide[: len(z), : z.shape[1]] = z
    return wide[: len(z), : z.shape[1]]
