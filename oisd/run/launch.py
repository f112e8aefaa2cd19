"""`--processes N`: a command on several processes of this machine, by torchrun's own launcher.

Unlike torchrun itself it leaves what is said to the processes: one that fails has named the reason.
"""

from __future__ import annotations

import logging
import os
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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
        return status if status > 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    return 0
