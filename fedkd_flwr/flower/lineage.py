"""Lineage: which updates a version has absorbed, as one digest."""

import hashlib

from fedkd_flwr.core.arrays import Arrays, digest


def initial_lineage(shared: Arrays) -> bytes:
    """Lineage of version 0: the digest of every shared array, 32 bytes."""
    return digest(shared)


def next_lineage(lineage: bytes, payload: bytes) -> bytes:
    """Lineage after one more payload. Two holders of the same lineage applied the same bytes in the same order."""
    return hashlib.sha256(lineage + payload).digest()
