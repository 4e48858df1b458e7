"""`fedkd`: run, compare, report, check."""

import logging
import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console

import fedkd_flwr
from fedkd_flwr.experiment import ConfigError, Experiment, load
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.launcher import launch
from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.report import read_run, write_report
from fedkd_flwr.report.progress import RunProgress
from fedkd_flwr.report.table import screen_table

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated knowledge distillation on Flower: small on the wire.",
)
out = Console()
err = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="YAML file of an experiment")]
Configs = Annotated[list[Path], typer.Argument(help="YAML files of experiments")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.key=value, over what the YAML says")]
InProcess = Annotated[bool, typer.Option("--in-process", help="without Ray, in this process: seconds, deterministic")]
Output = Annotated[Path | None, typer.Option("--output-dir", help="for results, over what the YAML says")]


@app.command()
def run(conf: Config, overrides: Overrides = None, in_process: InProcess = False, output_dir: Output = None) -> None:
    """Run one experiment in simulation and print what came out."""
    experiment = load(conf, overrides or ())
    _show([_run(experiment, output_dir, in_process)], None)


@app.command()
def compare(
    confs: Configs, overrides: Overrides = None, in_process: InProcess = False, output_dir: Output = None
) -> None:
    """Run several experiments, print one table and draw one figure."""
    experiments = [load(conf, overrides or ()) for conf in confs]
    for experiment in experiments:
        _root(experiment, output_dir)
    directories = [_run(experiment, output_dir, in_process) for experiment in experiments]
    _show(directories, _root(experiments[0], output_dir) / "comparison" / _run_name())


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="run directories: results/<experiment>/<run>")],
    output_dir: Output = None,
) -> None:
    """Draw finished runs again."""
    for directory in directories:
        if not (directory / LEDGER_FILE).is_file():
            raise ConfigError(f"{str(directory)!r} holds no {LEDGER_FILE}; give results/<experiment>/<run>")
    try:
        _show(directories, _writable(output_dir) if output_dir else None)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a {LEDGER_FILE} can't be read as the ledger of a run: {error!r}") from error


@app.command()
def check(conf: Config, overrides: Overrides = None) -> None:
    """Validate an experiment and predict its bytes, from one client's first update, without running it."""
    from fedkd_flwr.flower.forecast import forecast

    experiment = load(conf, overrides or ())
    _root(experiment, None)
    try:
        expected = forecast(experiment)
    except ValueError as error:
        raise ConfigError(f"one client's first round failed: {error}") from error
    out.print(f"{conf}: valid; {expected.describe()}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: one line for an error, and an exit status that can be relied on."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # As Ctrl-C: whoever ends this process means the run, and the SuperLink that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C and typer.Exit into this
    except ConfigError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    except RunError as error:
        _fail(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        _fail(error.format_message(), EXIT_BAD_INPUT)
    if code == EXIT_INTERRUPTED:
        _fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    err.print(f"fedkd: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def _run(experiment: Experiment, output_dir: Path | None, in_process: bool) -> Path:
    run_dir = _root(experiment, output_dir) / experiment.name / _run_name()
    # Built here first, so that data or models that don't fit are found before anything is started or written.
    experiment.build_algorithm(experiment.build_task())
    with RunProgress(experiment.name, experiment.num_rounds, err) as progress:
        if in_process:
            # Imported here: the apps stand beside the package, and nothing else needs them.
            import client_app
            from fedkd_flwr.flower.in_process import run_in_process

            run_in_process(experiment, client_app.app, run_dir, progress.update)
            write_report([run_dir])
        else:
            launch(experiment, _app_dir(), run_dir, progress.update)
    return run_dir


def _root(experiment: Experiment, output_dir: Path | None) -> Path:
    """Where results go; made and tried now, because a run that can't write loses its work."""
    return _writable(output_dir or Path(experiment.output_dir))


def _writable(directory: Path) -> Path:
    """The directory, absolute; it need not exist, but it must be possible to make it and to write there."""
    try:
        root = directory.expanduser().resolve()
        existing = next(parent for parent in (root, *root.parents) if parent.exists())
        usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except (OSError, ValueError, RuntimeError):  # no such user, a zero byte, a name too long
        usable = False
    if not usable:
        raise ConfigError(f"output_dir: must be a directory that can be written, got {str(directory)!r}")
    return root


def _run_name() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _app_dir() -> Path:
    return Path(fedkd_flwr.__file__).resolve().parent.parent


def _show(directories: list[Path], output: Path | None) -> None:
    figure, table = write_report(directories, output)
    runs = [read_run(directory) for directory in directories]
    console = out if out.is_terminal else Console(width=120)
    console.print(screen_table([run.table_row() for run in runs], runs[0].metric))
    for what, path in (("figure", figure), ("table", table), *((run.label, run.directory) for run in runs)):
        out.print(f"{what}: {path}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
