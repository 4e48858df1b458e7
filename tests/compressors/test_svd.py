import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.payload import HEADER_BYTES, Dense, Factored, Part, Zero, unpack
from fedkd_flwr.compressors.svd import CODEC_ID, SvdCodec, SvdOptions
from fedkd_flwr.core.arrays import Array, Spec, TensorSpec
from fedkd_flwr.core.low_rank import matrix_shape, smallest_rank
from fedkd_flwr.core.schedules import linear
from tests.compressors.updates import SPEC, Update, same_bits, sample_update, specs_with_updates


def sent(codec: SvdCodec, update: Update, progress: float = 0.0) -> bytes:
    return codec.encode(update, {}, progress=progress, seed=0)[0]


def parts_of(update: Update, spec: Spec, energy: float = 0.95) -> dict[str, Part]:
    return unpack(sent(SvdCodec(spec, linear(energy, energy), "float32"), update), spec, CODEC_ID).by_name


def only(shape: tuple[int, ...], values: Array, energy: float = 0.95) -> Part:
    spec: Spec = (TensorSpec("w", shape),)
    return parts_of({"w": np.asarray(values, np.float32).reshape(shape)}, spec, energy)["w"]


def relative_squared_error(found: Array, value: Array) -> float:
    missed = found.astype(np.float64) - value.astype(np.float64)
    return float((missed**2).sum() / (value.astype(np.float64) ** 2).sum())


# Options


def test_energy_rises_from_95_to_98_percent_by_default() -> None:
    options = SvdOptions()
    assert (options.name, options.energy_start, options.energy_end) == ("svd", 0.95, 0.98)


@pytest.mark.parametrize("field", ["energy_start", "energy_end"])
@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5, 95, float("nan")])
def test_an_energy_outside_its_range_is_refused_by_name(field: str, energy: float) -> None:
    with pytest.raises(ValidationError, match=field):
        SvdOptions.model_validate({field: energy})


# What arrives


@settings(max_examples=100, deadline=None)
@given(case=specs_with_updates(), start=st.floats(0.05, 1.0), end=st.floats(0.05, 1.0), progress=st.floats(0.0, 1.0))
def test_matrices_miss_at_most_one_minus_energy_and_all_else_arrives_bit_for_bit(
    case: tuple[Spec, Update], start: float, end: float, progress: float
) -> None:
    spec, update = case
    codec = SvdCodec(spec, linear(start, end), "float32")
    found, _ = codec.decode(sent(codec, update, progress), {})
    for tensor in spec:
        value, arrived = update[tensor.name], found[tensor.name]
        if tensor.kind == "buffer" or matrix_shape(tensor.shape) is None or not value.any():
            assert np.array_equal(arrived, value)
        else:
            energy = start + (end - start) * progress
            assert relative_squared_error(arrived, value) <= (1 - energy) + 1e-6


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 4, 3, 3), (2, 50), (1, 17, 64)])
def test_error_of_a_decaying_spectrum_follows_the_energy(shape: tuple[int, ...], energy: float) -> None:
    rows, cols = matrix_shape(shape) or (0, 0)
    rng, side = np.random.default_rng(0), min(rows, cols)
    left, right = (np.linalg.qr(rng.standard_normal((n, side)))[0] for n in (rows, cols))
    value = ((left * 0.6 ** np.arange(side)) @ right.T).astype(np.float32).reshape(shape)
    spec: Spec = (TensorSpec("w", shape),)
    codec = SvdCodec(spec, linear(energy, energy), "float32")
    found, _ = codec.decode(sent(codec, {"w": value}), {})
    assert relative_squared_error(found["w"], value) <= (1 - energy) + 1e-10


def test_neither_end_keeps_anything() -> None:
    codec = SvdOptions().build(SPEC)
    payload, after_encoding = codec.encode(sample_update(), {}, progress=0.0, seed=0)
    _, after_decoding = codec.decode(payload, {})
    assert after_encoding == {}
    assert after_decoding == {}
    assert codec.initial_state() == {}


# Energy


def test_rank_follows_the_schedule() -> None:
    spectrum = 0.9 ** np.arange(40)
    update = {"w": np.diag(spectrum).astype(np.float32)}
    spec: Spec = (TensorSpec("w", (40, 40)),)
    codec = SvdCodec(spec, linear(0.5, 0.95), "float32")
    ranks = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        part = unpack(sent(codec, update, progress), spec, CODEC_ID).by_name["w"]
        assert isinstance(part, Factored)
        assert part.left.shape[1] == smallest_rank(spectrum, 0.5 + 0.45 * progress)
        ranks.append(part.left.shape[1])
    assert ranks == sorted(set(ranks))


def test_energy_at_the_ends_is_that_of_the_options() -> None:
    # Squared singular values .90, .06, .03, .01: one, two and three of them exceed .89, .95 and .98.
    squares = np.array([0.90, 0.06, 0.03, 0.01])
    values = np.zeros((20, 20), np.float32)
    values[range(4), range(4)] = np.sqrt(squares)
    spec: Spec = (TensorSpec("w", (20, 20)),)
    codec = SvdOptions(energy_start=0.89, energy_end=0.98).build(spec)
    ranks = []
    for progress in (0.0, 0.7, 1.0):
        part = unpack(codec.encode({"w": values}, {}, progress=progress, seed=0)[0], spec, CODEC_ID).by_name["w"]
        assert isinstance(part, Factored)
        ranks.append(part.left.shape[1])
    assert ranks == [1, 2, 3]


def test_progress_outside_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match="progress must be in"):
        sent(SvdCodec(SPEC, linear(0.95, 0.98), "float32"), sample_update(), progress=1.5)


# Forms


