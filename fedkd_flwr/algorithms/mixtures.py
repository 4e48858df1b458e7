"""Mixed-up samples: made on a client, packed, gathered by the server, and taken apart again.

Oh et al., "Mix2FLD: downlink federated learning after uplink federated distillation with two-way mixup", IEEE
Communications Letters 2020, https://arxiv.org/abs/2006.09801. A client mixes two of its own examples of different
labels, s = lam * a + (1 - lam) * b with lam < 1/2, so that none leaves as it is. The server combines mixtures s and s'
of *different* clients whose labels are crossed: u = h * s + (1 - h) * s' has a hard label again, that of a for
h = lam / (2 lam - 1) and that of b for h = (lam - 1) / (2 lam - 1), and is still no client's example. Noise grows by
|h| + |1 - h| = 1 / (1 - 2 lam).
"""

from dataclasses import dataclass

import numpy as np

from fedkd_flwr.algorithms.label_outputs import (
    LabelOutputsCodec,
    LabelOutputsMean,
    Reader,
    Weighting,
    require_at_most,
    varint,
)
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite

SEEDS, MINOR, MAJOR, DEVICE = "seeds", "minor", "major", "device"
LARGEST_INPUT = 100.0  # that is believed of an input whose mean is near 0 and whose standard deviation is near 1
NO_LABEL = -1
_LEVELS = 255
_SCALE_BYTES = 8  # two numbers
_ROUNDING = 1.001


@dataclass(frozen=True, slots=True)
class Mixtures:
    """Mixed-up samples.

    Attributes:
        inputs: [count, ...].
        minor: [count], label of the example that counts lam.
        major: [count], label of the one that counts 1 - lam.
    """

    inputs: Array
    minor: Array
    major: Array


def mixed(inputs: Array, labels: Array, count: int, lam: float, seed: int) -> Mixtures:
    """Mixtures of pairs of examples of different labels.

    Args:
        inputs: [examples, ...].
        labels: [examples].
        count: mixtures wanted; none is made where all examples have one label.
        lam: weight of the first of a pair, in (0, 0.5).
        seed: of the draw. Every ordered pair of labels is as likely, however many examples they have.
    """
    rng = np.random.default_rng(seed)
    present = np.unique(labels)
    if len(present) < 2:
        nothing = np.zeros(0, np.int64)
        return Mixtures(np.zeros((0, *inputs.shape[1:]), np.float32), nothing, nothing)
    pairs = [rng.choice(present, 2, replace=False) for _ in range(count)]
    first, second = (
        np.array([rng.choice(np.flatnonzero(labels == pair[place])) for pair in pairs]) for place in (0, 1)
    )
    made = lam * inputs[first] + (1 - lam) * inputs[second]
    return Mixtures(np.asarray(made, np.float32), labels[first], labels[second])


def crossed(mixtures: Mixtures, device: Array) -> Array:
    """Every pair of mixtures of different clients whose labels are crossed, in the order of the first.

    Args:
        mixtures: of all clients.
        device: [count], which client each is of.

    Returns:
        Positions [pairs, 2], the first below the second; no pair where no two fit.
    """
    minor, major = (np.asarray(labels, np.int64) for labels in (mixtures.minor, mixtures.major))
    found = [np.zeros((0, 2), np.int64)]
    for one in range(len(device)):
        later = slice(one + 1, None)
        fits = (minor[later] == major[one]) & (major[later] == minor[one]) & (device[later] != device[one])
        others = one + 1 + np.flatnonzero(fits)
        found.append(np.stack([np.full_like(others, one), others], axis=1))
    return np.concatenate(found)


