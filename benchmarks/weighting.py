"""Does weighting clients by their examples make a better shared model than counting every client alike?

python benchmarks/weighting.py digits [--seeds N] [--set KEY=VALUE]... [--output DIR]

Runs conf/TASK_fedkd.yaml under both weightings, paired by seed, from the same version 0 and with the same local steps.
Prints one table; what is done already is not run again.
"""

import argparse
import logging
from pathlib import Path
from statistics import mean
from typing import Any

from runs import Condition, carry_out, interval

WEIGHTINGS = ("uniform", "num_examples")


def conditions_of(task: str) -> tuple[Condition, ...]:
    """Both weightings of one task."""
    conf = f"{task}_fedkd.yaml"
    return tuple(Condition(name, conf, (f"server.aggregator.weighting={name}",)) for name in WEIGHTINGS)


def print_table(results: list[dict[str, Any]], task: str) -> None:
    """A Markdown table; the difference is paired by seed."""
    scores = {name: {row["seed"]: row["score"] for row in results if row["label"] == name} for name in WEIGHTINGS}
    uniform, weighted = (scores[name] for name in WEIGHTINGS)
    gaps = [weighted[seed] - uniform[seed] for seed in sorted(uniform.keys() & weighted.keys())]
    print(f"| {task} | seeds | {results[0]['metric']}, shared model, last rounds | minus uniform | won | MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in WEIGHTINGS:
        rows = [row for row in results if row["label"] == name]
        cells = [name, f"{len(rows)}", interval([row["score"] for row in rows])]
        paired = name != WEIGHTINGS[0] and gaps
        cells += [interval(gaps), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"] if paired else ["-", "-"]
        cells.append(f"{mean(row['per_client_bytes'] for row in rows) / 1e6:.3f}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="first part of the name of a file in conf/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    directory = options.output / f"weighting_{options.task}_runs"
    print_table(carry_out(conditions_of(options.task), range(options.seeds), options.set, directory), options.task)


if __name__ == "__main__":
    main()
