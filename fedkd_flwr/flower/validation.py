"""What the server believes: bounds that follow the clients themselves."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import median, median_low
from typing import Literal

import numpy as np

from fedkd_flwr.algorithms.base import Length
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.roster import Seat

_REMEMBERED_NORMS = 128
_FEWEST = 3  # the median of two says nothing about either


@dataclass
class NormBound:
    """How long an update may be: a multiple of the running median of accepted ones.

    Where fewer than three lengths are known, or most are 0, there is no median to believe. Then the shortest of them
    speaks for the others: honest clients whose data differs in size by a factor of ten or twenty take as many more
    steps, and their first updates differ by as much, so `ratio` squared times the shortest is believed, or `ratio`
    times the length of the model itself, whichever is more: a client that sends next to nothing must not get the others
    rejected. A length that stands alone speaks for nobody, and only the model bounds it.

    Attributes:
        ratio: the multiple; None for no bound.
        excess: what becomes of a longer one.
        length: how long an update is, and how it is shortened.
        num_clipped: of this round's updates.
        num_rejected: of this round's updates.
    """

    ratio: float | None
    excess: Literal["reject", "clip"]
    length: Length = field(default_factory=Length)
    num_clipped: int = 0
    num_rejected: int = 0
    _pending: list[float] = field(default_factory=list)  # norms of this round's updates, until the round counts
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_NORMS))
    _limit: float | None = None
    _usual: str = ""  # what the limit is a multiple of, in words

    @property
    def needs_norms(self) -> bool:
        """Whether too few updates were accepted so far to know what is usual: then a round judges itself."""
        stale = self.num_rejected > len(self._pending)
        return self.ratio is not None and (stale or len(self._norms) < 2 * _FEWEST)

    def begin(self, norms: Iterable[float] = (), reference: float = 0.0) -> None:
        """Fix the bound of a round, so that it does not depend on the order of replies.

        Args:
            norms: of the round's own updates, where `needs_norms`.
            reference: the length of what updates move; 0 where it says nothing about theirs.
        """
        if self.num_rejected > len(self._pending):
            self._norms.clear()  # most of a round was too long: what is usual has changed, or was never known
        self.num_clipped = self.num_rejected = 0
        self._pending = []
        known = [*self._norms, *(norm for norm in norms if np.isfinite(norm))]
        self._limit, self._usual = (None, "") if self.ratio is None else _limit_of(known, self.ratio, reference)

    def admit(self, update: Arrays) -> dict[str, Array]:
        """The update, or the part of it that is believed.

        Raises:
            MessageError: if it is too long, and longer ones are rejected.
        """
        norm = self.length.norm(update)
        if self._limit is None or norm <= self._limit:
            self._pending.append(norm)
            return dict(update)
        if self.excess == "reject":
            self.num_rejected += 1
            raise MessageError(
                f"its update's norm is {norm:.4g}, more than {self._usual}; at most "
                f"{self._limit:.4g} is believed (server.validation.max_norm_ratio)",
                kind="norm",
            )
        self._pending.append(self._limit)
        self.num_clipped += 1
        return self.length.scaled(update, self._limit / norm)

    def counted(self) -> None:
        """The round's updates have entered an aggregate that moved the reference."""
        self._norms.extend(self._pending)

    def saved(self) -> Archive:
        """For a checkpoint."""
        mostly_rejected = self.num_rejected > len(self._pending)
        return Archive({"mostly_rejected": mostly_rejected}, {"norms": np.asarray(self._norms, np.float64)})

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint."""
        self._norms.clear()
        self._norms.extend(float(norm) for norm in archive.arrays["norms"])
        self.num_rejected = int(archive.facts["mostly_rejected"])


def _limit_of(known: list[float], ratio: float, reference: float) -> tuple[float | None, str]:
    """The longest update that is believed, or None where nothing is known, and what it is a multiple of."""
    usual = median(known) if len(known) >= _FEWEST else 0.0
    if usual > 0:
        return ratio * usual, f"{ratio:g} times the usual"
    moved = sorted(norm for norm in known if norm > 0)
    shortest = ratio**2 * moved[0] if len(moved) > 1 else 0.0
    if shortest > ratio * reference:
        return shortest, f"{ratio**2:g} times the shortest of {len(moved)}"
    return ratio * reference or None, f"{ratio:g} times the model's own"


def require_finite_scores(scores: Mapping[str, float] | None) -> None:
    """Refuse a version of which the server's test set says nothing, or that it is broken.

    Raises:
        ValueError: naming the first score that is no finite number.
    """
    for name, value in (scores or {}).items():
        if not isfinite(value):
            raise ValueError(
                f"the next version's {name} on the server's test set is {value}, so it is not taken; lower the "
                "learning rate, or look for the client whose update did it"
            )


def implausible(seats: Iterable[Seat], ratio: float | None) -> dict[str, str]:
    """Clients that claim far more examples than the others, and why they are not believed.

    Args:
        seats: all that are connected. Those that have given a good reply say what is usual, once there are three.
        ratio: how many times the median is believed; None for any.
    """
    known = list(seats)
    if ratio is None or len(known) < _FEWEST:
        return {}
    found = {}
    for what in ("num_examples", "num_test_examples"):
        usual = median(getattr(seat, what) for seat in _judges(known))
        for seat in known:
            if (claimed := getattr(seat, what)) > ratio * usual:
                found[seat.client_key] = (
                    f"claims {claimed} {what.removeprefix('num_').replace('_', ' ')}, more than {ratio:g} times the "
                    f"median of {usual:g} (server.validation.max_examples_ratio)"
                )
    return found


def most_examples(seats: Iterable[Seat], ratio: float | None) -> float:
    """For how many examples a client may count, whatever it claims.

    Args:
        seats: all clients ever seen. Those that have given a good reply say what is usual, once there are three.
        ratio: how many times the lower median; None for any number. Of two clients the smaller one decides.
    """
    known = list(seats)
    if ratio is None or not known:
        return inf
    return ratio * median_low(seat.num_examples for seat in _judges(known))


def _judges(known: list[Seat]) -> list[Seat]:
    """The clients whose claims say what is usual."""
    proven = [seat for seat in known if seat.replied_round > 0]
    return proven if len(proven) >= _FEWEST else known
