import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.core.arrays import Array
from fedkd_flwr.core.snapshot import SnapshotError, pack_snapshot, snapshot_bytes, unpack_snapshot

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
HEADER_BYTES = 20


def model() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((3, 4)).astype(np.float32),
        "bn.num_batches_tracked": np.array(2**40 + 1, np.int64),
        "bn.running_var": rng.random(3).astype(np.float32),
        "conv": rng.standard_normal((2, 1, 3, 3)).astype(np.float32),
        "mask": np.array([True, False]),
        "scale": np.array(-0.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes()


def test_snapshot_gives_back_every_bit() -> None:
    found = unpack_snapshot(pack_snapshot(model()), model())
    assert_same(found, model())
    assert found["bn.num_batches_tracked"].item() == 2**40 + 1


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.dictionaries(st.text(max_size=5), SHAPES, max_size=4),
    dtype=st.sampled_from([np.float32, np.float64, np.int64, np.int32, np.bool_]),
    seed=st.integers(0, 2**32),
)
def test_snapshot_of_any_shapes_and_types_gives_back_every_bit(
    shapes: dict[str, tuple[int, ...]], dtype: type[np.generic], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(100 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    data = pack_snapshot(arrays)
    assert len(data) == snapshot_bytes(arrays)
    assert_same(unpack_snapshot(data, arrays), arrays)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1), (3, 4), (4, 3), (2, 1, 3, 3), (0, 3)])
def test_snapshot_gives_back_the_shape(shape: tuple[int, ...]) -> None:
    arrays = {"w": np.ones(shape, np.float32)}
    assert unpack_snapshot(pack_snapshot(arrays), arrays)["w"].shape == shape


def test_snapshot_does_not_depend_on_insertion_order_layout_or_byte_order() -> None:
    arrays = model()
    turned = {name: np.array(arrays[name], order="F") for name in reversed(arrays)}
    swapped = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in arrays.items()}
    assert pack_snapshot(turned) == pack_snapshot(swapped) == pack_snapshot(arrays)


def test_snapshot_starts_with_magic_and_version_and_holds_little_endian_values_in_name_order() -> None:
    data = pack_snapshot({"b": np.array([1, 2], np.int64), "a": np.array([1.0], np.float32)})
    assert data[:4] == b"FKS\x02"
    assert data[HEADER_BYTES:].hex() == "0000803f" + "0100000000000000" + "0200000000000000"


def test_what_is_unpacked_is_writable_and_shares_nothing() -> None:
    template, data = model(), pack_snapshot(model())
    one, two = unpack_snapshot(data, template), unpack_snapshot(data, template)
    one["w"] += 1
    assert_same(two, model())
    assert_same(template, model())


@pytest.mark.parametrize(
    "template",
    [
        {"v": np.zeros((2, 3), np.float32)},
        {"w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros((2, 3), np.int32)},
        {"w": np.zeros((2, 3), np.float32), "b": np.zeros(0, np.float32)},
        {},
    ],
    ids=["name", "shape", "dtype", "more", "none"],
)
def test_snapshot_of_another_model_is_refused(template: dict[str, Array]) -> None:
    data = pack_snapshot({"w": np.ones((2, 3), np.float32)})
    with pytest.raises(SnapshotError, match="snapshot is of another model"):
        unpack_snapshot(data, template)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_snapshot_with_a_number_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    arrays = model()
    arrays["w"][1, 1] = bad
    with pytest.raises(SnapshotError, match="'w' holds numbers that are not finite"):
        unpack_snapshot(pack_snapshot(arrays), model())


def test_every_truncation_is_refused() -> None:
    data = pack_snapshot(model())
    for length in range(len(data)):
        with pytest.raises(SnapshotError):
            unpack_snapshot(data[:length], model())


@pytest.mark.parametrize("extra", [1, 4, 1000])
def test_bytes_after_the_end_are_refused(extra: int) -> None:
    data = pack_snapshot(model())
    with pytest.raises(SnapshotError, match=f"must have {len(data)} bytes, got {len(data) + extra}"):
        unpack_snapshot(data + bytes(extra), model())


@pytest.mark.parametrize("position", range(HEADER_BYTES))
def test_any_change_of_the_header_is_refused(position: int) -> None:
    data = bytearray(pack_snapshot(model()))
    data[position] ^= 1
    with pytest.raises(SnapshotError):
        unpack_snapshot(bytes(data), model())


@pytest.mark.filterwarnings("error")
def test_random_mutations_are_refused() -> None:
    rng, whole, template = np.random.default_rng(0), pack_snapshot(model()), model()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        if rng.random() < 0.2:
            data.insert(int(rng.integers(len(data))), int(rng.integers(256)))
        if bytes(data) != whole:
            with pytest.raises(SnapshotError):
                unpack_snapshot(bytes(data), template)
