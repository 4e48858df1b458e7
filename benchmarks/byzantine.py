"""What three hostile clients of twenty do to the shared model, by attack and defence.

python benchmarks/byzantine.py [CONF] [--seed N] [--rounds N] [--defence NAME]...: one table, and byzantine.json in the
current directory. All defences are three runs each and take ten minutes or more; --defence measures some of them.

An entry is the accuracy on the global test set, mean of the last rounds; damage is what an attack costs against the
same defence without an attack. Hostile clients answer every round in good form: only the numbers are bad.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

import client_app
from fedkd_flwr.algorithms.base import Length
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.local_grid import ClientFunction
from fedkd_flwr.flower.records import TRAIN, Instruction, Reply
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows

CONF = Path(__file__).resolve().parent.parent / "conf" / "digits_fedavg_student.yaml"
# Full participation is the default, and a codec without a state lets an attacker write any update it likes.
FEDERATION = ("num_clients=20", "compressor.name=identity")
HOSTILE = ("00003", "00009", "00015")
FACTOR = 10.0  # how much longer than its honest update a hostile one is
LAST_ROUNDS = 3

Attack = Callable[[Arrays, int], Arrays]


def random_update(honest: Arrays, seed: int) -> Arrays:
    """Gaussian noise, `FACTOR` times as long as the honest update."""
    rng = np.random.default_rng(seed)
    noise = {name: rng.standard_normal(value.shape) for name, value in honest.items()}
    scale = FACTOR * Length().norm(honest) / Length().norm(noise)
    return {name: (scale * value).astype(np.float32) for name, value in noise.items()}


def flipped_update(honest: Arrays, seed: int) -> Arrays:
    """The honest update, turned round and `FACTOR` times as long."""
    return {name: np.asarray(np.float32(-FACTOR) * value) for name, value in honest.items()}


ATTACKS: Mapping[str, Attack | None] = {"none": None, "random": random_update, "flipped": flipped_update}

_NO_BOUND = "server.validation.max_norm_ratio=null"  # so that a robust rule is measured, not the bound before it
# "reject" and "clip" are the bound on an update's norm, in front of the plain mean.
DEFENCES: Mapping[str, tuple[str, ...]] = {
    "fedavg": (_NO_BOUND,),
    "reject-5": ("server.validation.max_norm_ratio=5",),
    "clip-5": ("server.validation.max_norm_ratio=5", "server.validation.excess_norm=clip"),
    "clip-1.5": ("server.validation.max_norm_ratio=1.5", "server.validation.excess_norm=clip"),
    "fedmedian": (_NO_BOUND, "server.aggregator.name=fedmedian"),
    "fedtrimmedavg": (_NO_BOUND, "server.aggregator.name=fedtrimmedavg", "server.aggregator.beta=0.2"),
    "krum": (_NO_BOUND, "server.aggregator.name=krum", f"server.aggregator.num_malicious_nodes={len(HOSTILE)}"),
    "multikrum": (
        _NO_BOUND,
        "server.aggregator.name=multikrum",
        f"server.aggregator.num_malicious_nodes={len(HOSTILE)}",
    ),
}


def hostile_app(uplink: Codec, attack: Attack, seed: int) -> ClientFunction:
    """The client app, with the uploads of the hostile clients changed after they trained."""

    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        client_key = f"{int(context.node_config['partition-id']):05d}"
        if message.metadata.message_type != TRAIN or client_key not in HOSTILE:
            return reply
        instruction = Instruction.from_records(message.content)
        said = Reply.from_records(reply.content, instruction.lineage)
        honest, _ = uplink.decode(said.payload or b"", uplink.initial_state())
        its_seed = derive_seed(seed, "attack", instruction.server_round, client_key)
        payload, _ = uplink.encode(
            attack(honest, its_seed),
            uplink.initial_state(),
            progress=instruction.progress,
            seed=derive_seed(its_seed, "encode"),
        )
        # Written by the package's own writer: an attacker's reply is in good form, whatever that form asks for.
        return Message(replace(said, payload=payload).to_records(), reply_to=message)

    return app


def measure(experiment: Experiment, attack: Attack | None) -> dict[str, Any]:
    """Accuracy and rejections of one run."""
    wires = runtime_of(experiment).wires
    if wires is None:
        raise SystemExit(f"{experiment.algorithm.name} exchanges nothing that could be attacked")
    app: ClientFunction = client_app.app if attack is None else hostile_app(wires.uplink, attack, experiment.seed)
    with tempfile.TemporaryDirectory() as directory:
        run_dir = run_in_process(experiment, app, Path(directory) / "run")
        rounds: list[Row] = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "round"][1:]
    accuracies = [row["metrics"]["shared_global"]["accuracy"] for row in rounds]
    rejected = [item["client"] for row in rounds for item in row["rejected"]]
    hostile = sum(client_key in HOSTILE for client_key in rejected)
    return {
        "accuracy": float(np.mean(accuracies[-LAST_ROUNDS:])),
        "accuracies": accuracies,
        "asked": sum(len(row["sampled"]) for row in rounds),
        "rejected": {"hostile": hostile, "honest": len(rejected) - hostile},
        "skipped_rounds": sum(row["skipped"] for row in rounds),
    }


def _entry(result: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    rejected = result["rejected"]
    damage = control["accuracy"] - result["accuracy"]
    return f"{result['accuracy']:>10.3f}{damage:>8.3f}{rejected['hostile']:>6} +{rejected['honest']:>3}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", type=Path, nargs="?", default=CONF)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--defence", action="append", choices=list(DEFENCES), help="may be given several times; all")
    options = parser.parse_args()
    for logger in ("fedkd", "flwr"):  # a line for each of hundreds of rejections, which the table counts
        logging.getLogger(logger).setLevel(logging.ERROR)
    print("rejected: replies of the hostile clients + of all others")
    print(f"{'defence':<15}{'none':>7}{'rejected':>12}", end="")
    print("".join(f"{name:>10}{'damage':>8}{'rejected':>11}" for name in ATTACKS if name != "none"))
    results: dict[str, dict[str, Any]] = {}
    for defence in options.defence or DEFENCES:
        run = (f"seed={options.seed}", f"num_rounds={options.rounds}")
        experiment = load(options.conf, (*run, *FEDERATION, *DEFENCES[defence]))
        found = {name: measure(experiment, attack) for name, attack in ATTACKS.items()}
        results[defence] = found
        control = found["none"]
        counts = control["rejected"]
        print(f"{defence:<15}{control['accuracy']:>7.3f}{counts['hostile']:>7} +{counts['honest']:>3}", end="")
        entries = [_entry(result, control) for name, result in found.items() if name != "none"]
        print("".join(entries), flush=True)
    settings = {"seed": options.seed, "num_rounds": options.rounds, "hostile": HOSTILE, "factor": FACTOR}
    text = json.dumps({**settings, "results": results}, indent=2)
    Path("byzantine.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
