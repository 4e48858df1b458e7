"""Flower's run config and node config, read once at each end.

The run config stays small: `config` (path of the YAML, relative to the app), `config-text` (YAML that wins over it),
`set` (overrides, as a shell would split them), `output-dir`, `run-name`, `resume` (name of a run to go on with, or
"latest"), `resume-force` (with another number of rounds), `state-dir`, `code-digest`.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import fedkd_flwr
from fedkd_flwr.experiment import NAME_PATTERN, ConfigError, Experiment, load, parse

UserConfig = Mapping[str, bool | float | int | str]

APP_FILES = ("server_app.py", "client_app.py")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server run needs beside the grid.

    Attributes:
        experiment: the validated configuration.
        run_dir: where the ledger and the results go; not made yet, unless it is to be resumed.
        resume: go on with the run that is there.
        force: even with another number of rounds.
    """

    experiment: Experiment
    run_dir: Path
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs beside the message.

    Attributes:
        experiment: the validated configuration.
        state_dir: root of client states on this machine.
        client_key: the client's lasting name.
        partition_id: which part of the task's data is its own.
    """

    experiment: Experiment
    state_dir: Path
    client_key: str
    partition_id: int


def server_settings(run_config: UserConfig, app_dir: Path) -> ServerSettings:
    """Read a run config on the server.

    Raises:
        ConfigError: if the experiment can't be run as written.
    """
    experiment = _experiment(run_config, app_dir)
    root = _directory(run_config.get("output-dir")) or _flower_home() / "fedkd" / "results"
    runs = root / experiment.name
    if resume := str(run_config.get("resume", "")):
        return ServerSettings(experiment, _run_to_resume(runs, resume), True, run_config.get("resume-force") is True)
    name = str(run_config.get("run-name") or datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    return ServerSettings(experiment, runs / name)


def client_settings(run_config: UserConfig, node_config: UserConfig, app_dir: Path) -> ClientSettings:
    """Read run config and node config on a client.

    Raises:
        ConfigError: if the experiment can't be run as written, or the node is not told which client it is.
    """
    experiment = _experiment(run_config, app_dir)
    partition_id = node_config.get("partition-id")
    if not isinstance(partition_id, int) or isinstance(partition_id, bool):
        raise ConfigError(f"node config: partition-id must be an integer from 0, got {partition_id!r}")
    if not 0 <= partition_id < experiment.num_clients:
        raise ConfigError(
            f"node config: partition-id must be in [0, {experiment.num_clients - 1}] for num_clients "
            f"{experiment.num_clients}, got {partition_id}"
        )
    key = str(node_config.get("client-id", f"{partition_id:05d}"))
    if not re.fullmatch(NAME_PATTERN, key):
        raise ConfigError(f"node config: client-id must match {NAME_PATTERN}, got {key!r}")
    state_dir = _directory(node_config.get("state-dir")) or _directory(run_config.get("state-dir"))
    return ClientSettings(experiment, state_dir or default_state_dir(), key, partition_id)


def default_state_dir() -> Path:
    """Where clients keep their state unless node or run say otherwise."""
    return _flower_home() / "fedkd" / "state"


def code_digest(app_dir: Path) -> str:
    """Digest of the package's files and both apps, as they are where this runs."""
    package = Path(fedkd_flwr.__file__).parent
    state = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        state.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    for name in APP_FILES:
        state.update(name.encode() + b"\0" + (app_dir / name).read_bytes())
    return state.hexdigest()


def _run_to_resume(runs: Path, name: str) -> Path:
    there = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    if name == "latest" and there:
        name = there[-1]
    if name not in there:
        raise ConfigError(f"run config: resume must be a run in {str(runs)!r} or 'latest', got {name!r}")
    return runs / name


def _experiment(run_config: UserConfig, app_dir: Path) -> Experiment:
    _check_code(str(run_config.get("code-digest", "")), app_dir)
    try:
        overrides = shlex.split(str(run_config.get("set", "")))
    except ValueError as error:
        raise ConfigError(f"run config: set can't be split into overrides: {error}") from None
    if text := str(run_config.get("config-text", "")):
        return _parsed(text, tuple(overrides))
    path = str(run_config.get("config", ""))
    if not path:
        raise ConfigError("run config: config must be the path of a YAML file in the app, got nothing")
    return load(app_dir / path, overrides)


@lru_cache(maxsize=1)
def _parsed(text: str, overrides: tuple[str, ...]) -> Experiment:
    """An experiment from its text, read once in a process that gets many messages of it."""
    return parse(text, overrides, source="config-text")


def _check_code(expected: str, app_dir: Path) -> None:
    """Refuse to run other code than was started: a package imported from elsewhere shadows the one that was sent."""
    if expected and (found := code_digest(app_dir)) != expected:
        raise ConfigError(
            f"code-digest: this process runs {Path(fedkd_flwr.__file__).parent} with apps from {app_dir}, which is "
            f"other code than was started ({found[:12]} != {expected[:12]}); stop the old SuperLink or reinstall"
        )


def _directory(value: object) -> Path | None:
    return Path(str(value)).expanduser().resolve() if value else None


def _flower_home() -> Path:
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
