"""`fedkd state`: what clients keep on this machine."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fedkd_flwr.console import Terminal
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.inventory import Kept, delete_state, describe_age, kept_states
from fedkd_flwr.flower.retention import size_on_disk
from fedkd_flwr.flower.settings import default_state_dir

out = Terminal()


def state(
    directory: Annotated[Path | None, typer.Argument(help="state or run directory; Flower's own by default")] = None,
    training: Annotated[str, typer.Option(help="only this training")] = "",
    client: Annotated[str, typer.Option(help="only this client")] = "",
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed, private models included")] = False,
) -> None:
    """List what clients keep on this machine, and delete it when asked to."""
    root = directory or default_state_dir()
    listed = [
        kept for kept in kept_states(root) if training in ("", kept.training_id) and client in ("", kept.client_key)
    ]
    if not listed:
        raise ConfigError(f"{str(root)!r} holds no client state{' of that name' if training or client else ''}")
    num_bytes = size_on_disk(kept.directory for kept in listed)
    table = Table("training", "client", "version", "last reply", "kB", "changed", "age", "", box=box.SIMPLE)
    for kept in listed:
        if delete:
            try:
                delete_state(kept)
            except OSError as error:
                raise RunError(f"{str(kept.directory)!r} can't be deleted: {error.strerror}") from error
        table.add_row(*_cells(kept), "deleted" if delete else "")
    (out if out.is_terminal else Terminal(width=120)).print(table)
    trainings = len({kept.training_id for kept in listed})
    total = f"{_counted(len(listed), 'state')} of {_counted(trainings, 'training')}, {num_bytes / 1e3:.0f} kB"
    total += "; what clients share is counted once"
    out.print(total, highlight=False, markup=False, soft_wrap=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells(kept: Kept) -> tuple[str, ...]:
    return (
        kept.training_id,
        kept.client_key,
        "damaged" if kept.version is None else str(kept.version),
        f"round {kept.replied_round}" if kept.replied_round else "-",
        f"{kept.num_bytes / 1e3:.0f}",
        f"{kept.changed:%Y-%m-%d %H:%M}",
        describe_age(datetime.now() - kept.changed),
    )
