"""Imports that every step's process needs, made once; nothing here touches the GPU."""

import os

# torch would otherwise ask the driver, which a forked process could then no longer use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch._dynamo  # what the first custom op with a graph would import, with sympy

import oisd_kernels.attention.sampled_triton
import oisd_kernels.attention.triton_impl
import oisd_kernels.lens.chunked.rows_split
import oisd_kernels.lens.tiled.op  # noqa: F401

torch.set_num_threads(1)
