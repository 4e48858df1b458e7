"""Updates that the tests of this folder send, and how to read one tensor's part back."""

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkd_flwr.core.arrays import Array, Spec, TensorSpec

Update = dict[str, Array]

# One tensor of each kind that a published code got wrong, and a bias of length 3 among them.
SPEC: Spec = (
    TensorSpec("conv.weight", (8, 4, 3, 3)),
    TensorSpec("pointwise.weight", (16, 8, 1, 1)),
    TensorSpec("bn.weight", (8,)),
    TensorSpec("linear.weight", (12, 20)),
    TensorSpec("linear.bias", (3,)),
    TensorSpec("row", (1, 9)),
    TensorSpec("column", (9, 1)),
    TensorSpec("tokens", (1, 5, 6)),
    TensorSpec("scale", ()),
    TensorSpec("unused", (10, 10)),
    TensorSpec("bn.running_mean", (8,), "buffer"),
    TensorSpec("table", (6, 6), "buffer"),
)


def low_rank(rng: np.random.Generator, shape: tuple[int, ...], rank: int = 1) -> NDArray[np.float32]:
    """Values whose matrix has about this rank, where axes of size 1 don't count; any values for a vector."""
    rows, *others = [axis for axis in shape if axis != 1] or [1]
    cols = int(np.prod(others, dtype=np.int64))
    values = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))
    return (values + 0.01 * rng.standard_normal((rows, cols))).astype(np.float32).reshape(shape)


def sample_update(spec: Spec = SPEC, seed: int = 0) -> Update:
    """Nearly of rank 1, with noise; `unused` is zero."""
    rng = np.random.default_rng(seed)
    return {t.name: np.zeros(t.shape, np.float32) if t.name == "unused" else low_rank(rng, t.shape) for t in spec}


@st.composite
def specs_with_updates(draw: st.DrawFn) -> tuple[Spec, Update]:
    """Up to four tensors of 0 to 5 axes: zero, constant, of low rank or Gaussian, small or large."""
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=5).map(tuple), max_size=4))
    kinds = [draw(st.sampled_from(["parameter", "buffer"])) for _ in shapes]
    spec = tuple(TensorSpec(f"t{i}", s, k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True)))  # type: ignore[arg-type]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    update: Update = {}
    for tensor in spec:
        values = {
            "zero": np.zeros(tensor.shape, np.float32),
            "constant": np.full(tensor.shape, 0.125, np.float32),
            "low rank": low_rank(rng, tensor.shape, rank=2),
            "gaussian": rng.standard_normal(tensor.shape, np.float32),
        }[draw(st.sampled_from(["zero", "constant", "low rank", "gaussian"]))]
        update[tensor.name] = np.asarray(values * np.float32(draw(st.sampled_from([1e-12, 1.0, 1e6]))))
    return spec, update


def same_bits(one: Mapping[str, Array], two: Mapping[str, Array]) -> bool:
    """Whether names, types, shapes and bytes agree."""
    return one.keys() == two.keys() and all(
        (one[n].dtype, one[n].shape, one[n].tobytes()) == (two[n].dtype, two[n].shape, two[n].tobytes()) for n in one
    )
