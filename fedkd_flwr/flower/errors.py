"""What can go wrong at the seam."""


class RunError(Exception):
    """A run that can't go on. An ordinary exception on purpose: Flower reports SystemExit as a completed run."""


class MessageError(ValueError):
    """A message that is not what its sender should have sent.

    Attributes:
        kind: what it is counted under in the ledger and the summary.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


class StateError(Exception):
    """Client state on disk that can't be used."""


class NodeError(Exception):
    """What kept a node from answering, without the places that the error itself named."""
