"""Golden bytes of every form. A change here breaks every client of the last release: raise FORMAT_VERSION with it."""

import numpy as np
import pytest

from fedkd_flwr.compressors.coded import CodedDense, CodedFactored
from fedkd_flwr.compressors.payload import Dense, Factored, Form, Part, Parts, Sparse, Zero, pack, to_arrays, unpack
from fedkd_flwr.compressors.transform_coding import CODEC_ID as TRANSFORM
from fedkd_flwr.core.arrays import Array, Spec, TensorSpec
from tests.compressors.test_payload import golden

SPEC: Spec = (TensorSpec("w", (3, 4)),)
STEP = 0.5


def ints(*values: object) -> Array:
    return np.array(values, np.int64)


def flags(text: str) -> Array:
    return np.array([letter == "1" for letter in text])


VALUES = ints([127, 2, 0, -4], [-1, 0, 6, 8], [8, -16, 0, 1]) / 8
NIBBLES = ints([7, -7, 0, 1], [2, 3, -4, 5], [0, 0, -1, 6]) / 2
COLUMN, ROW = ints([4], [-8], [2]) / 4, ints([4, 0, -1, 8]) / 2
INTEGER_COLUMN, INTEGER_ROW = ints([127], [-2], [1]), ints([127, 0, -1, 4]) * 2
LEFT, RIGHT = ints([7, 7], [-2, 0], [1, -7]), ints([7, 0, -1, 4], [1, -7, 0, 2]) * ints([2], [1])

# Each part, and what it stands for; all of them are written without rounding.
FORMS: dict[Form, tuple[Part, Array]] = {
    Form.ZERO: (Zero(), np.zeros((3, 4))),
    Form.DENSE_FLOAT32: (Dense(VALUES), VALUES),
    Form.DENSE_FLOAT16: (Dense(VALUES, "float16"), VALUES),
    Form.DENSE_INT8: (Dense(VALUES, "int8"), VALUES),
    Form.DENSE_INT4: (Dense(NIBBLES, "int4"), NIBBLES),
    Form.FACTORED_FLOAT32: (Factored(COLUMN, ROW), COLUMN @ ROW),
    Form.FACTORED_FLOAT16: (Factored(COLUMN, ROW, "float16"), COLUMN @ ROW),
    Form.FACTORED_INT8: (Factored(INTEGER_COLUMN, INTEGER_ROW, "int8"), INTEGER_COLUMN @ INTEGER_ROW),
    Form.FACTORED_INT4: (Factored(LEFT, RIGHT, "int4"), LEFT @ RIGHT),
    Form.SPARSE_FLOAT16: (
        Sparse(ints(4, -8, 1) / 4, flags("001001000001")),
        ints([0, 0, 4, 0], [0, -8, 0, 0], [0, 0, 0, 1]) / 4,
    ),
    # Correction 8 is none, and 0 twice as much; spread 3 says that the integers' variance is about 1.
    Form.CODED_DENSE: (
        CodedDense(ints(1, 0, 0, -2, 0, 0, 3, 0, -1, 0, 0, 0), 8, 3),
        ints([1, 0, 0, -2], [0, 0, 3, 0], [-1, 0, 0, 0]) * STEP,
    ),
    # Code 8 halves.
    Form.CODED_FACTORED: (
        CodedFactored(ints([1], [0], [-2]), ints([3, 0, -1, 1]), np.array([8], np.uint8)),
        ints([3, 0, -1, 1], [0, 0, 0, 0], [-6, 0, 2, -2]) / 2 * STEP,
    ),
    Form.CODED_DENSE_ROWS: (
        CodedDense(ints(1, 0, -2, 3), 0, 4, flags("010")),
        ints([0, 0, 0, 0], [1, 0, -2, 3], [0, 0, 0, 0]) * 2 * STEP,
    ),
    Form.CODED_FACTORED_ROWS: (
        CodedFactored(ints([1], [-2]), ints([3, 0, -1, 1]), np.array([16], np.uint8), flags("101")),
        ints([3, 0, -1, 1], [0, 0, 0, 0], [-6, 0, 2, -2]) / 4 * STEP,
    ),
}


def named(form: Form) -> str:
    return f"form_{form.name.lower()}.hex"


def test_every_form_has_its_golden_bytes() -> None:
    assert set(FORMS) == set(Form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_read_from_its_golden_bytes(form: Form) -> None:
    payload = golden(named(form))
    assert payload[13] == form
    found = to_arrays(SPEC, unpack(payload, SPEC, TRANSFORM))["w"]
    assert (found.dtype, found.shape) == (np.float32, (3, 4))
    assert np.array_equal(found, FORMS[form][1])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_written_as_its_golden_bytes(form: Form) -> None:
    assert pack(SPEC, Parts({"w": FORMS[form][0]}, STEP), TRANSFORM).hex() == golden(named(form)).hex()


# One payload with coded, dense and empty parts together


MODEL: Spec = (
    TensorSpec("table", (4, 3)),
    TensorSpec("conv", (2, 3, 1, 2)),
    TensorSpec("bias", (3,)),
    TensorSpec("unused", (5, 5)),
    TensorSpec("bn.running_mean", (2,), "buffer"),
)
MODEL_PARTS: dict[str, Part] = {
    "table": CodedDense(ints(1, -1, 0), 8, 3, flags("0010")),
    "conv": CodedFactored(ints([1], [-2]), ints([3, 0, -1, 1, 0, 2]), np.array([8], np.uint8)),
    "bias": CodedDense(ints(0, 5, -1), 8, 4),
    "unused": Zero(),
    "bn.running_mean": Dense(np.array([0.0, 0.0625])),
}
MODEL_ARRAYS: dict[str, Array] = {
    "table": ints([0, 0, 0], [0, 0, 0], [1, -1, 0], [0, 0, 0]) * STEP,
    "conv": ints([[[3, 0]], [[-1, 1]], [[0, 2]]], [[[-6, 0]], [[2, -2]], [[0, -4]]]) / 2 * STEP,
    "bias": ints(0, 5, -1) * STEP,
    "unused": np.zeros((5, 5)),
    "bn.running_mean": np.array([0.0, 0.0625]),
}


def test_a_coded_payload_is_read_from_its_golden_bytes() -> None:
    found = to_arrays(MODEL, unpack(golden("coded.hex"), MODEL, TRANSFORM))
    assert list(found) == list(MODEL_ARRAYS)
    for name, value in MODEL_ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, value.shape)
        assert np.array_equal(found[name], value)


def test_a_coded_payload_is_written_as_its_golden_bytes() -> None:
    assert pack(MODEL, Parts(MODEL_PARTS, STEP), TRANSFORM).hex() == golden("coded.hex").hex()


def test_sparse_and_coded_tensors_do_not_share_a_payload() -> None:
    spec: Spec = (TensorSpec("one", (12,)), TensorSpec("two", (12,)))
    parts = Parts({"one": Sparse(ints(1), flags("001000000000")), "two": CodedDense(ints(*range(12)), 8, 6)}, STEP)
    with pytest.raises(ValueError, match="sparse or coded tensors, not both"):
        pack(spec, parts, TRANSFORM)


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 'w' has shape \(3, 4\), got values of \(4, 3\)"):
        pack(SPEC, Parts({"w": Dense(np.ones((4, 3)))}), TRANSFORM)
