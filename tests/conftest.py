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
