"""How a payload lies in a message: as one array, or where it is small as bytes of a configuration.

Flower moves large arrays in pieces, and frames each array with about 600 bytes; 800 with what its protocol says of it.
Bytes in a configuration cost 18, or 200 in one of their own, and travel with it in one piece.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedkd_flwr.flower.errors import MessageError

MOST_INLINE_BYTES = 4096
_ARRAYS, _CONFIG, _SMALL, _PAYLOAD = "arrays", "config", "small", "payload"
_NPY_HEADER_BYTES = 128  # an array travels as numpy.save writes it


def carry(content: RecordDict, payload: bytes) -> None:
    """Put a payload into a message's records."""
    if len(payload) > MOST_INLINE_BYTES:
        content[_ARRAYS] = ArrayRecord({_PAYLOAD: Array(np.frombuffer(payload, np.uint8))})
    elif config := content.config_records.get(_CONFIG):
        config[_PAYLOAD] = payload
    else:
        content[_SMALL] = ConfigRecord({_PAYLOAD: payload})


def carried(content: RecordDict) -> bytes | None:
    """The payload in a message's records; None where there is none.

    Raises:
        MessageError: if it can't be read.
    """
    record = content.array_records.get(_ARRAYS)
    if (inline := _inline(content)) is not None:
        if not isinstance(inline, bytes) or record is not None:
            raise MessageError("payload must be bytes of a configuration or one array, got something else, or both")
        return inline
    if record is None:
        return None
    if list(record) != [_PAYLOAD]:
        raise MessageError("arrays must hold one array named 'payload'")
    try:
        values = record[_PAYLOAD].numpy()
    except Exception as error:  # Flower's own reader of untrusted bytes raises many kinds
        raise MessageError(f"payload can't be read: {error}") from None
    if not isinstance(values, np.ndarray):  # numpy.load also opens archives
        raise MessageError(f"payload must be one array, got {type(values).__name__}")
    if values.dtype != np.uint8 or values.ndim != 1:
        raise MessageError(f"payload must be one axis of uint8, got {values.dtype} with {values.ndim} axes")
    return values.tobytes()


def carried_bytes(content: RecordDict) -> int:
    """Bytes of the payload in a message, without looking at it."""
    if isinstance(inline := _inline(content), bytes):
        return len(inline)
    record = content.array_records.get(_ARRAYS)
    return sum(max(0, len(array.data) - _NPY_HEADER_BYTES) for array in record.values()) if record else 0


def _inline(content: RecordDict) -> object:
    """What stands for a payload in a configuration."""
    for name in (_CONFIG, _SMALL):
        record = content.config_records.get(name)
        if record is not None and _PAYLOAD in record:
            return record[_PAYLOAD]
    return None
