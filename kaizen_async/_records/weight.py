"""How much memory a record takes. A small response can become a large record, so what is kept is bounded in bytes."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from sys import getsizeof
from typing import Any, cast

import msgspec

from kaizen_async._records.base import Part, source_of


def bytes_held(record: object, most: float = math.inf) -> int:
    """Return about how many bytes a record holds, its JSON included. Counting stops above `most`."""
    weight = 0
    counted: set[int] = set()
    todo: list[Any] = [record]
    while todo and weight <= most:
        part = todo.pop()
        if id(part) in counted:
            continue
        counted.add(id(part))
        if isinstance(part, msgspec.Raw):
            weight += memoryview(part).nbytes  # getsizeof of a Raw returns any number
            continue
        weight += getsizeof(part)
        if isinstance(part, msgspec.Struct):
            todo.extend(msgspec.structs.astuple(part))
            if isinstance(part, Part) and not isinstance(source := source_of(part), str):
                todo.append(source)
        elif isinstance(part, (tuple, list, set, frozenset)):
            todo.extend(cast("Iterable[Any]", part))
        elif isinstance(part, Mapping):
            todo.extend(chain.from_iterable(cast("Iterable[tuple[Any, Any]]", part.items())))
    return weight
