"""A worker of verl that Ray can start on a CPU; in a module of its own, for Ray's processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from verl.workers.engine_workers import TrainingWorker


class CPUWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses.
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
        super().__init__(config)
