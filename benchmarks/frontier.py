"""Accuracy against bytes: one task under every codec, over several seeds.

python benchmarks/frontier.py [digits|mnist20] [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

One table, frontier_TASK.json and frontier_TASK.png. Runs are in-process, and each is written down when it ends: the
same command goes on where it was stopped, and --run LABEL lets several processes share the work. Accuracy is the mean
of the last three rounds on the server's test set; bytes are every serialised message of a client, both ways.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runs import Condition, carry_out, interval


def codec(text: str) -> str:
    """An override of the compressor."""
    return f"compressor={{{text}}}"


TRANSFORM = "name: transform_coding"
SVD_INT4 = "name: svd, precision: int4"
NARROWER = ("compressor.bytes_per_round=9000",)
LONGER = ("num_rounds=30", "compressor.bytes_per_round=13000")
CODECS = {
    "dense float32": "name: identity",
    "quantize int8": "name: quantize, precision: int8",
    "quantize int4": "name: quantize, precision: int4",
    "top_k 1 %": "name: top_k, fraction: 0.01",
    "top_k 5 %": "name: top_k, fraction: 0.05",
    "powersgd rank 2": "name: powersgd, rank: 2",
    "powersgd rank 8": "name: powersgd, rank: 8",
    "svd, as published": "name: svd",
    "svd int8, no feedback": "name: svd, precision: int8",
    "svd int8, feedback": "name: svd, precision: int8, error_feedback: both",
    "svd int4, feedback, 0.6 to 0.8": f"{SVD_INT4}, error_feedback: both, energy_start: 0.6, energy_end: 0.8",
    "transform_coding": TRANSFORM,
    "transform_coding, no feedback": f"{TRANSFORM}, error_feedback: none",
    "transform_coding, uplink feedback": f"{TRANSFORM}, error_feedback: uplink",
    "transform_coding, downlink feedback": f"{TRANSFORM}, error_feedback: downlink",
    "transform_coding, 0.7 to 0.5": f"{TRANSFORM}, energy_start: 0.7, energy_end: 0.5",
    "transform_coding, 8 kB a round": f"{TRANSFORM}, bytes_per_round: 8000",
    "transform_coding, 20.5 kB a round": f"{TRANSFORM}, bytes_per_round: 20500",
    "ef21": "name: ef21",
}
DIGITS = (
    Condition("FedAvg(teacher), dense", "digits_fedavg.yaml", family="FedAvg(teacher)"),
    Condition("FedKD, dense", "digits_fedkd.yaml", (codec("name: identity"),), "FedKD"),
    Condition("FedKD, svd as published", "digits_fedkd.yaml", (codec("name: svd"),), "FedKD"),
    Condition("FedKD, transform_coding, 20.5 kB a round", "digits_fedkd.yaml", (), "FedKD"),
    Condition("FedKD, transform_coding, 9 kB a round", "digits_fedkd.yaml", NARROWER, "FedKD"),
    Condition("FedKD, transform_coding, 13 kB, 30 rounds", "digits_fedkd.yaml", LONGER, "FedKD"),
    *(
        Condition(f"FedAvg(student), {name}", "digits_fedavg_student.yaml", (codec(text),), "FedAvg(student)")
        for name, text in CODECS.items()
    ),
)
MNIST20 = (
    Condition("FedAvg, dense", "mnist20_fedavg.yaml", family="FedAvg"),
    Condition("FedKD, dense", "mnist20_fedkd.yaml", (codec("name: identity"),), "FedKD"),
    Condition("FedKD, svd as published", "mnist20_fedkd.yaml", (codec("name: svd"),), "FedKD"),
    Condition("FedKD, transform_coding", "mnist20_fedkd.yaml", (), "FedKD"),
    Condition("FedAvg, transform_coding", "mnist20_fedavg.yaml", (codec(TRANSFORM),), "FedAvg"),
)
TASKS = {"digits": DIGITS, "mnist20": MNIST20}


def print_table(results: list[dict[str, Any]], dense_label: str) -> None:
    """One line for each condition; differences to FedAvg are paired by seed."""
    dense = {row["seed"]: row for row in results if row["label"] == dense_label}
    print(f"{'':<48}{'seeds':>6}{'accuracy':>18}{'spread':>8}{'MB':>9}{'fewer bytes':>13}{'minus FedAvg':>20}")
    for label in dict.fromkeys(row["label"] for row in results):
        rows = [row for row in results if row["label"] == label]
        scores = [row["score"] for row in rows]
        paired = [row for row in rows if row["seed"] in dense]
        gaps = [row["score"] - dense[row["seed"]]["accuracy"] for row in paired]
        moved = mean(row["per_client_bytes"] for row in rows)
        # Against what FedAvg of the teacher moved in its own run, whatever the number of rounds here.
        shares = [row["per_client_bytes"] / dense[row["seed"]]["per_client_bytes"] for row in paired]
        fewer = f"{1 - mean(shares):.2%}" if shares else ""
        spread = f"{stdev(scores):.4f}" if len(scores) > 1 else ""
        print(
            f"{label:<48}{len(rows):>6}{interval(scores):>18}{spread:>8}{moved / 1e6:>9.3f}"
            f"{fewer:>13}{interval(gaps) if gaps else '':>20}"
        )


def draw(results: list[dict[str, Any]], conditions: tuple[Condition, ...], path: Path) -> None:
    """Accuracy against bytes: a point for each condition, a bar for its spread over seeds."""
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    families = list(dict.fromkeys(condition.family for condition in conditions))
    measured = [c for c in conditions if any(row["label"] == c.label for row in results)]
    for number, condition in enumerate(measured, 1):
        rows = [row for row in results if row["label"] == condition.label]
        scores = [row["score"] for row in rows]
        moved = mean(row["per_client_bytes"] for row in rows) / 1e6
        index = families.index(condition.family)
        ours = "transform_coding" in condition.label or "ef21" in condition.label
        axes.errorbar(
            moved,
            mean(scores),
            yerr=stdev(scores) if len(scores) > 1 else None,
            fmt="os^D"[index % 4],
            color=f"C{index}",
            markerfacecolor=f"C{index}" if ours else "white",
            markersize=6,
            elinewidth=0.6,
            capsize=2,
            label=f"{number}  {condition.label}",
        )
        axes.annotate(f"{number}", (moved, mean(scores)), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set(xlabel="MB moved per client, up and down (log scale)", ylabel="accuracy, mean of the last three rounds")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper", fontsize=7.5)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Measure what is missing, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS), nargs="?", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    conditions = TASKS[options.task]
    wanted = [c for c in conditions if not options.run or c.label in options.run]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = carry_out(wanted, seeds, options.set, options.output / f"frontier_{options.task}_runs")
    order = {condition.label: index for index, condition in enumerate(conditions)}
    results.sort(key=lambda row: (order.get(row["label"], len(order)), row["seed"]))
    print_table(results, conditions[0].label)
    target = options.output / f"frontier_{options.task}"
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, conditions, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
