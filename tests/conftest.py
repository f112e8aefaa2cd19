"""Settings of every test."""

import os

import pytest
import torch

# No test may reach for the network; without this, a missing model costs minutes of retries.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on two cores that others use too are many times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(params=[None, 16], ids=["whole", "in-parts"])
def depth(request, monkeypatch):
    """Products over K in the interpreter's attention kernels: at once, and 16 columns at a time."""
    from oisd_kernels.attention import tiles  # triton, which not every machine has

    tile = tiles.INTERPRETED._replace(depth=request.param)
    monkeypatch.setattr(tiles, "INTERPRETED", tile)
