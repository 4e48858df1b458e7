"""Bytes from another machine: refused, or finite arrays of the right shapes; in bounded memory and time."""

import subprocess
import sys
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
from tests.conftest import ROOT

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
PEAK = 10  # of decoding, in dense float32 sizes of the tensor
PEAK_OF_BOTH = 15  # of encoding and decoding
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


def fillings_of_the_longest_payload() -> list[bytes]:
    """Bits after the header and the table, as many as a payload may have."""
    room, rng = DENSE_BYTES - 16, np.random.default_rng(0)
    return [bytes(room), b"\xff" * room, b"\x55" * room, b"\x01" * room, rng.bytes(room)]


@pytest.mark.parametrize("count", [b"", b"\x01", b"\x80\x04", b"\x80\x08"], ids=["dense", "1", "512", "1024"])
@pytest.mark.parametrize("form", [Form.SPARSE_FLOAT16, Form.CODED_DENSE, Form.CODED_FACTORED, Form.CODED_DENSE_ROWS])
def test_memory_is_bounded_for_the_longest_payload_that_is_read(form: Form, count: bytes) -> None:
    codec, header = large_header()
    for filling in fillings_of_the_longest_payload():
        payload = header + bytes([form]) + count + np.float32(1).tobytes() + filling
        tracemalloc.start()
        try:
            refused(codec, payload, {})
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < PEAK * DENSE_BYTES


def payload_before_trailing_zeros(codec: Codec, form: Form) -> bytes:
    """A payload of one form that could go on for ever, as far as a reader of its header knows."""
    zeros = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in codec.spec}
    header = codec.encode(zeros, codec.initial_state(), progress=0.0, seed=0)[0][:HEADER_BYTES]
    return header + bytes([form, 1]) + bytes(len(codec.spec) - 1) + np.float32(1).tobytes()


@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_trailing_bytes_are_refused_before_any_of_them_is_unpacked(name: str, form: Form) -> None:
    codec = COMPRESSORS[name](name=name).build((TensorSpec("w", (64, 64)),))
    state = codec.initial_state()
    for length in (codec.most_bytes + 1, 8 << 20):
        payload = payload_before_trailing_zeros(codec, form).ljust(length, b"\0")
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match="payload"):
                codec.decode(payload, state)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < PEAK * 4 * 64 * 64


LIMITED = """
import resource, sys
import numpy as np
from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.payload import PayloadError
from fedkd_flwr.core.arrays import TensorSpec
from tests.compressors.test_hostile_payloads import Form, payload_before_trailing_zeros

codec = COMPRESSORS["transform_coding"](name="transform_coding").build((TensorSpec("w", (1024, 1024)),))
forms = (Form.SPARSE_FLOAT16, Form.CODED_DENSE, Form.CODED_FACTORED)
starts = [payload_before_trailing_zeros(codec, form) for form in forms]
zeros = bytes(128 << 20)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
allowed = used + len(zeros) + 10 * (4 << 20)  # the payload itself, and ten times the dense update
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
for start in starts:
    payload = start + zeros
    try:
        codec.decode(payload, {})
    except PayloadError:
        continue
    finally:
        del payload
    sys.exit("a payload of 128 MiB was read")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_128_mib_of_zeros_are_refused_within_ten_times_the_dense_update() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    assert peak < PEAK_OF_BOTH * DENSE_BYTES


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
@pytest.mark.parametrize("form", [Form.CODED_DENSE, Form.CODED_DENSE_ROWS, Form.CODED_FACTORED])
def test_coded_forms_of_a_tensor_without_elements_are_refused(form: Form, shape: tuple[int, ...]) -> None:
    spec: Spec = (TensorSpec("none", shape),)
    header = pack(spec, Parts({"none": Zero()}), CODEC_ID)[:HEADER_BYTES]
    with pytest.raises(PayloadError, match="no elements"):
        unpack(header + bytes([form, 1]) + np.float32(1).tobytes() + b"\x08", spec, CODEC_ID)
