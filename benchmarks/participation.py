"""What partial participation and lost replies cost, in accuracy and in bytes.

python benchmarks/participation.py [CONF] [--seed N] [--rounds N] [--condition NAME]...: one table, and
participation.json in the current directory. Twenty clients:

full        all of them in every round
sampled     a fraction of 0.3, for as many rounds as give the same number of client updates
lost        a fifth of all replies is lost after the client has trained
returning   the three largest clients lose eight replies in a row, then come back
"""

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from flwr.app import Context, Message

import client_app
from fedkd_flwr.core.snapshot import snapshot_bytes
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.local_grid import ClientFunction
from fedkd_flwr.flower.records import TRAIN, Instruction
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.measure.metrics import last_mean

CONF = Path(__file__).resolve().parent.parent / "conf" / "digits_fedkd_paper.yaml"
NUM_CLIENTS = 20
FRACTION = 0.3
LOST = 0.2
NUM_LOST_IN_A_ROW = 8
FIRST_LOST_ROUND = 4
LAST_ROUNDS = 3
DROP = "largest drop from round 11"

Loses = Callable[[int, int], bool]  # partition id, round -> whether the reply is lost


def losing(loses: Loses) -> ClientFunction:
    """The client app; a lost reply is lost after the client has trained and committed."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == TRAIN:
            number = Instruction.from_records(message.content).server_round
            if loses(int(context.node_config["partition-id"]), number):
                raise ConnectionError("lost")
        return reply

    return client


def largest_clients(experiment: Experiment) -> set[int]:
    """The three with most training examples."""
    task = runtime_of(experiment).task
    by_size = sorted(range(NUM_CLIENTS), key=lambda client: len(task.client_data(client).train))
    return set(by_size[-3:])


def measure(experiment: Experiment, app: ClientFunction) -> dict[str, Any]:
    """One run: accuracy of the last rounds and of each, bytes of each client update."""
    with tempfile.TemporaryDirectory() as directory:
        rows = list(read_rows(run_in_process(experiment, app, Path(directory) / "run") / LEDGER_FILE))
    rounds = [row for row in rows if row["kind"] == "round"]
    scores = [row["metrics"]["shared_global"]["accuracy"] for row in rounds[1:]]
    training = [row for row in rows if row["kind"] == "message" and row["purpose"] == "train"]
    num_updates = sum(row["direction"] == "uplink" for row in training)
    return {
        "rounds": len(scores),
        "accuracy": last_mean(scores, LAST_ROUNDS),
        # A window as long in client updates, so that conditions with different numbers of rounds compare.
        "last tenth": mean(scores[-max(1, len(scores) // 10) :]),
        "scores": scores,
        "client updates": num_updates,
        "bytes each": sum(row["wire_bytes"] for row in training) / num_updates,
        "up": _payload(training, "uplink", num_updates),
        "down": _payload(training, "downlink", num_updates),
        "broadcast": mean(row["payload_bytes"] for row in rounds[1:]),
        "overhead": sum(row["wire_bytes"] - row["payload_bytes"] for row in training) / num_updates,
        "rejected": sum(len(row["rejected"]) for row in rounds),
    }


def _payload(training: Sequence[Row], direction: str, num_updates: int) -> float:
    num_bytes: int = sum(row["payload_bytes"] for row in training if row["direction"] == direction)
    return num_bytes / num_updates


def conditions(base: Experiment, conf: Path, overrides: list[str], num_rounds: int) -> Mapping[str, Any]:
    """Experiment and app of each condition."""
    longer = round(num_rounds / FRACTION)
    sampled = load(conf, [*overrides, f"server.fraction_train={FRACTION}", f"num_rounds={longer}"])
    large = largest_clients(base)
    away = range(FIRST_LOST_ROUND, FIRST_LOST_ROUND + NUM_LOST_IN_A_ROW)
    return {
        "full": (base, client_app.app),
        "sampled": (sampled, client_app.app),
        "lost": (base, losing(lambda client, number: random.Random(f"{client} {number}").random() < LOST)),
        "returning": (base, losing(lambda client, number: client in large and number in away)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", type=Path, nargs="?", default=CONF)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--condition", action="append", choices=["full", "sampled", "lost", "returning"])
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)  # lost replies are the point
    overrides = [f"seed={options.seed}", f"num_rounds={options.rounds}", f"num_clients={NUM_CLIENTS}", *options.set]
    base = load(options.conf, overrides)
    wanted = options.condition or ["full", "sampled", "lost", "returning"]
    results: dict[str, Any] = {"snapshot": snapshot_bytes(runtime_of(base).initial)}
    heads = ("rounds", "accuracy", "last 10 %", "updates", "kB each", "up", "down", "drop")
    print(f"{'':<11}" + "".join(f"{head:>11}" for head in heads))
    for name, (experiment, app) in conditions(base, options.conf, overrides, options.rounds).items():
        if name not in wanted:
            continue
        found = results[name] = measure(experiment, app)
        pairs = zip(found["scores"], found["scores"][1:], strict=False)
        found[DROP] = max(
            (before - after for number, (before, after) in enumerate(pairs, 1) if number >= FIRST_LOST_ROUND + 7),
            default=0.0,
        )
        cells = (
            f"{found['rounds']}",
            *(f"{found[key]:.3f}" for key in ("accuracy", "last tenth")),
            f"{found['client updates']}",
            *(f"{found[key] / 1e3:.1f}" for key in ("bytes each", "up", "down")),
            f"{found[DROP]:.3f}",
        )
        print(f"{name:<11}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
    if "full" in results and "sampled" in results:
        full, sampled = results["full"], results["sampled"]
        expected = sampled["up"] + min(sampled["broadcast"] / FRACTION, results["snapshot"]) + sampled["overhead"]
        print(
            f"a sampled client's update: {sampled['bytes each'] / expected:.3f} of up + min(broadcast / {FRACTION}, "
            f"full student) + overhead; {sampled['bytes each'] / full['bytes each']:.3f} of full participation's"
        )
    Path("participation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
