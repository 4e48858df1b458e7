"""Options of every compressor: ranges and names are refused where they are written."""

import numpy as np
import pytest
from pydantic import ValidationError

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.payload import HEADER_BYTES
from fedkd_flwr.compressors.powersgd import PowerSgdOptions
from fedkd_flwr.compressors.quantize import QuantizeOptions
from fedkd_flwr.compressors.svd import SvdOptions
from fedkd_flwr.compressors.top_k import TopKOptions
from fedkd_flwr.compressors.transform_coding import TransformCodingOptions
from fedkd_flwr.core.arrays import TensorSpec
from fedkd_flwr.experiment import ConfigError
from tests.compressors.updates import SPEC
from tests.conftest import small

BAD_ENERGIES = [0.0, 1.0, -0.5, 1.5, 60, float("nan"), "most"]
BAD_VALUES = [
    *[
        (name, key, value)
        for name in ("transform_coding", "ef21")
        for key in ("energy_start", "energy_end")
        for value in BAD_ENERGIES
    ],
    *[
        (name, "bytes_per_round", value)
        for name in ("transform_coding", "ef21")
        for value in (0, 127, -1, 1000.5, "all")
    ],
    *[("svd", key, value) for key in ("energy_start", "energy_end") for value in (0.0, 1.01, float("inf"))],
    *[("top_k", "fraction", value) for value in (0.0, 1.01, -0.1, float("nan"))],
    *[("powersgd", "rank", value) for value in (0, -1, 2.5)],
    *[(name, "precision", value) for name in ("svd", "quantize", "powersgd") for value in ("float64", "int2", 8, None)],
    *[
        (name, "error_feedback", value)
        for name in ("svd", "quantize", "top_k", "powersgd", "transform_coding")
        for value in ("up", True, None)
    ],
    ("identity", "precision", "int8"),
    ("ef21", "error_feedback", "both"),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD_VALUES)
def test_a_value_outside_its_range_is_refused_by_its_key(name: str, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        COMPRESSORS[name].model_validate({"name": name, key: value})


def test_options_can_not_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TopKOptions().fraction = 0.5  # type: ignore[misc]


def test_defaults_are_those_that_are_documented() -> None:
    assert IdentityOptions().model_dump() == {"name": "identity"}
    published = {"energy_start": 0.95, "energy_end": 0.98, "precision": "float32", "error_feedback": "none"}
    assert SvdOptions().model_dump() == {"name": "svd", **published}
    feedback = {"error_feedback": "auto"}
    assert QuantizeOptions().model_dump() == {"name": "quantize", "precision": "int8", **feedback}
    assert TopKOptions().model_dump() == {"name": "top_k", "fraction": 0.01, **feedback}
    assert PowerSgdOptions().model_dump() == {"name": "powersgd", "rank": 4, "precision": "float16", **feedback}
    assert TransformCodingOptions().bytes_per_round is None


@pytest.mark.parametrize("name", ["transform_coding", "ef21"])
def test_bytes_that_do_not_do_for_the_tensors_are_one_clear_error(name: str) -> None:
    spec = tuple(TensorSpec(f"t{index}", (10,)) for index in range(100))
    least = 2 * (HEADER_BYTES + 100)
    message = f"compressor.bytes_per_round must be at least {least} for these tensors, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        COMPRESSORS[name].model_validate({"name": name, "bytes_per_round": least - 1}).build(spec)
    COMPRESSORS[name].model_validate({"name": name, "bytes_per_round": least}).build(spec)
    experiment = small(f"compressor.name={name}", f"compressor.bytes_per_round={least - 1}")
    with pytest.raises(ConfigError, match=message):
        experiment.build_codec(spec, "uplink")


def test_bytes_that_do_not_do_for_the_buffers_are_refused_too() -> None:
    # Buffers travel whole, so a payload that says nothing about the parameters still holds them.
    spec = (TensorSpec("w", (10, 10)), TensorSpec("mean", (500,), "buffer"))
    with pytest.raises(ValueError, match="bytes_per_round must be at least"):
        TransformCodingOptions(bytes_per_round=1000).build(spec)


# What the options of the small codecs do


def sent(options: QuantizeOptions | TopKOptions | PowerSgdOptions | SvdOptions, shape: tuple[int, ...]) -> int:
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return len(options.build((TensorSpec("w", shape),)).encode({"w": value}, {}, progress=0.0, seed=0)[0])


@pytest.mark.parametrize(("precision", "smaller"), [("float16", 2.0), ("int8", 3.87), ("int4", 7.5)])
def test_quantize_is_smaller_by_the_width_of_a_number(precision: str, smaller: float) -> None:
    options = QuantizeOptions.model_validate({"precision": precision})
    assert 4 * 64_000 / sent(options, (640, 100)) == pytest.approx(smaller, rel=0.01)


def test_top_k_sends_that_share_of_the_values_and_the_largest() -> None:
    spec = (TensorSpec("one", (50, 20)), TensorSpec("two", (1000,)))
    rng = np.random.default_rng(0)
    update = {"one": rng.standard_normal((50, 20), np.float32), "two": 3 * rng.standard_normal(1000, np.float32)}
    codec = TopKOptions(fraction=0.05).build(spec)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    found, _ = codec.decode(payload, {})
    flat, arrived = (np.concatenate([a[n].reshape(-1) for n in ("one", "two")]) for a in (update, found))
    largest = np.argsort(-np.abs(flat))[:100]
    assert np.array_equal(np.flatnonzero(arrived), np.sort(largest))
    np.testing.assert_allclose(arrived[largest], flat[largest], atol=2.0**-11 * np.abs(flat).max())
    # 16 bits for a value, and the entropy of one flag in twenty for each element.
    assert len(payload) <= HEADER_BYTES + 2 * 3 + 100 * 2 + 4 + 1.1 * 2000 * 0.2864 / 8 + 4


def test_top_k_of_everything_is_not_larger_than_everything() -> None:
    assert sent(TopKOptions(fraction=1.0), (40, 10)) <= HEADER_BYTES + 1 + 1600


@pytest.mark.parametrize(("rank", "precision", "width"), [(1, "float32", 4), (4, "float16", 2), (8, "int8", 1)])
def test_powersgd_sends_factors_of_its_rank(rank: int, precision: str, width: int) -> None:
    options = PowerSgdOptions.model_validate({"rank": rank, "precision": precision})
    extra = {"float32": 0, "float16": 4, "int8": 2 * rank}[precision]
    assert sent(options, (90, 70)) == HEADER_BYTES + 2 + rank * 160 * width + extra


def test_powersgd_finds_a_constant_update_by_going_on_from_its_last_subspace() -> None:
    spec, rng = (TensorSpec("w", (60, 50)),), np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 50)))[0] for n in (60, 50))
    update = {"w": ((left * 0.8 ** np.arange(50)) @ right.T).astype(np.float32)}
    codec, errors = PowerSgdOptions(rank=4, precision="float32").build(spec), []
    state = codec.initial_state()
    for _ in range(10):
        payload, state = codec.encode(update, state, progress=0.0, seed=0)
        errors.append(float(np.square(update["w"] - codec.decode(payload, {})[0]["w"]).sum()))
    best = float((0.8 ** (2 * np.arange(4, 50))).sum())
    assert errors[0] > 1.1 * best
    assert errors[-1] == pytest.approx(best, rel=0.01)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e36, 1e37])
