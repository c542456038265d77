"""One thread for every test: two on a busy machine wait for one another far longer than they compute."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)
