"""Flower's objects, with a limit on what a few bytes of theirs may unfold to.

Flower sends an array as pieces and a list that says in which order they follow. A piece may be named again and again,
so that equal ones travel once: a list of four megabytes and one piece make an array of terabytes, and Flower makes it
before anybody can look at it. Here its length is known before it is made.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Array as FlowerArray
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)

from fedkd_flwr.algorithms.base import Wires
from fedkd_flwr.core.arrays import FLOAT_BYTES, num_elements
from fedkd_flwr.flower.errors import MessageError

_TIMES_DENSE, _SPARE_BYTES = 10, 2**24


def array_with_limit(most_bytes: int) -> type[FlowerArray]:
    """Flower's array, which refuses to be inflated by repetition to more bytes than that.

    Args:
        most_bytes: of one array in which a piece is repeated; what is not repeated was sent, and is here already.
    """

    class Array(FlowerArray):  # the name is part of what is sent
        __qualname__ = "Array"

        @classmethod
        def inflate(cls, object_content: bytes, children: dict[str, InflatableObject] | None = None) -> FlowerArray:
            """As Flower's.

            Raises:
                MessageError: if it would be too long, or repeats what Flower would not.
            """
            pieces = _pieces(object_content, children or {})
            _check(pieces, most_bytes)
            return FlowerArray.inflate(object_content, children)

    return Array


@contextmanager
def inflation_limited(most_bytes: int) -> Iterator[None]:
    """Let no array that is received while the block lasts unfold to more bytes than that; see `array_with_limit`."""
    registry: dict[str, Any] = inflatable_utils.inflatable_class_registry
    before = registry["Array"]
    registry["Array"] = array_with_limit(most_bytes)
    try:
        yield
    finally:
        registry["Array"] = before


def most_unfolded_bytes(wires: Wires | None) -> int:
    """Bytes that an honest client's array has at most where a piece of it is repeated, and a good deal more.

    Args:
        wires: codecs of the experiment; None where nothing is exchanged.
    """
    return _SPARE_BYTES + (_TIMES_DENSE * FLOAT_BYTES * num_elements(wires.uplink.spec) if wires else 0)


def _pieces(object_content: bytes, children: dict[str, InflatableObject]) -> list[tuple[str, int]]:
    """Identifier and bytes of each piece of an array, in the order of its list; Flower refuses what is no piece."""
    order = json.loads(get_object_body(object_content, FlowerArray))["arraychunk_ids"]
    identifiers = get_object_children_ids_from_object_content(object_content)
    sizes = [len(getattr(children[identifier], "data", b"")) for identifier in identifiers]
    return [(identifiers[place], sizes[place]) for place in order]


def _check(pieces: list[tuple[str, int]], most_bytes: int) -> None:
    if len(pieces) == len(once := dict(pieces)):
        return
    repeated = Counter(identifier for identifier, _ in pieces)
    shortest = min(size for identifier, size in once.items() if repeated[identifier] > 1)
    if shortest < FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE:  # Flower cuts no shorter ones but the last
        raise MessageError(f"an array repeats a piece of {shortest} bytes, which Flower does not cut")
    num_bytes = sum(size for _, size in pieces)
    if num_bytes > max(most_bytes, sum(once.values())):
        raise MessageError(f"an array may have {most_bytes} bytes, this one unfolds to {num_bytes}")
