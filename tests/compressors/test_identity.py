import numpy as np
import pytest
from hypothesis import given, settings

from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.payload import HEADER_BYTES
from fedkd_flwr.core.arrays import Spec, num_elements
from tests.compressors.updates import SPEC, Update, same_bits, sample_update, specs_with_updates


def test_identity_is_the_name_of_no_compression() -> None:
    assert IdentityOptions().name == "identity"


@settings(max_examples=150, deadline=None)
@given(case=specs_with_updates())
def test_any_update_arrives_bit_for_bit(case: tuple[Spec, Update]) -> None:
    spec, update = case
    codec = IdentityOptions().build(spec)
    payload, _ = codec.encode(update, {}, progress=0.5, seed=1)
    assert same_bits(codec.decode(payload, {})[0], update)


def test_extreme_values_arrive_bit_for_bit() -> None:
    limits = np.finfo(np.float32)
    values = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0, 0.1, 1 / 3, 2.0**24]
    update = sample_update()
    update["bn.weight"] = np.array(values, np.float32)
    codec = IdentityOptions().build(SPEC)
    found, _ = codec.decode(codec.encode(update, {}, progress=0.0, seed=0)[0], {})
    assert same_bits(found, update)


def test_payload_has_a_header_one_byte_per_tensor_and_four_per_value() -> None:
    payload, _ = IdentityOptions().build(SPEC).encode(sample_update(), {}, progress=0.0, seed=0)
    assert len(payload) == HEADER_BYTES + len(SPEC) + 4 * num_elements(SPEC)


@pytest.mark.parametrize(("progress", "seed"), [(0.0, 1), (1.0, 0)])
def test_payload_depends_on_nothing_but_the_update(progress: float, seed: int) -> None:
    codec = IdentityOptions().build(SPEC)
    expected, _ = codec.encode(sample_update(), {}, progress=0.0, seed=0)
    assert codec.encode(sample_update(), {}, progress=progress, seed=seed)[0] == expected


def test_the_layout_of_memory_does_not_matter() -> None:
    codec = IdentityOptions().build(SPEC)
    update = sample_update()
    turned = {name: np.array(value, order="F") for name, value in update.items()}
    assert not turned["linear.weight"].flags.c_contiguous
    expected, _ = codec.encode(update, {}, progress=0.0, seed=0)
    assert codec.encode(turned, {}, progress=0.0, seed=0)[0] == expected


def test_state_passes_through_both_ends() -> None:
    codec = IdentityOptions().build(SPEC)
    state = {"kept": np.ones(2, np.float32)}
    payload, after_encoding = codec.encode(sample_update(), state, progress=0.0, seed=0)
    _, after_decoding = codec.decode(payload, state)
    assert after_encoding is state
    assert after_decoding is state
    assert codec.initial_state() == {}
