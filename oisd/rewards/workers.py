"""A pool of worker processes with deadlines that kill.

Workers are spawned, never forked (torch's threads do not survive a fork), and do not import the
caller's main module. Only the standard library and pebble are imported, so that a worker starts
fast.
"""

import multiprocessing.context
import multiprocessing.process
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

_main_hidden = threading.Lock()


def _renew_lock() -> None:
    global _main_hidden
    _main_hidden = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class WorkerProcess(multiprocessing.context.SpawnProcess):
    """Spawned process that does not import the parent's main module.

    Workers need nothing from it, it would bring torch along, and a script without the
    `if __name__ == "__main__"` guard would run again in every worker.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _main_hidden:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return multiprocessing.context.SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main

    def start(self) -> None:
        """Start, also below a daemon, such as a data loader's worker: ours end with their pool."""
        settings = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
        daemon = settings.pop("daemon", None)
        try:
            super().start()
        finally:
            if daemon is not None:
                settings["daemon"] = daemon


class WorkerContext(multiprocessing.context.SpawnContext):
    Process = WorkerProcess


def _stop(pool: ProcessPool, owner: int) -> None:
    if owner == os.getpid():  # a fork inherits the finalizer, but the workers are its parent's
        pool.stop()
        pool.join()


def _nothing() -> None:
    pass


class WorkersError(RuntimeError):
    """The workers failed, and none of the tasks is the reason."""


class Workers:
    """Processes that start with the first task, are replaced when they die, and stop at exit."""

    def __init__(self, count: int, initializer: Callable[[], None]) -> None:
        self._new_pool = partial(
            ProcessPool, max_workers=count, initializer=initializer, context=WorkerContext()
        )
        self._count = count
        self._forget()

    def _forget(self) -> None:
        self._pool: ProcessPool | None = None
        self._finalizer: weakref.finalize | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def _open(self) -> ProcessPool:
        if self._owner != os.getpid():  # a pool does not survive a fork: this process needs its own
            self._forget()
        with self._lock:
            if self._pool is None or not self._pool.active:
                self.close()
                self._pool = self._new_pool()
                self._finalizer = weakref.finalize(self, _stop, self._pool, self._owner)
            return self._pool

    def start(self) -> None:
        """Start the processes without waiting for them."""
        pool = self._open()
        for _ in range(self._count):
            pool.schedule(_nothing)

    def run(
        self, function: Callable[..., Any], tasks: Sequence[tuple], timeout_s: float
    ) -> list[Any]:
        """Result of `function(*task)` for each task, or its TimeoutError or ProcessExpired.

        The whole pool breaks if a worker dies idle; tasks lost in this way run once more. Raises
        WorkersError if it breaks again, or if `close` is called meanwhile.
        """
        results: dict[int, Any] = {}
        for _ in range(2):
            pool = self._open()
            futures: dict[int, ProcessFuture] = {}
            try:
                for i in range(len(tasks)):
                    if i not in results:
                        futures[i] = pool.schedule(function, args=tasks[i], timeout=timeout_s)
                for i, future in futures.items():
                    while not wait([future], timeout=1.0).done:
                        if not pool.active:
                            raise BrokenProcessPool
                    try:
                        results[i] = future.result()
                    except (TimeoutError, ProcessExpired) as lost:
                        results[i] = lost
                return [results[i] for i in range(len(tasks))]
            except BaseException as error:
                for future in futures.values():
                    future.cancel()
                if not isinstance(error, RuntimeError) or pool.active:
                    raise
                with self._lock:
                    if self._finalizer is None or not self._finalizer.alive:
                        raise WorkersError("closed while at work") from None
        raise WorkersError("its workers died twice, see their output above")

    def close(self) -> None:
        """End the processes; may be called twice. Another `run` starts new ones."""
        if self._finalizer is not None and self._owner == os.getpid():
            self._finalizer()  # once: a second call does nothing
