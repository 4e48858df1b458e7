"""How much privacy a run may spend, before it begins and before each round."""

from fedkd_flwr.experiment import ConfigError, Experiment
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
