"""What is printed reaches any stream: ASCII, closed, full; and nothing in it moves the cursor."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd_flwr.console import Terminal, escape_what_streams_lack, one_line, print_line, printable
from tests.conftest import ROOT

TABLE = """
from rich.table import Table
from fedkd_flwr.console import Terminal, escape_what_streams_lack
escape_what_streams_lack()
out = Terminal(width=80)
"""


def ran(code: str, **options: object) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    settings = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT} | options
    return subprocess.run([sys.executable, "-c", TABLE + code], **settings)  # type: ignore[call-overload, no-any-return]


def test_lines_and_tables_are_escaped_where_the_stream_is_ascii() -> None:
    done = ran(
        "out.print('caf\\xe9.yaml: valid \\u2026', highlight=False)\n"
        "table = Table('\\xe9'); table.add_row('\\u4e2d \\udce9'); out.print(table)\n"
        "print('\\u4e2d')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf\\xe9.yaml: valid \\u2026\n")
    assert "\\u4e2d" in done.stdout
    assert "\\udce9" in done.stdout


def test_after_the_reader_has_gone_the_work_goes_on_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = ran(
        "for _ in range(20): out.print('x' * 10_000, highlight=False, soft_wrap=True)\n"
        "import sys; print('done', file=sys.stderr)",
        capture_output=False,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "done\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 中", "plain é 中"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07\t", "a\\rb\\x07\\t"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("caf\udce9", "caf\\udce9"),
        ("a\xa0b", "a\\xa0b"),
    ],
)
def test_what_is_not_printable_is_shown_by_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    stream = io.StringIO()
    Terminal(file=stream).print(text, highlight=False, markup=False, soft_wrap=True)
    assert stream.getvalue() == f"{shown}\n"


def test_an_error_is_one_line_whatever_is_quoted_in_it() -> None:
    assert one_line("got 'a\nb'\u2028c") == "got 'a b' c"


def test_a_line_of_a_log_is_escaped_for_the_stream_it_goes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_line("note: café \udce9")
    assert stream.buffer.getvalue() == b"note: caf\\xe9 \\udce9\n"  # type: ignore[attr-defined]


def test_a_stream_that_is_none_of_pythons_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    escape_what_streams_lack()


def test_every_line_goes_out_through_one_of_two_doors() -> None:
    """A `print` or a rich console elsewhere would raise again where the stream is ASCII."""
    for path in sorted((ROOT / "fedkd_flwr").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "console.py":
            assert " print(" not in text and "= Console(" not in text and " Console(width" not in text, Path(path).name