def test_each_tensor_takes_the_form_that_it_should() -> None:
    forms = {name: type(part) for name, part in parts_of(sample_update(), SPEC).items()}
    assert forms == {
        "conv.weight": Factored,
        "pointwise.weight": Factored,
        "bn.weight": Dense,
        "linear.weight": Factored,
        "linear.bias": Dense,
        "row": Dense,
        "column": Dense,
        "tokens": Factored,
        "scale": Dense,
        "unused": Zero,
        "bn.running_mean": Dense,
        "table": Dense,
    }


def test_a_convolution_is_one_matrix_of_filters_by_the_rest() -> None:
    part = parts_of(sample_update(), SPEC)["conv.weight"]
    assert isinstance(part, Factored)
    assert (part.left.shape, part.right.shape) == ((8, 1), (1, 36))


@pytest.mark.parametrize("energy", [0.95, 1.0])
def test_a_matrix_whose_factors_would_be_larger_travels_dense(energy: float) -> None:
    value = np.random.default_rng(0).standard_normal((64, 64))
    part = only((64, 64), value, energy)
    assert isinstance(part, Dense)
    assert np.array_equal(part.values, value.astype(np.float32))


def test_factors_as_large_as_the_matrix_travel_dense() -> None:
    # Rank 1 of 2 x 2: four numbers either way, so the exact form is free.
    assert isinstance(only((2, 2), np.ones(4)), Dense)
    assert isinstance(only((2, 3), np.ones(6)), Factored)


def test_a_dense_fallback_costs_what_no_compression_does() -> None:
    spec: Spec = (TensorSpec("w", (64, 64)),)
    update: Update = {"w": np.random.default_rng(0).standard_normal((64, 64), np.float32)}
    plain, _ = IdentityOptions().build(spec).encode(update, {}, progress=0.0, seed=0)
    assert len(sent(SvdCodec(spec, linear(0.95, 0.95), "float32"), update)) == len(plain)


@pytest.mark.parametrize("shape", [(3,), (3, 40), (1, 9), (9, 1), (4, 2, 3, 3), ()])
def test_a_zero_tensor_costs_one_byte_and_stays_zero(shape: tuple[int, ...]) -> None:
    spec: Spec = (TensorSpec("w", shape),)
    update: Update = {"w": np.zeros(shape, np.float32)}
    codec = SvdOptions().build(spec)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    assert len(payload) == HEADER_BYTES + 1
    assert same_bits(codec.decode(payload, {})[0], update)


def test_a_bias_of_length_three_is_not_taken_for_factors() -> None:
    # The published codes test len(x) == 3 and make 1 * 2 * 3 = 6 of this.
    part = only((3,), np.array([1.0, 2.0, 3.0]))
    assert isinstance(part, Dense)
    assert part.values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (2, 64), (10, 512)])
@pytest.mark.parametrize("energy", [0.95, 0.98, 1.0])
def test_a_matrix_with_a_small_side_is_never_lost(shape: tuple[int, int], energy: float) -> None:
    # A flat spectrum: every singular value is needed, where the published loop keeps none.
    value = np.linalg.qr(np.random.default_rng(0).standard_normal(shape[::-1] if shape[0] < shape[1] else shape))[0]
    value = (value.T if shape[0] < shape[1] else value).astype(np.float32)
    spec: Spec = (TensorSpec("w", shape),)
    codec = SvdCodec(spec, linear(energy, energy), "float32")
    found, _ = codec.decode(sent(codec, {"w": value}), {})
    assert relative_squared_error(found["w"], value) <= 1e-10


@pytest.mark.parametrize("shape", [(8, 8, 1, 1), (8, 1, 3, 3), (8, 4, 5, 5)])
def test_convolutions_of_every_kind_are_never_lost(shape: tuple[int, ...]) -> None:
    value = np.random.default_rng(0).standard_normal(shape, np.float32)
    spec: Spec = (TensorSpec("w", shape),)
    codec = SvdCodec(spec, linear(0.95, 0.95), "float32")
    found, _ = codec.decode(sent(codec, {"w": value}), {})
    assert relative_squared_error(found["w"], value) <= 0.05 + 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-42])
def test_a_tiny_update_is_not_taken_for_zero(scale: float) -> None:
    spec: Spec = (TensorSpec("w", (8, 6)),)
    value = np.full((8, 6), scale, np.float32)
    codec = SvdCodec(spec, linear(0.95, 0.95), "float32")
    found, _ = codec.decode(sent(codec, {"w": value}), {})
    np.testing.assert_allclose(found["w"] / np.float32(scale), value / np.float32(scale), rtol=1e-2)


def test_a_low_rank_update_is_many_times_smaller() -> None:
    rng = np.random.default_rng(0)
    spec: Spec = (TensorSpec("w", (128, 128)),)
    value = (rng.standard_normal((128, 2)) @ rng.standard_normal((2, 128))).astype(np.float32)
    payload = sent(SvdCodec(spec, linear(0.999, 0.999), "float32"), {"w": value})
    assert len(payload) == HEADER_BYTES + 2 + 4 * 2 * (128 + 128)


def test_a_decomposition_that_fails_falls_back_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Array, energy: float, seed: int) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("fedkd_flwr.compressors.svd.factorise", fails)
    update = sample_update()
    codec = SvdCodec(SPEC, linear(0.95, 0.95), "float32")
    assert same_bits(codec.decode(sent(codec, update), {})[0], update)


def test_an_update_whose_singular_values_overflow_travels_dense() -> None:
    spec = (TensorSpec("w", (16, 16)),)
    update = {"w": np.full((16, 16), 1e38, np.float32)}
    codec = SvdOptions().build(spec)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    decoded, _ = codec.decode(payload, {})
    assert np.array_equal(decoded["w"], update["w"])
