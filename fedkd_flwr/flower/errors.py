"""What can go wrong at the seam."""


class RunError(Exception):
    """A run that can't go on. An ordinary exception on purpose: Flower reports SystemExit as a completed run."""


class MessageError(ValueError):
    """A message that is not what its sender should have sent."""


class StateError(Exception):
    """Client state on disk that can't be used."""
