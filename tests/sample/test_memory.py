"""The peak that sampling takes, on a CPU and on CUDA."""

import pytest
import torch

from priorguide.sample.memory import peak_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_what_is_held_at_once(device):
    held = torch.zeros(1000, 256, device=device)  # 1,000 KiB, before

    def call():
        a = held + 1
        b = a * 2  # two more
        del a
        c = b.view(256, 1000)  # none
        d = c.relu_()  # none
        return [d + i for i in range(3)][-1]  # three at once, beside b

    assert peak_of(call, torch.device(device)) == pytest.approx(4 * held.nbytes, rel=0.01)
    assert peak_of(lambda: held.sum(), torch.device(device)) < held.nbytes / 100
