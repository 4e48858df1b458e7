"""A round's row in the ledger."""

from collections.abc import Collection
from dataclasses import asdict

from fedkd_flwr.algorithms.base import Metrics
from fedkd_flwr.flower.roster import Roster
from fedkd_flwr.flower.round import Round
from fedkd_flwr.measure.ledger import Row
from fedkd_flwr.measure.metrics import spread_of, weighted_scores

_SCOPES = ("shared", "private", "ensemble")


def row_of(
    current: Round,
    roster: Roster,
    live: Collection[int],
    *,
    version: int,
    scores: Metrics | None,
    wire_bytes: int,
    skipped: bool,
) -> Row:
    """The shared model as it is now, and local scores of the version that clients were sent.

    Args:
        current: the round.
        roster: of clients.
        live: nodes that are connected.
        version: of the shared model now.
        scores: of that model on the server's test set; None where nothing is shared.
        wire_bytes: moved by the run so far.
        skipped: whether the round did not count.
    """
    replies = current.accepted.values()
    local = {
        f"{scope}_local": [(getattr(reply, scope), reply.num_test_examples) for reply in replies] for scope in _SCOPES
    }
    return {
        "round": current.number,
        "version": version,
        "skipped": skipped,
        "payload_bytes": current.payload_bytes,
        "wire_bytes": wire_bytes - current.wire_bytes_before,
        "local_version": current.version,
        "metrics": {"shared_global": scores, **{scope: weighted_scores(found) for scope, found in local.items()}},
        "spread": {scope: spread_of(metrics for metrics, _ in found) for scope, found in local.items()},
        "train": weighted_scores((reply.train, reply.num_examples) for reply in replies),
        "sampled": current.sampled,
        "clients": sorted(current.accepted),
        "online": roster.online(live),  # counts: names would grow with the federation
        "offline": roster.offline(live),
        "num_clipped": current.num_clipped,
        "rejected": [asdict(rejection) for rejection in current.rejected],
        "seconds": current.seconds,
    }
