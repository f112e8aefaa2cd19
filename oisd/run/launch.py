"""`--processes N`: a command on several processes of this machine, by torchrun's own launcher.

Unlike torchrun itself it leaves what is said to the processes: one that fails has named the reason.
Only a signal that ends a process, or all of them, is said here.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from oisd.config import ConfigError


def run_on_processes(count: int, command: Sequence[str]) -> int:
    """Run a command `count` times at once; when one fails, the others are stopped.

    Returns the exit status: 0, that of the one that failed, or 128 + N after signal N, as a shell
    says it. Raises ConfigError within a launched process.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--processes must be left out under torchrun, which starts them itself")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    # Of semaphores of a process that was stopped, which has no time to clean up.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        # Those that were stopped for it have a negative status.
        statuses = [failure.exitcode for failure in error.failures.values()]
        status = max(statuses)
        if status > 0:
            return status
        _, first = error.get_first_failure()
        killed = first.exitcode == -signal.SIGKILL
        why = ", perhaps because the machine's memory was full" if killed else ""
        _say(f"a process was ended by {first.signal_name()}{why}")
        return 128 - first.exitcode
    except SignalException as error:
        if error.sigval != signal.SIGINT:  # of which the first process speaks
            _say(f"ended by {error.sigval.name}")
        return 128 + error.sigval
    return 0


def _say(what: str) -> None:
    print(f"oisd: {what}; the same command goes on from what is on disk", file=sys.stderr)
