"""What a training step can reach from the model and the trainer: attributes, elements, and variables of functions."""

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

# Packages whose objects and functions hold no state of their own that a training step changes.
LIBRARIES = (
    *("torch", "transformers", "accelerate", "deepspeed", "hf_xsam", "trl", "peft", "datasets", "numpy", "builtins"),
)
# What every module has, which passes do not change or which is put back elsewhere (modes, weights, buffers).
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# What cannot change within.
CONSTANT = (bool, int, float, complex, str, bytes, type(None))
# Containers of more elements are left out.
LARGEST_CONTAINER = 10_000


def counts(attribute: str) -> bool:
    """Return whether an attribute of a module or trainer may be a part of what training steps change."""
    ours = attribute.startswith(("_xsam", "xsam_")) or attribute == "log"  # which is replaced while passes run again
    return not ours and attribute not in OF_EVERY_MODULE and not attribute.endswith("dataset")


def reachable(owners: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what is found within `depth` steps from `owners`, each object once, by a name that a person understands."""
    level = [part for name, owner in owners.items() for part in _held_by(name or "model", owner)]
    seen: set[int] = set()
    for _ in range(depth):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, CONSTANT):
                yield name, value
            elif id(value) not in seen:
                seen.add(id(value))
                yield name, value
                following += _within(name, value)
        level = following


def _held_by(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object, and of those of its classes that no library has defined."""
    held = {key: value for key, value in vars(owner).items() if counts(key)}
    if isinstance(owner, nn.Module):
        held |= {**dict(owner.named_parameters(recurse=False)), **owner._buffers}
    for kind in type(owner).__mro__:
        if not _of_a_library(kind):
            held = {key: value for key, value in vars(kind).items() if not key.startswith("__")} | held
    yield from ((f"{name}.{key}", value) for key, value in held.items())


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `value` holds, by name."""
    if isinstance(value, nn.Module | Tensor | type):
        return
    if isinstance(value, dict):
        if len(value) <= LARGEST_CONTAINER:
            yield from ((f"{name}[{key!r}]", element) for key, element in value.items())
        return
    if isinstance(value, list | tuple | set | deque):
        if len(value) <= LARGEST_CONTAINER:
            yield from ((f"{name}[{number}]", element) for number, element in enumerate(value))
        return
    if isinstance(value, partial):
        yield from ((f"{name}({argument})", part) for argument, part in enumerate((value.func, *value.args)))
        yield from ((f"{name}({argument})", part) for argument, part in value.keywords.items())
        return
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if inspect.isfunction(function):
        if not _of_a_library(function):
            yield from ((f"{variable}, which {name} uses", part) for variable, part in _variables(function).items())
    elif hasattr(value, "__dict__") and not _of_a_library(type(value)):
        yield from _held_by(name, value)


def _variables(function: Any) -> Mapping[str, Any]:
    """Return the variables of a function's closure, and the global ones that its code names."""
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a variable of the closure has no value yet
        return {}
    return {**used.globals, **used.nonlocals}


def _of_a_library(defined: Any) -> bool:
    return str(getattr(defined, "__module__", None) or "").split(".")[0] in LIBRARIES
