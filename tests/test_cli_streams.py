"""The command line where its output can't take every letter, or nothing at all."""

import io
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.test_cli import fedkd


class Ascii(io.TextIOWrapper):
    """Standard output as PYTHONIOENCODING=ascii makes it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined, no-any-return]


def ascii_out(monkeypatch: pytest.MonkeyPatch) -> Ascii:
    """Called in the test itself, because pytest puts its own stream back between a fixture and a test."""
    stream = Ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_check_escapes_a_letter_that_standard_output_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = ascii_out(monkeypatch)
    conf = tmp_path / "café.yaml"
    conf.write_text(SMALL)
    assert fedkd("check", str(conf), "--output-dir", str(tmp_path / "é")) == 0
    assert "caf\\xe9.yaml: valid; about" in printed.text()
    assert "\\xe9/small/partition.png" in printed.text()


def test_a_path_that_is_no_text_is_shown_by_its_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = ascii_out(monkeypatch)
    directory = tmp_path / os.fsdecode(b"keys\xe9")
    assert fedkd("deploy", "certificates", str(directory), "--host", "localhost") == 0
    assert printed.text() == f"certificates: {tmp_path}/keys\\udce9\n"


def test_an_error_about_such_a_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("run", str(tmp_path / os.fsdecode(b"\xe9\n\x1b[31m.yaml"))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\\udce9" in said
    assert "\x1b" not in said


def test_a_path_that_flowers_configuration_can_not_hold_is_refused_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "small.yaml"
    conf.write_text(SMALL)
    assert fedkd("run", str(conf), "--output-dir", str(tmp_path / os.fsdecode(b"\xe9"))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fedkd: output_dir: must be a path that UTF-8 can write, got ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, encoding="utf-8", write_through=True))
        assert fedkd("deploy", "certificates", str(tmp_path / "keys"), "--host", "localhost") == 1
        said = capsys.readouterr().err
        monkeypatch.undo()
    assert said.count("\n") == 1
    assert "can't be written: No space left on device" in said


def test_a_flower_home_that_can_not_be_written_is_named_with_its_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/dev/null/home")
    (tmp_path / "ca.crt").write_text("a certificate")
    assert fedkd("deploy", "connection", "a", "127.0.0.1:1", str(tmp_path / "ca.crt")) == 2
    said = capsys.readouterr().err
    assert "/dev/null/home/config.toml' can't be written: Not a directory; set FLWR_HOME to a directory" in said
