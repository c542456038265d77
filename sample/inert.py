"""What torch may build while it reads a checkpoint, besides tensors and plain values: nothing that can act."""

import argparse
from typing import Any

import numpy as np


class Inert:
    """Stands for a pickled object of training code: whatever it is given, it does and keeps nothing."""

    def __new__(cls, *args: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stands for a kind of dictionary: what is made is a plain one."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
_CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "timer.Timer")
_CONFIGS = ("base.ContainerMetadata", "base.Metadata", "dictconfig.DictConfig", "listconfig.ListConfig")
_VALUES = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode")
_NUMBERS = ("bool", "int32", "int64", "float16", "float32", "float64")
_SCALAR = np.float64(0).__reduce__()[0]  # numpy's function from a type and bytes to a number

ALLOWED: tuple[Any, ...] = (
    # Lightning before 1.5 files the states of callbacks by their classes
    *((Inert, f"{package}.callbacks.{name}") for package in _LIGHTNING for name in _CALLBACKS),
    # hyperparameters: Lightning's dictionary of them; OmegaConf's, with the types that its metadata names
    *((InertDict, f"{package}.utilities.parsing.AttributeDict") for package in _LIGHTNING),
    *((InertDict, f"{package}.utilities.data.AttributeDict") for package in ("lightning_fabric", "lightning.fabric")),
    *((Inert, f"omegaconf.{name}") for name in _CONFIGS),
    *((Inert, f"omegaconf.nodes.{name}") for name in _VALUES),
    *((Inert, name) for name in ("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.str")),
    (InertDict, "collections.defaultdict"),
    # as they are
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in _NUMBERS),
    *((_SCALAR, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
)
"""For torch.serialization.safe_globals: classes, or what is put in the place of the class of a name."""
