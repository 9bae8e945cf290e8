"""What a training step can reach from the model and the trainer: attributes, elements, and variables of functions."""

import inspect
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Packages whose objects and functions hold no state that a training step changes, wherever they are installed. Those of
# all others that are installed may hold it with what cannot be put back: memory of their own, connections, threads.
LIBRARIES = frozenset(
    ("torch", "transformers", "accelerate", "hf_xsam", "trl", "peft", "datasets", "numpy", "builtins", "tokenizers")
)
INSTALLED = ("site-packages", "dist-packages")
# Modules and classes of libraries, and of Python, whose objects do: caches of keys and values, namespaces, the list of
# the user's callbacks.
STATEFUL = (
    "transformers.cache_utils.",
    "transformers.trainer_callback.CallbackHandler",
    "torch.quasirandom.",
    "types.",
    "collections.",
    "argparse.",
    "weakref.",
)
# What every module has, which passes do not change or which is put back elsewhere (modes, weights, buffers).
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Transformers' mark that the first pass has hooked the modules whose outputs are recorded: the hooks stay, so it must.
HOOKED = "_output_capturing_hooks_installed"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What cannot change within.
CONSTANT = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
# Containers of more elements are left out.
LARGEST_CONTAINER = 10_000
# Nor is more looked at than this: somewhere there is a data set.
MOST = 20_000
# How far from the trainer or a module state is looked for.
DEPTH = 6


@cache
def counts(attribute: str) -> bool:
    """Return whether an attribute of a module or trainer may be a part of what training steps change."""
    ours = attribute.startswith(("_xsam", "xsam_")) or attribute == "log"  # which is replaced while passes run again
    of_libraries = attribute in OF_EVERY_MODULE or attribute == HOOKED
    return not ours and not of_libraries and not attribute.endswith("dataset")


def reachable(owners: Mapping[str, Any], left_out: Sequence[Any] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what is found within `DEPTH` steps from `owners`, each object once, by a name that a person understands.

    Not what is `left_out`, and not more than `MOST` things.
    """
    level = [part for name, owner in owners.items() for part in _attributes(name or "model", owner)]
    seen = {id(value) for value in (*owners.values(), *left_out)}
    for _ in range(DEPTH):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, CONSTANT):
                yield name, value
            elif id(value) not in seen:
                seen.add(id(value))
                yield name, value
                following += _within(name, value)
        level = following if len(seen) <= MOST else []


def is_library(defined: Any) -> bool:
    """Return whether a class or function is of a library, or of Python's, whose objects hold no state that counts."""
    module = str(getattr(defined, "__module__", None) or "")
    package, name = module.split(".")[0], f"{module}.{getattr(defined, '__qualname__', '')}"
    return _is_installed(package) and not name.startswith(STATEFUL)


@cache
def _is_installed(package: str) -> bool:
    module = sys.modules.get(package)
    places = f"{getattr(module, '__file__', '')} {list(getattr(module, '__path__', []))}"
    return package in LIBRARIES | sys.stdlib_module_names or any(folder in places for folder in INSTALLED)


def slots_of(value: Any) -> tuple[MemberDescriptorType, ...]:
    """Return what reads and writes the `__slots__` of an object, without those of libraries' classes."""
    kind: Any = type(value)
    return _slots_in(kind)


@cache
def _slots_in(kind: type) -> tuple[MemberDescriptorType, ...]:
    own = (base for base in kind.__mro__ if not is_library(base))
    held = (value for base in own for name, value in vars(base).items() if not name.startswith("__"))
    return tuple(value for value in held if isinstance(value, MemberDescriptorType))


def slot_values(value: Any) -> Iterator[tuple[MemberDescriptorType, Any]]:
    """Yield the slots of an object that hold something, and what."""
    for slot in slots_of(value):
        try:
            yield slot, slot.__get__(value)
        except AttributeError:  # nothing yet
            continue


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the `__dict__` of an object, the very one; an empty one where it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the objects that the module's hooks are, or are methods of.

    Functions are left out: what they note in their variables is how passes are counted.
    """
    hooks = (hook for name in HOOKS for hook in vars(module)[name].values())
    return [hook for hook in hooks if not inspect.isfunction(hook)]


def _attributes(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object, and of those of its classes that no library has defined."""
    held = {key: value for key, value in attributes_of(owner).items() if counts(key)}
    held |= {slot.__name__: value for slot, value in slot_values(owner)}
    if isinstance(owner, nn.Module):
        held |= {**dict(owner.named_parameters(recurse=False)), **owner._buffers}
        held |= {f"hook {number}": hook for number, hook in enumerate(hooks_of(owner))}
    for kind in type(owner).__mro__:
        if not is_library(kind):
            held = {key: value for key, value in vars(kind).items() if not key.startswith("__")} | held
    yield from ((f"{name}.{key}", value) for key, value in held.items())


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `value` holds, by name."""
    if isinstance(value, nn.Module):
        yield from ((f"{name}.{inner}".rstrip("."), module) for inner, module in value.named_children())
        yield from _attributes(name, value)
        return
    if isinstance(value, Tensor | type | MemberDescriptorType):
        return
    if isinstance(value, dict | list | tuple | set | deque):
        if len(value) <= LARGEST_CONTAINER:
            if not isinstance(value, tuple):
                yield f"the length of {name}", len(value)
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", element) for key, element in pairs)
    elif isinstance(value, partial):
        yield from ((f"{name}({argument})", part) for argument, part in enumerate((value.func, *value.args)))
        yield from ((f"{name}({argument})", part) for argument, part in value.keywords.items())
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if inspect.isfunction(function):
        if not is_library(function):
            where = f"(used in {function.__qualname__})"
            yield from ((f"{variable} {where}", part) for variable, part in _variables(function).items())
            yield from ((f"{name}.{key}", part) for key, part in vars(function).items())
        if inspect.ismethod(value):
            yield f"{name}.__self__", value.__self__
    elif isinstance(value, np.ndarray):
        if value.dtype == object and value.size <= LARGEST_CONTAINER:
            yield from ((f"{name}.flat[{number}]", element) for number, element in enumerate(value.flat))
    elif not is_library(type(value)):
        yield from _attributes(name, value)


def _variables(function: Any) -> Mapping[str, Any]:
    """Return the variables of a function's closure, the global ones that its code names, and its defaults."""
    defaults = {f"default {number}": value for number, value in enumerate(function.__defaults__ or ())}
    defaults |= function.__kwdefaults__ or {}
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a variable of the closure has no value yet
        return defaults
    # An iterator that nothing holds is no state of the model's or the trainer's.
    variables = {**used.globals, **used.nonlocals, **defaults}
    return {name: value for name, value in variables.items() if not isinstance(value, Iterator)}
