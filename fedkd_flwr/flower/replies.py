"""What a reply message holds, or why it holds nothing."""

import re

from flwr.app import Message, RecordDict

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.errors import MessageError

# How a SuperNode writes what its app raised; a simulation sends the whole traceback.
_RAISED = re.compile(r"<class '(?P<name>[^']+)'>:<'(?P<text>.*)'>", re.DOTALL)


def content_of(message: Message) -> RecordDict:
    """The message's records.

    Raises:
        MessageError: if it holds an error instead: the last line of what the client raised, or Flower's own reason.
    """
    if message.has_content():
        return message.content
    reason = message.error.reason or ""
    if raised := _RAISED.fullmatch(reason):
        reason = f"{raised['name']}: {' '.join(raised['text'].split())}"
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    # A traceback ends with the error's full name; its module says nothing to whoever reads the ledger.
    said = re.sub(r"^(\w+\.)+(?=\w+:)", "", lines[-1]) if lines else f"Flower error {message.error.code}"
    raise MessageError(said, kind="error")


def reason_of(error: Exception) -> str:
    """An error in one line, its type named where the text alone would not say enough."""
    return str(error) if isinstance(error, ValueError | ConfigError) else f"{type(error).__name__}: {error}"
