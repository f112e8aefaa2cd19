#!/usr/bin/env bash
# `except Exception` around torch.distributed.checkpoint does not catch its errors.
#
# Whatever goes wrong on a rank, a full disk or a checkpoint of other sizes, comes wrapped in a
# CheckpointException. This class derives from BaseException, as KeyboardInterrupt and SystemExit
# do. A trainer that means to log a failed save and go on, or to fall back to an older checkpoint,
# ends instead. Catch `torch.distributed.checkpoint.api.CheckpointException` by name.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   bases: CheckpointException, BaseException, object
#   save to a full disk:   `except Exception` missed CheckpointException, the rank's OSError
#   load of another shape: `except Exception` missed CheckpointException, the rank's ValueError
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import errno
import os
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


class FullDisk(dcp.FileSystemWriter):
    """A writer that fails as the real one does when the disk is full."""

    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def missed(name, work):
    """The type of the rank's error if `except Exception` does not catch what `work` raises."""
    try:
        try:
            work()
        except Exception as error:
            print(f"{name} `except Exception` caught a {type(error).__name__}")
            return None
    except CheckpointException as error:
        inner = type(error.failures[0][0]).__name__
        print(f"{name} `except Exception` missed CheckpointException, the rank's {inner}")
        return inner


print(f"torch {torch.__version__}")
print("bases: " + ", ".join(base.__name__ for base in CheckpointException.__mro__))
with tempfile.TemporaryDirectory() as folder:
    state = {"weight": torch.ones(3)}
    disk = FullDisk(folder)
    full = missed(
        "save to a full disk:  ", lambda: dcp.save(state, storage_writer=disk, no_dist=True)
    )
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    other = {"weight": torch.ones(4)}
    shape = missed(
        "load of another shape:", lambda: dcp.load(other, checkpoint_id=folder, no_dist=True)
    )
same = full == "OSError" and shape == "ValueError"
sys.exit(0 if same and not issubclass(CheckpointException, Exception) else 1)
PYTHON
