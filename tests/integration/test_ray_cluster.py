"""Simulation on a Ray cluster: many clients on two nodes learn what they learn in one process."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import client_app
from fedkd_flwr.experiment import ConfigError, Experiment, parse
from fedkd_flwr.flower import cluster
from fedkd_flwr.flower.cluster import ADDRESS_VARIABLE, check_shared, cluster_address, joined_cluster, reason_against
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.launcher import launch
from fedkd_flwr.flower.processes import LOOPBACK, Children, free_ports
from tests.conftest import ROOT, SMALL

HUNDRED = ("num_clients=100", "num_rounds=2", "name=hundred", "compressor.name=transform_coding")
STUDENT = "student/model.safetensors"


def hundred() -> Experiment:
    return parse(SMALL, HUNDRED)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a cluster of two Ray nodes of one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    [port] = free_ports(1)
    address = f"{LOOPBACK}:{port}"
    node = ("--node-ip-address", LOOPBACK, "--num-cpus", "1", "--block", "--disable-usage-stats")
    # Ray's sockets lie there, and the name of a socket may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name, Children() as children:
        home = Path(name)
        head = (
            "ray",
            "start",
            "--head",
            "--port",
            str(port),
            "--include-dashboard",
            "false",
            "--temp-dir",
            name,
            *node,
        )
        children.wait_for_port(children.start("Ray", head, home, home / "head.log"), port)
        children.start("Ray node", ("ray", "start", "--address", address, *node), home, home / "node.log")
        deadline = time.monotonic() + 60
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        while (found := joined_cluster(home / "shared")) is None or found.num_nodes < 2:
            assert time.monotonic() < deadline, (home / "node.log").read_text()
            children.require_running()
        yield address


@pytest.mark.slow
def test_a_hundred_clients_on_two_nodes_learn_the_student_of_one_process(two_nodes: str, tmp_path: Path) -> None:
    found = joined_cluster(tmp_path / "on_cluster" / "hundred")
    assert found is not None
    assert (found.address, found.num_nodes, found.num_cpus) == (two_nodes, 2, 2.0)
    on_cluster = launch(hundred(), ROOT, tmp_path / "on_cluster" / "hundred" / "run")
    here = run_in_process(hundred(), client_app.app, tmp_path / "here" / "hundred" / "run")
    assert (on_cluster / STUDENT).read_bytes() == (here / STUDENT).read_bytes()
    assert [path.name for path in on_cluster.parent.iterdir()] == ["run"]  # neither marker nor Flower's home is left


def test_without_an_address_a_simulation_starts_a_ray_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in ("", " ", "local"):
        monkeypatch.setenv(ADDRESS_VARIABLE, value)
        assert cluster_address() == ""
        assert joined_cluster(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_a_cluster_that_is_not_there_is_one_clear_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [port] = free_ports(1)
    monkeypatch.setenv(ADDRESS_VARIABLE, f"{LOOPBACK}:{port}")
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: no Ray cluster .* '{LOOPBACK}:{port}' .*unset RAY_ADDRESS"):
        joined_cluster(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_node_that_does_not_find_the_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(address: str, marker: Path, token: str) -> tuple[dict[str, str], float]:
        assert reason_against(str(marker), token) == ""
        elsewhere = str(tmp_path / "elsewhere" / marker.name)
        return {"here": reason_against(str(marker), token), "box2": reason_against(elsewhere, token)}, 2.0

    monkeypatch.setenv(ADDRESS_VARIABLE, "head:6379")
    monkeypatch.setattr(cluster, "_asked", asked)
    with pytest.raises(ConfigError, match=r"box2 does not \(No such file or directory\); give a shared one"):
        joined_cluster(tmp_path / "results")
    assert os.listdir(tmp_path / "results") == []


def test_a_directory_of_the_same_name_with_other_files_is_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("another")
    assert reason_against(str(tmp_path / "marker"), "token") == "it finds another file there"
    with pytest.raises(ConfigError, match="box does not"):
        check_shared({"box": "it finds another file there"}, tmp_path)
