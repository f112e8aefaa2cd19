"""Loads fatbins and launches their kernels through the CUDA driver, by ctypes on libcuda.

libcuda comes with the driver, so it is there wherever torch sees a GPU; torch's own headers and
ABI are not involved. Kernels run in the device's primary context, torch's, on its current stream.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
# Of cuTensorMapEncodeTiled: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _SWIZZLE_128B,
# _L2_PROMOTION_L2_128B. The others that are wanted (no interleave, zeros outside) are 0.
MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
MAP_SWIZZLE_128, MAP_PROMOTION_128 = 3, 2
MAP_BYTES, MAP_ALIGNMENT = 128, 128  # of a CUtensorMap
# CUDA_ERROR_INVALID_IMAGE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION
UNLOADABLE = (200, 209, 222)


class DriverError(RuntimeError):
    """A call of the driver failed."""

    def __init__(self, call: str, code: int) -> None:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        super().__init__(f"{call}: {(text.value or b'unknown error').decode()} (CUDA error {code})")
        self.code = code


@functools.cache
def _library() -> ctypes.CDLL:
    """libcuda, initialised. Raises OSError where there is no driver."""
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cuInit(0)  # where this fails, so does every call, which then says so
        return library
    raise OSError("libcuda.so.1 not found: no CUDA driver is installed")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise DriverError(name, code)


def driver_version() -> str:
    """The CUDA version that the driver supports, as "13.0"."""
    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    handle, value = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDeviceGetAttribute", ctypes.byref(value), SHARED_OPTIN, handle)
    return value.value


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


class _Current:
    """The device's primary context is current; autograd's threads may have none."""

    def __init__(self, device: int) -> None:
        self.context = _context(device)

    def __enter__(self) -> None:
        _call("cuCtxPushCurrent_v2", self.context)

    def __exit__(self, *error: object) -> None:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _module(device: int, fatbin: Path) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), fatbin.read_bytes())
    return module


@functools.cache
def _function(device: int, fatbin: Path, kernel: str, shared: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    module = _module(device, fatbin)
    _call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
    if shared:
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
    return function


def tensor_map(
    device: int,
    dtype: torch.dtype,
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
) -> bytes:
    """128 bytes by which a kernel has boxes of a tensor copied, swizzled by 128 bytes.

    `sizes` and `box` from the dimension of stride 1 on, in elements; `strides` of the others, in
    bytes, multiples of 16, as `address` is.
    """
    rank = len(sizes)
    space = (ctypes.c_ubyte * (MAP_BYTES + MAP_ALIGNMENT))()
    start = -ctypes.addressof(space) % MAP_ALIGNMENT
    with _Current(device):
        _call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(ctypes.addressof(space) + start),
            ctypes.c_int(MAP_TYPES[dtype]),
            ctypes.c_uint(rank),
            ctypes.c_void_p(address),
            (ctypes.c_ulonglong * rank)(*sizes),
            (ctypes.c_ulonglong * (rank - 1))(*strides),
            (ctypes.c_uint * rank)(*box),
            (ctypes.c_uint * rank)(*[1] * rank),
            ctypes.c_int(0),
            ctypes.c_int(MAP_SWIZZLE_128),
            ctypes.c_int(MAP_PROMOTION_128),
            ctypes.c_int(0),
        )
    return bytes(space[start : start + MAP_BYTES])


def launch(
    device: int,
    fatbin: Path,
    kernel: str,
    params: ctypes.Structure,
    *,
    blocks: int,
    threads: int,
    shared: int,
) -> None:
    """Starts `kernel`, whose one argument is `params`, on torch's current stream of `device`."""
    stream = torch.cuda.current_stream(device).cuda_stream
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    with _Current(device):
        function = _function(device, fatbin, kernel, shared)
        _call(
            "cuLaunchKernel", function,
            blocks, 1, 1, threads, 1, 1, shared,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip
