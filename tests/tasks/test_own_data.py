"""Nodes that bring data of their own: it takes the place of what the experiment would have divided among them."""

import json
import re
from pathlib import Path
from traceback import format_exception
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value
from flwr.app import Context, RecordDict

import client_app
from fedkd_flwr import cli
from fedkd_flwr.core.protocols import Task, score_of
from fedkd_flwr.experiment import ConfigError, Experiment, parse
from fedkd_flwr.flower.client import client_of
from fedkd_flwr.flower.guard import unplaced
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import read_rows
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.tasks.base import TaskOptions
from fedkd_flwr.tasks.digits import DigitsOptions
from tests.conftest import ROOT
from tests.tasks import image_data, news_data, test_text_classification, test_token_classification
from tests.tasks.conftest import everything, images, write_splits, write_table
from tests.tasks.test_images import damaged_inside

pytestmark = pytest.mark.usefixtures("offline")

KINDS, NAMES = test_text_classification.KINDS, test_token_classification.NAMES
TEXTS, TAGGED = test_text_classification.ROWS, test_token_classification.TRAIN
OWN = {"name": "own"}
CLIENTS = 2


def text_options(data: Path | str, bert: Path, **changes: Any) -> TaskOptions:
    return test_text_classification.options(str(data), bert, **{"label_names": KINDS, **changes})


def at(options: TaskOptions, path: Path | str) -> Task:
    return options.at_node(Path(path)).build(CLIENTS, 0)


def texts(rows: slice) -> dict[str, list[Any]]:
    return {name: list(values[rows]) for name, values in TEXTS.items()}


def same_tensors(a: Task, b: Task) -> bool:
    """Whether two places build the same student."""
    of_a, of_b = (task.build_models(3).student.state_dict() for task in (a, b))
    return of_a.keys() == of_b.keys() and all(torch.equal(of_a[name], of_b[name]) for name in of_a)


@pytest.fixture
def server_data(tmp_path: Path) -> str:
    return write_splits(tmp_path / "server", TEXTS, test_text_classification.TEST)


def test_a_node_learns_from_all_its_rows_and_scores_on_its_own_test_split(
    server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    site = write_splits(tmp_path / "site", texts(slice(0, 9)), texts(slice(9, 14)))
    options = text_options(server_data, tiny_bert, partition={"name": "dirichlet", "min_examples": 2})
    data = at(options, site).client_data(1)
    assert (len(data.train), len(data.test)) == (9, 5)
    assert data.label_counts == tuple(TEXTS["label"][:9].count(kind) for kind in range(len(KINDS)))


@pytest.mark.parametrize("file", ["train.parquet", "train.csv", "train.json", "rows.csv"])
def test_without_a_test_split_a_node_holds_some_rows_out(
    file: str, server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    write_table(tmp_path / "site" / file, texts(slice(0, 20)))
    path = tmp_path / "site" / (file if file.startswith("rows") else "")
    data = at(text_options(server_data, tiny_bert), path).client_data(0)
    assert (len(data.train), len(data.test)) == (16, 4)
    both = [row.tolist() for side in (data.train, data.test) for row in everything(side)["input_ids"]]
    assert len({tuple(piece for piece in row if piece) for row in both}) == 20


def test_documents_are_held_out_whole_where_the_experiment_deals_them_out_whole(
    server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = texts(slice(0, 20)) | {"doc": [f"d{row // 4}" for row in range(20)]}
    write_table(tmp_path / "site" / "train.parquet", rows)
    partition = {"name": "natural", "column": "doc", "grouped": True}
    data = at(text_options(server_data, tiny_bert, partition=partition), tmp_path / "site").client_data(0)
    held_out = {tuple(p for p in row.tolist() if p) for row in everything(data.test)["input_ids"]}
    write_table(tmp_path / "one" / "train.parquet", {name: values[:4] for name, values in rows.items()})
    documents = []
    for first in range(0, 20, 4):
        folder = tmp_path / f"document{first}"
        part = {name: values[first : first + 4] for name, values in rows.items()}
        write_splits(folder, part, part)
        of_one = everything(at(text_options(server_data, tiny_bert), folder).client_data(0).test)["input_ids"]
        documents.append({tuple(p for p in row.tolist() if p) for row in of_one})
    assert held_out in documents


def test_the_student_is_the_servers_whatever_a_node_has(server_data: str, tiny_bert: Path, tmp_path: Path) -> None:
    site = write_splits(tmp_path / "site", texts(slice(0, 4)), texts(slice(4, 8)))  # some of the classes only
    options = text_options(server_data, tiny_bert)
    assert same_tensors(options.build(CLIENTS, 0), at(options, site))


def test_a_server_whose_clients_bring_their_data_needs_a_test_split_alone(tiny_bert: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "server" / "test.parquet", texts(slice(0, 12)))
    options = text_options(tmp_path / "server", tiny_bert, partition=OWN)
    task = options.build(CLIENTS, 0)
    assert len(task.test_data()) == 12
    assert score_of(task, task.build_models(0).student, task.test_data())["accuracy"] >= 0
    assert task.data_report().notes == ()
    with pytest.raises(ValueError, match=r"task\.partition: own leaves the data to the nodes, and there is none here"):
        task.client_data(0)
    site = write_splits(tmp_path / "site", texts(slice(0, 9)), texts(slice(9, 14)))
    assert same_tensors(task, at(options, site))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (["yes", "no"] * 4, r"'label' has 'yes' in row 0 .* one of good, bad, drug"),
        ([0, 1, 2, 3] * 2, r"'label' has 3 in row 3 .* must be 0 to 2"),
        ("named", r"'label' has the class 'yes'; task.label_names has good, bad, drug"),
    ],
)
def test_a_node_whose_labels_are_others_is_refused_with_the_reason(
    label: Any, reason: str, server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    rows, features = texts(slice(0, 8)) | {"label": label}, None
    if label == "named":
        rows["label"] = [0, 1] * 4
        features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "yes"])})
    site = write_splits(tmp_path / "site", rows, rows, features=features)
    with pytest.raises(ValueError, match=reason):
        at(text_options(server_data, tiny_bert), site)


