"""What holds for every compressor of the table, those that are still to come included."""

import tracemalloc
from contextlib import suppress
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.numbers import PRECISIONS
from fedkd_flwr.compressors.payload import HEADER_BYTES, PayloadError
from fedkd_flwr.core.arrays import Arrays, Spec, TensorSpec
from fedkd_flwr.core.protocols import Codec
from tests.compressors.updates import SPEC, Update, same_bits, sample_update, specs_with_updates

pytestmark = pytest.mark.parametrize("name", sorted(COMPRESSORS))


def codec_of(name: str, spec: Spec = SPEC) -> Codec:
    return COMPRESSORS[name](name=name).build(spec)


def encoded(codec: Codec, update: Arrays, progress: float = 0.0) -> bytes:
    return codec.encode(update, codec.initial_state(), progress=progress, seed=7)[0]


def decoded(codec: Codec, payload: bytes) -> Arrays:
    return codec.decode(payload, codec.initial_state())[0]


def assert_an_update(found: Arrays, spec: Spec) -> None:
    assert list(found) == [t.name for t in spec]
    for tensor in spec:
        value = found[tensor.name]
        assert isinstance(value, np.ndarray)
        assert (value.shape, value.dtype) == (tensor.shape, np.dtype(np.float32))
        assert np.isfinite(value).all()


def refuses(codec: Codec, payload: bytes) -> bool:
    """Whether a payload is refused; one that is not must be a whole update."""
    try:
        found = decoded(codec, payload)
    except PayloadError:
        return True
    assert_an_update(found, codec.spec)
    return False


def test_options_are_built_by_their_name_in_the_table(name: str) -> None:
    codec = codec_of(name)
    assert COMPRESSORS[name](name=name).name == name
    assert codec.spec == SPEC


def adversarial_updates(spec: Spec) -> list[Update]:
    """Noise, extremes, denormals, one-hot, constant, a few ranks, a few rows."""
    rng = np.random.default_rng(0)
    tiny, huge = np.float32(1e-45), np.float32(3.4e38)
    makers = [
        lambda shape: rng.standard_normal(shape),
        lambda shape: rng.standard_cauchy(shape),
        lambda shape: rng.choice([-huge, huge], shape),
        lambda shape: rng.choice([-huge, tiny, 0.0], shape),
        lambda shape: rng.choice([-tiny, tiny], shape),
        lambda shape: np.where(np.arange(int(np.prod(shape))).reshape(shape) == 1, 1.0, 0.0),
        lambda shape: np.full(shape, -0.125),
        lambda shape: np.exp(rng.uniform(-80, 80, shape)),
        lambda shape: rng.integers(-2, 3, shape),
        lambda shape: rng.standard_normal(shape) * (rng.random(shape[:1] + (1,) * (len(shape) - 1)) < 0.3),
    ]
    return [{t.name: np.asarray(make(t.shape), np.float32) for t in spec} for make in makers]


SHAPES = [(1,), (2,), (3, 3), (5, 1), (2, 2), (7, 64), (65,), (4, 3, 2, 2), (40, 40), (300, 2), (1, 1), (0, 3)]


def variants_of(name: str) -> list[dict[str, object]]:
    """Options that change how tensors are written."""
    return {
        "svd": [{"precision": precision, "energy_end": energy} for precision in PRECISIONS for energy in (0.1, 1.0)],
        "quantize": [{"precision": precision} for precision in PRECISIONS],
        "powersgd": [{"precision": precision, "rank": rank} for precision in PRECISIONS for rank in (1, 16)],
        "top_k": [{"fraction": fraction} for fraction in (0.01, 0.5, 1.0)],
        "transform_coding": [{"energy_start": 0.999}, {"energy_start": 0.1}, {"bytes_per_round": 4000}],
        "ef21": [{"energy_start": 0.999}],
    }.get(name, [{}])


