"""The memory of a chunk's logits, which a thread keeps between calls on a CPU.

New memory costs a CPU a page fault for every 4 KiB, and freeing it as much again: 5 to 8 % of a
call whose rows fill it once (512 tokens, float32, one thread). On a GPU torch's allocator keeps it.
"""

import threading

import torch
from torch import Tensor

from oisd_kernels.lens.chunked.chunks import DEFAULT_BYTES

KEPT_BYTES = DEFAULT_BYTES["cpu"]  # at most, by each thread that calls


class _Kept(threading.local):
    buffer = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], uninitialised; of this thread's last call if that is large enough."""
    needed = rows * columns * dtype.itemsize
    if device.type != "cpu" or needed > KEPT_BYTES:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    if len(_kept.buffer) < needed:
        release()  # first: two would be over the budget
        _kept.buffer = torch.empty(needed, dtype=torch.uint8)
    buffer = _kept.buffer[:needed].view(dtype).view(rows, columns)
    settings = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    if fill and torch.are_deterministic_algorithms_enabled():
        buffer.fill_(torch.nan)  # as torch fills new memory then
    return buffer


def release() -> None:
    """Give this thread's memory back."""
    _kept.buffer = torch.empty(0, dtype=torch.uint8)
