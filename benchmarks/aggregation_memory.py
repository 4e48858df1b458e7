"""Peak memory of the server while it merges the replies of a round, by the number of clients.

python benchmarks/aggregation_memory.py [--clients N]... [--compressor NAME] [--aggregator NAME]: one table, and
aggregation_memory.json in the current directory.

Replies stay encoded until it is their turn. "replies" is what their payloads weigh together; "peak" is the most that
was allocated beyond them from the first decoding to the aggregate (`tracemalloc`, which sees every array of numpy; no
tensor of torch is made there), in a process of its own for each number of clients. "decoded" is what all updates would
weigh side by side.
"""

import argparse
import json
import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import process_time

import numpy as np
from pydantic import TypeAdapter

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.core.arrays import Array, Spec, TensorSpec, num_elements
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.flower.aggregators import build_aggregator
from fedkd_flwr.flower.merger import Merger
from fedkd_flwr.flower.records import Reply
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.validation import NormBound
from fedkd_flwr.server_options import AggregatorOptions, AnyAggregation, ValidationOptions

CLIENTS = (10, 50, 200)
WIDTH, NUM_LAYERS = 320, 4
NUM_KINDS = 5  # updates that differ; each client has a copy of its own of one of them
RANK = 8  # of what they hold beside noise
MEGABYTE = 1e6


def transformer_spec() -> Spec:
    """The matrices and vectors of a small transformer's layers: 4.9 million parameters."""
    inner = 4 * WIDTH
    tensors = []
    for layer in range(NUM_LAYERS):
        for name, shape in (
            *((name, (WIDTH, WIDTH)) for name in ("query", "key", "value", "output")),
            ("up", (inner, WIDTH)),
            ("down", (WIDTH, inner)),
        ):
            tensors += [TensorSpec(f"{layer}.{name}", shape), TensorSpec(f"{layer}.{name}.bias", shape[:1])]
    return tuple(tensors)


def made_up_update(spec: Spec, seed: int) -> dict[str, Array]:
    """Of low rank, with noise."""
    rng = np.random.default_rng(seed)
    update: dict[str, Array] = {}
    for tensor in spec:
        value = rng.standard_normal(tensor.shape, np.float32)
        if len(tensor.shape) == 2:
            rows, cols = tensor.shape
            factors = (rng.standard_normal((rows, RANK), np.float32), rng.standard_normal((RANK, cols), np.float32))
            value = 0.3 * value + factors[0] @ factors[1]
        update[tensor.name] = np.asarray(1e-3 * value, np.float32)
    return update


def codec_of(compressor: str) -> Codec:
    """With its default options, without error feedback: decoding is the same."""
    return COMPRESSORS[compressor](name=compressor).build(transformer_spec())


def replies_of(codec: Codec, num_clients: int) -> dict[str, Reply]:
    """Encoded replies; no two share their bytes."""
    payloads = [
        codec.encode(made_up_update(codec.spec, seed), codec.initial_state(), progress=0.0, seed=seed)[0]
        for seed in range(NUM_KINDS)
    ]
    return {
        f"{client:05d}": Reply(1, 1, 0, b"", 100, 10, bytes(bytearray(payloads[client % NUM_KINDS])))
        for client in range(num_clients)
    }


def measure(replies: dict[str, Reply], compressor: str, aggregator: str) -> dict[str, float]:
    """One round, twice: timed, then traced."""
    codec, num_clients = codec_of(compressor), len(replies)
    options: AggregatorOptions = TypeAdapter(AnyAggregation).validate_python({"name": aggregator})
    most_norm = ValidationOptions().max_norm_ratio

    def merge() -> None:
        merger = Merger(codec, build_aggregator(options), NormBound(most_norm, "reject"), robust=options.robust)
        taken = merger.take(Round(1, 0.0, 0, b"", accepted=dict(replies)), lambda *reason: print(*reason))
        if taken != num_clients or not merger.result():
            raise SystemExit(f"{taken} of {num_clients} uploads were taken")

    started = process_time()
    merge()
    seconds = process_time() - started
    tracemalloc.start()
    merge()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "clients": num_clients,
        "replies": sum(len(reply.payload or b"") for reply in replies.values()) / MEGABYTE,
        "peak": peak / MEGABYTE,
        "decoded": num_clients * 4 * num_elements(codec.spec) / MEGABYTE,
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", action="append", type=int, help="may be given several times; 10, 50 and 200")
    parser.add_argument("--compressor", choices=list(COMPRESSORS), default="transform_coding")
    parser.add_argument("--aggregator", default="fedavg", help="name of a server.aggregator; the others keep updates")
    options = parser.parse_args()
    spec = transformer_spec()
    print(f"{num_elements(spec):,} parameters, {4e-6 * num_elements(spec):.1f} MB decoded; all in MB")
    print(f"{'clients':>7}" + "".join(f"{head:>12}" for head in ("replies", "peak", "decoded", "CPU s")))
    found = []
    for num_clients in options.clients or CLIENTS:
        replies = replies_of(codec_of(options.compressor), num_clients)
        # A process that encoded before has held more than it needs now, which would hide it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measure, replies, options.compressor, options.aggregator).result()
        found.append(row)
        cells = "".join(f"{row[name]:>12.2f}" for name in ("replies", "peak", "decoded", "cpu_seconds"))
        print(f"{num_clients:>7}{cells}", flush=True)
    settings = {"compressor": options.compressor, "aggregator": options.aggregator, "parameters": num_elements(spec)}
    text = json.dumps({**settings, "results": found}, indent=2)
    Path("aggregation_memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
