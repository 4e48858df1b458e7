"""What an error reply is turned into."""

import time

import pytest
from flwr.app import Error, Message, RecordDict

from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.replies import content_of, reason_of

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nfedkd_flwr.experiment.ConfigError: no data\n'


def failed(reason: str) -> Message:
    with task_identity():
        return Message(Error(2, reason), reply_to=Message(RecordDict(), 1, "train"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (TRACEBACK, "ConfigError: no data"),
        ("<class 'fedkd_flwr.experiment.ConfigError'>:<'no data'>", "ConfigError: no data"),
        ("<class 'KeyError'>:<''train''>", "KeyError: 'train'"),
        ("<class 'RuntimeError'>:<'one line\n  and another'>", "RuntimeError: one line and another"),
        ("<class 'a.StateError'>:<''>", "StateError:"),
        ("the node is away", "the node is away"),
        ("", "Flower error 2"),
    ],
)
def test_a_client_error_reads_alike_from_a_simulation_and_from_a_supernode(reason: str, said: str) -> None:
    with pytest.raises(MessageError) as caught:
        content_of(failed(reason))
    assert str(caught.value) == said
    assert caught.value.kind == "error"


HOSTILE = ("x" * 19_000_000, "a\n" * 1_000_000, "a." * 1_000_000 + "b", "\x1b[2J\u202e\u200b" * 100_000, "\ud800")


@pytest.mark.parametrize("text", HOSTILE, ids=("long", "many lines", "many dots", "escapes", "half a pair"))
@pytest.mark.parametrize(
    "form", ["{}", "Traceback:\nValueError: {}", "<class 'KeyError'>:<'{}'>", "<class '{}'>:<'x'>"]
)
def test_a_reason_is_one_short_printable_line_in_no_time(text: str, form: str) -> None:
    message = failed(form.format(text))
    began = time.process_time()
    with pytest.raises(MessageError) as caught:
        content_of(message)
    assert time.process_time() - began < 10
    for said in (str(caught.value), reason_of(RuntimeError(text)), str(MessageError(text))):
        assert 0 < len(said) <= 500
        assert said.isprintable()
