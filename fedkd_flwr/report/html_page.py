"""One run as one HTML file that needs nothing else: no script, no font, no request.

Names and reasons come from clients, and a hostile one writes what it likes: whatever is not made here passes `as_text`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedkd_flwr.experiment import CONFIG_FILE
from fedkd_flwr.measure.link import NetworkOptions, transfer_of
from fedkd_flwr.measure.metrics import SCOPES
from fedkd_flwr.report.account import Account, account_of
from fedkd_flwr.report.charts import Axes, Series, bar_chart, line_chart
from fedkd_flwr.report.markup import as_text
from fedkd_flwr.report.page_style import STYLE
from fedkd_flwr.report.privacy import privacy_rows
from fedkd_flwr.report.runs import MEGABYTE, RunResult, fewer_bytes
from fedkd_flwr.report.verdict import verdict

PAGE_FILE = "report.html"
SCOPE_NAMES = {
    "shared_global": "shared model, server's test set",
    "shared_local": "shared model, clients' own data",
    "private_local": "private models, clients' own data",
    "ensemble_local": "both together, clients' own data",
}
NONE = "-"
MOST_REASONS = 10
MOST_BARS = 40  # rounds; beyond, bars flicker
FEWEST_TENTHS = 10  # clients; fewer have no tenth
# The browser itself refuses whatever is not in the file, should anything slip through.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_page(run: RunResult, link: NetworkOptions | None = None) -> str:
    """The report of one run: finished, failed or still going on; bytes as seconds over a link, or the run's own."""
    account = account_of(run.rows)
    sections = [
        _headline(run, account, link or run.network),
        section_of_lines("Verdict", verdict([run])),
        _scores(run),
        _curves(run, account),
        _bytes(run),
        _clients(account),
        _troubles(run, account),
        _privacy(run),
        _facts(run),
        _configuration(run.directory),
    ]
    return page_of(run.label, sections)


def page_of(title: str, sections: Iterable[str]) -> str:
    """A page that needs nothing else, of sections that are HTML already; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><link rel="icon" href="data:,"><title>{as_text(title)}</title>'
        f"<style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


def section_of_lines(title: str, lines: Sequence[str]) -> str:
    """A section of sentences, in the order given; nothing where there are none."""
    items = "".join(f"<li>{as_text(line, None)}</li>" for line in lines)
    return f'<section><h2>{title}</h2><ul class="lines">{items}</ul></section>' if lines else ""


def table_of(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first column names the row.

    Kinds: "tall" scrolls within the page, "words" has sentences in its last column.
    """
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    table = f"<table><caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
    region = f'class="scroll {kind}" role="region" tabindex="0" aria-label="{caption}"'
    return f"<div {region}>{table}</div>"


