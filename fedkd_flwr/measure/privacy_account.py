"""What a run has disclosed of any one client, as (epsilon, delta), counted from its ledger.

Two observers are told apart. The **server** sees each reply on its own: as many Gaussian mechanisms as the client was
asked to train, each with that client's noise alone. Everybody else, other clients and whoever uses the model, sees
**released** broadcasts: each has the noise of all replies in it, as long as their clients did add it. That of one reply
counts for nothing: who took part knows what it sent, and can take it out again. Sampling is not counted in anyone's
favour, because the server knows whom it asked, and so do the clients.

Mechanisms with noise multipliers z_1 ... z_n compose to one with 1 / sqrt(sum 1 / z_i^2) (Dong, Roth and Su 2019,
https://arxiv.org/abs/1905.02383); its epsilon is that of Balle and Wang 2018, https://arxiv.org/abs/1805.06530, from
the library dp-accounting.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]
Spent = dict[str, Any]

OUTSIDE = (
    "that a client takes part, when it replies and in how many bytes",
    "that a client says it failed, and why",
)
OUTSIDE_METRICS = ("scores, losses and seconds of clients", "numbers of examples")
# Rejections that depend on what an update is: the noise of those that are left is not what it was.
_BY_CONTENT = {"norm", "payload", "aggregate"}


class PrivacyAccount:
    """Counts what every client has disclosed.

    Args:
        facts: `noise_multiplier`, `delta`, `adjacency`, `noise_by` ("clients" or "server"), `share_metrics`,
            `is_mean` (whether broadcasts are made of the mean of the replies).
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._num_trainings: Counter[str] = Counter()
        self._released: dict[str, float] = {}  # sum of 1 / z^2 over the broadcasts that a client is in
        self._released_holds = bool(facts["is_mean"])
        self._multiplier = facts["noise_multiplier"] / (2.0 if facts["adjacency"] == "replace" else 1.0)

    def take(self, row: Mapping[str, Any]) -> None:
        """Count one row of the ledger. Those of a round that was done again count again: both were seen."""
        if row["kind"] == "account":
            self._merge(row["disclosed"] or {})
        elif row["kind"] == "message":
            if (row["direction"], row["purpose"]) == ("downlink", "train"):
                self._num_trainings[row["node"]] += 1
        elif row["kind"] == "round" and not row.get("skipped") and row.get("clients") and row["round"] > 0:
            disclosed = self._disclosed(len(row["clients"]))
            for name in row["clients"]:
                self._released[name] = self._released.get(name, 0.0) + disclosed
        if row["kind"] == "round":
            changed = row.get("num_clipped") or any(r["kind"] in _BY_CONTENT for r in row.get("rejected", ()))
            self._released_holds &= not changed

    def saved(self) -> dict[str, Any]:
        """What was counted, for a checkpoint and as `disclosed` of a ledger's row of kind "account"."""
        return {
            "num_trainings": dict(self._num_trainings),
            "released": {name: value if math.isfinite(value) else None for name, value in self._released.items()},
            "released_holds": self._released_holds,
        }

    def lacks(self, disclosed: Facts) -> bool:
        """Whether some client has disclosed more by another count of the same run (see `saved`) than by this one."""
        other = PrivacyAccount(self._facts)
        other._merge(disclosed)
        return (
            any(count > self._num_trainings[name] for name, count in other._num_trainings.items())
            or any(value > self._released.get(name, 0.0) for name, value in other._released.items())
            or (self._released_holds and not other._released_holds)
        )

    def _merge(self, disclosed: Facts) -> None:
        """Count at least what another count of the same run says: the larger of both, client by client."""
        self._num_trainings |= Counter(disclosed.get("num_trainings", {}))
        for name, value in disclosed.get("released", {}).items():
            self._released[name] = max(self._released.get(name, 0.0), math.inf if value is None else value)
        self._released_holds &= disclosed.get("released_holds", True)

    @property
    def num_trainings(self) -> int:
        """How often the client that was asked most was asked to train."""
        return max(self._num_trainings.values(), default=0)

    def spent(self) -> Spent:
        """For the ledger: epsilon towards the server and of what is released, of the client with the largest.

        None stands for no bound. Replies that were asked for twice count twice, though a client gives the same again.
        """
        released = max(self._released.values(), default=0.0)
        return self._spent(self.num_trainings, released if self._released_holds else math.inf)

    def forecast(self, num_rounds: int, num_replies: int) -> Spent:
        """The same of a client that takes part in so many rounds of so many replies each, all of them good."""
        released = num_rounds * self._disclosed(num_replies) if self._facts["is_mean"] else math.inf
        return self._spent(num_rounds, released)

    def _spent(self, num_trainings: int, released: float) -> Spent:
        by_clients = self._facts["noise_by"] == "clients"
        outside = OUTSIDE if by_clients and not self._facts["share_metrics"] else (*OUTSIDE, *OUTSIDE_METRICS)
        return {
            "epsilon_server": self.epsilon_after(num_trainings) if by_clients else None,
            "epsilon_released": self._epsilon(released),
            "delta": self._facts["delta"],
            "adjacency": self._facts["adjacency"],
            "num_trainings": num_trainings,
            "outside": list(outside),
        }

    def _disclosed(self, num_replies: int) -> float:
        """1 / z^2 of a broadcast of so many replies, for whoever sent one of the others."""
        copies = max(1, num_replies - 1) if self._facts["noise_by"] == "clients" else 1
        variance = copies * self._multiplier**2
        return 1.0 / variance if variance else math.inf

    def epsilon_after(self, num_trainings: int) -> float | None:
        """Epsilon towards the server of a client that has trained so often; None for no bound."""
        if num_trainings == 0:
            return 0.0
        return self._epsilon(num_trainings / self._multiplier**2 if self._multiplier else math.inf)

    def _epsilon(self, inverse_variance: float) -> float | None:
        if inverse_variance == 0:
            return 0.0
        return None if not math.isfinite(inverse_variance) else epsilon_of(inverse_variance**-0.5, self._facts["delta"])


def epsilon_of(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism with this noise for each unit of sensitivity.

    Raises:
        ImportError: without dp-accounting.
    """
    from dp_accounting import get_epsilon_gaussian  # a second to import, and only runs with noise need it

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def require_accounting() -> None:
    """Refuse early what could not be accounted for later.

    Raises:
        ImportError: in one line, with the remedy.
    """
    try:
        epsilon_of(1.0, 1e-5)
    except ImportError:
        remedy = "pip install 'fedkd-flwr[privacy]' where the server runs"
        raise ImportError(
            f"epsilon is computed by the package dp-accounting, which is not installed: {remedy}"
        ) from None
