"""How a payload lies in a message: as one array, or where it is small as bytes of a configuration.

Flower moves large arrays in pieces, and frames each array with about 600 bytes; 800 with what its protocol says of it.
Bytes in a configuration cost 18, or 200 in one of their own, and travel with it in one piece.
"""

import re

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedkd_flwr.core.quoting import cut
from fedkd_flwr.flower.errors import MessageError

MOST_INLINE_BYTES = 4096
_ARRAYS, _CONFIG, _SMALL, _PAYLOAD = "arrays", "config", "small", "payload"
_NPY_HEADER_BYTES = 128  # an array travels as numpy.save writes it
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '\|u1', 'fortran_order': (?:True|False), "
    rb"'shape': \((?P<size>[0-9]{1,18}),\), \} *\n"
)


def carry(content: RecordDict, payload: bytes) -> None:
    """Put a payload into a message's records."""
    if len(payload) > MOST_INLINE_BYTES:
        content[_ARRAYS] = ArrayRecord({_PAYLOAD: Array(np.frombuffer(payload, np.uint8))})
    elif config := content.config_records.get(_CONFIG):
        config[_PAYLOAD] = payload
    else:
        content[_SMALL] = ConfigRecord({_PAYLOAD: payload})


def carried(content: RecordDict, most_bytes: int | None = None) -> bytes | None:
    """The payload in a message's records; None where there is none.

    Args:
        content: the records.
        most_bytes: of the payload. A longer one is refused before anything of its size is allocated. None: any length.

    Raises:
        MessageError: if it is longer, or can't be read.
    """
    record = content.array_records.get(_ARRAYS)
    if (inline := _inline(content)) is not None:
        if not isinstance(inline, bytes) or record is not None:
            raise MessageError("payload must be bytes of a configuration or one array, got something else, or both")
        _require_length(len(inline), most_bytes)
        return inline
    if record is None:
        return None
    if list(record) != [_PAYLOAD]:
        raise MessageError("arrays must hold one array named 'payload'")
    return _read_npy(record[_PAYLOAD], most_bytes)


def carried_bytes(content: RecordDict) -> int:
    """Bytes of the payload in a message, without looking at it."""
    if isinstance(inline := _inline(content), bytes):
        return len(inline)
    record = content.array_records.get(_ARRAYS)
    return sum(max(0, len(array.data) - _NPY_HEADER_BYTES) for array in record.values()) if record else 0


def _read_npy(array: Array, most_bytes: int | None) -> bytes:
    """The bytes of one axis of uint8 as numpy.save writes it.

    Not read by numpy.load, which allocates what a header claims before it looks for it, and opens archives.
    """
    header = _NPY_HEADER.match(array.data[:_NPY_HEADER_BYTES])
    if header is None:
        raise MessageError(
            f"payload must be one array of uint8 with one axis, as numpy writes it, got {cut(array.dtype)} with "
            f"{len(array.shape)} axes"
        )
    _require_length(len(array.data) - _NPY_HEADER_BYTES, most_bytes)
    payload = array.data[_NPY_HEADER_BYTES:]
    if (claimed := int(header["size"])) != len(payload):
        raise MessageError(f"payload must have the {claimed} bytes that it claims, got {len(payload)}")
    return payload


def _require_length(found: int, most_bytes: int | None) -> None:
    if most_bytes is not None and found > most_bytes:
        raise MessageError(f"payload must have at most {most_bytes} bytes, got {found}", kind="payload")


def _inline(content: RecordDict) -> object:
    """What stands for a payload in a configuration."""
    for name in (_CONFIG, _SMALL):
        record = content.config_records.get(name)
        if record is not None and _PAYLOAD in record:
            return record[_PAYLOAD]
    return None
