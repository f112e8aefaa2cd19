"""csrc/'s kernels on a CPU: their own source, compiled by g++ against csrc/emulate.h."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from oisd_kernels import cuda_build
from oisd_kernels.cuda_build import Unit

FLAGS = (
    "-std=c++20",
    "-O1",
    "-U_FORTIFY_SOURCE",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
)
IGNORED = ("-Wno-unknown-pragmas", "-Wno-missing-field-initializers")


def compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def library(unit: Unit) -> ctypes.CDLL:
    """The unit's emulation; compiled once for each state of the sources."""
    folder = cuda_build.source_folder()
    digest = hashlib.sha256(repr((FLAGS, IGNORED, unit)).encode())
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    cache = Path(__file__).parents[1] / ".pytest_cache" / "csrc"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{unit.name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        whole = path.with_suffix(f".{os.getpid()}")
        source = str(folder / "emulated_attention.cpp")
        command = [str(compiler()), *FLAGS, *IGNORED, *unit.macros(), "-o", str(whole), source]
        subprocess.run(command, check=True)
        whole.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


class Emulator:
    """Stands in for `attention_cuda.run`; keeps the launches."""

    def __init__(self) -> None:
        self.reversed = False
        self.launches: list[tuple[Unit, str, int]] = []

    def __call__(self, unit, kernel, params, device, blocks, threads, shared) -> None:
        assert device.type == "cpu"
        self.launches.append((unit, kernel, blocks))
        arguments = (kernel.encode(), ctypes.byref(params), blocks, threads, shared, self.reversed)
        message = library(unit).emulate(*arguments)
        assert not message, f"{unit.name} {kernel}: {message.decode()}"
