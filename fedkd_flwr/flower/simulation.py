"""What only a simulation has: workers that may die under their clients."""

import re

from flwr.app import Message
from flwr.serverapp import Grid

# How Flower's simulation writes what Ray raised where a worker was gone, and not what a client raised in one.
_LOST = re.compile(
    r"<class 'ray\.exceptions\.(RayActorError|ActorDiedError|WorkerCrashedError|NodeDiedError|LocalRayletDiedError"
    r"|OutOfMemoryError|OwnerDiedError|ObjectLostError)'>:"
)
_SIMULATES = "InMemoryGrid"  # by name: nobody else has to import it


def lost_worker(grid: Grid, reply: Message) -> str:
    """The name of Ray's error where a reply says that the worker of its client has died; empty where it does not.

    Flower puts a dead worker back among the others, where it fails whatever it is given, at once, so that it is given
    nearly everything: no later round can be had from this simulation.

    Args:
        grid: only a simulation's own word is taken: a node could write what it likes.
        reply: to any message.
    """
    if type(grid).__name__ != _SIMULATES or not reply.has_error():
        return ""
    found = _LOST.match(reply.error.reason or "")
    return found[1] if found else ""