def test_powersgd_takes_updates_of_any_size(scale: float) -> None:
    spec = (TensorSpec("w", (40, 30)),)
    update = {"w": np.full((40, 30), scale, np.float32)}
    codec, state = PowerSgdOptions(precision="float32").build(spec), {}
    for _ in range(3):
        payload, state = codec.encode(update, state, progress=0.0, seed=0)
    found, _ = codec.decode(payload, {})
    np.testing.assert_allclose(found["w"].astype(np.float64), update["w"].astype(np.float64), rtol=1e-3, atol=2e-44)


@pytest.mark.parametrize("name", ["svd", "powersgd"])
def test_integer_factors_keep_most_of_an_update(name: str) -> None:
    rng = np.random.default_rng(0)
    value = (rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))).astype(np.float32)
    for precision, most in (("float16", 1e-5), ("int8", 1e-3), ("int4", 0.1)):
        codec = (
            COMPRESSORS[name].model_validate({"name": name, "precision": precision}).build((TensorSpec("w", (60, 50)),))
        )
        payload, _ = codec.encode({"w": value}, {}, progress=1.0, seed=0)
        missed = np.square(codec.decode(payload, {})[0]["w"] - value).sum() / np.square(value).sum()
        assert missed < most + (0.02 if name == "svd" else 0.0)


def test_buffers_travel_exactly_at_every_precision() -> None:
    spec = SPEC
    rng = np.random.default_rng(0)
    update = {t.name: np.asarray(rng.standard_normal(t.shape), np.float32) for t in spec}
    for name in ("svd", "quantize", "powersgd"):
        codec = COMPRESSORS[name].model_validate({"name": name, "precision": "int4"}).build(spec)
        found, _ = codec.decode(codec.encode(update, {}, progress=0.0, seed=0)[0], {})
        for tensor in spec:
            exact = np.array_equal(found[tensor.name], update[tensor.name])
            assert exact if tensor.kind == "buffer" else not exact or tensor.size <= 9
