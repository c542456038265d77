"""Where the networks of a comparison's priors lie: on the device, beside it, or in fewer bits."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from ..sample.adapter_rows import Unadapted
from ..sample.bits import bytes_of, reduce_bits
from ..sample.candidates import Candidate
from ..sample.guidance import Arm, Guidance, Prior
from ..sample.model import Condition, DiffusionModel, with_network
from ..sample.own_base import adapted, why_another
from ..sample.precision import guided_change
from .shares import moved

Where = Literal["auto", "device", "cpu", "streamed", "int8", "nf4"]
WORDS = {
    "device": "stay on {device}",
    "cpu": "wait on the CPU between comparisons",
    "streamed": "are streamed from the CPU to {device}, layer by layer",
}


def without_copies(
    candidates: Mapping[str, Candidate], model: DiffusionModel, tell_others: bool = False
) -> dict[str, Candidate]:
    """The candidates, those whose prior is the base of the model's own adapter as "base", and said to be: the model's
    network with the adapter off, so that the second one is let go. tell_others: beside an adapter, says of the other
    networks too what they take, and why."""
    if not adapted(model):
        return dict(candidates)
    found = dict(candidates)
    for name, candidate in candidates.items():
        prior = candidate.prior
        if not isinstance(prior, DiffusionModel):
            continue
        size = _size(bytes_of(prior.network))
        why = f"it sees {', '.join(candidate.keep)} (keep)" if candidate.keep else why_another(prior, model)
        if why is None:
            found[name] = replace(candidate, prior="base")
            rank_zero_only(print)(
                f"prior {name} is the adapter's own base, weight for weight: it is the network itself with the adapter "
                f"off, and takes no memory of its own ({size} let go)"
            )
        elif tell_others:
            rank_zero_only(print)(f"prior {name} is a second network of {size}: {why}")
    return found


def apart(priors: Mapping[str, Prior | None]) -> dict[str, Prior]:
    """Those of a network of their own."""
    return {
        name: prior
        for name, prior in priors.items()
        if prior and prior.model is not prior.onto and not isinstance(prior.model.network, Unadapted)
    }


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device that training has never needed, and those that are free at the moment."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    return free + reserved - peak, free + reserved - torch.cuda.memory_allocated(device)


class Placement:
    """Keeps to one way, which `auto` chooses by the memory at hand when it is first needed: a comparison comes after
    training steps, whose peak is then known. int8 and nf4 are never chosen: they change the prediction."""

    def __init__(self, wanted: Where):
        if wanted not in (options := ("auto", *WORDS, "int8", "nf4")):
            raise ValueError(f"prior_placement must be one of {', '.join(options)}, got {wanted!r}")
        self.wanted = wanted
        self.few_bits = wanted in ("int8", "nf4")
        self.way: str | None = None
        self._small: dict[int, tuple[nn.Module, nn.Module]] = {}  # by a network's id: itself, and it in fewer bits
        self._streamed: dict[int, nn.Module] = {}

    @contextmanager
    def placed(self, priors: Mapping[str, Prior], device: torch.device, whole: bool, quiet: bool) -> Iterator[None]:
        """The priors' networks where the device can use them. whole: not those in fewer bits. quiet: says nothing."""
        networks = {id(prior.model.network): prior.model.network for prior in priors.values()}
        way = "cpu" if whole and self.few_bits else self.choose(priors, networks, device, quiet)
        if way == "cpu":
            with moved(list(networks.values()), device):
                yield
            return
        for key, network in networks.items():
            if way == "streamed":
                self._stream(key, network, device)
            elif way == "device":
                network.to(device)
        yield

    def in_few_bits(
        self, candidates: Mapping[Arm, Guidance], model: DiffusionModel, x_0: Tensor, condition: Condition, quiet: bool
    ) -> dict[Arm, Guidance]:
        """The candidates with their priors' networks in fewer bits, on x_0's device. When a network is first held so,
        it is said what that changes: of the guided prediction, on x_0 (B, *shape) and its condition."""
        found, others = dict(candidates), {}
        for arm, guidance in candidates.items():
            if not (prior := apart({"": guidance.prior}).get("")):
                continue
            if prior not in others:
                before, new = prior.model.network, id(prior.model.network) not in self._small
                others[prior] = replace(prior, model=with_network(prior.model, self._in_few(before, x_0.device)))
                if new and guidance.scales[0] != 1 and not quiet:
                    with moved([before], x_0.device):
                        change = guided_change(model, guidance, replace(guidance, prior=others[prior]), x_0, condition)
                    small = bytes_of(others[prior].model.network)
                    print(
                        f"prior {arm[0]} lies on {x_0.device} in {self.wanted}, {_size(small)} in place of "
                        f"{_size(bytes_of(before))}, while training: it moves the guided prediction at scale "
                        f"{', '.join(map(str, guidance.scales))} by {change['mean_relative_rms']:.2e} of its size"
                    )
            found[arm] = replace(guidance, prior=others[prior])
        return found

    def _in_few(self, network: nn.Module, device: torch.device) -> nn.Module:
        if id(network) not in self._small:
            small = copy.deepcopy(network)
            reduce_bits(small, self.wanted)  # type: ignore[arg-type]
            self._small[id(network)] = network, small.to(device)
        return self._small[id(network)][1]

    def choose(
        self, priors: Mapping[str, Prior], networks: Mapping[int, nn.Module], device: torch.device, quiet: bool
    ) -> str:
        """One of WORDS, or what was asked for; the first time it is said, unless all is on the CPU anyway."""
        if self.way is None and networks:
            self.way, why = self.wanted, "as asked"
            need = sum(map(bytes_of, networks.values()))
            if self.wanted == "auto" and device.type == "cpu":
                self.way = "device"
            elif self.wanted == "auto":
                spare, free = memory(device)
                self.way = "device" if 2 * need <= spare else "cpu" if 1.25 * need <= free else "streamed"
                why = f"of its memory training leaves {_size(spare)}, and {_size(free)} between two steps"
            if device.type != "cpu" and self.way in WORDS and not quiet:
                print(f"priors ({', '.join(priors)}: {_size(need)}) {WORDS[self.way].format(device=device)}: {why}")
        return self.way or "device"

    def _stream(self, key: int, network: nn.Module, device: torch.device) -> None:
        """The hooks stay: they bring a layer to the device for the time that it runs."""
        from diffusers.hooks import apply_group_offloading

        if key not in self._streamed:
            self._streamed[key] = network
            options: dict[str, Any] = {"offload_type": "leaf_level", "use_stream": device.type == "cuda"}
            apply_group_offloading(network, onload_device=device, offload_device=torch.device("cpu"), **options)


def buffers_to(model: DiffusionModel, device: torch.device) -> None:
    """A model's own buffers, such as its null: those of its parts apart."""
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, buffer.to(device))


def _size(count: int) -> str:
    return f"{count / 1e9:.2g} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
