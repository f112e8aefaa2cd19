"""A launched process that ends with the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal

_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent dies, even of SIGKILL.

    On Linux; elsewhere nothing happens. A process started by this one is not meant.
    """
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, int(number))
    except (OSError, AttributeError, TypeError):  # a system without it
        return
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)
