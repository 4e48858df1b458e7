"""Transform coding of the update: the default.

Every tensor is written in the basis in which it is cheapest: its singular vectors, or as it is, with or without naming
its rows. All coefficients of all tensors are multiples of one step, entropy coded; what is not worth its bytes at that
step is not sent (`allocation.py`). The step follows from the energy to keep, or from the bytes to spend. What is lost
comes back with the next update (error feedback), so a share of energy far below the paper's is enough.

For a factored tensor the basis is quantised first. The other factor is then fitted to the basis as the other end will
see it, so that only what lies outside its span is lost by coarse integers.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from fedkd_flwr.compressors.allocation import Allocation, Allocator, Candidate
from fedkd_flwr.compressors.base import Compressed, CompressorOptions, LossyCodec, LossyOptions, exact
from fedkd_flwr.compressors.coefficients import coded_factors, coded_rows
from fedkd_flwr.compressors.payload import HEADER_BYTES, Dense, Part, Parts, Zero, pack, to_arrays
from fedkd_flwr.core.arrays import FLOAT_BYTES, Arrays, Spec, require_finite, squared_norm
from fedkd_flwr.core.schedules import Schedule, linear
from fedkd_flwr.core.seeds import derive_seed

CODEC_ID = 2
_MAX_TRIES = 8
_AIM = 0.985  # of what is allowed, after a try that went beyond it
_CLOSE = 0.96  # of the bytes: near enough
_FIRST_AIM = 0.96  # of the bytes: a payload takes two to four per cent more than the allocation expects
_PLAIN = (1e-37, 1e36)  # magnitudes of a largest value beyond which steps leave the range of float32


class TransformOptions(CompressorOptions):
    """How much to send: by energy, or by bytes.

    Attributes:
        energy_start: share of the squared norm, over all parameters, that the first payload keeps, in (0, 1).
        energy_end: of the last; in between it is linear in the progress. It falls: first updates point along few
            directions and are cheap to keep; of the last, most is what tells the clients apart, and it can wait in the
            residual.
        bytes_per_round: of one upload and one broadcast together, half of them for each, whatever energy they keep;
            null: as many as the energy takes.
    """

    energy_start: float = Field(0.9, gt=0, lt=1)
    energy_end: float = Field(0.8, gt=0, lt=1)
    bytes_per_round: int | None = Field(None, ge=128)

    def transform(self, spec: Spec) -> "TransformCodec":
        """The codec that these options describe.

        Raises:
            ValueError: if the bytes would not do for a payload that says nothing.
        """
        num_bytes = self.bytes_per_round // 2 if self.bytes_per_round is not None else None
        num_buffered = sum(tensor.size for tensor in spec if tensor.kind == "buffer")
        least = HEADER_BYTES + len(spec) + FLOAT_BYTES * num_buffered
        if num_bytes is not None and num_bytes < least:
            raise ValueError(
                f"compressor.bytes_per_round must be at least {2 * least} for these tensors, got {self.bytes_per_round}"
            )
        return TransformCodec(spec, linear(self.energy_start, self.energy_end), num_bytes)


class TransformCodingOptions(LossyOptions, TransformOptions):
    """Transform coding, with error feedback."""

    name: Literal["transform_coding"] = "transform_coding"

    def objection_to_noise(self) -> str:
        """An energy to keep, without a limit of bytes: noise is spread over all directions."""
        objection = super().objection_to_noise()
        if not objection and self.bytes_per_round is None:
            objection = "bytes_per_round must be set, because energy does not tell noise from signal; got null"
        return objection

    def build(self, spec: Spec) -> "TransformCodec":
        """The codec of payloads with the tensors of `spec`."""
        return self.transform(spec)


class TransformCodec(LossyCodec):
    """See the module's text.

    Args:
        spec: the tensors.
        energy: share to keep, by progress.
        num_bytes: to spend on one payload, where the energy does not decide.
    """

    codec_id = CODEC_ID

    def __init__(self, spec: Spec, energy: Schedule, num_bytes: int | None = None) -> None:
        super().__init__(spec)
        self._energy = energy
        self._num_bytes = num_bytes

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """Code the update at the energy of `progress`, or at the bytes that are allowed.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        coding = _Coding(self.spec, update, seed)
        if not _PLAIN[0] <= coding.allocator.largest <= _PLAIN[1]:
            return self.packed(self.raw(update) if self._num_bytes is None else coding.nothing)
        if self._num_bytes is None:
            found = self._at_energy(coding, self._energy(progress))
        else:
            found = self._at_bytes(coding, self._num_bytes)
        return found if len(found.payload) <= self.most_bytes else self.packed(self.raw(update))

    def _at_energy(self, coding: "_Coding", energy: float) -> Compressed:
        """The first parts that keep the energy: the aim is corrected by what the last try lost."""
        most_error = (1.0 - energy) * coding.allocator.total
        aim = most_error
        for attempt in range(_MAX_TRIES):
            parts = coding.parts(coding.allocator.for_error(aim))
            decoded = to_arrays(self.spec, parts)
            error = coding.error(decoded)
            if error <= most_error:
                return Compressed(pack(self.spec, parts, self.codec_id), decoded)
            # From the third try on it is at least halved: the error of few or odd numbers may hardly follow the aim.
            aim *= min(_AIM * most_error / error, 0.5 ** (attempt - 1))
        return self.packed(self.raw(coding.update))

    def _at_bytes(self, coding: "_Coding", num_bytes: int) -> Compressed:
        """The longest payload within the bytes: the aim is corrected by what the last try took."""
        best = coding.nothing
        payload = pack(self.spec, best, self.codec_id)
        fixed = len(payload)  # header, table and buffers
        room = num_bytes - fixed
        aim, fits, too_much = _FIRST_AIM * room, 0.0, np.inf
        for _ in range(_MAX_TRIES):
            parts = coding.parts(coding.allocator.for_bytes(aim))
            tried = pack(self.spec, parts, self.codec_id)
            used = len(tried) - fixed
            if used <= room:
                fits = aim
                if used + fixed == len(payload) and best is not coding.nothing:
                    break  # there is nothing more to say
                if used + fixed > len(payload):
                    best, payload = parts, tried
                if used >= _CLOSE * room:
                    break
            else:
                too_much = aim
            aim *= _AIM * room / max(used, 1)
            if not fits < aim < too_much:
                aim = float(np.sqrt(max(fits, 1.0) * too_much)) if np.isfinite(too_much) else 2 * fits
        return Compressed(payload, to_arrays(self.spec, best))


