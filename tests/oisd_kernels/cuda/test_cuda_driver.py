"""Calls of the CUDA driver, answered by tests/fake_cuda.cpp, which has cuda.h's prototypes."""

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from oisd_kernels.cuda import build, driver, params
from tests.oisd_kernels.cuda import emulation

MAP = (0x7F0000004000, (64, 3, 7), [128, 384], (64, 1, 64))


def cuda_h() -> Path | None:
    """The toolkit's, or the one that Triton brings along."""
    nvcc = build.find_nvcc()
    folders = [Path("/usr/local/cuda/include")]
    if nvcc is not None:
        folders.insert(0, Path(nvcc).resolve().parents[1] / "include")
    try:
        import triton.backends.nvidia as backend

        folders += [Path(folder) / "include" for folder in backend.__path__]
    except ImportError:
        pass
    return next((folder / "cuda.h" for folder in folders if (folder / "cuda.h").is_file()), None)


HEADER = cuda_h()
needs_header = pytest.mark.skipif(HEADER is None, reason="no cuda.h")


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> ctypes.CDLL:
    if HEADER is None or emulation.compiler() is None:
        pytest.skip("no cuda.h, or no g++")
    path = tmp_path_factory.mktemp("fake") / "libcuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    options = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{HEADER.parent}"]
    subprocess.run([str(emulation.compiler()), *options, "-o", str(path), str(source)], check=True)
    library = ctypes.CDLL(str(path))
    library.listen.restype = ctypes.c_char_p
    return library


@pytest.fixture
def heard(fake, monkeypatch):
    """What the fake heard, in lines, since it was last asked."""
    monkeypatch.setattr(driver, "_library", lambda: fake)
    cached = [driver.shared_limit, driver._context]
    cached += [driver._module, driver._function]
    for function in cached:
        function.cache_clear()
    fake.listen()
    yield lambda: fake.listen().decode().splitlines()
    assert fake.contexts() == 0, "a context was left current"
    for function in cached:
        function.cache_clear()


def in_a_fresh_thread(work) -> object:
    """As autograd calls a backward: no context is current there."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    ("device", "dtype"), [(0, torch.bfloat16), (1, torch.float16)], ids=["bfloat16", "float16"]
)
def test_a_tensor_map(heard, device, dtype):
    words = in_a_fresh_thread(lambda: driver.tensor_map(device, dtype, *MAP))
    assert isinstance(words, bytes) and len(words) == 128
    assert [int.from_bytes(words[i : i + 8], "little") for i in (0, 120)] == [100, 115]
    assert heard() == [
        f"retain {10 + device}",
        f"map on {10 + device}: {str(dtype)[6:]} at 7f0000004000, 64 3 7 by 128 384, box 64 1 64, "
        "steps 1 1 1, swizzled by 128, promoted to 128, zeros outside",
    ]


def test_a_refused_map_says_why(heard):
    with pytest.raises(driver.DriverError, match=r"cuTensorMapEncodeTiled: unknown error \("):
        driver.tensor_map(0, torch.float16, 4096, (64, 3), [128], (64, 1))


@pytest.mark.parametrize("device", [0, 1])
def test_a_launch(heard, device, monkeypatch, tmp_path):
    path = tmp_path / "unit.fatbin"
    path.write_bytes(b"image\0rest")
    streams = {0: 0, 1: 0x7F1234567890}

    class Stream:
        cuda_stream = streams[device]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda asked: {device: Stream}[asked])
    arguments = params.Backward()
    arguments.maps.q.words[0] = 0xFEDCBA9876543210
    sizes = {"blocks": (1 << 30) - 1, "threads": 384, "shared": 200_000}
    launch = lambda: driver.launch(device, path, "kernel", arguments, **sizes)  # noqa: E731
    in_a_fresh_thread(launch)
    first = heard()
    kernel = re.search(r"launch (\w+) on", first[-1])
    assert kernel and kernel[1].startswith("60000000")
    line = (
        f"launch {kernel[1]} on {10 + device}: 1073741823 1 1 x 384 1 1, shared 200000, "
        f"stream {streams[device]:x}, argument fedcba9876543210"
    )
    load = f"load image on {10 + device}"
    assert first == [f"retain {10 + device}", load, "find kernel", "shared 200000", line]
    launch()
    assert heard() == [line]  # what was loaded is kept


def test_what_the_device_says(heard):
    assert driver.shared_limit(1) == 227 * 1024
    assert driver.driver_version() == "13.0"


def test_a_call_that_fails_says_so(heard):
    with pytest.raises(
        driver.DriverError, match=r"cuCtxPopCurrent_v2: invalid device context \(CUDA error 2"
    ):
        driver._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@needs_header
def test_the_driver_s_constants():
    """As cuda.h has them; the fake checks those of tensor maps and attributes."""
    assert HEADER is not None
    text = HEADER.read_text(encoding="utf-8", errors="replace")
    names = ("INVALID_IMAGE", "NO_BINARY_FOR_GPU", "UNSUPPORTED_PTX_VERSION")
    codes = [re.search(rf"CUDA_ERROR_{name} *= *(\d+)", text) for name in names]
    assert driver.UNLOADABLE == tuple(int(code[1]) for code in codes if code)
    assert "CU_TENSOR_MAP_NUM_QWORDS 16" in text and driver.MAP_BYTES == 16 * 8
    aligned = re.search(r"struct CUtensorMap_st {.*?alignas\((\d+)\)", text, re.DOTALL)
    assert aligned is not None and driver.MAP_ALIGNMENT % int(aligned[1]) == 0
