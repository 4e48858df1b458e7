"""`fedkd`: run, resume, compare, report, status, check, state, deploy."""

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.live import Live

import fedkd_flwr
from fedkd_flwr.cli_deploy import deploy
from fedkd_flwr.cli_places import PARTITION_FILE, first_lines, is_new, place_of_report, run_name, writable
from fedkd_flwr.cli_state import state
from fedkd_flwr.console import Terminal, escape_what_streams_lack, one_line
from fedkd_flwr.core.protocols import DataElsewhereError
from fedkd_flwr.core.quoting import quoted
from fedkd_flwr.disk import disk_refuses, refusal
from fedkd_flwr.experiment import CONFIG_FILE, ConfigError, Experiment, baselines_of, load
from fedkd_flwr.flower.budget import check_accounting
from fedkd_flwr.flower.cluster import joined_cluster
from fedkd_flwr.flower.deployment import run_demo
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.launcher import launch
from fedkd_flwr.flower.processes import ENDING
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.server import check_resumable
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.measure.ledger import LEDGER_FILE, LedgerError
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.report import (
    common_link,
    comparison_dir,
    read_run,
    reported,
    verdict,
    write_model_card,
    write_report,
)
from fedkd_flwr.report.html_page import PAGE_FILE
from fedkd_flwr.report.partition import draw_partition
from fedkd_flwr.report.privacy import describe_privacy
from fedkd_flwr.report.progress import RunProgress
from fedkd_flwr.report.runs import rounds_in_words, table_rows
from fedkd_flwr.report.status import status_of
from fedkd_flwr.report.table import screen_table
from fedkd_flwr.report.tensorboard import require_tensorboard, write_events

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated knowledge distillation on Flower: small on the wire.",
)
app.add_typer(deploy, name="deploy")
app.command()(state)
out = Terminal()
err = Terminal(stderr=True)

Config = Annotated[Path, typer.Argument(help="YAML file of an experiment")]
Configs = Annotated[list[Path], typer.Argument(help="YAML files of experiments")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.key=value, over what the YAML says")]
InProcess = Annotated[bool, typer.Option("--in-process", help="without Ray, in this process: seconds, deterministic")]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help="also run what FedKD must beat: dense FedAvg of the teacher, the student alone, each teacher alone",
    ),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="also write event files for TensorBoard; needs the package tensorboard")
]
Output = Annotated[Path | None, typer.Option("--output-dir", help="for results, over what the YAML says")]


