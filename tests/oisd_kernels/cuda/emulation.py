"""csrc/'s kernels on a CPU: their own source, compiled by g++ with csrc/emulator/."""

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess

from oisd_kernels.cuda import build
from oisd_kernels.cuda.build import Unit
from tests import ROOT

FLAGS = (
    "-std=c++17",
    "-O1",
    "-U_FORTIFY_SOURCE",
    "-fno-exceptions",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
)
IGNORED = ("-Wno-unknown-pragmas", "-Wno-missing-field-initializers", "-Wno-psabi")


def compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def library(unit: Unit) -> ctypes.CDLL:
    """The unit's emulation; compiled once for each state of the sources."""
    folder = build.source_folder()
    digest = hashlib.sha256(repr((FLAGS, IGNORED, unit)).encode())
    for path in sorted([*folder.glob("*.*"), *folder.glob("emulator/*")]):
        digest.update(path.read_bytes())
    cache = ROOT / ".pytest_cache" / "csrc"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{unit.name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        whole = path.with_suffix(f".{os.getpid()}")
        source = str(folder / "emulator" / "emulated_attention.cpp")
        command = [str(compiler()), *FLAGS, *IGNORED, *unit.macros(), "-o", str(whole), source]
        subprocess.run(command, check=True)
        whole.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


def tensor_map(device, dtype, address, sizes, strides, box) -> bytes:
    """Stands in for `cuda_impl.tensor_map`: encodes the `Map` of csrc/emulator/machine.h.

    Refuses what the driver's documentation says the driver refuses.
    """
    assert device.type == "cpu"
    assert dtype.itemsize == 2 and address % 16 == 0 and len(sizes) == len(box) == 3
    assert all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in strides)
    assert all(0 < size <= 1 << 32 for size in sizes) and all(0 < side <= 256 for side in box)
    swizzle = 128
    assert box[0] * dtype.itemsize <= swizzle
    return struct.pack("<6Q4I", address, *sizes, *strides, *box, swizzle).ljust(128, b"\0")


class Emulator:
    """Stands in for `cuda_impl.run`; keeps the launches."""

    def __init__(self) -> None:
        self.order = 0  # 1: reversed; more: the seed of a shuffle, raised with each launch
        self.launches: list[tuple[Unit, str, int]] = []
        self.boxes: dict[str, int] = {}  # of a kernel's last launch, copied by tensor maps

    def __call__(self, unit, kernel, params, device, blocks, threads, shared) -> None:
        assert device.type == "cpu"
        self.launches.append((unit, kernel, blocks))
        arguments = (kernel.encode(), ctypes.byref(params), blocks, threads, shared, self.order)
        message = library(unit).emulate(*arguments)
        self.order += self.order > 1
        assert not message, f"{unit.name} {kernel}: {message.decode()}"
        self.boxes[kernel] = library(unit).boxes_copied()
