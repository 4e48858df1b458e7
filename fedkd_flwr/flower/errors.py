"""What can go wrong at the seam."""

from fedkd_flwr.core.printable import printable


class RunError(Exception):
    """A run that can't go on. An ordinary exception on purpose: Flower reports SystemExit as a completed run."""


class WorkerLostError(RunError):
    """A process that simulates clients has died: whatever it is given from then on fails."""


class MessageError(ValueError):
    """A message that is not what its sender should have sent. Its text may quote the sender: it is made printable.

    Attributes:
        kind: what it is counted under in the ledger and the summary.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(printable(message))
        self.kind = kind


class StateError(Exception):
    """Client state on disk that can't be used."""


class NodeError(Exception):
    """What kept a node from answering, without the places that the error itself named."""
