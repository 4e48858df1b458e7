"""What one payload loses comes with the next; nothing is lost twice, and nothing is counted twice."""

import io

import numpy as np
import pytest

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.base import RESIDUAL, Compressed, LossyCodec, LossyOptions, WithErrorFeedback
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec
from fedkd_flwr.core.modules import without_prefix
from fedkd_flwr.core.protocols import Codec, Direction
from tests.compressors.updates import SPEC, Update, same_bits, sample_update
from tests.conftest import small

LOSSY = {name: options for name, options in COMPRESSORS.items() if issubclass(options, LossyOptions)}
each_lossy = pytest.mark.parametrize("name", sorted(LOSSY))


def with_feedback(name: str, spec: Spec = SPEC) -> Codec:
    codec = (
        LOSSY[name]
        .model_validate({"name": name, "error_feedback": "both"})
        .build_for(spec, "uplink", uplink_feedback=True)
    )
    assert isinstance(codec, WithErrorFeedback)
    return codec


def random_update(seed: int) -> Update:
    rng = np.random.default_rng(seed)
    return {t.name: np.asarray(rng.standard_normal(t.shape) * 0.01, np.float32) for t in SPEC}


def added(total: dict[str, Array], update: Arrays) -> dict[str, Array]:
    return {name: total.get(name, np.float64(0)) + np.asarray(value, np.float64) for name, value in update.items()}


def assert_nothing_is_lost(sent: Arrays, arrived: Arrays, state: Arrays) -> None:
    residual = without_prefix(RESIDUAL, state)
    for tensor in SPEC:
        rest = residual.get(tensor.name, 0.0) if tensor.kind == "parameter" else 0.0
        np.testing.assert_allclose(arrived[tensor.name] + rest, sent[tensor.name], rtol=0, atol=2e-6)


@each_lossy
def test_what_arrived_and_the_residual_are_what_was_sent(name: str) -> None:
    codec, sent, arrived = with_feedback(name), {}, {}
    state = codec.initial_state()
    for round_ in range(50):
        update = random_update(round_)
        payload, state = codec.encode(update, state, progress=round_ / 49, seed=round_)
        sent, arrived = added(sent, update), added(arrived, codec.decode(payload, {})[0])
    assert_nothing_is_lost(sent, arrived, state)


@each_lossy
def test_only_replies_that_are_counted_change_what_is_owed(name: str) -> None:
    # The exchange: a client's next state is pending until the server says that it counted the reply.
    rng, codec, sent, arrived = np.random.default_rng(0), with_feedback(name), {}, {}
    committed = codec.initial_state()
    for round_ in range(40):
        if rng.random() < 0.4:
            continue  # not sampled
        update = random_update(round_)
        payload, pending = codec.encode(update, committed, progress=0.5, seed=round_)
        if rng.random() < 0.3:
            continue  # the reply is lost, and the update with it
        committed = pending
        sent, arrived = added(sent, update), added(arrived, codec.decode(payload, {})[0])
    assert_nothing_is_lost(sent, arrived, committed)


@each_lossy
def test_encoding_again_from_the_same_state_gives_the_same_payload(name: str) -> None:
    codec = with_feedback(name)
    _, state = codec.encode(random_update(0), codec.initial_state(), progress=0.0, seed=0)
    before = {key: value.copy() for key, value in state.items()}
    first = codec.encode(random_update(1), state, progress=0.0, seed=1)
    second = codec.encode(random_update(1), state, progress=0.0, seed=1)
    assert first[0] == second[0]
    assert same_bits(first[1], second[1])
    assert same_bits(state, before)


@each_lossy
def test_a_constant_update_arrives_on_average(name: str) -> None:
    codec, update, total = with_feedback(name), sample_update(), {}
    state = codec.initial_state()
    num_rounds = 200 if name == "top_k" else 40  # one value of a hundred in each
    for round_ in range(num_rounds):
        payload, state = codec.encode(update, state, progress=0.0, seed=round_)
        total = added(total, codec.decode(payload, {})[0])
    whole = sum(np.square(value).sum() for value in update.values())
    missed = sum(np.square(total[n] / num_rounds - value).sum() for n, value in update.items())
    assert missed < 0.05 * whole


@each_lossy
def test_buffers_have_no_residual_and_the_rest_is_float32(name: str) -> None:
    codec = with_feedback(name)
    _, state = codec.encode(sample_update(), codec.initial_state(), progress=0.0, seed=0)
    residual = without_prefix(RESIDUAL, state)
    assert set(residual) == {t.name for t in SPEC if t.kind == "parameter"}
    for tensor in SPEC:
        if tensor.kind == "parameter":
            value = residual[tensor.name]
            assert isinstance(value, np.ndarray)
            assert (value.shape, value.dtype) == (tensor.shape, np.float32)


