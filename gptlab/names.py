"""Dotted names in configs and checkpoints are code by another name: only trusted packages are imported."""

import importlib

OWN_PACKAGES = ("gptlab", "experiments")


def require_trusted(name: str, trust: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless the dotted `name` lies in gptlab, experiments or one of the packages in `trust`."""
    package = name.split(".")[0]
    if "." not in name or package not in (*OWN_PACKAGES, *trust):
        raise ValueError(
            f"{name!r} is not a dotted name under gptlab. or experiments.; if you know and trust that code, "
            f"allow it with trust={package}"
        )


def load_class(name: str, base: type, trust: tuple[str, ...] = ()) -> type:
    """The class called `name` ("experiments.mine.MyAttention"), which must be a subclass of `base`.

    Raises ValueError for an untrusted package, a missing module or attribute, or something that is no such class.
    """
    require_trusted(name, trust)
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module exists; something that it imports does not
        raise ValueError(
            f"{name!r}: there is no module {error.name!r} here; is the folder that holds it current?"
        ) from error
    except AttributeError as error:
        raise ValueError(f"{name!r}: module {module_name!r} has no {attribute!r}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found
