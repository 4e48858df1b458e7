"""The default codec: the energy or the bytes that are asked for, in the form that each tensor needs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.compressors.coded import CodedDense, CodedFactored
from fedkd_flwr.compressors.payload import HEADER_BYTES, Dense, Part, Zero, unpack
from fedkd_flwr.compressors.transform_coding import CODEC_ID, TransformCodec, TransformCodingOptions
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, num_elements
from fedkd_flwr.core.schedules import linear
from tests.compressors.updates import SPEC, Update, low_rank, same_bits, sample_update, specs_with_updates


def codec_at(energy: float, spec: Spec = SPEC) -> TransformCodec:
    return TransformCodec(spec, linear(energy, energy))


def codec_within(bytes_per_round: int, spec: Spec = SPEC) -> TransformCodec:
    return TransformCodingOptions(bytes_per_round=bytes_per_round).build(spec)


def sent(codec: TransformCodec, update: Arrays, progress: float = 0.0, seed: int = 0) -> bytes:
    return codec.encode(update, {}, progress=progress, seed=seed)[0]


def part_of(shape: tuple[int, ...], values: object, energy: float = 0.9) -> Part:
    spec: Spec = (TensorSpec("w", shape),)
    update = {"w": np.asarray(values, np.float32).reshape(shape)}
    return unpack(sent(codec_at(energy, spec), update), spec, CODEC_ID).by_name["w"]


def missed_share(spec: Spec, update: Arrays, found: Arrays) -> float:
    """Squared error over all parameters, relative to their squared norm."""
    names = [t.name for t in spec if t.kind == "parameter"]
    missed = sum(float(np.square(update[n].astype(np.float64) - found[n]).sum()) for n in names)
    return missed / (sum(float(np.square(update[n].astype(np.float64)).sum()) for n in names) or 1.0)


@st.composite
def hard_updates(draw: st.DrawFn) -> tuple[Spec, Update]:
    """Updates of `specs_with_updates`, made harder: an outlier, empty rows, few digits, denormals."""
    spec, update = draw(specs_with_updates())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for name, value in update.items():
        changed, kind = (
            value.copy(),
            draw(st.sampled_from(["as it is", "outlier", "rows", "float16", "bfloat16", "tiny"])),
        )
        if kind == "outlier" and changed.size:
            changed.flat[int(rng.integers(changed.size))] = draw(st.sampled_from([1e-30, 1e4, -1e20, 1e37]))
        elif kind == "rows" and changed.ndim > 1:
            changed[rng.random(len(changed)) < 0.6] = 0
        elif kind == "float16":
            changed = np.clip(changed, -6e4, 6e4).astype(np.float16).astype(np.float32)
        elif kind == "bfloat16":
            changed = torch.from_numpy(changed).bfloat16().float().numpy().reshape(value.shape)
        elif kind == "tiny":
            changed = np.asarray(changed * np.float32(1e-38))
        update[name] = np.asarray(changed, np.float32)
    return spec, update


# Energy


@pytest.mark.filterwarnings("error")
@settings(max_examples=120, deadline=None)
@given(case=hard_updates(), energy=st.floats(0.05, 0.9999), seed=st.integers(0, 2**32))
def test_error_over_all_parameters_is_at_most_one_minus_energy(
    case: tuple[Spec, Update], energy: float, seed: int
) -> None:
    spec, update = case
    codec = codec_at(energy, spec)
    found = codec.compress(update, {}, progress=0.0, seed=seed)
    assert missed_share(spec, update, found.decoded) <= (1 - energy) * (1 + 1e-9)
    assert same_bits(codec.decode(found.payload, {})[0], found.decoded)
    assert len(found.payload) <= HEADER_BYTES + len(spec) + 4 * num_elements(spec)
    for tensor in spec:
        if tensor.kind == "buffer":
            assert np.array_equal(found.decoded[tensor.name], update[tensor.name])


@pytest.mark.parametrize("shape", [(40, 60), (300, 280), (900, 20), (1, 2000), (64, 16, 3, 3)])
@pytest.mark.parametrize("energy", [0.6, 0.8, 0.95])
def test_no_more_energy_is_sent_than_needed(shape: tuple[int, ...], energy: float) -> None:
    spec: Spec = (TensorSpec("w", shape),)
    update: Update = {"w": low_rank(np.random.default_rng(0), shape, rank=12)}
    found = codec_at(energy, spec).compress(update, {}, progress=0.0, seed=0)
    assert 0.65 * (1 - energy) <= missed_share(spec, update, found.decoded) <= 1 - energy


def test_energy_is_scheduled_by_progress() -> None:
    update = sample_update()
    codec = TransformCodingOptions(energy_start=0.3, energy_end=0.99).build(SPEC)
    lengths = []
    for progress in (0.0, 0.5, 1.0):
        payload = sent(codec, update, progress)
        assert missed_share(SPEC, update, codec.decode(payload, {})[0]) <= 1 - (0.3 + 0.69 * progress)
        assert payload == sent(codec_at(0.3 * (1 - progress) + 0.99 * progress), update)
        lengths.append(len(payload))
    assert lengths == sorted(set(lengths))


def test_progress_outside_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match="progress must be in"):
        sent(TransformCodingOptions().build(SPEC), sample_update(), progress=1.5)


def test_a_tensor_that_hardly_moved_is_not_sent_beside_one_that_did() -> None:
    spec: Spec = (TensorSpec("large", (20, 30)), TensorSpec("small", (20, 30)))
    rng = np.random.default_rng(0)
    update: Update = {"large": low_rank(rng, (20, 30)), "small": 1e-3 * low_rank(rng, (20, 30))}
    assert isinstance(unpack(sent(codec_at(0.9, spec), update), spec, CODEC_ID).by_name["small"], Zero)


# Bytes


BUDGETED: Spec = tuple(tensor for tensor in SPEC if tensor.kind == "parameter")


@settings(max_examples=60, deadline=None)
@given(
    bytes_per_round=st.integers(128, 5000),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["low rank", "gaussian", "sparse"]),
)
def test_a_payload_takes_at_most_half_of_the_bytes_of_a_round(
    bytes_per_round: int, scale: float, seed: int, kind: str
) -> None:
    rng, update = np.random.default_rng(seed), sample_update(BUDGETED, seed)
    if kind == "gaussian":
        update = {t.name: np.asarray(rng.standard_normal(t.shape), np.float32) for t in BUDGETED}
    elif kind == "sparse":
        update = {name: np.asarray(value * (rng.random(value.shape) < 0.1)) for name, value in update.items()}
    update = {name: np.asarray(value * np.float32(scale)) for name, value in update.items()}
    codec = codec_within(bytes_per_round, BUDGETED)
    payload = sent(codec, update)
    assert len(payload) <= bytes_per_round // 2
    assert missed_share(BUDGETED, update, codec.decode(payload, {})[0]) <= 1 + 1e-9


@pytest.mark.parametrize("bytes_per_round", [4000, 8000, 20_000])
def test_the_bytes_are_used(bytes_per_round: int) -> None:
    spec: Spec = (TensorSpec("one", (120, 80)), TensorSpec("two", (60, 90)), TensorSpec("bias", (80,)))
    rng = np.random.default_rng(0)
    update: Update = {t.name: np.asarray(rng.standard_normal(t.shape), np.float32) for t in spec}
    assert 0.85 * bytes_per_round / 2 <= len(sent(codec_within(bytes_per_round, spec), update)) <= bytes_per_round / 2


def test_more_bytes_leave_less_error() -> None:
    spec: Spec = (TensorSpec("one", (120, 80)), TensorSpec("two", (60, 90)))
    update: Update = {t.name: low_rank(np.random.default_rng(0), t.shape, rank=9) for t in spec}
    errors = []
    for bytes_per_round in (400, 1000, 3000, 9000, 30_000):
        codec = codec_within(bytes_per_round, spec)
        errors.append(missed_share(spec, update, codec.decode(sent(codec, update), {})[0]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_a_tiny_update_keeps_to_the_bytes_too() -> None:
    spec: Spec = (TensorSpec("w", (100, 100)),)
    update: Update = {"w": np.full((100, 100), 1e-40, np.float32)}
    assert len(sent(codec_within(400, spec), update)) <= 200


# Forms


@pytest.mark.parametrize(
    ("shape", "sides"), [((64, 16, 3, 3), (64, 144)), ((1, 17, 64), (17, 64)), ((80, 40), (80, 40))]
)
def test_a_tensor_of_low_rank_is_factored_as_its_matrix(shape: tuple[int, ...], sides: tuple[int, int]) -> None:
    part = part_of(shape, low_rank(np.random.default_rng(0), shape))
    assert isinstance(part, CodedFactored)
    assert (part.left.shape, part.right.shape) == ((sides[0], 1), (1, sides[1]))


@pytest.mark.parametrize("shape", [(200,), (1, 200), (200, 1)])
def test_vectors_are_coded_as_they_are(shape: tuple[int, ...]) -> None:
    assert isinstance(part_of(shape, np.random.default_rng(0).standard_normal(shape) + 0.1), CodedDense)


def test_noise_is_coded_as_it_is() -> None:
    assert isinstance(part_of((40, 40), np.random.default_rng(0).standard_normal((40, 40))), CodedDense)


def test_rows_that_did_not_move_cost_next_to_nothing() -> None:
    rng, moved = np.random.default_rng(0), 20
    rows, whole = rng.standard_normal((moved, 32)), np.zeros((5000, 32))
    whole[rng.choice(5000, moved, replace=False)] = rows
    few: Spec = (TensorSpec("w", (moved, 32)),)
    many: Spec = (TensorSpec("w", (5000, 32)),)
    alone = sent(codec_at(0.9, few), {"w": rows.astype(np.float32)})
    found = sent(codec_at(0.9, many), {"w": whole.astype(np.float32)})
    names = moved * np.log2(np.e * 5000 / moved) / 8
    assert len(found) <= len(alone) + 1.3 * names + 8
    arrived, _ = codec_at(0.9, many).decode(found, {})
    assert not arrived["w"][~whole.any(axis=1)].any()


def test_an_update_of_zeros_says_nothing() -> None:
    update: Update = {t.name: np.zeros(t.shape, np.float32) for t in SPEC}
    for codec in (codec_at(0.9), codec_within(1000)):
        payload = sent(codec, update)
        assert len(payload) == HEADER_BYTES + len(SPEC)
        assert same_bits(codec.decode(payload, {})[0], update)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-40, 1.4e-45])
def test_an_update_around_the_smallest_float32_arrives(scale: float) -> None:
    update: Update = {name: np.asarray(np.sign(value) * np.float32(scale)) for name, value in sample_update().items()}
    codec = codec_at(0.9)
    assert missed_share(SPEC, update, codec.decode(sent(codec, update), {})[0]) <= 0.1


@pytest.mark.filterwarnings("error")
def test_one_huge_value_arrives_and_nothing_else_matters() -> None:
    update = sample_update()
    update["linear.weight"][3, 4] = 1e37
    codec = codec_at(0.999)
    found, _ = codec.decode(sent(codec, update), {})
    assert found["linear.weight"][3, 4] == pytest.approx(1e37, rel=0.04)


def test_energy_that_no_integers_reach_is_kept_by_plain_numbers() -> None:
    spec: Spec = (TensorSpec("w", (40,)),)
    value = (10.0 ** np.linspace(-9, 0, 40)).astype(np.float32)
    codec = codec_at(1 - 1e-15, spec)
    payload = sent(codec, {"w": value})
    assert isinstance(unpack(payload, spec, CODEC_ID).by_name["w"], Dense)
    assert np.array_equal(codec.decode(payload, {})[0]["w"], value)


# Promises of every codec, where this one could break them


def test_what_the_encoder_believes_is_what_arrives_bit_for_bit() -> None:
    for codec in (codec_at(0.6), codec_at(0.99), codec_within(1500)):
        for seed in range(5):
            found = codec.compress(sample_update(seed=seed), {}, progress=0.0, seed=seed)
            assert same_bits(codec.decode(found.payload, {})[0], found.decoded)


def test_the_same_seed_gives_the_same_payload() -> None:
    spec: Spec = (TensorSpec("w", (300, 400)), TensorSpec("v", (300, 400)))
    update: Update = {t.name: low_rank(np.random.default_rng(0), t.shape, rank=20) for t in spec}
    codec = codec_at(0.95, spec)
    assert sent(codec, update, seed=3) == sent(codec, update, seed=3)


@pytest.mark.parametrize("failing", [["eigh"], ["eigh", "svd"]])
def test_a_decomposition_that_fails_is_no_reason_to_stop(failing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: torch.Tensor, **options: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    for name in failing:
        monkeypatch.setattr(torch.linalg, name, fails)
    update, codec = sample_update(), codec_at(0.9)
    payload = sent(codec, update)
    parts = unpack(payload, SPEC, CODEC_ID).by_name.values()
    assert any(isinstance(part, CodedFactored) for part in parts) == ("svd" not in failing)
    assert missed_share(SPEC, update, codec.decode(payload, {})[0]) <= 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    update = sample_update()
    update["tokens"][0, 1, 2] = bad
    with pytest.raises(ValueError, match="the update of 'tokens' is not finite; lower the learning rate"):
        sent(codec_at(0.9), update)


ODD_UPDATES: dict[str, Array] = {
    "constant": np.ones((300, 400), np.float32),
    "vector": np.ones(500, np.float32),
    "one row": np.where(np.arange(500)[:, None] == 7, np.float32(0.5), np.float32(0)) * np.ones((500, 64), np.float32),
    "outlier": np.where(np.arange(40_000) == 3, 1e3, 1e-3).astype(np.float32).reshape(200, 200),
    "rank 2": np.asarray(low_rank(np.random.default_rng(1), (200, 150), rank=2)),
}


@pytest.mark.parametrize("bytes_per_round", [300, 2000, 20_500, 400_000])
@pytest.mark.parametrize("name", sorted(ODD_UPDATES))
def test_bytes_that_are_few_or_more_than_needed_still_say_something(name: str, bytes_per_round: int) -> None:
    update: Update = {"w": ODD_UPDATES[name]}
    spec: Spec = (TensorSpec("w", update["w"].shape),)
    codec = codec_within(bytes_per_round, spec)
    payload = sent(codec, update)
    assert len(payload) <= bytes_per_round / 2
    if name == "vector" and bytes_per_round == 300:
        return  # 150 bytes can't hold 500 equal numbers, and none is worth more than another
    assert missed_share(spec, update, codec.decode(payload, {})[0]) < 1.0


def test_a_budget_beside_buffers_is_spent_on_parameters() -> None:
    spec: Spec = (TensorSpec("w", (100, 100)), TensorSpec("mean", (2400,), "buffer"))
    rng = np.random.default_rng(0)
    update: Update = {t.name: np.asarray(rng.standard_normal(t.shape), np.float32) for t in spec}
    for left in (400, 2000, 4000):
        payload = sent(codec_within(2 * (9600 + left), spec), update)
        assert 9600 + 0.8 * left <= len(payload) <= 9600 + left


def test_odd_numbers_do_not_make_the_whole_update_travel_raw() -> None:
    rng = np.random.default_rng(5)
    for trial in range(120):
        shapes = [(int(rng.integers(1, 40)), int(rng.integers(1, 40))) for _ in range(int(rng.integers(1, 4)))]
        spec = tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes))
        update: Update = {}
        for t in spec:
            drawn = (rng.standard_normal(t.shape), rng.standard_t(1.5, t.shape), rng.choice([-1.0, 1.0], t.shape))
            update[t.name] = np.asarray(drawn[trial % 3], np.float32)
        energy = float(rng.uniform(0.3, 0.95))
        codec = TransformCodingOptions(energy_start=energy, energy_end=energy).build(spec)
        forms = unpack(sent(codec, update), spec, codec.codec_id).by_name.values()
        if sum(t.size for t in spec) > 300:
            assert not all(isinstance(part, Dense) for part in forms)
