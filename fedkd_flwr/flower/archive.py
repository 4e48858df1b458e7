"""Facts and arrays in one file that is replaced whole and refused when damaged.

The file is safetensors: arrays in its body, the facts as JSON in its header with a checksum over both. No pickle.
"""

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.disk import make_durable

_SAFETENSORS_PARTIAL = ".tmp*"  # where the library itself writes first
_FORMAT, _FACTS, _CHECKSUM = "format", "facts", "crc32"


class ArchiveError(Exception):
    """A file that can't be written, or is not what was written."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file holds.

    Attributes:
        facts: anything JSON can hold.
        arrays: by name.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


def write_archive(path: Path, kind: str, archive: Archive) -> None:
    """Replace a file by this archive; after a crash at any moment the old one or the new one is there, whole.

    One process at a time writes into a folder; what an earlier one left unfinished there is cleared away.

    Args:
        path: the file.
        kind: format and version; `read_archive` asks for the same.
        archive: what to write.

    Raises:
        ArchiveError: if the disk refuses.
    """
    facts = json.dumps(archive.facts)
    arrays = {name: _as_stored(value) for name, value in archive.arrays.items()}
    header = {_FORMAT: kind, _FACTS: facts, _CHECKSUM: str(_checksum(facts, arrays))}
    partial = path.with_name(f"{path.name}.partial")
    try:
        for unfinished in (*path.parent.glob(_SAFETENSORS_PARTIAL), partial):
            unfinished.unlink(missing_ok=True)
        save_file(arrays, partial, metadata=header)
        make_durable(partial)
        os.replace(partial, path)
        make_durable(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"{path.name} can't be written: {reason_without_place(error, path)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_archive(path: Path, kind: str) -> Archive:
    """Read what `write_archive` wrote.

    Raises:
        OSError: if it can't be opened; `FileNotFoundError` where there is none.
        ArchiveError: if it is damaged or of another format.
    """
    path.open("rb").close()  # safetensors says "not found" of whatever it can't open
    try:
        with safe_open(path, framework="np") as file:
            header = _header(file.metadata(), kind)
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
            facts = header[_FACTS]
        if int(header[_CHECKSUM]) != _checksum(facts, arrays):
            raise ArchiveError(f"{path.name} is damaged: its checksum differs")
        return Archive(json.loads(facts), arrays)
    except FileNotFoundError as error:  # it was there a moment ago
        raise OSError(f"{path.name} can't be opened") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path.name} is damaged: {reason_without_place(error, path)}") from error


def read_facts(path: Path, kind: str) -> dict[str, Any]:
    """The facts alone, without reading arrays or comparing the checksum. Raises as `read_archive` does."""
    path.open("rb").close()
    try:
        with safe_open(path, framework="np") as file:
            facts: dict[str, Any] = json.loads(_header(file.metadata(), kind)[_FACTS])
            return facts
    except FileNotFoundError as error:  # it was there a moment ago
        raise OSError(f"{path.name} can't be opened") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path.name} is damaged: {reason_without_place(error, path)}") from error


def reason_without_place(error: Exception, path: Path) -> str:
    """What went wrong with a file, not where it lies: a node's reasons are read by the server."""
    text = error.strerror if isinstance(error, OSError) else None
    return (text or str(error)).replace(f"{path.parent}/", "")


def _header(header: Mapping[str, str] | None, kind: str) -> Mapping[str, str]:
    found = (header or {}).get(_FORMAT)
    if header is None or found != kind:
        raise ArchiveError(f"format must be {kind!r}, got {found!r}")
    return header


def _as_stored(value: Array) -> Array:
    """Contiguous and little-endian; ascontiguousarray alone gives a scalar an axis."""
    return np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(value.shape)


def _checksum(facts: str, arrays: Mapping[str, Array]) -> int:
    checksum = zlib.crc32(facts.encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        checksum = zlib.crc32(f"{name}:{value.dtype.str}:{arrays[name].shape}".encode(), checksum)
        checksum = zlib.crc32(value.data.cast("B") if value.size else b"", checksum)
    return checksum
