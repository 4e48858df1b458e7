"""Encoding, decoding and aggregating as shares of the time in which the clients train.

python benchmarks/encode_share.py [CONF]... [--rounds N] [--set KEY=VALUE]...: one table, and encode_share.json in the
current directory. Seconds are those of the ledger, of all clients and the server together, in an in-process run: the
encoding of the server's broadcast is among them, once for each round. They are wall time: shares mean something on a
machine that does little else.
"""

import argparse
import json
import tempfile
from pathlib import Path

from round_time import measure

from fedkd_flwr.experiment import load

CONF = Path(__file__).resolve().parent.parent / "conf" / "digits_fedkd.yaml"
SHARES = ("encode", "decode", "aggregate")


def seconds_of(conf: Path, overrides: list[str], num_rounds: int) -> dict[str, float]:
    """Seconds of one run by what they were spent on."""
    with tempfile.TemporaryDirectory() as directory:
        resolved = Path(directory) / conf.name
        resolved.write_text(load(conf, overrides).to_yaml(), encoding="utf-8")
        return measure(resolved, num_rounds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", type=Path, nargs="*", default=[CONF])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what each YAML says")
    options = parser.parse_args()
    heads = ("train s", *(f"{name} s" for name in SHARES), *(f"{name}/train" for name in SHARES))
    print(f"{'':<28}" + "".join(f"{head:>17}" for head in heads))
    results: dict[str, dict[str, float]] = {}
    for conf in options.conf:
        seconds = seconds_of(conf, options.set, options.rounds)
        training = seconds["client_train"]
        shares = {f"{name} share": seconds[name] / training for name in SHARES}
        results[str(conf)] = seconds | shares
        cells = [f"{seconds[name]:.3f}" for name in ("client_train", *SHARES)]
        cells += [f"{share:.2%}" for share in shares.values()]
        print(f"{conf.stem:<28}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
    found = {"num_rounds": options.rounds, "overrides": options.set, "results": results}
    Path("encode_share.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
