"""Payloads of messages, taken out and put back."""

from collections.abc import Callable
from zlib import crc32

from flwr.app import ArrayRecord, RecordDict

from fedkd_flwr.flower.carriage import carried, carry


def remove_payload(content: RecordDict) -> bytes:
    """Take the payload out of a message, however it lies there."""
    payload = carried(content)
    content.pop("arrays", None)
    content.pop("small", None)
    if config := content.config_records.get("config"):
        config.pop("payload", None)
    return payload or b""


def change_payload(content: RecordDict, change: Callable[[bytes], bytes], *, checksum: bool = True) -> None:
    """Put another payload in its place, with a checksum that fits unless told otherwise."""
    data = change(remove_payload(content))
    carry(content, data)
    if checksum:
        content["metrics"]["checksum"] = crc32(data)  # type: ignore[index]


def put_array(content: RecordDict, record: ArrayRecord) -> None:
    """Put an array record in the payload's place."""
    remove_payload(content)
    content["arrays"] = record