def unmixed(mixtures: Mixtures, pairs: Array, lam: float, drawn: Array) -> tuple[Array, Array]:
    """Samples with hard labels. Of each pair there are two, with the label of either example.

    Args:
        mixtures: of all clients.
        pairs: [pairs, 2], as `crossed` gives them.
        lam: as they were mixed.
        drawn: [count], numbers of samples, below 2 * pairs: those of a pair follow one another.

    Returns:
        Inputs [count, ...] and labels [count].
    """
    one, other = pairs[drawn // 2].T
    to_minor, to_major = lam / (2 * lam - 1), (lam - 1) / (2 * lam - 1)
    is_minor = drawn % 2 == 0
    h = np.where(is_minor, to_minor, to_major).reshape(-1, *(1 for _ in mixtures.inputs.shape[1:]))
    inputs = h * mixtures.inputs[one] + (1 - h) * mixtures.inputs[other]
    labels = np.where(is_minor, mixtures.minor[one], mixtures.major[one])
    return np.asarray(inputs, np.float32), np.asarray(labels, np.int64)


class SeededOutputsCodec:
    """Mean outputs of each label, and mixtures where there are some: a byte for each number, on one scale for all.

    Args:
        outputs: of the mean outputs.
        num_seeds: mixtures at most.
        shape: of one input.
        num_labels: classes.
    """

    def __init__(self, outputs: LabelOutputsCodec, num_seeds: int, shape: tuple[int, ...], num_labels: int) -> None:
        self._outputs = outputs
        self._num_seeds = num_seeds
        self._shape = shape
        self._num_labels = num_labels
        self.spec: Spec = (
            *outputs.spec,
            TensorSpec(SEEDS, (num_seeds, *shape)),
            TensorSpec(MINOR, (num_seeds,)),
            TensorSpec(MAJOR, (num_seeds,)),
        )

    @property
    def mixtures_bytes(self) -> int:
        """Bytes that all mixtures of a client take in a payload."""
        return _SCALE_BYTES + self._num_seeds * (
            int(np.prod(self._shape, dtype=np.int64)) + 2 * len(varint(self._num_labels - 1))
        )

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload: outputs of every label, the number of mixtures, and all of these."""
        return self._outputs.most_bytes + len(varint(self._num_seeds)) + self.mixtures_bytes

    def initial_state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def arrays(self, mixtures: Mixtures | None) -> dict[str, Array]:
        """Mixtures, or none, as the tensors of a payload."""
        found = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in self.spec[-3:]}
        found[MINOR] -= 1
        found[MAJOR] -= 1
        if mixtures is not None:
            count = len(mixtures.minor)
            found[SEEDS][:count], found[MINOR][:count], found[MAJOR][:count] = (
                mixtures.inputs,
                mixtures.minor,
                mixtures.major,
            )
        return found

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """The payload.

        Raises:
            ValueError: if a number is not finite, or an input is no standardised one.
        """
        require_finite(update)
        if (largest := float(np.abs(update[SEEDS]).max())) > LARGEST_INPUT:
            raise ValueError(
                f"mixed inputs must lie within {LARGEST_INPUT:g} of 0, got {largest:.4g}; standardise them "
                "(task.pixel_mean, task.pixel_std)"
            )
        outputs, _ = self._outputs.encode(update, {}, progress=progress, seed=seed)
        there = update[MAJOR] != NO_LABEL
        parts = [outputs, varint(int(there.sum()))]
        if there.any():
            values = update[SEEDS][there]
            low, high = float(values.min()), float(values.max())
            scale = (high - low) / _LEVELS or 1.0
            parts.append(np.array([low, scale], "<f4").tobytes())
            for minor, major in zip(update[MINOR][there], update[MAJOR][there], strict=True):
                parts += [varint(int(minor)), varint(int(major))]
            parts.append(np.clip(np.rint((values - low) / scale), 0, _LEVELS).astype(np.uint8).tobytes())
        return b"".join(parts), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """What was packed, as float32.

        Raises:
            ValueError: if the payload is not one of these.
        """
        require_at_most(payload, self.most_bytes)
        reader = Reader(payload)
        found = self._outputs.read(reader)
        count = reader.varint()
        if count > self._num_seeds:
            raise ValueError(f"at most {self._num_seeds} mixtures may be sent, got {count}")
        mixtures = None
        if count:
            low, scale = np.frombuffer(reader.take(_SCALE_BYTES), "<f4").astype(np.float64)
            labels = np.array([[reader.varint(), reader.varint()] for _ in range(count)])
            if (labels >= self._num_labels).any() or (labels[:, 0] == labels[:, 1]).any():
                raise ValueError(f"a mixture needs two different labels below {self._num_labels}")
            size = int(np.prod(self._shape, dtype=np.int64))
            levels = np.frombuffer(reader.take(count * size), np.uint8).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                values = (low + scale * levels).astype(np.float32)
            if not (np.abs(values) <= LARGEST_INPUT * _ROUNDING).all():  # also where they are no numbers
                raise ValueError(f"mixtures must be finite and lie within {LARGEST_INPUT:g} of 0")
            mixtures = Mixtures(values.reshape(count, *self._shape), labels[:, 0], labels[:, 1])
        reader.end()
        return {**found, **self.arrays(mixtures)}, state


class GatheredSeeds(LabelOutputsMean):
    """The mean of outputs, and the mixtures of every client that ever counted: those that it sent last.

    A client that has lost its state sends its mixtures again. Were they kept beside the first as another client's, they
    would be unmixed with these, and give back the client's very examples.
    """

    def __init__(self, weighting: Weighting = "uniform", num_epochs: int = 1) -> None:
        super().__init__(weighting, num_epochs)
        self._kept: dict[str, dict[str, Array]] = {}
        self._new: dict[str, dict[str, Array]] = {}

    def begin(self, server_round: int) -> None:
        """Forget the uploads of the round before, not the mixtures that counted."""
        super().begin(server_round)
        self._new = {}

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one client's outputs, and its mixtures if it sent some."""
        super().add(upload, num_examples, loss, client)
        there = upload[MAJOR] != NO_LABEL
        if there.any():
            self._new[client] = {name: np.array(upload[name][there]) for name in (SEEDS, MINOR, MAJOR)}

    def result(self) -> Arrays | None:
        """Outputs of this round, and all mixtures; from here on those of this round count."""
        means = super().result()
        if means is None:
            return None
        self._kept |= self._new
        self._new = {}
        if not self._kept:
            return means
        of_clients = [self._kept[client] for client in sorted(self._kept)]
        gathered = {name: np.concatenate([one[name] for one in of_clients]) for name in (SEEDS, MINOR, MAJOR)}
        device = np.repeat(np.arange(len(of_clients)), [len(one[MAJOR]) for one in of_clients])
        return {**means, **gathered, DEVICE: device.astype(np.float32)}

    def state(self) -> Arrays:
        """The mixtures that counted."""
        return {f"{client}/{name}": value for client, of in self._kept.items() for name, value in of.items()}

    def restore(self, state: Arrays) -> None:
        """Go on with these mixtures."""
        self._kept = {}
        for name, value in state.items():
            client, _, what = name.rpartition("/")
            self._kept.setdefault(client, {})[what] = value
