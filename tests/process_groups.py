"""Process groups as torchrun makes them, forked from one process that has imported the library.

Under torchrun each process imports torch and the library for itself, and so does torchrun: that
takes longer than a tiny run. Nothing that starts threads may run before the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_PATIENCE_S = 20.0  # for processes of which another has failed


def on_ranks(size: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """Exit statuses of `size` processes, of which each calls `work` and knows its rank.

    One process alone has no group. When a process fails, the others soon end or are killed.
    """
    store = dist.TCPStore(  # pyright: ignore
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    group = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip

    def member(rank: int) -> None:
        if size > 1:
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
        work(*arguments)

    fork = multiprocessing.get_context("fork")
    members = [fork.Process(target=member, args=(rank,)) for rank in range(size)]
    for process in members:
        process.start()
    end = float("inf")
    while any(process.is_alive() for process in members):
        if end == float("inf") and any(process.exitcode for process in members):
            end = time.monotonic() + _PATIENCE_S
        for process in members:
            process.join(0.05)
            if time.monotonic() > end:
                process.kill()
    return [process.exitcode or 0 for process in members]
