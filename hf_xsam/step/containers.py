"""What containers hold, read and put back in place, whatever methods their classes have of their own."""

import array
from collections import OrderedDict, deque
from operator import is_
from typing import Any


def elements_of(container: Any) -> Any:
    """Return a plain copy, whatever methods a subclass has of its own."""
    if isinstance(container, OrderedDict):
        return dict(OrderedDict.items(container))
    if isinstance(container, dict):
        return dict.copy(container)
    kind = next(kind for kind in (list, deque, set) if isinstance(container, kind))
    return list(kind.__iter__(container))


def refill(container: Any, elements: Any) -> None:
    """Put `elements` back into a container whose elements are others, or in another order."""
    if isinstance(container, bytearray | array.array):
        container[:] = elements
        return
    if len(container) == len(elements) and (not elements or _is_same(elements_of(container), elements)):
        return
    if isinstance(container, OrderedDict):
        OrderedDict.clear(container)
        for key, value in elements.items():
            OrderedDict.__setitem__(container, key, value)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, elements)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), elements)
    elif isinstance(container, deque):
        deque.clear(container)
        deque.extend(container, elements)
    else:
        set.clear(container)
        set.update(container, elements)


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two plain copies of one length have the same elements, the very same, in the same order."""
    if isinstance(one, dict):
        return all(map(is_, one, other)) and all(map(is_, one.values(), other.values()))
    return all(map(is_, one, other))
