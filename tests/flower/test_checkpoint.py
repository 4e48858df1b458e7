"""The newest checkpoint that can be read, or the one before."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedkd_flwr.flower.archive import Archive, write_archive
from fedkd_flwr.flower.checkpoint import CHECKPOINTS_DIR, Checkpoint, Checkpoints, Choice
from fedkd_flwr.flower.errors import RunError
from tests.flower.test_archive import full_disk
from tests.flower.test_archive import same as same_archive


def checkpoint(server_round: int, num_elements: int = 3) -> Checkpoint:
    parts = {
        "reference": Archive({"lineages": ["00", "ff"]}, {"shared/w": np.full(num_elements, server_round, np.float32)}),
        "aggregator": Archive({}, {"first moment/w": np.array(0.5), "second moment/w": np.zeros((0, 2))}),
        "roster": Archive({"seats": [{"client_key": "a", "version": None}]}),
        "rounds": Archive({"num_good": 3, "first_failure": ""}),
    }
    return Checkpoint(server_round, "0123", parts, {"round": server_round, "metrics": {"loss": None}})


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(os.listdir(checkpoints.directory))


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    return (
        a is not None
        and (a.server_round, a.training_id, a.row) == (b.server_round, b.training_id, b.row)
        and a.parts.keys() == b.parts.keys()
        and all(same_archive(a.parts[part], b.parts[part]) for part in b.parts)
    )


def damage(checkpoints: Checkpoints, server_round: int) -> None:
    path = checkpoints.directory / f"round-{server_round:07d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, keep=2)


def test_what_is_saved_is_found_again_by_another_process(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(checkpoint(0))
    assert same(checkpoints.latest(), checkpoint(0))
    assert same(Checkpoints(tmp_path, keep=1).latest(), checkpoint(0))


def test_without_checkpoints_there_is_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    checkpoints.directory.mkdir()
    assert checkpoints.latest() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for server_round in (0, 8, 9, 10, 11):
        checkpoints.save(checkpoint(server_round))
    assert names(checkpoints) == [f"round-{number:07d}.safetensors" for number in (9, 10, 11)[-keep:]]
    assert same(checkpoints.latest(), checkpoint(11))


def test_a_round_that_is_saved_again_replaces_the_first(checkpoints: Checkpoints) -> None:
    for num_elements in (3, 5):
        checkpoints.save(checkpoint(4, num_elements))
    assert same(checkpoints.latest(), checkpoint(4, 5))
    assert len(names(checkpoints)) == 1


def test_of_a_damaged_newest_one_the_one_before_is_taken_and_the_run_goes_on_over_it(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    for server_round in (1, 2):
        checkpoints.save(checkpoint(server_round))
    damage(checkpoints, 2)
    assert same(checkpoints.latest(), checkpoint(1))
    assert "round-0000002.safetensors is damaged" in caplog.text
    for server_round in (2, 3):
        checkpoints.save(checkpoint(server_round))
        assert same(checkpoints.latest(), checkpoint(server_round))


def test_a_file_cut_short_or_of_another_format_is_passed_over(checkpoints: Checkpoints) -> None:
    for server_round in (1, 2):
        checkpoints.save(checkpoint(server_round))
    (checkpoints.directory / "round-0000002.safetensors").write_bytes(b"")
    assert same(checkpoints.latest(), checkpoint(1))


def test_all_damaged_is_an_error_that_names_the_directory(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for server_round in (1, 2):
        checkpoints.save(checkpoint(server_round))
        damage(checkpoints, server_round)
    with pytest.raises(RunError) as caught:
        checkpoints.latest()
    said = str(caught.value)
    assert said.startswith(
        f"no checkpoint in {str(tmp_path / CHECKPOINTS_DIR)!r} can be read: round-0000002.safetensors"
    )
    assert "server.keep_checkpoints" in said


def test_of_one_without_a_part_the_one_before_is_taken(checkpoints: Checkpoints) -> None:
    for server_round in (1, 2):
        checkpoints.save(checkpoint(server_round))
    lacking = {name: part for name, part in checkpoint(3).parts.items() if name != "roster"}
    checkpoints.save(Checkpoint(3, "0123", lacking, {}))
    assert same(checkpoints.latest(["reference", "roster"]), checkpoint(2))
    with pytest.raises(RunError, match=r"round-0000003\.safetensors lacks its part 'sampler'"):
        checkpoints.latest(["sampler"])


def test_what_a_killed_process_left_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(checkpoint(1))
    (checkpoints.directory / "round-0000002.safetensors.77.partial").write_bytes(b"half")
    assert same(checkpoints.latest(), checkpoint(1))


def test_whom_a_round_asks_is_on_the_disk_with_its_name_before_anyone_is_asked(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync, target = os.fsync, checkpoints.directory / "chosen.json"

    def recorded(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", recorded)
    checkpoints.save_choice(Choice(1, ("a",), ()))
    assert synced[-1] == (str(checkpoints.directory), True)  # after the rename
    assert (str(checkpoints.directory.parent), False) in synced  # the folder itself, which is new
    assert any("chosen" in name and not there for name, there in synced)


@pytest.mark.parametrize("stage", ["os.fsync", "os.replace"])
def test_a_choice_that_can_not_be_written_leaves_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    checkpoints.save_choice(Choice(1, ("a",), ()))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, full)
    with pytest.raises(RunError, match=r"the choice of round 2 can't be written: .*No space left"):
        checkpoints.save_choice(Choice(2, ("b",), ()))
    assert checkpoints.choice() == Choice(1, ("a",), ())


def test_a_full_disk_is_an_error_and_older_ones_are_intact(checkpoints: Checkpoints) -> None:
    for server_round in (1, 2):
        checkpoints.save(checkpoint(server_round))
    before = names(checkpoints)
    with full_disk(), pytest.raises(RunError, match="checkpoint of round 3 can't be written"):
        checkpoints.save(checkpoint(3, num_elements=100_000))
    assert names(checkpoints) == before
    assert same(checkpoints.latest(), checkpoint(2))


@pytest.mark.parametrize("run_dir", ["/proc", "/dev/null"])
def test_a_directory_that_cannot_be_made_is_an_error(run_dir: str) -> None:
    with pytest.raises(RunError, match="checkpoint of round 1 can't be written"):
        Checkpoints(Path(run_dir), keep=1).save(checkpoint(1))


def test_what_clients_have_written_is_as_long_as_it_likes(checkpoints: Checkpoints) -> None:
    plain = checkpoint(1)
    reasons = [{"client": f"c{number}", "kind": "error", "reason": "x" * 20_000_000} for number in range(4)]
    reasons.append({"client": "last", "kind": "error", "reason": "x" * 25_000_000})
    rounds = Archive({"num_good": 0, "first_failure": "y" * 20_000_000})
    given = replace(plain, parts=dict(plain.parts) | {"rounds": rounds}, row={"round": 1, "rejected": reasons})
    checkpoints.save(given)
    assert same(checkpoints.latest(), given)


def test_a_checkpoint_of_the_format_before_is_read(checkpoints: Checkpoints) -> None:
    given = checkpoint(3)
    arrays = {f"{part}/{name}": value for part, of in given.parts.items() for name, value in of.arrays.items()}
    facts = {
        "server_round": 3,
        "training_id": given.training_id,
        "parts": {part: archive.facts for part, archive in given.parts.items()},
        "row": given.row,
    }
    checkpoints.directory.mkdir()
    write_archive(checkpoints.directory / "round-0000003.safetensors", "fedkd checkpoint 1", Archive(facts, arrays))
    assert same(checkpoints.latest(), given)
