"""What others wrote, as one line that no terminal takes for a command."""

import random
import sys
import unicodedata

import pytest

from fedkd_flwr.core.printable import MOST_CHARACTERS, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("disk on fire", "disk on fire"),
        ("Bücher, 数据, क्षेत्र", "Bücher, 数据, क्षेत्र"),
        ("one\n  and\tanother\u2028line\x0b", "one and another line"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("a\ufe0f\u3164\U000e0101", "a\\ufe0f\\u3164\\U000e0101"),
        ("half a pair \ud800", "half a pair \\ud800"),
        ("", ""),
    ],
)
def test_what_can_not_be_seen_is_written_as_its_escape(text: str, line: str) -> None:
    assert printable(text) == line


def test_a_long_text_is_cut_and_says_so() -> None:
    assert len(printable("x" * 19_000_000)) == MOST_CHARACTERS
    assert printable("x" * 501).endswith("x ...")
    assert printable("x" * 500) == "x" * 500
    assert printable("\n" * 5000 + "after") == " ..."
    assert len(printable("\u202e" * 400)) <= MOST_CHARACTERS


def test_every_character_there_is_gives_one_printable_line() -> None:
    for code in range(0, sys.maxunicode + 1, 7):
        line = printable(f"a{chr(code)}b")
        assert line.isprintable()
        assert unicodedata.bidirectional(line[1]) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    rng = random.Random(0)
    for _ in range(300):
        line = printable("".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(rng.randrange(900))))
        assert len(line) <= MOST_CHARACTERS
        assert line.isprintable()
        line.encode()  # no half of a pair is left
