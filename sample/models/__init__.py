"""One file per system. Nothing else knows their names: `find` discovers them."""

import importlib
import pkgutil

from ..model import DiffusionModel

_registered: dict[str, type[DiffusionModel]] = {}


def register(model: type[DiffusionModel]) -> type[DiffusionModel]:
    """Class decorator: lets bundles name a model of your own, once your code has been imported."""
    _registered[model.__name__] = model
    return model


def models() -> dict[str, type[DiffusionModel]]:
    """Every model of this package, and those registered, by class name."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, DiffusionModel) and value.__module__ == module.__name__:
                found[value.__name__] = value
    return found | _registered


def find(name: str) -> type[DiffusionModel]:
    """The model class of that name. ValueError where there is none."""
    known = models()
    if name not in known:
        known_names = ", ".join(sorted(known))
        raise ValueError(f"no model is called {name!r}; known are {known_names}, and your own once they are imported")
    return known[name]
