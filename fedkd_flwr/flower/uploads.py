"""How long the server waits for the pieces of a reply that its node has announced.

A node says first which objects its reply is made of, and then uploads them. Flower waits for them as long as an upload
may pause (three minutes after each piece), and up to two hours together: a node that sends a piece now and then, or
none, would hold up everybody's round. Here its time ends with that of the round.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF
from flwr.superlink.grid import http_grid

_LOOKS = 4  # in that time, at least


@contextmanager
def uploads_awaited(seconds: float) -> Iterator[None]:
    """While the block lasts, wait no longer for the pieces of a reply; what lacks one then is no reply.

    Args:
        seconds: from when a reply is pulled; at least 0.
    """
    module: Any = http_grid  # simulations have no uploads
    before = module.pull_objects
    pause = seconds / _LOOKS
    module.pull_objects = partial(
        before,
        max_time=seconds,
        initial_backoff=min(PULL_INITIAL_BACKOFF, pause),
        backoff_cap=min(PULL_BACKOFF_CAP, pause),
    )
    try:
        yield
    finally:
        module.pull_objects = before
