"""Every shared array in full, as one byte string: for a client that can't be brought up to date by payloads.

Little-endian: magic "FKS", format version u8, 8 bytes of a digest over names, shapes and dtypes, 8 bytes of a digest
over the values, then the values in name order. Both ends know the template, so nothing in it is trusted but numbers;
and a damaged one is refused, because whoever took it would differ from all others without knowing.
"""

import hashlib

import numpy as np

from fedkd_flwr.core.arrays import Array, Arrays

_MAGIC = b"FKS\x02"
_DIGEST_BYTES = 8
_VALUES_DIGEST = len(_MAGIC) + _DIGEST_BYTES
_HEADER_BYTES = _VALUES_DIGEST + _DIGEST_BYTES


class SnapshotError(ValueError):
    """Bytes that are not a snapshot of the expected arrays."""


def snapshot_bytes(template: Arrays) -> int:
    """Length of a snapshot of arrays like these."""
    return _HEADER_BYTES + sum(value.nbytes for value in template.values())


def pack_snapshot(arrays: Arrays) -> bytes:
    """Write all arrays."""
    values = b"".join(_little_endian(arrays[name]).tobytes() for name in sorted(arrays))
    return _MAGIC + _template_digest(arrays) + _digest(values) + values


def unpack_snapshot(data: bytes, template: Arrays) -> dict[str, Array]:
    """Read what `pack_snapshot` wrote for arrays with the template's names, shapes and dtypes.

    Raises:
        SnapshotError: for anything else, a number that is not finite included.
    """
    if not data.startswith(_MAGIC) or data[len(_MAGIC) : _VALUES_DIGEST] != _template_digest(template):
        raise SnapshotError("snapshot is of another model; both ends need the same experiment")
    if len(data) != snapshot_bytes(template):
        raise SnapshotError(f"snapshot must have {snapshot_bytes(template)} bytes, got {len(data)}")
    if data[_VALUES_DIGEST:_HEADER_BYTES] != _digest(data[_HEADER_BYTES:]):
        raise SnapshotError("snapshot is damaged: the digest of its values differs")
    arrays: dict[str, Array] = {}
    offset = _HEADER_BYTES
    for name in sorted(template):
        like = _little_endian(template[name])
        values = np.frombuffer(data, like.dtype, like.size, offset).astype(template[name].dtype)
        if not np.isfinite(values).all():
            raise SnapshotError(f"snapshot: {name!r} holds numbers that are not finite")
        arrays[name] = values.reshape(template[name].shape)
        offset += like.nbytes
    return arrays


def _little_endian(value: Array) -> Array:
    """The values in memory order; a scalar gets one axis, so shapes are the template's to say."""
    return np.ascontiguousarray(value, value.dtype.newbyteorder("<"))


def _template_digest(template: Arrays) -> bytes:
    lines = [f"{name}:{template[name].shape}:{template[name].dtype.newbyteorder('<').str}" for name in sorted(template)]
    return _digest("\n".join(lines).encode())


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]
