"""How long those who are late are waited for once enough others have answered."""

from collections.abc import Callable
from math import inf
from time import monotonic

from flwr.app import Message


class Grace:
    """Watches the replies of one batch of messages.

    Args:
        num_wanted: good replies from which on the others have only the grace left.
        seconds: the grace; None: they have all the time that the batch has.
        is_good: whether a reply is one. A node that answers fast, and nonsense, must not shorten the others' time.
    """

    def __init__(self, num_wanted: int, seconds: float | None, is_good: Callable[[Message], bool]) -> None:
        self._num_left = num_wanted
        self._seconds = seconds
        self._is_good = is_good
        self._ends = inf

    def take(self, reply: Message) -> None:
        """A reply has come."""
        if self._seconds is not None and self._num_left > 0:
            self._num_left -= self._is_good(reply)

    def ends(self) -> float:
        """When it is over, on the clock of `time.monotonic`; infinity before enough have answered."""
        if self._seconds is not None and self._num_left <= 0 and self._ends == inf:
            self._ends = monotonic() + self._seconds
        return self._ends

    def describe(self, timeout_seconds: float) -> str:
        """For how long those that are silent were waited for, in words."""
        if self._ends == inf:
            return f"{timeout_seconds:.4g} s"
        return f"{self._seconds:g} s after enough others had answered (server.grace_seconds)"
