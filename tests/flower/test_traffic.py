"""The ledger's bytes against an independent count of every message."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import InflatableObject

import client_app
from fedkd_flwr.flower.local_grid import LocalGrid, task_identity
from fedkd_flwr.flower.server import serve
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.flower.traffic import ENVELOPE_BYTES
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.measure.summary import summarise
from tests.conftest import small


def unique_objects(item: InflatableObject) -> dict[str, int]:
    sizes = {item.object_id: len(item.deflate())}
    for child in (item.children or {}).values():
        sizes |= unique_objects(child)
    return sizes


class CountingGrid(LocalGrid):
    """Counts the content of every message that passes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.content_bytes = {"downlink": 0, "uplink": 0}
        self.num_messages = {"downlink": 0, "uplink": 0}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        for message in kept:
            self._count(message, "downlink")
        return super().push_messages(kept)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message in super().pull_messages(message_ids):
            self._count(message, "uplink")
            yield message

    def _count(self, message: Message, direction: str) -> None:
        self.num_messages[direction] += 1
        self.content_bytes[direction] += sum(unique_objects(message.content).values())


def test_ledger_bytes_equal_an_independent_count_of_every_message(tmp_path: Path) -> None:
    experiment = small()
    run_config = {"config-text": experiment.to_yaml(), "state-dir": str(tmp_path / "state")}
    with task_identity():
        grid = CountingGrid(client_app.app, [{"partition-id": i} for i in range(3)], run_config)
        serve(grid, ServerSettings(experiment, tmp_path / "run"))
    counted = summarise(read_rows(tmp_path / "run" / LEDGER_FILE))["bytes"]
    for direction in ("downlink", "uplink"):
        envelopes = grid.num_messages[direction] * ENVELOPE_BYTES[direction]
        assert counted[direction] == grid.content_bytes[direction] + envelopes
    assert grid.num_messages["downlink"] == 3 * (1 + 3 + 1)  # hello, three rounds, final evaluation
