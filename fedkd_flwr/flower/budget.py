"""How much privacy a run may spend, before it begins, before each round, and after it lost its ledger."""

from collections import Counter

from fedkd_flwr.experiment import ConfigError, Experiment
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.checkpoint import Choice
from fedkd_flwr.measure.ledger import Ledger
from fedkd_flwr.measure.privacy_account import PrivacyAccount, require_accounting

NO_BOUND = "without noise, there is no bound"


def check_accounting(experiment: Experiment) -> None:
    """Refuse early what could not be accounted for later, or allows not even one round.

    Raises:
        ConfigError: naming the key or the package.
    """
    if experiment.noise_facts is None:
        return
    try:
        require_accounting()
    except ImportError as error:
        raise ConfigError(str(error)) from None
    if experiment.privacy is None or (most := experiment.privacy.max_epsilon) is None:
        return
    attempts = experiment.server.num_attempts
    least = PrivacyAccount(experiment.noise_facts).epsilon_after(attempts)
    if least is None or least > most:
        can = f"can take {least:.4g}, because a client is asked up to {attempts} times (server.num_attempts)"
        takes = f"one round {can if attempts > 1 else f'takes {least:.4g}'}" if least is not None else NO_BOUND
        raise ConfigError(f"privacy.max_epsilon: {takes}, got {most:g}; raise it, or noise_multiplier")


def reason_of_budget(account: PrivacyAccount | None, max_epsilon: float | None, num_attempts: int) -> str:
    """Why no further round may begin; empty where one may.

    Args:
        account: what has been disclosed so far.
        max_epsilon: towards the server, of any one client.
        num_attempts: how often a client can be asked in one round.
    """
    if account is None or max_epsilon is None:
        return ""
    after = account.epsilon_after(account.num_trainings + num_attempts)
    if after is not None and after <= max_epsilon:
        return ""
    return f"another round would bring epsilon from {account.spent()['epsilon_server']:.4g} above {max_epsilon:g}"


def account_of(ledger: Ledger) -> Archive:
    """For a checkpoint: what was moved and disclosed, so that a ledger that is lost takes nothing of it away."""
    disclosed = ledger.privacy.saved() if ledger.privacy is not None else None
    return Archive({"wire_bytes": ledger.wire_bytes, "disclosed": disclosed})


def go_on_counting(
    ledger: Ledger, account: Archive | None, begun: Choice | None, server_round: int, num_attempts: int
) -> None:
    """Let the ledger count at least what a checkpoint says, and what was asked of clients after it.

    Who is asked is on disk before any message leaves, and a message is in the ledger after it has left, so whoever was
    chosen after the checkpoint counts as asked. A ledger that lacks what the checkpoint knows was lost, or is an older
    one, and says nothing of tries within that round: then all that may have been made count.

    Args:
        ledger: as it was found.
        account: of the checkpoint; None in one of before there was any.
        begun: whom the last round that began has asked.
        server_round: of the checkpoint.
        num_attempts: how often a client can be asked in one round.
    """
    if account is None:
        return
    disclosed = account.facts["disclosed"]
    if ledger.privacy is not None and disclosed is not None and begun is not None and begun.server_round > server_round:
        times = num_attempts if ledger.privacy.lacks(disclosed) else 1
        num_trainings = Counter(disclosed["num_trainings"])
        num_trainings.update(dict.fromkeys(begun.clients, times))
        disclosed = disclosed | {"num_trainings": num_trainings}
    ledger.go_on(account.facts["wire_bytes"], disclosed)