def test_no_encoder_exceeds_the_length_beyond_which_it_would_be_refused(name: str) -> None:
    specs = [tuple(TensorSpec(f"t{n}", shape) for n, shape in enumerate(SHAPES))]
    specs += [(TensorSpec("w", shape),) for shape in SHAPES]
    for options in variants_of(name):
        for spec in specs:
            codec = (
                COMPRESSORS[name]
                .model_validate({"name": name, **options})
                .build_for(spec, "downlink", uplink_feedback=True)
            )
            assert codec.most_bytes <= 4 * sum(t.size for t in spec) + len(spec) + HEADER_BYTES
            for update in adversarial_updates(spec):
                with suppress(PayloadError):  # the encoder itself refuses what its rounding takes out of float32
                    assert len(encoded(codec, update)) <= codec.most_bytes


def test_options_refuse_unknown_keys_and_other_names(name: str) -> None:
    with pytest.raises(ValidationError, match="enrgy"):
        COMPRESSORS[name].model_validate({"name": name, "enrgy": 0.9})
    with pytest.raises(ValidationError, match="name"):
        COMPRESSORS[name].model_validate({"name": "zip"})


@settings(max_examples=60, deadline=None)
@given(case=specs_with_updates(), progress=st.floats(0.0, 1.0))
def test_any_update_arrives_with_its_names_shapes_and_type(
    name: str, case: tuple[Spec, Update], progress: float
) -> None:
    spec, update = case
    codec = codec_of(name, spec)
    assert_an_update(decoded(codec, encoded(codec, update, progress)), spec)


@settings(max_examples=60, deadline=None)
@given(case=specs_with_updates(), progress=st.floats(0.0, 1.0))
def test_payload_is_never_longer_than_without_compression(
    name: str, case: tuple[Spec, Update], progress: float
) -> None:
    spec, update = case
    assert len(encoded(codec_of(name, spec), update, progress)) <= len(encoded(codec_of("identity", spec), update))


def test_zeros_and_buffers_arrive_exactly(name: str) -> None:
    update, codec = sample_update(), codec_of(name)
    found = decoded(codec, encoded(codec, update))
    assert not found["unused"].any()
    for tensor in SPEC:
        if tensor.kind == "buffer":
            assert np.array_equal(found[tensor.name], update[tensor.name])


def test_encoding_is_repeatable_and_leaves_its_input_as_it_was(name: str) -> None:
    update, codec = sample_update(), codec_of(name)
    before = deepcopy(update)
    assert encoded(codec, update) == encoded(codec, update)
    assert same_bits(update, before)


def test_encoding_does_not_depend_on_the_order_of_the_update(name: str) -> None:
    update, codec = sample_update(), codec_of(name)
    turned = {key: update[key] for key in reversed(update)}
    assert encoded(codec, turned) == encoded(codec, update)


def test_decoding_is_repeatable_and_its_results_share_nothing(name: str) -> None:
    # The published server decodes in place, in a dict that all clients share.
    update, codec = sample_update(), codec_of(name)
    payload = encoded(codec, update)
    first, second = decoded(codec, payload), decoded(codec, payload)
    assert same_bits(first, second)
    kept = deepcopy(dict(second))
    for value in first.values():
        value += 1
    assert same_bits(second, kept)
    assert same_bits(decoded(codec, payload), kept)
    assert same_bits(update, sample_update())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["conv.weight", "linear.bias", "bn.running_mean"])
def test_an_update_that_is_not_finite_is_refused_by_name(name: str, tensor: str, bad: float) -> None:
    update, codec = sample_update(), codec_of(name)
    update[tensor].flat[1] = bad
    with pytest.raises(ValueError, match=f"the update of '{tensor}' is not finite; lower the learning rate"):
        encoded(codec, update)


def test_payload_of_another_model_is_refused(name: str) -> None:
    payload = encoded(codec_of(name), sample_update())
    other: Spec = (*SPEC[:-1], TensorSpec("table", (6, 6), "parameter"))
    with pytest.raises(PayloadError, match="model with other tensors; both ends need the same experiment"):
        decoded(codec_of(name, other), payload)


def test_payload_of_another_compressor_is_refused(name: str) -> None:
    payload = encoded(codec_of(name), sample_update())
    for other in COMPRESSORS.keys() - {name}:
        with pytest.raises(PayloadError, match=r"codec id must be \d+, got \d+; both ends need the same compressor"):
            decoded(codec_of(other), payload)


