"""Does README's template for one's own texts do as well as an experiment that was tuned for its data?

python benchmarks/template.py --data DIR --model DIR [--seeds N] [--output DIR]

Runs the YAML under "Your data, your models" with no change but source, columns, partition and teacher, beside
conf/ade_fedkd.yaml with the same teacher, on a folder like that of conf/ade_fedkd.yaml. Scores are those of the shared
student, means of the last three rounds; the template names no positive label, so accuracy and macro-F1 are compared.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from runs import CONF, Condition, carry_out, interval

METRICS = ("accuracy", "macro_f1")


def template() -> str:
    """The YAML of README."""
    text = (CONF.parent / "README.md").read_text(encoding="utf-8")
    return text.split("```yaml\n# my_reports.yaml\n", 1)[1].split("```", 1)[0]


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="train.parquet and test.parquet: text, label, doc_id")
    parser.add_argument("--model", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    directory = options.output / "template_runs"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "template.yaml"
    path.write_text(template(), encoding="utf-8")
    where = (f"task.data.source={options.data.resolve()}", f"task.teacher.source={options.model.resolve()}")
    own = (
        "task.data.columns={text: text, label: label}",
        "task.partition={name: natural, column: doc_id, grouped: true}",
    )
    conditions = (
        Condition("README's template", str(path.resolve()), (*where, *own)),
        Condition("ade_fedkd.yaml", "ade_fedkd.yaml", where),
    )
    print_table(carry_out(conditions, range(options.seeds), [], directory), conditions)


def print_table(results: list[dict[str, Any]], conditions: tuple[Condition, ...]) -> None:
    """A Markdown table."""
    print(f"| | seeds | {' | '.join(METRICS)} |\n|---|---:|---:|---:|")
    for label in (condition.label for condition in conditions):
        rows = [row for row in results if row["label"] == label]
        cells = [interval([row["last_rounds"][metric] for row in rows]) for metric in METRICS]
        print(f"| {label} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
