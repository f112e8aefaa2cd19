"""The matmuls of a chunk against the unembedding, in the dtypes that keep their digits.

Logits leave the matmul in the compute dtype (float32; float64 where an input is). On CUDA, bf16 and
fp16 operands stay as they are and the tensor cores add up in fp32. Elsewhere, and where dtypes are
mixed, operands are raised to the compute dtype, the unembedding a slice of V at a time.

Letters: R rows, D width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_BYTES = 16 << 20  # of the unembedding raised to the compute dtype
HALF = (torch.bfloat16, torch.float16)


class Projection:
    """`hidden @ weight.T` and its two gradients, for hidden states of `dtypes`."""

    def __init__(self, weight: Tensor, dtypes: set[torch.dtype], compute: torch.dtype):
        native = weight.is_cuda and torch.version.hip is None and weight.dtype in HALF
        self.weight = weight
        self.compute = compute
        self.operand = weight.dtype if native and dtypes == {weight.dtype} else compute

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """rows [R, D], out [R, V] in the compute dtype."""
        if self.operand != self.compute:
            torch.ops.aten.mm.dtype_out(rows, self.weight.t(), self.compute, out=out)
            return
        for part, weight in self._slices():
            torch.mm(rows, weight.t(), out=out[:, part])

    def to_hidden(self, d_logits: Tensor) -> Tensor:
        """d_logits [R, V] in the operand dtype -> [R, D] in the compute dtype."""
        if self.operand != self.compute:
            return torch.mm(d_logits, self.weight, out_dtype=self.compute)
        out = d_logits.new_zeros(d_logits.shape[0], self.weight.shape[1])
        for part, weight in self._slices():
            out.addmm_(d_logits[:, part], weight)
        return out

    def add_to_weight(self, total: Tensor, d_logits: Tensor, scale: Tensor, rows: Tensor) -> None:
        """total [V, D] += (scale * d_logits).T @ rows; `scale` [R], or empty for ones."""
        if self.operand == self.compute:
            total.addmm_(d_logits.t(), rows)
            return
        if scale.numel() == 0:
            torch.ops.aten.addmm.dtype_out(total, d_logits.t(), rows, self.compute, out=total)
            return
        # fp16: the largest scale of the chunk is taken out, the rest (at most 1) joins the rows.
        largest = scale.amax()
        rows = (rows * (scale / largest)[:, None]).to(self.operand)
        step = max(SLICE_BYTES // (total.shape[1] * total.element_size()), 1)
        for v in range(0, total.shape[0], step):
            part = torch.mm(d_logits[:, v : v + step].t(), rows, out_dtype=self.compute)
            total[v : v + step].addcmul_(part, largest)

    def add_to_bias(self, total: Tensor, d_logits: Tensor, scale: Tensor) -> None:
        """total [V] += (scale * d_logits).sum(0)."""
        if scale.numel() == 0:
            total.add_(d_logits.sum(0, dtype=self.compute))
            return
        ones = torch.ones_like(d_logits[:, :1])
        self.add_to_weight(total[:, None], d_logits, scale, ones)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        vocabulary, width = self.weight.shape
        if self.weight.dtype == self.compute:
            yield slice(0, vocabulary), self.weight
            return
        step = max(SLICE_BYTES // max(width * self.compute.itemsize, 1), 1)
        for v in range(0, vocabulary, step):
            part = slice(v, min(v + step, vocabulary))
            yield part, self.weight[part].to(self.compute)
