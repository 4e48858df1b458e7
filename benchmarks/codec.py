"""What each codec makes of real updates: bytes, error, and time on one thread.

python benchmarks/codec.py [--update NAME]... [--data DIR] [--tokenizer DIR]: one table for each
update, and codec.json in the current directory. An encoder takes three to five minutes; --update measures some of them.

encoder-*    transformer encoder, 4 layers of width 768, 10 steps with batches of 16 x 32 tokens, after 10 others
cnn-sgd      two 5x5 convolutions and two linear layers, 60 steps with batches of 10 images, after 60 others
embedding-*  30,522 x 128 with a mean and a linear layer, 40 steps with batches of 16 x 32 tokens, after none

Bytes are those of the payload; error is the squared error over all parameters, relative to the update's squared norm;
milliseconds are CPU time, the least of up to three runs. "floor": bytes of the largest singular components of all
tensors together, those first that take away most error for each byte, until no more than the row's error is left; with
numbers of 32 or 4 bits that are taken to be exact, and a vector as one component. "feedback" is the update after this
one with what this one's payload lost; its error is that of both together, for which there is no floor.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional

from fedkd_flwr.compressors.base import LossyCodec, WithErrorFeedback
from fedkd_flwr.compressors.powersgd import PowerSgdOptions
from fedkd_flwr.compressors.quantize import QuantizeOptions
from fedkd_flwr.compressors.svd import SvdOptions
from fedkd_flwr.compressors.top_k import TopKOptions
from fedkd_flwr.compressors.transform_coding import TransformCodingOptions
from fedkd_flwr.core.arrays import Array, Arrays, Spec, difference, num_elements
from fedkd_flwr.core.low_rank import matrix_shape, smallest_rank
from fedkd_flwr.core.modules import exchanged_spec, read_arrays
from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.base import TensorExamples
from fedkd_flwr.tasks.cnn import CnnOptions
from fedkd_flwr.tasks.image_classification import ImageClassificationOptions, ImageData
from fedkd_flwr.tasks.source import DataSource

VOCABULARY, TOKENS, TEXT_BATCH, IMAGE_BATCH = 30_522, 32, 16, 10
STEPS: Mapping[str, int] = {"encoder": 10, "cnn": 60, "embedding": 40}
ENERGIES = (0.5, 0.7, 0.9)
TARGET_ERRORS = (0.3, 0.4, 0.5)
REPEATS, ENOUGH_SECONDS = 3, 4.0
FEEDBACK_ENERGY = 0.7
RANGES = (16, 64)  # q of torch.svd_lowrank

Decompose = Callable[[Array], Any]
Optimise = Callable[[Any], torch.optim.Optimizer]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Updates:
    """Two updates of one model, one after the other."""

    spec: Spec
    first: Arrays
    second: Arrays


# Models and data


class Encoder(nn.Module):
    """Hidden states of a transformer encoder with random weights, their mean, two logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=4)
        self.body = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, batch: Batch) -> Tensor:
        """Logits."""
        mask = batch["tokens"] > 0
        states: Tensor = self.body(input_ids=batch["tokens"], attention_mask=mask).last_hidden_state
        logits: Tensor = self.classifier((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return logits


class Embedding(nn.Module):
    """Mean of word vectors, two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(VOCABULARY, 128, mode="mean", padding_idx=0)
        self.classifier = nn.Linear(128, 2)

    def forward(self, batch: Batch) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.words(batch["tokens"]))
        return logits


class Images(nn.Module):
    """The convolutional network of the image task, for images of 28x28 grey pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CnnOptions().build((1, 28, 28), 10)

    def forward(self, batch: Batch) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(batch["pixel_values"])
        return logits


def texts(data: Path | None, tokenizer: Path | None) -> TensorExamples:
    """Sentences of two classes as tokens, 0 where one is shorter; made up where there is no folder."""
    if data is not None and tokenizer is not None:
        from transformers import AutoTokenizer

        train, _ = DataSource(source=str(data / "ade_corpus")).load()
        read = AutoTokenizer.from_pretrained(tokenizer)
        tokens = read(list(train["text"]), max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
        return TensorExamples({"tokens": torch.tensor(tokens), "labels": torch.tensor(list(train["label"])).long()})
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    # Words as frequent as in language; a fifth of them is of the class, one of a hundred words that only it has.
    drawn = np.minimum(rng.zipf(1.2, (len(labels), TOKENS)), VOCABULARY - 1)
    of_class = 1000 + 100 * labels[:, None] + rng.integers(0, 100, drawn.shape)
    drawn = np.where(rng.random(drawn.shape) < 0.2, of_class, drawn)
    return TensorExamples({"tokens": torch.from_numpy(drawn), "labels": torch.from_numpy(labels)})


def images(data: Path | None) -> Iterator[Batch]:
    """Batches of MNIST, or of scikit-learn's 8x8 digits enlarged."""
    if data is not None:
        options = ImageClassificationOptions(data=ImageData(source=str(data / "mnist")), channels=1)
        yield from options.build(20, 0).client_data(0).train.batches(IMAGE_BATCH, 0)
        return
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 8.0 - 1.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    enlarged = functional.interpolate(small, size=28, mode="bilinear")
    yield from TensorExamples({"pixel_values": enlarged, "labels": torch.from_numpy(labels)}).batches(IMAGE_BATCH, 0)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam at a rate at which pretrained encoders are tuned."""
    return torch.optim.Adam(parameters, lr=1e-4)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def train(model: nn.Module, batches: Iterator[Batch], optimise: Optimise, num_steps: int) -> Arrays:
    """Some steps with a fresh optimiser, as a client begins every round; the weights after them."""
    optimiser = optimise(model.parameters())
    model.train()
    for _ in range(num_steps):
        batch = next(batches)
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(model(batch), batch["labels"]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return read_arrays(model)


def updates_of(name: str, data: Path | None, tokenizer: Path | None) -> Updates:
    """Train one of the models; the same on every call."""
    kind, optimiser = name.split("-")
    torch.manual_seed(0)
    model = {"encoder": Encoder, "cnn": Images, "embedding": Embedding}[kind]()
    batches = images(data) if kind == "cnn" else texts(data, tokenizer).batches(TEXT_BATCH, 0)
    optimise = adam if optimiser == "adam" else sgd
    # Warm, as most rounds of a training are; an embedding whose rows moved before would move others under momentum.
    before = read_arrays(model) if kind == "embedding" else train(model, batches, optimise, STEPS[kind])
    states = [before, *(train(model, batches, optimise, STEPS[kind]) for _ in range(2))]
    # Without the encoder's own embeddings, which are a case of their own, and without the two-class heads: under SGD a
    # head moves so much more than what is below it that most of the energy would be its.
    left_out = () if kind == "cnn" else ("embeddings", "classifier")
    spec = tuple(t for t in exchanged_spec(model) if not any(part in t.name for part in left_out))
    return Updates(spec, difference(states[1], states[0], spec), difference(states[2], states[1], spec))


# Measuring


def cpu_ms(call: Callable[[], Any]) -> tuple[float, Any]:
    """Least CPU time of a few calls, and what the last returned."""
    spent: list[float] = []
    while len(spent) < REPEATS and sum(spent) < ENOUGH_SECONDS:
        started = time.process_time()
        result = call()
        spent.append(time.process_time() - started)
    return 1e3 * min(spent), result


def energy_of(arrays: Arrays) -> float:
    """Squared norm."""
    return float(sum(np.square(value, dtype=np.float64).sum() for value in arrays.values()))


def added(one: Arrays, other: Arrays) -> dict[str, Array]:
    """One plus the other."""
    return {name: np.asarray(value + other[name]) for name, value in one.items()}


def error_of(update: Arrays, decoded: Arrays) -> float:
    """Squared error relative to the update's squared norm."""
    return energy_of({name: value - decoded[name] for name, value in update.items()}) / energy_of(update)


def measured(name: str, codec: LossyCodec, update: Arrays) -> Row:
    """A codec that starts anew."""
    state = codec.initial_state()
    encode_ms, (payload, _) = cpu_ms(lambda: codec.encode(update, state, progress=0.0, seed=0))
    decode_ms, (decoded, _) = cpu_ms(lambda: codec.decode(payload, state))
    return _row(name, len(payload), error_of(update, decoded), encode_ms, decode_ms)


def with_feedback(name: str, codec: LossyCodec, updates: Updates) -> Row:
    """The second update, after the first."""
    fed_back = WithErrorFeedback(codec)
    first, state = fed_back.encode(updates.first, fed_back.initial_state(), progress=0.0, seed=0)
    encode_ms, (payload, _) = cpu_ms(lambda: fed_back.encode(updates.second, state, progress=0.0, seed=1))
    decode_ms, (second, _) = cpu_ms(lambda: fed_back.decode(payload, {}))
    decoded = added(fed_back.decode(first, {})[0], second)
    return _row(name, len(payload), error_of(added(updates.first, updates.second), decoded), encode_ms, decode_ms)


def _row(name: str, num_bytes: int, error: float, encode_ms: float, decode_ms: float) -> Row:
    return {"method": name, "bytes": num_bytes, "error": error, "encode_ms": encode_ms, "decode_ms": decode_ms}


def factored(name: str, updates: Updates, decompose: Decompose, energies: Sequence[float]) -> Iterator[Row]:
    """float32 factors by somebody else's decomposition, every matrix at the same energy; vectors dense.

    Args:
        name: of the rows; the energy follows.
        updates: the first is factored.
        decompose: to U, s and V transposed; timed once for all rows.
        energies: to keep of each matrix; 1 is all that the decomposition found.
    """
    matrices = {
        t.name: np.ascontiguousarray(updates.first[t.name].reshape(shape))
        for t in updates.spec
        if (shape := matrix_shape(t.shape)) is not None
    }
    encode_ms, found = cpu_ms(lambda: {key: decompose(matrix) for key, matrix in matrices.items()})
    for energy in energies:
        factors = {}
        for key, (left, values, right) in found.items():
            rank = smallest_rank(values, energy)
            if rank * sum(matrices[key].shape) < matrices[key].size:
                factors[key] = (left[:, :rank] * values[:rank], right[:rank])
        decode_ms, products = cpu_ms(partial(_products, factors))
        decoded = dict(updates.first)
        decoded |= {key: value.reshape(decoded[key].shape) for key, value in products.items()}
        num_bytes = sum(4 * (one.size + two.size) for one, two in factors.values())
        num_bytes += sum(4 * value.size for key, value in updates.first.items() if key not in factors)
        error = error_of(updates.first, decoded)
        kept = f" {energy:g}" if energy < 1.0 else ""
        yield _row(f"{name}{kept} float32", num_bytes, error, encode_ms, decode_ms)


def _products(factors: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    return {key: left @ right for key, (left, right) in factors.items()}


def full_svd(matrix: Array) -> Any:
    """All singular values and vectors."""
    return np.linalg.svd(matrix, full_matrices=False)


def lowrank_svd(matrix: Array, q: int) -> Any:
    """By a randomised range of fixed size and two power steps."""
    left, values, right = torch.svd_lowrank(torch.from_numpy(matrix), q=min(q, *matrix.shape), niter=2)
    return left.numpy(), values.numpy(), right.numpy().T


class Floor:
    """Singular components of all tensors of an update, the best for each byte first."""

    def __init__(self, updates: Updates) -> None:
        energies: list[NDArray[np.float64]] = []
        numbers: list[NDArray[np.float64]] = []
        for tensor in updates.spec:
            value = updates.first[tensor.name].astype(np.float64)
            shape = matrix_shape(tensor.shape)
            if shape is None:
                energies.append(np.array([np.square(value).sum()]))
                numbers.append(np.array([value.size]))
                continue
            matrix = value.reshape(shape)
            matrix = matrix.T if shape[0] > shape[1] else matrix
            energies.append(np.linalg.eigvalsh(matrix @ matrix.T).clip(0.0))
            numbers.append(np.full(min(shape), sum(shape)))
        energy, number = np.concatenate(energies), np.concatenate(numbers)
        order = np.argsort(-energy / number)
        self._kept = np.cumsum(energy[order]) / energy.sum()
        self._numbers = np.cumsum(number[order])

    def numbers(self, error: float) -> int:
        """Numbers in the components that leave no more than this error."""
        return int(self._numbers[min(int(np.searchsorted(self._kept, 1.0 - error)), self._kept.size - 1)])


def transform(updates: Updates, energy: float) -> LossyCodec:
    """The default codec at one energy."""
    return TransformCodingOptions(energy_start=energy, energy_end=energy).build(updates.spec)


def rows_of(updates: Updates) -> Iterator[Row]:
    """Every method, then the default codec at the errors that matter."""
    spec, first = updates.spec, updates.first
    for energy in ENERGIES:
        yield measured(f"transform_coding {energy:g}", transform(updates, energy), first)
    yield with_feedback(f"transform_coding {FEEDBACK_ENERGY:g}, feedback", transform(updates, FEEDBACK_ENERGY), updates)
    paper = {"energy_start": 0.95, "energy_end": 0.98}
    yield measured("svd .95 float32 (paper)", SvdOptions(**paper).build(spec), first)
    yield measured("svd .95 int8", SvdOptions(**paper, precision="int8").build(spec), first)
    yield measured("svd .95 int4", SvdOptions(**paper, precision="int4").build(spec), first)
    coarse = measured("svd .7 int4", SvdOptions(energy_start=0.7, energy_end=0.7, precision="int4").build(spec), first)
    yield coarse
    yield measured("quantize int8", QuantizeOptions(precision="int8").build(spec), first)
    dense = measured("quantize int4", QuantizeOptions(precision="int4").build(spec), first)
    yield dense
    yield measured("top_k 1 %", TopKOptions(fraction=0.01).build(spec), first)
    yield measured("powersgd 4, first payload", PowerSgdOptions(rank=4).build(spec), first)
    yield from factored("numpy svd", updates, full_svd, ENERGIES)
    for q in RANGES:
        yield from factored(f"torch svd_lowrank q={q}", updates, partial(lowrank_svd, q=q), [1.0])
    for error in TARGET_ERRORS:
        yield measured(f"transform_coding to error {error:g}", transform(updates, 1 - error), first)
    for name, other in (("svd .7 int4", coarse), ("quantize int4", dense)):
        yield measured(f"transform_coding to {name}'s", transform(updates, 1 - other["error"]), first)


def print_row(row: Row, floor: Floor, dense: int) -> None:
    """Complete a row and print it."""
    row["ratio"] = dense / row["bytes"]
    floors = ""
    if not row["method"].endswith("feedback"):
        numbers = floor.numbers(row["error"])
        row |= {"floor_float32": 4 * numbers, "floor_int4": numbers / 2}
        floors = f"{row['floor_float32']:>14,}{row['floor_int4']:>12,.0f}"
    cells = (
        f"{row['bytes']:>12,}{row['ratio']:>9.1f}{row['error']:>9.4f}{row['encode_ms']:>11.1f}{row['decode_ms']:>11.1f}"
    )
    print(f"{row['method']:<36}{cells}{floors}", flush=True)


def main() -> None:
    """Measure, print, write."""
    names = ("encoder-adam", "encoder-sgd", "cnn-sgd", "embedding-sgd", "embedding-adam")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="append", choices=names, help="may be given several times; all")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that holds mnist and ade_corpus, each with train.parquet and test.parquet (columns image and "
        "label, text and label); without it made-up words and scikit-learn's digits",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of a BERT tokenizer, for the texts of --data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    results: dict[str, list[Row]] = {}
    for name in options.update or names:
        updates = updates_of(name, options.data, options.tokenizer)
        dense, floor = 4 * num_elements(updates.spec), Floor(updates)
        heads = ("bytes", "ratio", "error", "encode ms", "decode ms", "floor float32", "floor int4")
        widths = (12, 9, 9, 11, 11, 14, 12)
        print(f"{name}: {num_elements(updates.spec):,} parameters, {dense:,} bytes of dense float32")
        print(" " * 36 + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
        results[name] = []
        for row in rows_of(updates):
            print_row(row, floor, dense)
            results[name].append(row)
    Path("codec.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
