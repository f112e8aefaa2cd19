"""Data-parallel processes under torchrun: this one's rank, and sums over all of them."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from oisd.losses.metrics import Metrics, add_metrics

T = TypeVar("T")
_PATIENCE_S = 3.0  # for another process, where something has gone wrong


def device_named(name: str) -> str:
    """The device of a setting: "auto" is a GPU where there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def is_first_to_fail(may_follow: bool = False) -> bool:
    """Whether this process is the one of its run that says what is wrong; call it once.

    Under torchrun that is the first one that asks: the others have the same trouble, or lost it.

    may_follow: it may be that another process is lost, which is given some seconds to say why.
    """
    if may_follow:
        time.sleep(_PATIENCE_S)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        wait = timedelta(seconds=_PATIENCE_S)
        try:
            store = dist.TCPStore(  # pyright: ignore
                address, port, timeout=wait, wait_for_workers=False
            )
            if store.add(f"oisd/failed/{restart}", 1) > 1:
                return False
        except (RuntimeError, dist.DistError):  # the store has gone with its process
            pass
    return True


class Processes:
    """The processes that share a run. One process alone needs no launcher and no communication.

    Under torchrun the backend is nccl on CUDA devices and gloo on CPUs.

    timeout: how long a process waits for another before both give up; None for the backend's own
        default of some minutes, which suits processes that do the same work at the same time.
    """

    def __init__(self, device: str = "auto", timeout: timedelta | None = None) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(device_named(device))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        self._owns_group = self.size > 1 and not dist.is_initialized()
        if self._owns_group:
            # Checkpoints of sharded models are written from the host's memory.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timeout)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and talks to the terminal."""
        return self.rank == 0

    def share_model(self, sharding: str) -> bool:
        """Whether they split one model, as `run.sharding` says; warns where there is only one."""
        if sharding == "fsdp2" and self.size == 1:
            warnings.warn(
                f'run.sharding = "{sharding}" splits the model over processes, and this is one '
                "process, which holds the whole; torchrun --nproc-per-node=N starts more",
                stacklevel=3,
            )
        return sharding == "fsdp2" and self.size > 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`: every `size`-th, starting at its rank."""
        return list(items[self.rank :: self.size])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's tensors, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, thing: Any) -> list[Any]:
        """What each process has, in the order of ranks, on every process."""
        if self.size == 1:
            return [thing]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, thing)
        return gathered

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, on every process; and what it raises there."""
        if self.size == 1:
            return work()
        found: tuple[Any, Exception | None] = None, None
        if self.is_first:
            try:
                found = work(), None
            except Exception as error:  # or the others would wait for this process
                found = None, _portable(error)
        result, error = self.gather(found)[0]
        if error is not None:
            raise error
        return result

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each process, on all of them; what it raises on one, all raise."""
        found: tuple[Any, Exception | None] = None, None
        try:
            found = work(), None
        except Exception as error:
            found = None, _portable(error)
        everything = self.gather(found)
        for _, error in everything:
            if error is not None:
                raise error
        return [result for result, _ in everything]

    def reduce(self, metrics: Metrics) -> Metrics:
        """The metrics over all processes; a process may lack some of the names."""
        flat = [torch.stack([m.total.cpu(), m.count.cpu()]) for m in metrics.values()]
        pairs = zip(map(type, metrics.values()), torch.stack(flat).tolist(), strict=True)
        total: Metrics = {}
        for theirs in self.gather(dict(zip(metrics, pairs, strict=True))):
            found = {name: kind(*torch.tensor(pair)) for name, (kind, pair) in theirs.items()}
            total = add_metrics(total, found)
        return total

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if this object made it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _portable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
