"""One thread for every test: two on a busy machine wait for one another far longer than they compute."""

import os

import pytest
import torch

from priorguide.sample import machine

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order, where that is asked for
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)


@pytest.fixture
def reproducible():
    """On a GPU, training too adds in one order, in float32: as a CPU does by itself."""
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    try:
        with machine.reproducible():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
