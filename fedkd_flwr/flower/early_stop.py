"""When a run has what was wanted of it."""

from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.measure.ledger import Row
from fedkd_flwr.server_options import EarlyStopOptions


def reason_to_stop(wish: EarlyStopOptions, row: Row, moved_bytes: int) -> str:
    """Why no further round is needed; empty where one is.

    Args:
        wish: what was wanted.
        row: of the last round.
        moved_bytes: by all messages so far.

    Raises:
        RunError: if the metric is none of those that the task gives.
    """
    if wish.target is not None:
        scores = row["metrics"]["shared_global"] or {}
        if wish.metric not in scores:
            names = ", ".join(scores) or "none of a shared model"
            raise RunError(f"server.early_stop.metric must be one of {names}, got {wish.metric!r}")
        if (score := scores[wish.metric]) is not None and score >= wish.target:
            return f"{wish.metric} {score:.4g} is at least {wish.target:g}"
    if wish.max_wire_bytes is not None and moved_bytes + row["wire_bytes"] > wish.max_wire_bytes:
        return f"{moved_bytes} bytes moved, another round would bring them above {wish.max_wire_bytes}"
    return ""
