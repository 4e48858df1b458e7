"""Whom a round asks."""

import random
from collections.abc import Sequence

from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.checkpoint import Checkpoints, Choice
from fedkd_flwr.flower.resyncs import Resyncs
from fedkd_flwr.flower.roster import Seat
from fedkd_flwr.flower.round import Round

_RESYNC_SHARE = 2  # of a round's clients, one in so many may be sent again what it was sent before


class Sampler:
    """Draws a round's clients by seed, round and name, among those that need not wait for a resync.

    Who that is depends on who is there and what their disks hold, so the choice is written down before anyone is asked:
    a server that is interrupted in the round asks the same clients when it is resumed.

    Args:
        num_sampled: clients of a round.
        max_resyncs: of those, how many may be sent again what they were sent before; None for half.
        seed: of the draw.
        checkpoints: where the choice is written down.
    """

    def __init__(self, num_sampled: int, max_resyncs: int | None, seed: int, checkpoints: Checkpoints) -> None:
        self._num_sampled = num_sampled
        self._seed = seed
        self._checkpoints = checkpoints
        self._resyncs = Resyncs(-(-num_sampled // _RESYNC_SHARE) if max_resyncs is None else max_resyncs, seed)
        self._begun: Choice | None = None  # of the round that was interrupted

    def choose(self, seats: Sequence[Seat], current: Round) -> list[Seat]:
        """This round's clients, by name, written down."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.server_round == current.number:
            chosen = [seat for seat in seats if seat.client_key in begun.clients]
            for client_key in begun.resynced:
                self._serve(client_key, current)
        else:
            chosen = self._draw(self._resyncs.eligible(seats, current.number), current.number)
        current.sampled = [seat.client_key for seat in chosen]
        self._note_resyncs(chosen, current)
        resynced = tuple(sorted(current.resynced))
        self._checkpoints.save_choice(Choice(current.number, tuple(current.sampled), resynced))
        return chosen

    def choose_again(self, seats: Sequence[Seat], current: Round) -> list[Seat]:
        """Those of the round's clients that have given no good reply yet and may be asked once more."""
        missing = set(current.sampled) - current.accepted.keys()
        chosen = [seat for seat in self._resyncs.eligible(seats, current.number) if seat.client_key in missing]
        self._note_resyncs(chosen, current)
        return chosen

    def replied(self, client_key: str, current: Round) -> None:
        """A client has given a good reply."""
        if client_key not in current.resynced:
            self._resyncs.kept(client_key)

    def _draw(self, seats: list[Seat], server_round: int) -> list[Seat]:
        if self._num_sampled >= len(seats):
            return seats
        rng = random.Random(derive_seed(self._seed, "sample", server_round))
        return sorted(rng.sample(seats, self._num_sampled), key=lambda seat: seat.client_key)

    def _note_resyncs(self, chosen: Sequence[Seat], current: Round) -> None:
        for seat in chosen:
            if seat.needs_resync:
                self._serve(seat.client_key, current)

    def _serve(self, client_key: str, current: Round) -> None:
        if client_key not in current.resynced:  # however often it is asked, it counts once in a round
            current.resynced.add(client_key)
            self._resyncs.served(client_key, current.number)

    def saved(self) -> Archive:
        """For a checkpoint."""
        return self._resyncs.saved()

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint, and with the round that had begun after it."""
        self._resyncs.restore(archive)
        self._begun = self._checkpoints.choice()
