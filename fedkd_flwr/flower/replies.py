"""What a reply message holds, or why it holds nothing.

Every word of a client's that gets into a log, the ledger or a checkpoint comes through here, or through `MessageError`,
and leaves as one printable line of bounded length.
"""

import re

from flwr.app import Error, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message

from fedkd_flwr.core.printable import printable
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.errors import MessageError

# How a SuperNode writes what its app raised; a simulation sends the whole traceback.
_RAISED = re.compile(r"<class '(?P<name>[^']+)'>:<'(?P<text>.*)'>", re.DOTALL)
_MOST_CHARACTERS = 100_000  # of an error that are looked at: its end, where a traceback has its reason
_MALFORMED_CODE = 1100  # none of Flower's


def content_of(message: Message) -> RecordDict:
    """The message's records.

    Raises:
        MessageError: if it holds an error instead: the last line of what the client raised, or Flower's own reason.
    """
    if message.has_content():
        return message.content
    reason = message.error.reason or ""
    if message.error.code == _MALFORMED_CODE:
        raise MessageError(reason)
    if raised := _RAISED.fullmatch(reason):
        reason = f"{raised['name']}: {' '.join(raised['text'].split())}"
    else:
        reason = reason[-_MOST_CHARACTERS:]
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    # A traceback ends with the error's full name; its module says nothing to whoever reads the ledger.
    said = re.sub(r"^(\w+\.)+(?=\w+:)", "", lines[-1]) if lines else f"Flower error {message.error.code}"
    raise MessageError(said, kind="error")


def reason_of(error: Exception) -> str:
    """An error in one line, its type named where the text alone would not say enough."""
    return printable(str(error) if isinstance(error, ValueError | ConfigError) else f"{type(error).__name__}: {error}")


def unreadable(message_id: str, reason: str) -> Message:
    """What stands for a reply that can't be read.

    Args:
        message_id: of the message that it answers.
        reason: why.

    Returns:
        A message without content; `content_of` raises its reason.
    """
    metadata = Metadata(0, "", 0, 0, message_id, "", 0.0, 0.0, MessageType.TRAIN)
    return make_message(metadata, error=Error(_MALFORMED_CODE, printable(reason)))