@app.command()
def run(
    conf: Config,
    overrides: Overrides = None,
    in_process: InProcess = False,
    output_dir: Output = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Run one experiment in simulation and print what came out."""
    experiment = load(conf, overrides or ())
    if tensorboard:
        require_tensorboard()
    run_dir = _run(experiment, output_dir, in_process, set())
    _show([run_dir], None)
    if tensorboard:
        _show_events(run_dir)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="run directory: results/<experiment>/<run>")],
    overrides: Overrides = None,
    in_process: InProcess = False,
    force: Annotated[
        bool, typer.Option("--force", help="accept another num_rounds than the run was begun with")
    ] = False,
) -> None:
    """Go on with a run that was interrupted, from its newest checkpoint."""
    config = directory / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{str(directory)!r} holds no {CONFIG_FILE}; give results/<experiment>/<run>")
    experiment = load(config, overrides or ())
    run_dir = directory.resolve()
    check_resumable(ServerSettings(experiment, run_dir, resume=True, force=force))
    _execute(experiment, run_dir, in_process, resume=True, force=force)
    _show([run_dir], None)


@app.command()
def compare(
    confs: Configs,
    overrides: Overrides = None,
    in_process: InProcess = False,
    output_dir: Output = None,
    baselines: Baselines = False,
) -> None:
    """Run several experiments, print one table and draw one figure."""
    experiments = [load(conf, overrides or ()) for conf in confs]
    if baselines:
        experiments = [
            each for experiment in experiments for each in (experiment, *(of for _, of in baselines_of(experiment)))
        ]
    for experiment in experiments:
        _root(experiment, output_dir)
    for experiment in experiments:
        runtime_of(experiment)  # what can't be built is better known before hours of others
    noted: set[str] = set()
    directories = [_run(experiment, output_dir, in_process, noted) for experiment in experiments]
    _show(directories, comparison_dir(_root(experiments[0], output_dir)))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="run directories: results/<experiment>/<run>")],
    output_dir: Output = None,
    tensorboard: TensorBoard = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="network.key=value: the link that bytes are turned into seconds for"),
    ] = None,
) -> None:
    """Draw runs again: figure, table and a page for each; several are compared in a place of their own."""
    if tensorboard:
        require_tensorboard()
    directories = [each for n, each in enumerate(directories) if is_new(each, directories[:n])] or directories
    if other := [text for text in overrides or () if text.partition("=")[0].strip().partition(".")[0] != "network"]:
        raise ConfigError(f"what was run can't be set any more, only network can, got {quoted(other[0])}")
    for directory in directories:
        if not (directory / LEDGER_FILE).is_file():
            raise ConfigError(f"{str(directory)!r} holds no {LEDGER_FILE}; give results/<experiment>/<run>")
    link = load(directories[0] / CONFIG_FILE, overrides).network if overrides else None
    try:
        _show(directories, place_of_report(directories, output_dir), link)
        for directory in directories if tensorboard else ():
            _show_events(directory)
    except LedgerError as error:
        raise ConfigError(str(error)) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a {LEDGER_FILE} can't be read as the ledger of a run: {error!r}") from error


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(help="run directory, or that of an experiment: its newest run")],
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.1, help="look again every so many seconds until the run ends")
    ] = None,
) -> None:
    """Say how a run stands, while it goes on or after it."""
    now = status_of(directory)
    console = out if out.is_terminal else Terminal(width=120)
    if watch is None:
        console.print(now.table())
        return
    with Live(now.table(), console=console, auto_refresh=False) as live:
        while not now.ended and not console.quiet:  # it is once nobody reads any more
            time.sleep(watch)
            now = status_of(directory)
            live.update(now.table(), refresh=True)


@app.command()
def check(conf: Config, overrides: Overrides = None, output_dir: Output = None) -> None:
    """Validate an experiment, draw its data and predict its bytes, from first updates of a few clients."""
    # Imported here: it takes seconds, and other commands should not.
    from fedkd_flwr.flower.forecast import forecast

    experiment = load(conf, overrides or ())
    figure = _root(experiment, output_dir) / experiment.name / PARTITION_FILE
    try:
        with err.status("reading data and models") as now:
            expected = forecast(experiment, lambda text: now.update(f"trying {text}"))
    except DataElsewhereError:
        out.print(
            f"{conf}: valid; its data is on the nodes, so nothing can be drawn or predicted here",
            highlight=False,
            soft_wrap=True,
        )
        return
    except ValueError as error:
        raise ConfigError(f"a client's first round failed: {error}") from error
    runtime = runtime_of(experiment)
    labels = runtime.task.data_report()
    drawn = []
    if any(map(any, labels.label_counts)):  # who learns by acting has none
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_partition(labels, figure)
        drawn = [f"partition: {figure}"]
    out.print(f"{conf}: valid; {expected.describe()}", highlight=False, soft_wrap=True)
    noise = [describe_privacy(expected.privacy)] if expected.privacy else []
    for line in (*noise, *(f"note: {note}" for note in runtime.notes), *drawn):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@deploy.callback()
def deployment(
    context: typer.Context,
    demo: Annotated[Path | None, typer.Option("--demo", help="YAML file of an experiment, to run on loopback")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="SuperNodes of the demo, and clients of the run")] = 3,
    overrides: Overrides = None,
    output_dir: Output = None,
) -> None:
    """Run an experiment on real processes on this machine, or prepare keys and certificates for other machines."""
    if context.invoked_subcommand:
        return
    if demo is None:
        raise ConfigError(
            "deploy starts only a demo: --demo CONF --nodes N; how to deploy on hosts is in docs/deploy.md"
        )
    experiment = load(demo, [*(overrides or ()), f"num_clients={nodes}"])
    run_dir = _prepared(experiment, output_dir, set())
    with RunProgress(experiment.name, experiment.num_rounds, err) as progress:
        deployed = run_demo(experiment, _app_dir(), run_dir, progress.update)
    _show([run_dir], None)
    for line in deployed.lines():
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: one line for an error, and an exit status that can be relied on."""
    escape_what_streams_lack()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # As Ctrl-C: whoever ends this process means the run, and the SuperLink that it started.
    for number in ENDING[1:]:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means that the run goes on
            signal.signal(number, signal.default_int_handler)
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
    except OSError as error:
        if not disk_refuses(error):
            raise
        _fail(refusal(error), EXIT_FAILED)
    if code == EXIT_INTERRUPTED:
        _fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    err.print(f"fedkd: {one_line(message)}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def _run(experiment: Experiment, output_dir: Path | None, in_process: bool, noted: set[str]) -> Path:
    """Run and give the run directory; what is to be noted of the data is said unless it is in `noted` already."""
    run_dir = _prepared(experiment, output_dir, noted)
    _execute(experiment, run_dir, in_process)
    return run_dir


def _prepared(experiment: Experiment, output_dir: Path | None, noted: set[str]) -> Path:
    """A new run directory, of an experiment that can be run."""
    run_dir = _root(experiment, output_dir) / experiment.name / run_name()
    check_accounting(experiment)
    # Built here first, so that data or models that don't fit are found before anything is started or written.
    runtime = runtime_of(experiment)
    for line in (*first_lines(runtime, run_dir), *(f"note: {note}" for note in runtime.notes if note not in noted)):
        err.print(line, highlight=False, markup=False, soft_wrap=True)
    noted.update(runtime.notes)
    return run_dir


def _execute(
    experiment: Experiment, run_dir: Path, in_process: bool, *, resume: bool = False, force: bool = False
) -> None:
    if not in_process and (cluster := joined_cluster(run_dir.parent)):
        err.print(f"note: {cluster.describe()}", highlight=False, markup=False, soft_wrap=True)
    with RunProgress(experiment.name, experiment.num_rounds, err) as progress:
        if in_process:
            # Imported here: the apps stand beside the package, and nothing else needs them.
            import client_app
            from fedkd_flwr.flower.in_process import run_in_process

            with reported(run_dir):
                run_in_process(experiment, client_app.app, run_dir, progress.update, resume=resume, force=force)
            write_model_card(run_dir)
        else:
            launch(experiment, _app_dir(), run_dir, progress.update, resume=resume, force=force)


def _root(experiment: Experiment, output_dir: Path | None) -> Path:
    """Where results go; made and tried now, because a run that can't write loses its work."""
    return writable(output_dir or Path(experiment.output_dir))


def _app_dir() -> Path:
    return Path(fedkd_flwr.__file__).resolve().parent.parent


def _show_events(run_dir: Path) -> None:
    out.print(f"tensorboard: {write_events(run_dir)}", highlight=False, markup=False, soft_wrap=True)


def _show(directories: list[Path], output: Path | None, link: NetworkOptions | None = None) -> None:
    figure, table = write_report(directories, output, link)
    runs = [read_run(directory) for directory in directories]
    link = link or common_link(runs)
    console = out if out.is_terminal else Terminal(width=120)
    table_of_runs = screen_table(
        table_rows(runs, link), link.describe(), rounds_in_words(runs), runs[0].metric, console.width
    )
    console.print(table_of_runs)
    if len(runs) > 1 and any(run.network not in (None, link) for run in runs):
        out.print(f"note: runs name several networks; all are shown over {link.describe()}", highlight=False)
    noisy = [(run, privacy) for run in runs if (privacy := run.summary.get("privacy"))]
    disclosed = [f"{run.label}: {describe_privacy(privacy)}" for run, privacy in noisy]
    for line in (*disclosed, *verdict(runs)):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    page = ("page", figure.parent / PAGE_FILE)
    for what, path in (("figure", figure), ("table", table), page, *((run.label, run.directory) for run in runs)):
        out.print(f"{what}: {path}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
