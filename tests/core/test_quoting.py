"""Values of strangers in messages: short, in one line, without what a terminal obeys."""

from typing import Any

import pytest

from fedkd_flwr.core.quoting import cut, quoted


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value] * 9
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"\x00" * 10**6, 1 << 4 * 10**6, -(1 << 4 * 10**6), nested(40), {"a": nested(40)}, {nested: 1}],
    ids=["text", "bytes", "integer", "negative", "list", "mapping", "other"],
)
def test_whatever_it_is_it_takes_eighty_characters_at_most(value: object) -> None:
    assert len(quoted(value)) <= 80


@pytest.mark.parametrize(("value", "expected"), [("a", "'a'"), (2, "2"), (None, "None"), (0.5, "0.5"), ([1], "[1]")])
def test_what_is_short_is_written_whole(value: object, expected: str) -> None:
    assert quoted(value) == expected


def test_what_a_terminal_obeys_or_turns_around_is_not_shown() -> None:
    assert cut("a\x1b[31mb\u202ec\x07") == "a?[31mb?c?"
    assert cut("two\n  lines\tof é ü 日本") == "two lines of é ü 日本"
    assert cut("x" * 100, 10) == "xxxxxxx..."