def test_names_of_classes_decide_not_their_numbers(server_data: str, tiny_bert: Path, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["drug", "good"])})
    rows = {"text": TEXTS["text"][:6], "label": [0, 0, 0, 0, 1, 1]}
    site = write_splits(tmp_path / "site", rows, rows, features=features)
    assert at(text_options(server_data, tiny_bert), site).client_data(0).label_counts == (2, 0, 4)


def test_what_must_be_alike_on_all_nodes_is_not_left_to_their_data(
    server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="label_names is required where nodes bring their own data"):
        text_options(server_data, tiny_bert, label_names=None).at_node(Path(server_data))
    with pytest.raises(ValueError, match="label_names is required where nodes bring their own data"):
        text_options(server_data, tiny_bert, label_names=None, partition=OWN)
    stored = image_data.write_both(tmp_path / "images")
    with pytest.raises(ValueError, match="image_size is required where nodes bring their own data"):
        image_data.options(stored, label_names=("red", "green", "blue")).at_node(stored)


def test_a_task_that_ships_its_data_takes_none() -> None:
    with pytest.raises(ValueError, match=r"task\.name: digits has its own data; leave data-path out"):
        DigitsOptions.model_validate({}).at_node(Path())


def test_images_of_a_node(tmp_path: Path) -> None:
    server, site = image_data.write_both(tmp_path / "server"), tmp_path / "site"
    image_data.write(site, "train", image_data.rows(10, first=900))
    chosen = {"label_names": ("red", "green", "blue"), "image_size": image_data.SIDE}
    options = image_data.options(server, **chosen)
    task = at(options, site)
    data = task.client_data(0)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert not images(data.train) & images(options.build(CLIENTS, 0).client_data(0).train)
    assert same_tensors(options.build(CLIENTS, 0), task)
    only_test = image_data.options(server, partition=OWN, **chosen).build(CLIENTS, 0)
    assert len(only_test.test_data()) == image_data.NUM_TEST
    assert same_tensors(only_test, task)


def test_tagged_sentences_of_a_node(tiny_bert: Path, tmp_path: Path) -> None:
    server = write_splits(tmp_path / "server", TAGGED, test_token_classification.TEST)
    write_table(tmp_path / "site" / "train.parquet", {name: rows[:10] for name, rows in TAGGED.items()})
    chosen = {"data": server, "teacher": {"source": str(tiny_bert)}, "max_length": 32, "label_names": NAMES}
    options = test_token_classification.TokenClassificationOptions.model_validate(chosen)
    data = at(options, tmp_path / "site").client_data(0)
    assert (len(data.train), len(data.test)) == (8, 2)
    wrong = {name: list(rows[:10]) for name, rows in TAGGED.items()}
    wrong["ner_tags"] = [["B-Gene", *tags[1:]] for tags in wrong["ner_tags"]]
    write_table(tmp_path / "other" / "train.parquet", wrong)
    with pytest.raises(ValueError, match=r"has 'B-Gene' in row 0 .* none of O, B-Chemical"):
        at(options, tmp_path / "other")


@pytest.mark.parametrize("has_test", [True, False])
def test_impressions_of_a_node(has_test: bool, tmp_path: Path) -> None:
    build = news_data.builder(tmp_path / "tokenizer")
    news, train, test = news_data.split(news_data.planted())
    server = news_data.write_lists(tmp_path / "server", news, train, test)
    site = news_data.write_lists(tmp_path / "site", news, train[:10], test[:4])
    if not has_test:
        (site / "test.parquet").unlink()
    task = at(build(server)._options, site)
    data = task.client_data(0)
    assert (len(data.train), len(data.test)) == ((10, 4) if has_test else (8, 2))
    (server / "train.parquet").unlink()
    only_test = build(server, partition=OWN)
    assert len(only_test.test_data()) == len(test)
    assert same_tensors(only_test, task)


