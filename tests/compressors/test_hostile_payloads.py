"""Bytes from another machine: refused, or finite arrays of the right shapes; in bounded memory and time."""

import time
import tracemalloc

import numpy as np
import pytest

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.coded import CodedDense
from fedkd_flwr.compressors.payload import HEADER_BYTES, Form, Parts, PayloadError, Zero, pack, to_arrays, unpack
from fedkd_flwr.compressors.transform_coding import CODEC_ID
from fedkd_flwr.core.arrays import Arrays, Spec, TensorSpec
from fedkd_flwr.core.protocols import Codec

# Small, so that thousands of payloads can be tried; every form can occur.
SPEC: Spec = (
    TensorSpec("table", (12, 4)),
    TensorSpec("matrix", (10, 9)),
    TensorSpec("bias", (7,)),
    TensorSpec("scale", ()),
    TensorSpec("none", (0, 2)),
    TensorSpec("mean", (3,), "buffer"),
)
NUM_MUTATIONS = {"transform_coding": 10_000}
LARGE: Spec = (TensorSpec("w", (1024, 1024)),)
DENSE_BYTES = 4 * 1024 * 1024
PEAK = 20  # in dense float32 sizes of the tensor; integers and their flags are int64 while they are read
HOSTILE = [0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]


def update(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((12, 4)) * (rng.random((12, 1)) < 0.3)
    matrix = np.outer(rng.standard_normal(10), rng.standard_normal(9)) * 3 + 0.05 * rng.standard_normal((10, 9))
    values = {"table": table, "matrix": matrix, "bias": rng.standard_normal(7), "scale": rng.standard_normal(())}
    values |= {"none": np.zeros((0, 2)), "mean": rng.standard_normal(3)}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def mutated(payload: bytes, rng: np.random.Generator) -> bytes:
    """One of several payloads that nobody wrote: the header stays, so that what follows is read."""
    data = bytearray(payload)
    table_end = min(HEADER_BYTES + 3 * len(SPEC), len(data))
    for _ in range(int(rng.integers(1, 4))):
        where = int(rng.integers(HEADER_BYTES, max(len(data), HEADER_BYTES + 1)))
        kind = int(rng.integers(7))
        if where >= len(data):
            data += rng.bytes(4)
        elif kind == 0:
            data[where] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[where] = int(rng.choice(HOSTILE))
        elif kind == 2:
            data[int(rng.integers(HEADER_BYTES, min(table_end, len(data))))] = int(rng.choice([*HOSTILE, *Form]))
        elif kind == 3:
            data[where:where] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:
            del data[where : where + int(rng.integers(1, 9))]
        elif kind == 5:
            del data[where:]
        else:
            data[where : where + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\xff\xff\x7f\x7f", b"\x01\x00\x80\x7f", bytes(4)]
            )
    return bytes(data)


def refused(codec: Codec, payload: bytes, state: Arrays) -> bool:
    try:
        found, _ = codec.decode(payload, state)
    except PayloadError:
        return True
    for tensor in codec.spec:
        value = found[tensor.name]
        assert (value.shape, value.dtype) == (tensor.shape, np.float32)
        assert np.isfinite(value).all()
    return False


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_mutated_payloads_are_refused_or_give_a_whole_update(name: str) -> None:
    codec, rng = COMPRESSORS[name](name=name).build(SPEC), np.random.default_rng(0)
    state = codec.initial_state()
    good = [codec.encode(update(seed), state, progress=0.5, seed=0)[0] for seed in range(8)]
    count = NUM_MUTATIONS.get(name, 2000)
    num_refused = sum(refused(codec, mutated(good[n % 8], rng), state) for n in range(count))
    assert 0.3 * count < num_refused < 0.99 * count


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
def test_random_bytes_after_any_form_are_refused_or_give_a_whole_update(form: Form) -> None:
    spec: Spec = (TensorSpec("w", (6, 5)),)
    codec, rng = COMPRESSORS["transform_coding"](name="transform_coding").build(spec), np.random.default_rng(form)
    header = codec.encode({"w": np.zeros((6, 5), np.float32)}, {}, progress=0.0, seed=0)[0][:HEADER_BYTES]
    for length in range(150):
        for count in (b"", b"\x01", b"\x02", b"\xff\x01"):
            refused(codec, header + bytes([form]) + count + rng.bytes(length), {})


def large_header() -> tuple[Codec, bytes]:
    codec = COMPRESSORS["transform_coding"](name="transform_coding").build(LARGE)
    zeros = {"w": np.zeros((1024, 1024), np.float32)}
    return codec, codec.encode(zeros, {}, progress=0.0, seed=0)[0][:HEADER_BYTES]


def hostile_tails() -> list[bytes]:
    """For each form and the ranks that ask for most: no bits, no zeros, only ones, and noise."""
    rng, step = np.random.default_rng(0), np.float32(1).tobytes()
    counts = [b"", b"\x01", b"\x80\x01", b"\x80\x04", b"\x80\x08", b"\xff\xff\xff\xff\x0f"]
    fillings = [b"", bytes(600), b"\xff" * 600, b"\x55" * 600, rng.bytes(600), rng.bytes(60_000)]
    return [bytes([form]) + count + step + filling for form in Form for count in counts for filling in fillings]


def test_memory_and_time_are_bounded_by_the_model_whatever_arrives() -> None:
    codec, header = large_header()
    for tail in hostile_tails():
        tracemalloc.start()
        before = time.perf_counter()
        try:
            refused(codec, header + tail, {})
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < PEAK * DENSE_BYTES, tail[:12]
        assert time.perf_counter() - before < 10


def test_a_large_tensor_of_zeros_in_a_few_bytes_is_read() -> None:
    codec, header = large_header()
    found, _ = codec.decode(header + bytes([Form.CODED_DENSE]) + np.float32(1).tobytes() + b"\x08" + bytes(3), {})
    assert not found["w"].any()


@pytest.mark.parametrize(("spread", "size"), [(15, 2000.0), (4, 2.0), (0, 0.1)])
def test_an_honest_payload_takes_no_more_memory_either(spread: int, size: float) -> None:
    integers = np.rint(size * np.random.default_rng(0).standard_normal(1024 * 1024)).astype(np.int64)
    tracemalloc.start()
    try:
        payload = pack(LARGE, Parts({"w": CodedDense(integers, 8, spread)}, 0.5), CODEC_ID)
        found = to_arrays(LARGE, unpack(payload, LARGE, CODEC_ID))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found["w"].reshape(-1), integers * np.float32(0.5))
    assert peak < PEAK * DENSE_BYTES


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
@pytest.mark.parametrize("form", [Form.CODED_DENSE, Form.CODED_DENSE_ROWS, Form.CODED_FACTORED])
def test_coded_forms_of_a_tensor_without_elements_are_refused(form: Form, shape: tuple[int, ...]) -> None:
    spec: Spec = (TensorSpec("none", shape),)
    header = pack(spec, Parts({"none": Zero()}), CODEC_ID)[:HEADER_BYTES]
    with pytest.raises(PayloadError, match="no elements"):
        unpack(header + bytes([form, 1]) + np.float32(1).tobytes() + b"\x08", spec, CODEC_ID)
