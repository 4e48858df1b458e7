"""Randomness is an argument, derived from names."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, in order: `derive_seed(seed, "batches", round, client_key)`.

    A hash rather than a sum, so that neighbouring rounds and clients get unrelated streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