def test_payload_of_another_format_version_is_refused(name: str) -> None:
    payload = bytearray(encoded(codec_of(name), sample_update()))
    payload[3] += 1
    with pytest.raises(PayloadError, match="payload format must be 2, got 3; run the same release on both ends"):
        decoded(codec_of(name), bytes(payload))


@pytest.mark.parametrize("data", [b"", b"FKD", b"fkd\x02\x00" + bytes(40), b"\x80\x04\x95" + bytes(40), bytes(100)])
def test_bytes_of_another_kind_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(PayloadError, match="a payload starts with b'FKD'"):
        decoded(codec_of(name), data)


def test_every_truncation_is_refused(name: str) -> None:
    codec = codec_of(name)
    payload = encoded(codec, sample_update())
    for length in range(len(payload)):
        assert refuses(codec, payload[:length]), length


def test_bytes_after_the_end_are_refused(name: str) -> None:
    codec = codec_of(name)
    payload = encoded(codec, sample_update())
    for extra in (b"\0", b"\0" * 4, payload):
        with pytest.raises(PayloadError, match=f"{len(payload)} bytes.*got {len(payload) + len(extra)}|can't be read"):
            decoded(codec, payload + extra)


@pytest.mark.filterwarnings("error")
def test_random_mutations_are_refused_or_give_finite_arrays_of_the_right_shapes(name: str) -> None:
    rng, codec = np.random.default_rng(0), codec_of(name)
    whole = encoded(codec, sample_update())
    table = slice(13, 13 + 3 * len(SPEC))
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            kind = rng.integers(5)
            where = int(rng.integers(len(data)))
            if kind == 0:
                data[where] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[where] = int(rng.choice([0, 1, 5, 127, 128, 255]))
            elif kind == 2:
                # Forms and ranks, where a hostile number asks for the most.
                data[int(rng.integers(table.start, min(table.stop, len(data))))] = int(rng.integers(256))
            elif kind == 3:
                data[where:where] = rng.bytes(int(rng.integers(1, 9)))
            else:
                del data[where : where + int(rng.integers(1, 9))]
        refused += refuses(codec, bytes(data))
    # Both ways must have been taken, or the loop has shown nothing.
    assert 300 < refused < 1000


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=200))
def test_arbitrary_bytes_after_a_good_header_are_refused_or_give_a_whole_update(name: str, tail: bytes) -> None:
    spec: Spec = (TensorSpec("w", (3, 4)), TensorSpec("b", (3,)), TensorSpec("s", ()))
    codec = codec_of(name, spec)
    header = encoded(codec, {t.name: np.zeros(t.shape, np.float32) for t in spec})[:13]
    refuses(codec, header + tail)


@pytest.mark.parametrize(
    "tail", [b"\x01", b"\x05\x80\x20", b"\x05\x80\x10", b"\x05\xff\xff\xff\xff\x0f", b"\x01" + bytes(64)]
)
def test_a_short_payload_that_asks_for_a_large_tensor_allocates_nothing(name: str, tail: bytes) -> None:
    spec: Spec = (TensorSpec("w", (4096, 4096)),)
    codec = codec_of(name, spec)
    header = encoded(codec, {"w": np.zeros((4096, 4096), np.float32)})[:13]
    state = codec.initial_state()  # ef21's is as large as the model, whatever arrives
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            codec.decode(header + tail, state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_tensors_without_elements_arrive_beside_others(name: str) -> None:
    spec: Spec = (TensorSpec("none", (0, 3)), TensorSpec("w", (2,)), TensorSpec("last", (4, 0)))
    codec = codec_of(name, spec)
    found = decoded(codec, encoded(codec, {t.name: np.ones(t.shape, np.float32) for t in spec}))
    assert_an_update(found, spec)
    np.testing.assert_allclose(found["w"], 1.0, rtol=0.02)


def test_a_model_without_tensors_has_a_payload(name: str) -> None:
    codec = codec_of(name, ())
    assert dict(decoded(codec, encoded(codec, {}))) == {}
