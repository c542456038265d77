"""Networks whose linear layers hold their weights in 8 or 4 bits in memory: bitsandbytes' layers in place of torch's.

int8 is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), nf4 that of QLoRA (arXiv 2305.14314) with double
quantisation. What a bundle holds in fewer bits on disk is `precision`'s.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

Bits = Literal["int8", "nf4"]


def reduce_bits(network: nn.Module, bits: Bits, leave: Sequence[str] = ()) -> None:
    """Every linear layer of a network, in place, but those whose names start with one of `leave`, frozen in fewer bits.

    ValueError without bitsandbytes, or where it cannot do it here.
    """
    bnb = _bitsandbytes(bits)
    for name, layer in list(network.named_modules()):
        if type(layer) is not nn.Linear or name.startswith(tuple(leave)):
            continue
        device, weight = layer.weight.device, layer.weight.detach().cpu()
        held: Any
        options: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
        if bits == "nf4":
            held = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", **options)
            held.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=held)
            held.support_avx512bf16_for_cpu = False  # else evaluation on a CPU repacks the weights, for good
        else:
            sizes = layer.in_features, layer.out_features
            held = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0, **options)
            held.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            held.register_forward_pre_hook(_follow_weight)
        held.bias = layer.bias
        try:
            _replace(network, name, held.to(device).requires_grad_(False).train(layer.training))
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"bitsandbytes cannot hold weights in {bits} on {device.type} here: {reason}") from error


def _follow_weight(layer: Any, _: Any) -> None:
    """What the layer computes with follows its weight to another device, which is all that a network's `to` moves."""
    weight = layer.weight.data
    for place in (layer.weight, layer.state):
        if place.CB is not None and place.CB.device != weight.device:
            place.CB, place.SCB = weight, place.SCB.to(weight.device)


def in_few_bits(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's layers in fewer bits, by name."""
    names = {"Linear4bit", "Linear8bitLt"}  # told without an import, which takes seconds
    for name, module in network.named_modules():
        if type(module).__module__.startswith("bitsandbytes.") and type(module).__name__ in names:
            yield name, module


def bits_of(layer: nn.Module) -> Bits:
    """How one of those layers holds its weights."""
    return "nf4" if type(layer).__name__ == "Linear4bit" else "int8"


def restore_bits(network: nn.Module) -> None:
    """Those layers, in place, as torch's in float32 again, with the weights that they stand for."""
    for name, layer in list(in_few_bits(network)):
        _replace(network, name, _whole(layer))


def _whole(layer: Any) -> nn.Linear:
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:  # its scales move from the parameter to the layer's state at the first forward
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        weight = layer.weight.data.float() * scales.to(layer.weight.device)[:, None] / 127
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.float(), False)
    plain.bias = layer.bias
    return plain.train(layer.training)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def bytes_of(network: nn.Module) -> int:
    """Bytes of all its parameters and buffers, with the scales of those in fewer bits."""
    total = sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    for _, module in in_few_bits(network):
        layer: Any = module
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            scales = [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
        else:
            scales = [layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB]
        total += sum(t.numel() * t.element_size() for t in scales)
    return total


def _bitsandbytes(bits: str) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast at every layer
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{bits} weights need bitsandbytes: pip install 'priorguide[train]'") from error
    return bitsandbytes
