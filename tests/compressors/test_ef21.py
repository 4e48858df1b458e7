"""EF21: two ends that keep the same estimate."""

from itertools import pairwise

import numpy as np
import pytest

from fedkd_flwr.compressors.ef21 import CODEC_ID, Ef21Codec, Ef21Options
from fedkd_flwr.compressors.payload import Dense, Parts, PayloadError, pack
from fedkd_flwr.core.arrays import Arrays, Spec, TensorSpec
from fedkd_flwr.core.modules import without_prefix
from tests.compressors.updates import SPEC, Update, same_bits, sample_update

PARAMETERS = [t.name for t in SPEC if t.kind == "parameter"]


def distance(found: Arrays, update: Arrays) -> float:
    missed = sum(float(np.square(found[n] - update[n]).sum()) for n in PARAMETERS)
    return missed / sum(float(np.square(update[n]).sum()) for n in PARAMETERS)


def exchanged(codec: Ef21Codec, updates: list[Update]) -> tuple[list[Arrays], Arrays, Arrays]:
    """What arrives in each round, and both ends' states after the last."""
    sender, receiver, found = codec.initial_state(), codec.initial_state(), []
    for round_, update in enumerate(updates):
        payload, sender = codec.encode(update, sender, progress=0.0, seed=round_)
        arrived, receiver = codec.decode(payload, receiver)
        found.append(arrived)
    return found, sender, receiver


def test_both_ends_hold_the_same_estimate_after_twenty_rounds() -> None:
    codec = Ef21Options().build(SPEC)
    found, sender, receiver = exchanged(codec, [sample_update(seed=seed) for seed in range(20)])
    assert same_bits(sender, receiver)
    estimate = without_prefix("estimate/", sender)
    assert sorted(estimate) == sorted(PARAMETERS)
    assert same_bits({name: found[-1][name] for name in PARAMETERS}, estimate)


def test_the_estimate_converges_to_a_constant_update() -> None:
    update = sample_update()
    found, _, _ = exchanged(Ef21Options(energy_start=0.6, energy_end=0.6).build(SPEC), [update] * 20)
    distances = [distance(arrived, update) for arrived in found]
    # Each round keeps at least 0.6 of the energy of what is still missing.
    for before, after in pairwise(distances):
        assert after <= 0.4 * before + 1e-13
    assert distances[-1] < 1e-7


def test_payloads_of_an_update_that_hardly_changes_stay_as_small_as_what_is_new() -> None:
    codec, update = Ef21Options(energy_start=0.9, energy_end=0.9).build(SPEC), sample_update()
    state = codec.initial_state()
    for round_ in range(12):
        payload, state = codec.encode(update, state, progress=0.0, seed=round_)
    moved = {name: value.copy() for name, value in update.items()}
    moved["linear.bias"][1] += 5
    payload, _ = codec.encode(moved, state, progress=0.0, seed=99)
    first, _ = codec.encode(update, codec.initial_state(), progress=0.0, seed=0)
    assert len(payload) < len(first) - 10


def test_buffers_travel_as_they_are_and_are_not_estimated() -> None:
    codec = Ef21Options().build(SPEC)
    updates = [sample_update(seed=seed) for seed in range(3)]
    found, sender, _ = exchanged(codec, updates)
    assert not any("running_mean" in key or "table" in key for key in sender)
    for arrived, update in zip(found, updates, strict=True):
        assert np.array_equal(arrived["bn.running_mean"], update["bn.running_mean"])
        assert np.array_equal(arrived["table"], update["table"])


def test_what_arrives_shares_nothing_with_the_state() -> None:
    codec = Ef21Options().build(SPEC)
    payload, _ = codec.encode(sample_update(), codec.initial_state(), progress=0.0, seed=0)
    arrived, state = codec.decode(payload, codec.initial_state())
    kept = {name: value.copy() for name, value in state.items()}
    for value in arrived.values():
        value += 1
    assert same_bits(state, kept)


def test_a_lost_reply_leaves_both_ends_alike() -> None:
    codec = Ef21Options().build(SPEC)
    committed = receiver = codec.initial_state()
    for round_ in range(10):
        payload, pending = codec.encode(sample_update(seed=round_), committed, progress=0.0, seed=round_)
        if round_ % 3 == 1:
            continue
        committed = pending
        _, receiver = codec.decode(payload, receiver)
    assert same_bits(committed, receiver)


def test_it_has_no_error_feedback_to_choose() -> None:
    with pytest.raises(ValueError, match="error_feedback"):
        Ef21Options.model_validate({"error_feedback": "both"})


def test_payloads_that_move_the_estimate_out_of_float32_are_refused() -> None:
    spec: Spec = (TensorSpec("w", (3,)),)
    codec = Ef21Options().build(spec)
    payload = pack(spec, Parts({"w": Dense(np.full(3, 3e38, np.float32))}), CODEC_ID)
    _, state = codec.decode(payload, codec.initial_state())
    with pytest.raises(PayloadError, match="out of float32"):
        codec.decode(payload, state)
