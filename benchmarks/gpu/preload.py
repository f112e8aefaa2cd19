"""Imports that every step's process needs, made once; nothing here touches the GPU."""

import os

# torch would otherwise ask the driver, which a forked process could then no longer use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

import benchmarks.gpu.attention_checks
import benchmarks.gpu.facts
import benchmarks.gpu.headlines
import benchmarks.gpu.lens_checks
import benchmarks.gpu.sweep  # noqa: F401

torch.set_num_threads(1)
