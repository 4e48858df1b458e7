import numpy as np
import pytest

from fedkd_flwr.algorithms.soft_labels import HEADER_BYTES, SOFT_LABELS, Form, Schedule, SoftLabelCodec, SoftLabelMean

M, C = 37, 10
P = np.random.default_rng(0).dirichlet([0.3] * C, M).astype(np.float32)
FORMS: list[tuple[Form, int, float]] = [
    ("float32", 1, 32 * C),
    ("float16", 1, 16 * C),
    ("int8", 1, 8 * C),
    ("top_k", 1, 4),
    ("top_k", 3, 3 * (4 + 8)),
]


def encode(codec: SoftLabelCodec, rows: np.ndarray = P) -> bytes:
    return codec.encode({SOFT_LABELS: rows}, {}, progress=0.0, seed=0)[0]


def decode(codec: SoftLabelCodec, payload: bytes) -> np.ndarray:
    return codec.decode(payload, {})[0][SOFT_LABELS]


@pytest.mark.parametrize(("form", "k", "bits"), FORMS)
def test_bytes_are_examples_times_bits_and_a_header(form: Form, k: int, bits: float) -> None:
    codec = SoftLabelCodec(M, C, form, k)
    packed_bits = 4 * k * M if form == "top_k" else 0
    rest = bits * M - packed_bits
    assert len(encode(codec)) == codec.payload_bytes == HEADER_BYTES + -(-packed_bits // 8) + rest / 8


@pytest.mark.parametrize(("form", "k", "bits"), FORMS)
def test_what_is_read_are_distributions_with_the_same_likeliest_class(form: Form, k: int, bits: float) -> None:
    found = decode(codec := SoftLabelCodec(M, C, form, k), encode(codec))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert (found[np.arange(M), P.argmax(axis=1)] >= found.max(axis=1) - 1e-3).all()


def test_floats_and_bytes_lose_as_much_as_their_width_says() -> None:
    for form, error in (("float32", 1e-6), ("float16", 1e-3), ("int8", 5e-3)):
        found = decode(codec := SoftLabelCodec(M, C, form), encode(codec))  # type: ignore[arg-type]
        np.testing.assert_allclose(found, P, atol=error)


def test_the_likeliest_class_alone_is_one_hot() -> None:
    found = decode(codec := SoftLabelCodec(M, C, "top_k"), encode(codec))
    np.testing.assert_array_equal(found, np.eye(C)[P.argmax(axis=1)])


def test_even_rows_of_many_classes_do_not_vanish_in_bytes() -> None:
    rows = np.full((2, 1000), 1e-3, np.float32)
    np.testing.assert_allclose(decode(codec := SoftLabelCodec(2, 1000, "int8"), encode(codec, rows)), rows, rtol=1e-5)


@pytest.mark.parametrize(("form", "k", "bits"), FORMS)
def test_bytes_of_another_length_or_kind_are_refused(form: Form, k: int, bits: float) -> None:
    codec = SoftLabelCodec(M, C, form, k)
    payload = encode(codec)
    for wrong in (
        payload[:-1],
        payload + b"\0",
        b"",
        b"XXX" + payload[3:],
        encode(SoftLabelCodec(M, C, "float32"))[::-1],
    ):
        with pytest.raises(ValueError, match="soft labels must"):
            decode(codec, wrong)


@pytest.mark.parametrize("row", [[np.nan, 0.5], [-0.5, 1.5], [0.9, 0.9], [0, 0], [np.inf, 0]])
def test_numbers_that_are_no_probabilities_are_refused(row: list[float]) -> None:
    codec = SoftLabelCodec(1, 2, "float32")
    payload = encode(codec, np.array([[0.5, 0.5]], np.float32))[:HEADER_BYTES] + np.array(row, "<f4").tobytes()
    with pytest.raises(ValueError, match="probabilities"):
        decode(codec, payload)


def test_a_class_beyond_the_last_is_refused() -> None:
    codec = SoftLabelCodec(2, C, "top_k")
    with pytest.raises(ValueError, match="a class must be below 10, got 15"):
        decode(codec, encode(codec, P[:2])[:HEADER_BYTES] + b"\xff")


def test_any_bytes_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    for form, k, _ in FORMS:
        codec = SoftLabelCodec(3, 4, form, k)
        header = encode(codec, P[:3, :4] / P[:3, :4].sum(axis=1, keepdims=True))[:HEADER_BYTES]
        for _ in range(200):
            try:
                found = decode(codec, header + rng.bytes(codec.payload_bytes - HEADER_BYTES))
            except ValueError:
                continue
            assert np.isfinite(found).all()


def test_the_mean_is_that_of_numpy() -> None:
    uploads = np.random.default_rng(1).dirichlet([1.0] * C, (3, M)).astype(np.float32)
    for weighting, weights in (("uniform", [1, 1, 1]), ("num_examples", [5, 1, 2])):
        mean = SoftLabelMean(weighting)  # type: ignore[arg-type]
        mean.begin(1)
        for upload, number in zip(uploads, [5, 1, 2], strict=True):
            mean.add({SOFT_LABELS: upload}, number, None)
        found = mean.result()
        assert found is not None
        np.testing.assert_allclose(found[SOFT_LABELS], np.average(uploads, axis=0, weights=weights), rtol=1e-5)


def test_under_entropy_weights_a_client_without_an_idea_does_not_count() -> None:
    mean = SoftLabelMean("entropy")
    mean.begin(1)
    mean.add({SOFT_LABELS: np.full((1, 4), 0.25, np.float32)}, 100, None)
    mean.add({SOFT_LABELS: np.array([[0.97, 0.01, 0.01, 0.01]], np.float32)}, 1, None)
    found = mean.result()
    assert found is not None
    np.testing.assert_allclose(found[SOFT_LABELS], [[0.97, 0.01, 0.01, 0.01]], atol=1e-4)


def test_no_example_is_asked_again_before_all_were() -> None:
    schedule = Schedule(100, 20, seed=0)
    asked = np.concatenate([schedule.asked(version) for version in range(5)])
    assert sorted(asked.tolist()) == list(range(100))
    np.testing.assert_array_equal(schedule.asked(5), schedule.asked(0))


@pytest.mark.parametrize("num_public", [20, 50, 53])
def test_an_asked_set_has_no_example_twice(num_public: int) -> None:
    schedule = Schedule(num_public, 20, seed=0)
    assert all(len(set(schedule.asked(version).tolist())) == 20 for version in range(12))


def test_what_is_new_is_what_was_asked_since() -> None:
    schedule = Schedule(100, 20, seed=0)
    assert len(schedule.new(3, 3)) == 0
    assert set(schedule.new(1, 3).tolist()) == {*schedule.asked(1).tolist(), *schedule.asked(2).tolist()}
    assert set(schedule.new(0, 3).tolist()) == set(schedule.known(3).tolist())  # who comes late learns all
    assert len(schedule.new(0, 40)) == 100


@pytest.mark.parametrize("num_public", [20, 50, 53, 99])
def test_who_comes_late_learns_all_whatever_the_numbers(num_public: int) -> None:
    schedule = Schedule(num_public, 20, seed=0)
    for version in range(12):
        assert set(schedule.new(0, version).tolist()) == set(schedule.known(version).tolist())


def test_both_ends_draw_the_same_and_another_seed_another() -> None:
    first, again, other = (Schedule(100, 20, seed=seed).asked(0).tolist() for seed in (0, 0, 1))
    assert first == again != other
