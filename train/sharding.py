"""A network whose weights lie in parts on all processes (FSDP2)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def shard(networks: Iterable[nn.Module], mesh: Any) -> None:
    """Shards the networks over Lightning's device mesh, each block of their outermost module lists by itself.

    ValueError unless the mesh is of data_parallel alone.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "ModelParallelStrategy must shard the data over all processes: set its data_parallel_size to their number "
            f"({mesh.size()}) and tensor_parallel_size to 1"
        )
    for network in networks:
        for block in _blocks(network):
            fully_shard(block, mesh=mesh["data_parallel"])
        # Resharded after each forward also where no backward follows: its parameters are then always the parts.
        fully_shard(network, mesh=mesh["data_parallel"], reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterable[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which shares its memory; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
