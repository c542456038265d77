"""Parity vectors: inputs and outputs of the systems' original networks, whose weights follow from names and a seed.

Tests that use them are skipped where the vectors are not at hand: PRIORGUIDE_PARITY names their folder.
"""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

NETWORK_TOLERANCE = 1e-4
"""Absolute, for one network's output."""
GUIDED_TOLERANCE = 3e-4
"""Relative to the reference's maximum, for guided predictions."""
TRAJECTORY_TOLERANCE = 1e-3
"""Relative to the reference's maximum, for samples."""


@dataclass(frozen=True)
class Vectors:
    """One system's vectors: its description, and its tensors by name."""

    spec: dict[str, Any]
    io: dict[str, Tensor]

    def weights(self, network: str) -> dict[str, Tensor]:
        """The tensors that the rule gives of one of the spec's networks, under their published names."""
        described = self.spec["networks"][network]
        return {key: weight(key, shape, described["seeds"]) for key, shape in described["tensors"].items()}

    def relative_error(self, found: Tensor, name: str) -> float:
        """The largest difference from a reference, relative to its own maximum."""
        reference = self.io[name]
        assert found.shape == reference.shape
        return ((found - reference).abs().max() / reference.abs().max()).item()

    def error(self, found: Tensor, name: str) -> float:
        """The largest difference from a reference."""
        assert found.shape == self.io[name].shape
        return (found - self.io[name]).abs().max().item()


def weight(key: str, shape: list[int], seeds: dict[str, int]) -> Tensor:
    """The weight rule: normals from the name's CRC and the seed of the longest prefix, scaled by the fan-in."""
    seed = seeds[max((prefix for prefix in seeds if key.startswith(prefix)), key=len)]
    rng = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    values = rng.standard_normal(int(np.prod(shape))).reshape(shape)
    fan_in = np.sqrt(np.prod(shape[1:]))
    values = values / fan_in if len(shape) >= 2 else 0.1 * values + key.endswith("weight")
    return torch.from_numpy(np.asarray(values, np.float32))


def vectors(system: str) -> Vectors:
    """The vectors of a system, by its folder's name; skips the test where there are none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "parity"
    folder = Path(os.environ.get("PRIORGUIDE_PARITY", beside)) / system
    if not (folder / "spec.json").is_file():
        pytest.skip(f"no parity vectors for {system}: set PRIORGUIDE_PARITY to their folder")
    return Vectors(json.loads((folder / "spec.json").read_text()), load_file(folder / "io.safetensors"))