EXPERIMENT = """
name: sites
num_clients: 4
num_rounds: 2
task:
  name: image_classification
  data: {source: SERVER}
  label_names: [red, green, blue]
  image_size: 8
  channels: 1
  partition: {name: own}
  teacher: {num_channels: [2], kernel_size: 3, hidden_size: 4}
  student: {num_channels: [2], kernel_size: 3, hidden_size: 4}
algorithm: {name: fedkd, hidden: false, attention: false, local: {num_epochs: 1}}
server: {min_available: 2, connect_timeout_seconds: 2, validation: {max_examples_ratio: 10}}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    image_data.write(tmp_path / "server", "test", image_data.rows(12, first=500))
    return parse(EXPERIMENT.replace("SERVER", str(tmp_path / "server")))


def test_a_site_that_can_not_be_used_is_refused_and_the_others_train(experiment: Experiment, tmp_path: Path) -> None:
    for site, num_rows in enumerate((20, 30)):
        image_data.write(tmp_path / f"site{site}", "train", image_data.rows(num_rows, first=100 * site))
    other = image_data.rows(20, first=300) | {"label": ["red", "green", "violet", "blue"] * 5}
    image_data.write(tmp_path / "other", "train", other, named=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    sites = ("site0", "site1", "other", "broken")
    nodes = [{"data-path": str(tmp_path / site), "name": site} for site in sites]
    run_dir = run_in_process(experiment, client_app.app, tmp_path / "run", nodes=nodes)
    summary = read_summary(run_dir)
    assert summary is not None and summary["status"] == "completed"
    rows = list(read_rows(run_dir / "ledger.jsonl"))
    trained = {row["node"] for row in rows if row["kind"] == "message" and row["purpose"] == "train"}
    assert trained == {"site0", "site1"}
    refused = [row["event"] for row in rows if row["kind"] == "event"]
    assert any("'label' has 'violet' in row 2" in event for event in refused)
    assert all(re.match(r"not taken in \(node \d+\): ConfigError: data-path: ", event) for event in refused)
    # What a client says of itself never names where its data is.
    said = json.dumps([row for row in rows if row["kind"] != "start"])
    assert all(str(tmp_path / site) not in said for site in sites)


@pytest.mark.parametrize("algorithm", ["fd", "mixfld", "mix2fld"])
def test_sites_that_lack_a_label_take_part_in_what_is_said_of_labels(
    algorithm: str, experiment: Experiment, tmp_path: Path
) -> None:
    for site, labels in enumerate((["red", "green"], ["red", "green", "blue"])):
        rows = image_data.rows(30, first=100 * site) | {"label": [labels[n % len(labels)] for n in range(30)]}
        image_data.write(tmp_path / f"site{site}", "train", rows, named=False)
    nodes = [{"data-path": str(tmp_path / f"site{site}"), "name": f"site{site}"} for site in (0, 1)]
    changed = [f"algorithm={{name: {algorithm}, local: {{num_epochs: 1}}}}", "num_clients=2"]
    run_dir = run_in_process(parse(experiment.to_yaml(), changed), client_app.app, tmp_path / "run", nodes=nodes)
    rounds = [row for row in read_rows(run_dir / "ledger.jsonl") if row["kind"] == "round" and row["round"] > 0]
    assert [row["clients"] for row in rounds] == [["site0", "site1"]] * 2


def test_an_experiment_whose_data_is_on_the_nodes_can_be_checked(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "sites.yaml"
    conf.write_text(experiment.to_yaml())
    cli.check(conf, output_dir=tmp_path / "out")
    assert "valid; its data is on the nodes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"num_clients"):
        cli.check(conf, ["num_clients=0"], tmp_path / "out")


@pytest.mark.parametrize("spoilt", ["file", "pixels"])
def test_no_word_that_a_node_sends_of_an_error_names_its_path(
    spoilt: str, experiment: Experiment, tmp_path: Path
) -> None:
    """Flower sends the whole traceback. Pixels are looked at when the client's data is, long after the table."""
    (site := tmp_path / "site").mkdir()
    rows = image_data.rows(10)
    if spoilt == "pixels":
        rows["image"][0] = {"bytes": damaged_inside(), "path": f"{site}/0.png"}
        image_data.write(site, "train", rows)
    else:
        (site / "train.parquet").write_bytes(b"no parquet")
    node = {"data-path": str(site), "state-dir": str(tmp_path / "state")}
    context = Context(1, 1, node, RecordDict(), {"config-text": experiment.to_yaml()})
    with pytest.raises(ConfigError, match=r"^data-path: ") as caught, unplaced(context):
        client_of(context, ROOT)
    assert str(site) not in "".join(format_exception(caught.value))


def test_all_rows_of_a_node_are_its_own_even_where_it_has_a_partition_number(
    server_data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    """The number decides which of several teachers it has."""
    site = write_splits(tmp_path / "site", texts(slice(0, 9)), texts(slice(9, 14)))
    other = {"clients": [1], "model": {"source": str(tiny_bert)}}
    task = at(text_options(server_data, tiny_bert, other_teachers=[other]), site)
    assert [task.client_data(client).teacher for client in range(CLIENTS)] == [0, 1]
    assert all(np.array_equal(len(task.client_data(client).train), 9) for client in range(CLIENTS))
