"""Steps of a queue that fail in the ways that a GPU's do; `test_gpu_queue.py` runs them."""

import os
import signal
import time
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu import lens_checks
from benchmarks.gpu.worker import Check, Outcome, Wrong
from oisd_kernels import logit_lens_divergence

HERE = "tests.benchmarks.planted"


def right(work):
    for name in ("one", "two"):
        work.check(name, lambda: "fine")


def slightly_off(*arguments, impl, **options):
    """A kernel whose divergence, and so its gradient, is 0.1 % too large."""
    rows = logit_lens_divergence(*arguments, impl=impl, **options)
    return rows * 1.001 if impl != "reference" else rows


def wrong_kernel(work):
    """The queue's own check, of an operation that is slightly wrong."""
    check = Check("lens", partial(lens_checks.lens, impl="chunked"))
    with mock.patch.object(lens_checks, "logit_lens_divergence", slightly_off):
        work.checks([check])
    work.check("after it", lambda: "fine")


def no_gradient(work):
    """A gradient of zeros, where truth is one too, proves nothing."""
    zeros = {"d_x": torch.zeros(3)}
    work.check("zeros", lambda: Outcome(zeros, zeros, lens_checks.BOUNDS[torch.float32]))


def hang(work):
    work.check("before", lambda: "fine")
    work.check("hangs", lambda: time.sleep(600))
    work.check("behind", lambda: "fine")


def loud_fault(work):
    """As an illegal access in a library that ends the process."""
    work.check("before", lambda: "fine")
    work.check("faults", lambda: (print("illegal memory access"), os._exit(13)))
    work.check("behind", lambda: "fine")


def signalled(work):
    work.check("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
    work.check("behind", lambda: "fine")


def out_of_memory(work):
    def take():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    work.check("too large", take)
    work.check("behind", lambda: "fine")


def refuted(work):
    def fact():
        raise Wrong("waited 3 times for the device, wanted 0")

    work.check("fact", fact)


def broken(work):
    raise ImportError("no such library")


def dead_probe(device):
    raise RuntimeError("CUDA error: device not ready")


def dies_later(device):
    """Answers the first process alone."""
    mark = os.environ["PLANTED_MARK"]
    if os.path.exists(mark):
        dead_probe(device)
    open(mark, "w").close()


def slow(work):
    for name in ("a", "b", "c"):
        work.check(name, lambda: time.sleep(1.5) or "fine")


def counted(work):
    """Each run leaves a mark."""
    work.append("mark", "ran", "passed")
    work.check("only", lambda: "fine")
