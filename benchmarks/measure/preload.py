"""Imported by the server that forks memory measurements: imports everything, computes nothing."""

import contextlib
import importlib

import torch

torch.set_num_threads(1)  # a process with threads cannot be forked safely

for module in (
    "benchmarks.cases.suite",
    "transformers.models.qwen3.modeling_qwen3",
    "liger_kernel.chunked_loss.jsd_loss",
    "trl.kernels.chunked_divergence",
    "trl.kernels.chunked_logprob",
):
    with contextlib.suppress(Exception):
        importlib.import_module(module)
