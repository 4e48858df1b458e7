"""What differential privacy of a whole client costs on digits: accuracy against epsilon.

python benchmarks/privacy.py [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

FedKD and FedAvg of its student under the same codec, with noise on the clients at several noise multipliers; 0 only
clips. Two federations: the ten clients of conf/digits_fedkd.yaml, and a hundred of a dozen images each, whose noise
averages out better. Epsilon is what the run's account gives, for one client replaced. Prints a table and writes
privacy.json.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from runs import Condition, carry_out, interval

from fedkd_flwr.experiment import parse
from fedkd_flwr.measure.privacy_account import PrivacyAccount

FEDKD, STUDENT = "digits_fedkd.yaml", "digits_fedavg_student.yaml"
CLIP = 1.0
MULTIPLIERS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SAME_CODEC = (
    "compressor={name: transform_coding, bytes_per_round: 20500}",
    "algorithm.optimizer.learning_rate=0.002",
    "algorithm.keep_moments=true",
)
HUNDRED = ("num_clients=100", "server.num_train=100", "task.partition.alpha=100.0")


def conditions() -> tuple[Condition, ...]:
    """Every run of the table."""
    found = []
    for size, many in (("10 clients", ()), ("100 clients", HUNDRED)):
        for name, conf in (("FedKD", FEDKD), ("FedAvg(student)", STUDENT)):
            for multiplier in MULTIPLIERS:
                noise = f"privacy={{clip_norm: {CLIP}, noise_multiplier: {multiplier}}}"
                overrides = (noise, *many, *(SAME_CODEC if conf == STUDENT else ()))
                found.append(Condition(f"{name}, {size}, noise {multiplier:g}", conf, overrides))
    return tuple(found)


def epsilons(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Towards the server and of what is released, of a run without trouble."""
    experiment = parse(row["experiment"])
    assert experiment.noise_facts is not None
    spent = PrivacyAccount(experiment.noise_facts).forecast(experiment.num_rounds, experiment.num_sampled)
    return spent["epsilon_server"], spent["epsilon_released"]


def table(results: list[dict[str, Any]]) -> str:
    """Accuracy over the last rounds, and what it cost in epsilon, for each run that was made."""
    lines = ["| | epsilon, server | epsilon, released | seeds | accuracy |", "|---|---:|---:|---:|---:|"]
    for label in dict.fromkeys(row["label"] for row in results):
        rows = [row for row in results if row["label"] == label]
        towards = " | ".join("no bound" if value is None else f"{value:.3g}" for value in epsilons(rows[0]))
        lines.append(f"| {label} | {towards} | {len(rows)} | {interval([row['score'] for row in rows])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", action="append", help="beginning of labels; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    every = conditions()
    wanted = [c for c in every if not options.run or c.label.startswith(tuple(options.run))]
    results = carry_out(wanted, range(options.seeds), options.set, options.output / "privacy_runs")
    order = {condition.label: index for index, condition in enumerate(every)}
    results.sort(key=lambda row: (order[row["label"]], row["seed"]))
    (options.output / "privacy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
