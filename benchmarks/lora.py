"""Federated fine-tuning of a frozen backbone: adapters averaged, adapters stacked, outputs exchanged, all of the model.

python benchmarks/lora.py ade|cifar10 [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

Reads conf/TASK_lora_kd.yaml; the other conditions change its algorithm and nothing else, so partitions, version 0,
epochs and batches are the same, and public examples are no client's in any of them. On cifar10 the algorithms that need
no adapters are there, too, as in conf/cifar10_half_*.yaml. Prints one table and writes
lora_TASK.json. Scores of the shared model, which with lora_kd is the server's own, are of the server's test set, over
the last three rounds; those of clients are of what each predicts with on its own test examples, at the end. Differences
are in points, paired by seed, to averaged adapters.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import mean
from typing import Any

from runs import CONF, Condition, carry_out, interval

from fedkd_flwr.experiment import load

REFERENCE = "lora_avg"
POINTS = 100
HELD_OUT = "task.public={num_examples: 3000}"
FULL_RATE = {"ade": 0.0005, "cifar10": 0.001}  # of the whole model, as conf/ade_fedkd.yaml and cifar10_fedavg.yaml


def conditions_of(task: str) -> tuple[Condition, ...]:
    """Every method on one task."""
    conf = f"{task}_lora_kd.yaml"
    algorithm = load(CONF / conf).model_dump(mode="json")["algorithm"]
    same = {key: algorithm[key] for key in ("model", "local")}
    adapters = {**same, "lora": algorithm["lora"], "optimizer": algorithm["optimizer"]}
    full = {**same, "optimizer": {**algorithm["optimizer"], "learning_rate": FULL_RATE[task]}}
    codec = "compressor={name: transform_coding}"

    def instead(name: str, options: dict[str, Any]) -> str:
        return f"algorithm={json.dumps({'name': name, **options})}"

    ranks = [algorithm["lora"]["rank"] // 2, algorithm["lora"]["rank"], 2 * algorithm["lora"]["rank"]]
    return (
        Condition("FedAvg, dense", conf, (instead("fedavg", full),)),
        Condition("FedAvg, default codec", conf, (instead("fedavg", full), codec)),
        Condition("lora_avg", conf, (instead("lora_avg", adapters),)),
        Condition("lora_avg, default codec", conf, (instead("lora_avg", adapters), codec)),
        Condition("flora, one rank", conf, (instead("flora", adapters),)),
        Condition("flora, three ranks", conf, (instead("flora", {**adapters, "ranks": ranks}),)),
        Condition("lora_kd, int8", conf),
        Condition("lora_kd, float16", conf, ("algorithm.uplink=float16", "algorithm.downlink=float16")),
        Condition("lora_kd, likeliest class up", conf, ("algorithm.uplink=top_k",)),
        Condition("lora_kd, entropy weights", conf, ("algorithm.weighting=entropy",)),
        Condition("lora_kd, mean as it is", conf, ("algorithm.entropy_reduction={name: none}",)),
        Condition("lora_kd, logit adjustment", conf, ("algorithm.logit_adjustment=1.0",)),
        Condition("lora_avg, logit adjustment", conf, (instead("lora_avg", {**adapters, "logit_adjustment": 1.0}),)),
        Condition("lora_kd, held-out texts", conf, ("task.public={num_examples: 3000}",)),
        Condition(
            "lora_avg, held-out texts", conf, (instead("lora_avg", adapters), "task.public={num_examples: 3000}")
        ),
    )


def without_adapters() -> tuple[Condition, ...]:
    """Every other algorithm on the pretrained ResNet."""
    public = ("task.public={num_examples: 5000}",)
    names = {
        "FedKD, default codec": "fedkd",
        "FD": "fd",
        "MixFLD": "mixfld",
        "Mix2FLD": "mix2fld",
        "clients alone": "local_only",
    }
    return tuple(Condition(label, f"cifar10_half_{name}.yaml", public) for label, name in names.items())


def print_table(results: list[dict[str, Any]], task: str) -> None:
    """A Markdown table."""
    of_reference = {row["seed"]: row for row in results if row["label"] == REFERENCE}
    metric = results[0]["metric"]
    print(
        f"| {task} | seeds | {metric}, shared | minus {REFERENCE}, points | {metric}, own data | kB a client | fewer |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for label in dict.fromkeys(row["label"] for row in results):
        rows = [row for row in results if row["label"] == label]
        paired = [row for row in rows if row["seed"] in of_reference]
        gaps = [POINTS * (row["score"] - of_reference[row["seed"]]["score"]) for row in paired]
        fewer = [of_reference[row["seed"]]["per_client_bytes"] / row["per_client_bytes"] for row in paired]
        own = [(row["metrics"]["private_local"] or row["metrics"]["shared_local"])[metric] for row in rows]
        cells = [
            label,
            f"{len(rows)}",
            interval([row["score"] for row in rows]),
            interval(gaps) if gaps else "-",
            interval(own),
            f"{mean(row['per_client_bytes'] for row in rows) / 1e3:.1f}",
            f"{mean(fewer):.1f} times" if fewer else "-",
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(FULL_RATE))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    conditions = conditions_of(options.task) + (without_adapters() if options.task == "cifar10" else ())
    wanted = [c for c in conditions if not options.run or c.label in options.run]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = carry_out(wanted, seeds, options.set, options.output / f"lora_{options.task}_runs")
    order = {condition.label: index for index, condition in enumerate(conditions)}
    results.sort(key=lambda row: (order[row["label"]], row["seed"]))
    (options.output / f"lora_{options.task}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results, options.task)


if __name__ == "__main__":
    main()
