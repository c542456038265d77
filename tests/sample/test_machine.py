"""What is compiled, and what a GPU computes with while pictures are recorded."""

import pytest
import torch
from oracle import pixel_model
from torch import nn

from priorguide.sample.machine import as_written, compile_network, reproducible
from priorguide.sample.models.dit import DiT


def compiled(network):
    return [module for module in network.modules() if module._compiled_call_impl is not None]


def dit(**sizes):
    return DiT.create(input_size=16, num_classes=3, channels=1, width=48, num_heads=2, **sizes).network


def test_blocks_that_are_alike_are_compiled_one_by_one():
    network = dit(depth=40)
    compile_network(network)
    assert compiled(network) == list(network.blocks)


@pytest.mark.parametrize(
    "network", [pixel_model(0).network, dit(depth=1), nn.Linear(2, 2)], ids=["U-Net", "few", "any"]
)
def test_other_networks_are_compiled_as_a_whole(network):
    compile_network(network)
    assert compiled(network) == [network]


def test_a_block_is_compiled_once_for_all(monkeypatch):
    from torch._dynamo.utils import counters

    counters.clear()
    network, graphs = dit(depth=40), []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend))
    x, t, label = torch.randn(2, 1, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    wanted = network(x, t, label)
    compile_network(network)
    torch.testing.assert_close(network(x, t, label), wanted)
    assert len(graphs) == 1
    with as_written(network):
        torch.testing.assert_close(network(x[:1], t[:1], label[:1]), wanted[:1])
    assert len(graphs) == 1  # not even looked at


@pytest.mark.parametrize(("sizes", "limit"), [(0, 8), (3, 8), (11, 22)])
def test_pictures_of_many_sizes_are_compiled_for_each(monkeypatch, sizes, limit):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_network(nn.Linear(2, 2), sizes)
        assert torch._dynamo.config.recompile_limit == limit
    assert asked == [{"dynamic": False} if sizes else {}]


def compile_with(module, backend):
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)


def test_float32_in_full_for_a_while(monkeypatch):
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        with pytest.raises(KeyError), reproducible(network):
            assert not any(parameter.requires_grad for parameter in network.parameters())
            assert torch.get_float32_matmul_precision() == "highest"
            assert cudnn.deterministic and not cudnn.benchmark and not cudnn.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        assert [parameter.requires_grad for parameter in network.parameters()] == [True, True, False, False]
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == before[1:]