class _Coding:
    """One update on its way into parts.

    Attributes:
        update: what is coded.
        allocator: of its tensors.
        nothing: the parts that say nothing of any parameter.
    """

    def __init__(self, spec: Spec, update: Arrays, seed: int) -> None:
        self.update = update
        moved = [t for t in spec if t.kind == "parameter" and update[t.name].any()]
        self._candidates = [Candidate(t, update[t.name], derive_seed(seed, t.name)) for t in moved]
        self.allocator = Allocator(self._candidates)
        names = {tensor.name for tensor in moved}
        # Buffers, and zeros.
        self.nothing = Parts({t.name: Zero() if t.name in names else exact(t, update[t.name]) for t in spec})

    def parts(self, allocation: Allocation) -> Parts:
        """What the allocation asks for."""
        step = float(np.float32(allocation.step))
        parts = dict(self.nothing.by_name)
        for candidate, rank, rows in zip(self._candidates, allocation.ranks, allocation.rows, strict=True):
            part: Part | None = Zero()
            if rows.any():
                part = coded_rows(candidate, rows, step)
            elif rank:
                part = coded_factors(candidate, int(rank), step)
            name = candidate.tensor.name
            parts[name] = Dense(self.update[name]) if part is None else part
        return Parts(parts, step)

    def error(self, decoded: Arrays) -> float:
        """Total squared error of the parameters."""
        names = [candidate.tensor.name for candidate in self._candidates]
        return sum(squared_norm(self.update[name] - decoded[name]) for name in names)