@each_lossy
def test_the_state_survives_being_written_as_plain_arrays(name: str) -> None:
    codec = with_feedback(name)
    _, state = codec.encode(sample_update(), codec.initial_state(), progress=0.0, seed=0)
    file = io.BytesIO()
    np.savez(file, **{key.replace("/", "|"): value for key, value in state.items()})
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        read = {key.replace("|", "/"): loaded[key] for key in loaded.files}
    assert same_bits(read, state)
    one = codec.encode(random_update(1), state, progress=0.0, seed=1)
    assert codec.encode(random_update(1), read, progress=0.0, seed=1)[0] == one[0]


@each_lossy
def test_the_initial_state_takes_no_room(name: str) -> None:
    assert with_feedback(name).initial_state() == {}


@each_lossy
def test_feedback_changes_nothing_about_the_first_payload(name: str) -> None:
    plain = LOSSY[name].model_validate({"name": name, "error_feedback": "none"}).build(SPEC)
    with_it = with_feedback(name)
    expected = plain.encode(sample_update(), {}, progress=0.3, seed=5)[0]
    assert with_it.encode(sample_update(), {}, progress=0.3, seed=5)[0] == expected


@pytest.mark.filterwarnings("error")
def test_a_residual_that_overflows_is_refused_by_name() -> None:
    codec = with_feedback("top_k", (TensorSpec("w", (200,)),))
    update: Update = {"w": np.full(200, 3e38, np.float32)}
    state = {RESIDUAL + "w": update["w"]}
    with pytest.raises(ValueError, match="the update of 'w' is not finite"):
        codec.encode(update, state, progress=0.0, seed=0)


class _Nothing(LossyCodec):
    """Loses everything."""

    codec_id = 99

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        decoded = {name: np.zeros_like(value) for name, value in update.items()}
        return Compressed(b"", decoded, {"calls": np.asarray(state.get("calls", 0) + np.int64(1))})


def test_the_state_of_the_codec_itself_is_carried_beside_the_residual() -> None:
    codec = WithErrorFeedback(_Nothing((TensorSpec("w", (2,)),)))
    state: Arrays = codec.initial_state()
    for _ in range(3):
        _, state = codec.encode({"w": np.array([1, 2], np.float32)}, state, progress=0.0, seed=0)
    assert state["calls"] == 3
    assert state[RESIDUAL + "w"].tolist() == [3, 6]
    assert len(state) == 2


# Directions


@each_lossy
@pytest.mark.parametrize(
    ("choice", "linear", "expected"),
    [
        ("auto", True, {"uplink", "downlink"}),
        ("auto", False, {"downlink"}),
        ("both", True, {"uplink", "downlink"}),
        ("both", False, {"uplink", "downlink"}),
        ("uplink", True, {"uplink"}),
        ("uplink", False, {"uplink"}),
        ("downlink", True, {"downlink"}),
        ("downlink", False, {"downlink"}),
        ("none", True, set()),
        ("none", False, set()),
    ],
)
def test_feedback_is_in_the_directions_that_are_asked_for(
    name: str, choice: str, linear: bool, expected: set[str]
) -> None:
    options = LOSSY[name].model_validate({"name": name, "error_feedback": choice})
    directions: tuple[Direction, Direction] = ("uplink", "downlink")
    found = {d for d in directions if isinstance(options.build_for(SPEC, d, uplink_feedback=linear), WithErrorFeedback)}
    assert found == expected


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        ("fedavg", {"uplink", "downlink"}),
        ("fedmedian", {"downlink"}),
        ("krum", {"downlink"}),
    ],
)
def test_an_experiment_feeds_back_up_only_to_a_mean(aggregator: str, expected: set[str]) -> None:
    options = [f"server.aggregator.name={aggregator}", "compressor.name=top_k", "num_clients=8"]
    experiment = small(*options)
    directions: tuple[Direction, Direction] = ("uplink", "downlink")
    found = {d for d in directions if isinstance(experiment.build_codec(SPEC, d), WithErrorFeedback)}
    assert found == expected


def test_the_published_compressor_feeds_nothing_back_and_the_others_do() -> None:
    defaults = {name: options(name=name).model_dump()["error_feedback"] for name, options in LOSSY.items()}
    assert defaults == {
        "svd": "none",
        "quantize": "auto",
        "top_k": "auto",
        "powersgd": "auto",
        "transform_coding": "auto",
    }


def test_identity_and_ef21_have_no_residual() -> None:
    for name in ("identity", "ef21"):
        for direction in ("uplink", "downlink"):
            codec = COMPRESSORS[name](name=name).build_for(SPEC, direction, uplink_feedback=True)  # type: ignore[arg-type]
            assert not isinstance(codec, WithErrorFeedback)
