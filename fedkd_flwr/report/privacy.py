"""What a run has disclosed, in words."""

from collections.abc import Mapping, Sequence
from typing import Any


def describe_privacy(spent: Mapping[str, Any]) -> str:
    """One line: epsilon towards both observers, and for what."""
    client = "replaced" if spent["adjacency"] == "replace" else "left out"
    towards = [
        ("the server", spent["epsilon_server"]),
        ("whoever sees only what is released", spent["epsilon_released"]),
    ]
    bounds = ", ".join(f"{_epsilon(value)} towards {who}" for who, value in towards)
    return (
        f"privacy: {bounds}, at delta {spent['delta']:g}, for one client's data {client}; "
        f"at most {spent['num_trainings']} trainings of a client"
    )


def privacy_rows(spent: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """The same as rows of a table, with what epsilon leaves out; none where a run has no noise."""
    if not spent:
        return ()
    return (
        ("privacy towards the server", _epsilon(spent["epsilon_server"])),
        ("privacy of what is released", _epsilon(spent["epsilon_released"])),
        ("delta; adjacency", f"{spent['delta']:g}; {str(spent['adjacency']).replace('_', ' ')} one client"),
        ("trainings of the client with the most", str(spent["num_trainings"])),
        ("outside epsilon", "; ".join(spent["outside"])),
    )


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"epsilon {value:.4g}"