def _headline(run: RunResult, account: Account, link: NetworkOptions | None) -> str:
    summary = run.summary
    status = "running or interrupted" if summary["status"] == "unfinished" else summary["status"]
    said = {name: as_text(value) for name, value in summary.items()}
    best = run.score("shared_global")
    name = "shared model"
    if best is None and (best := run.score("private_local")) is not None:
        name = "private models"
    last_rounds = run.last_rounds()
    averaged = (
        [] if last_rounds is None else [(f"the same, {run.rounds_averaged}, as in verdicts", _score(last_rounds))]
    )
    reduction = summary["bytes"]["reduction_vs_dense_teacher"]
    tiles = [
        (f"{as_text(run.metric)}, {name}, after round {account.last_round or 0}", _score(best)),
        *averaged,
        ("rounds", f"{account.last_round or 0} of {said['num_rounds']}"),
        ("moved, all clients", _size(summary["bytes"]["total"])),
        ("fewer bytes than dense FedAvg of the teacher", NONE if reduction is None else fewer_bytes(reduction)),
        ("duration", _duration(summary["seconds"]["wall"])),
    ]
    if link is not None:
        transfer = transfer_of(run.rows, link)
        late = sum(transfer.late_by_round.values())
        beyond = f"; {late} times beyond the deadline" if late else ""
        tiles.append((f"of transfer, {as_text(link.describe())}{beyond}", _duration(transfer.seconds)))
    parts = [
        f"<header><h1>{said['experiment']} "
        f'<span class="status {said["status"]}">{as_text(status)}</span></h1>'
        f"<p>{said['algorithm']} with {said['compressor']} on {said['task']}, aggregated by {said['aggregator']}; "
        f"{said['num_clients']} clients, seed {said['seed']}. "
        f"Run {as_text(run.directory.resolve().name)}.</p></header>"
    ]
    if summary.get("leaves"):
        parts.append(f"<p>What leaves a client: {as_text(summary['leaves'], None)}.</p>")
    if account.reason:
        parts.append(f'<p class="alert" role="alert">The run ended: {as_text(account.reason)}</p>')
    if summary["stopped_early"]:
        parts.append(f'<p class="note">Stopped early: {as_text(summary["stopped_early"])}</p>')
    parts.append('<dl class="tiles">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles) + "</dl>")
    return "".join(parts)


def _scores(run: RunResult) -> str:
    metrics = {scope: run.summary["metrics"].get(scope) or {} for scope in SCOPES}
    names = list(dict.fromkeys(name for scores in metrics.values() for name in scores))
    if not names:
        return '<section><h2>Scores</h2><p class="note">No round has been scored yet.</p></section>'
    rows = [
        (SCOPE_NAMES[scope], *(_score(scores.get(name)) for name in names))
        for scope, scores in metrics.items()
        if scores
    ]
    if (majority := run.majority) is not None:
        words = f"{as_text(majority.words)}, server's test set"
        rows.append((words, *(_score(majority.scores.get(name)) for name in names)))
    table = table_of(f"Scores after round {run.last_round}", ["model", *map(as_text, names)], rows)
    return f"<section><h2>Scores</h2>{table}</section>"


def _curves(run: RunResult, account: Account) -> str:
    by_round, by_bytes = _score_series(run)
    metric = run.metric
    rounds, megabytes = f"{metric} by round", f"{metric} against bytes"
    moved = [
        Series("up", [(n, up / MEGABYTE) for n, (up, _) in sorted(account.bytes_by_round.items())], 0),
        Series("down", [(n, down / MEGABYTE) for n, (_, down) in sorted(account.bytes_by_round.items())], 1),
    ]
    num_rounds = run.summary["num_rounds"]

    def when(number: float) -> str:
        """A round's number; the evaluation after the last is no round."""
        return "end" if num_rounds is not None and number > num_rounds else _whole(number)

    bytes_chart = bar_chart if len(account.bytes_by_round) <= MOST_BARS else line_chart
    figures = [
        _figure(rounds, line_chart(by_round, Axes("round", metric, _whole, _short)), by_round),
        _figure(megabytes, line_chart(by_bytes, Axes("MB moved per client", metric, _short, _short)), by_bytes),
        _spread_figure(run),
        _figure(
            "MB by round, all clients", bytes_chart(moved, Axes("round", "MB", when, _short, from_zero=True)), moved
        ),
    ]
    drawn = "".join(figures)
    note = "Round 0 is before training."
    if any(row["kind"] == "final" for row in run.rows):
        note += " The last bytes are of the evaluation on all clients at the end."
    return f'<section><h2>Curves</h2><div class="figures">{drawn}</div><p class="small">{note}</p></section>'


def _score_series(run: RunResult) -> tuple[list[Series], list[Series]]:
    """Scores of every scope by round, and against megabytes for each client."""
    by_round: dict[str, list[tuple[float, float]]] = {scope: [] for scope in SCOPES}
    by_bytes: dict[str, list[tuple[float, float]]] = {scope: [] for scope in SCOPES}
    moved = {-1: 0.0}
    total = 0
    for row in run.rows:
        if row["kind"] == "message":
            total += row["wire_bytes"]
        elif row["kind"] in ("round", "final"):
            last = row["kind"] == "final"
            moved[row["round"]] = total / MEGABYTE / (run.summary["num_clients"] or 1)
            for scope in SCOPES:
                score = (row["metrics"].get(scope) or {}).get(run.metric)
                if score is None or (last and scope == "shared_global"):  # of the last round already
                    continue
                # Local scores are of the version that the round began with.
                at = row["round"] - (scope != "shared_global")
                by_round[scope].append((at, score))
                if at > 0 and at in moved:  # version 0 costs nothing but a greeting
                    by_bytes[scope].append((moved[at], score))
    series = [
        [Series(SCOPE_NAMES[scope], points[scope], color) for color, scope in enumerate(SCOPES) if points[scope]]
        for points in (by_round, by_bytes)
    ]
    return series[0], series[1]


def _spread_figure(run: RunResult) -> str:
    """How far clients are apart, on their own data; nothing where they were never scored."""
    spreads = {scope: _spread(run, scope) for scope in ("shared_local", "private_local")}
    scope = next((scope for scope, series in spreads.items() if series), None)
    if scope is None:
        return ""
    series = spreads[scope]
    caption = f"{run.metric} over clients: {SCOPE_NAMES[scope].split(',')[0]}"
    return _figure(caption, line_chart(series, Axes("round", run.metric, _whole, _short)), series)


def _spread(run: RunResult, scope: str) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in run.rows:
        if row["kind"] in ("round", "final") and row["round"] > 0:
            values = ((row.get("spread") or {}).get(scope) or {}).get(run.metric) or {}
            for name, value in values.items():
                if value is not None:
                    points.setdefault(name, []).append((row["round"] - 1, value))
    names = {"p90": "best tenth begins here", "median": "median client", "p10": "worst tenth ends here"}
    if (run.summary["num_clients"] or 0) < FEWEST_TENTHS:
        names |= {"p90": "90th percentile of clients", "p10": "10th percentile of clients"}
    return [Series(names[name], points[name], color) for color, name in enumerate(names) if name in points]


def _figure(caption: str, chart: str, series: Sequence[Series]) -> str:
    if not chart:
        return f'<figure><figcaption>{as_text(caption)}</figcaption><p class="note">Nothing to draw yet.</p></figure>'
    keys = "".join(f'<li><span class="key c{each.color}"></span>{as_text(each.name)}</li>' for each in series)
    return f'<figure><figcaption>{as_text(caption)}</figcaption>{chart}<ul class="legend">{keys}</ul></figure>'


def _bytes(run: RunResult) -> str:
    counted = run.summary["bytes"]
    clients = run.summary["num_clients"] or 1
    rows = [(name, _size(counted[name]), _size(counted[name] / clients)) for name in ("uplink", "downlink", "total")]
    for what in ("student", "teacher"):
        dense = counted[f"dense_{what}_equivalent"]
        if dense:
            rows.append((f"dense FedAvg of the {what}", _size(dense), _size(dense / clients)))
    caption = "Every serialised message, evaluation and greetings included"
    return f"<section><h2>Bytes</h2>{table_of(caption, ['', 'all clients', 'per client'], rows)}</section>"


def _clients(account: Account) -> str:
    if not account.clients:
        return '<section><h2>Clients</h2><p class="note">No client has taken part yet.</p></section>'
    head = ["client", "asked", "answered", "rejected", "last version", "up", "down", "events"]
    rows = []
    offline = set(account.offline)
    for name, client in sorted(account.clients.items()):
        events = "".join(f"<li>round {as_text(number)}: {as_text(event)}</li>" for number, event in client.events)
        rows.append(
            (
                f"<bdi>{as_text(name)}</bdi>" + (' <span class="small">offline</span>' if name in offline else ""),
                str(client.num_asked),
                str(client.num_answered),
                f'<span class="bad">{client.num_rejected}</span>' if client.num_rejected else "0",
                NONE if client.version is None else str(client.version),
                _size(client.uplink),
                _size(client.downlink),
                f"<ul>{events}</ul>" if events else NONE,
            )
        )
    return f"<section><h2>Clients</h2>{table_of(f'{len(rows)} clients, by name', head, rows, 'tall words')}</section>"


def _troubles(run: RunResult, account: Account) -> str:
    parts = ["<section><h2>What went wrong</h2>"]
    if account.skipped:
        rounds = ", ".join(map(str, account.skipped))
        parts.append(f"<p>Skipped, for want of good replies: round {as_text(rounds)}.</p>")
    if account.rejected:
        rows = []
        for kind, reasons in sorted(account.rejected.items()):
            items = [
                f"<li>{count} times: <bdi>{as_text(why)}</bdi></li>" for why, count in reasons.most_common(MOST_REASONS)
            ]
            if len(reasons) > MOST_REASONS:
                items.append(f"<li>and {len(reasons) - MOST_REASONS} other reasons</li>")
            rows.append((as_text(kind), str(reasons.total()), f"<ul>{''.join(items)}</ul>"))
        parts.append(table_of("Replies that did not count", ["kind", "replies", "reasons"], rows, "words"))
    if len(parts) == 1:
        parts.append("<p>No round was skipped and no reply rejected.</p>")
    return "".join(parts) + "</section>"


def _privacy(run: RunResult) -> str:
    rows = [(as_text(name), as_text(value)) for name, value in privacy_rows(run.summary.get("privacy"))]
    if not rows:
        return ""
    caption = "What the noise on updates promises, of one client's whole data, as far as the run went"
    return f"<section><h2>Differential privacy</h2>{table_of(caption, ['', ''], rows, 'words')}</section>"


def _facts(run: RunResult) -> str:
    start = next((row for row in run.rows if row["kind"] == "start"), {})
    notes = "".join(f"<li>{as_text(note)}</li>" for note in start.get("notes") or ())
    data = f"<section><h2>Notes on the data</h2><ul>{notes}</ul></section>" if notes else ""
    seconds = run.summary["seconds"]
    environment = run.summary["environment"] or {}
    rows = [(as_text(name.replace("_", " ")), as_text(value)) for name, value in environment.items()]
    rows += [(f"seconds, {as_text(name.replace('_', ' '))}", f"{value:.1f}") for name, value in seconds.items()]
    table = table_of("What it ran on, and where time went; clients' seconds are summed over them", ["", ""], rows)
    return f"{data}<section><h2>Environment and time</h2>{table}</section>"


def _configuration(directory: Path) -> str:
    try:
        text = (directory / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    summary = "<summary>Configuration, every default written out</summary>"
    return f"<section><details>{summary}<pre>{as_text(text, None)}</pre></details></section>"


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 1000 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
