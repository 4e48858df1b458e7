"""What a text model can read, found by letting it read: no list of families, no names of their modules.

Models are asked when they are built, in a state of the random numbers of their own, so that nothing that is drawn later
depends on it. Whole models read a few word pieces; how many positions there are shows in the first layer alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.layers import layer_stack
from fedkd_flwr.tasks.source import reason_of

Read = Callable[[nn.Module, Batch], Tensor]  # a model's outputs of a batch

EXAMPLE_LENGTH = 6  # word pieces of a made-up text
# Word pieces that are tried although a model says that it has room for more: attention takes their square.
_MOST = 4096
_NEAR = 8  # positions that a family may keep for padding and the like
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


class MadeUpTexts:
    """Batches of any length, with a tokenizer's special tokens where it puts them.

    Args:
        tokenizer: whose padding token the models have.
        names: of the inputs that it makes.
    """

    def __init__(self, tokenizer: Any, names: list[str]) -> None:
        made = tokenizer("a", return_special_tokens_mask=True, return_attention_mask=True)
        special = made["special_tokens_mask"]
        # Where nothing but special tokens is made of a letter, the first of them is repeated.
        self._place = special.index(0) if 0 in special else 0
        self._after = special[::-1].index(0) if 0 in special else max(len(special) - 1, 0)
        self._rows = {name: list(made[name]) or [0] for name in names}
        self._pad = int(tokenizer.pad_token_id)
        self.end = self._rows["input_ids"][-1]  # what a text ends in, a special token or not
        self.shortest = max(len(special) - special.count(0) + 1, 1)  # a text of one word piece

    def batch(self, *lengths: int) -> Batch:
        """A text of each of these lengths, [texts, word pieces], padded to the longest."""
        longest = max(lengths)
        padding = {"input_ids": self._pad}
        return {
            name: torch.tensor(
                [self._row(row, length) + [padding.get(name, 0)] * (longest - length) for length in lengths]
            )
            for name, row in self._rows.items()
        }

    def _row(self, row: list[int], length: int) -> list[int]:
        end = len(row) - self._after
        inner = [row[self._place]] * max(length - self._place - self._after, 0)
        return [*row[: self._place], *inner, *row[end:]][:length]


def require_readable(key: str, model: nn.Module, read: Read, texts: MadeUpTexts, max_length: int) -> None:
    """Check that a model reads texts of up to `max_length` word pieces, whatever its family.

    Args:
        key: of the model in the experiment.
        model: as it was built; neither it nor the random numbers are changed.
        read: runs it.
        texts: of the tokenizer.
        max_length: the most word pieces of a text.

    Raises:
        ValueError: if it can't read them, gives outputs that are not finite, or has fewer positions.
    """
    few = min(EXAMPLE_LENGTH, max_length)
    with _undisturbed(model):
        try:
            read(model.eval(), texts.batch(min(texts.shortest, few)))
            out = read(model, texts.batch(few, (few + 1) // 2))
            read(_training(model), texts.batch(few, (few + 1) // 2))
        except Exception as error:  # of whatever the library's code meets
            raise ValueError(
                f"{key}: a {type(model).__name__} can't read this task's texts ({reason_of(error)}); "
                "change its config, or choose a model that takes word pieces alone"
            ) from error
        if not out.isfinite().all():
            raise ValueError(
                f"{key}: the outputs of this {type(model).__name__} are not finite even for a short text; "
                "its weights or its config are damaged, take another"
            )
        model.eval()
        most = _longest(model, read, texts, few, _tried(model, max_length))
    if most is not None:
        raise ValueError(f"task.max_length: must be at most {most}, the positions that {key} has, got {max_length}")


def _tried(model: nn.Module, max_length: int) -> int:
    config = model.config
    assert not isinstance(config, Tensor | nn.Module)
    with suppress(ValueError):
        config = config.get_text_config()
    said = [size for name in _POSITIONS if isinstance(size := getattr(config, name, None), int)]
    return max_length if said and min(said) < max_length + _NEAR else min(max_length, _MOST)


def _longest(model: nn.Module, read: Read, texts: MadeUpTexts, few: int, length: int) -> int | None:
    """The most word pieces that a model reads, where that is less than `length`."""
    if _reads(model, read, texts, length):
        return None
    fits, fails = few, length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _reads(model, read, texts, middle) else (fits, middle)
    return fits


class _FirstLayerDoneError(Exception):
    """The rest of the model is not needed."""


def _reads(model: nn.Module, read: Read, texts: MadeUpTexts, length: int) -> bool:
    def stop(*_: Any) -> None:
        raise _FirstLayerDoneError

    stack = layer_stack(model)
    hook = stack[0].register_forward_hook(stop) if stack is not None else None
    try:
        read(model, texts.batch(length))
    except _FirstLayerDoneError:
        return True
    except Exception as error:
        return "memory" in str(error)  # too long for this machine, not for the model
    finally:
        if hook is not None:
            hook.remove()
    return True


def _training(model: nn.Module) -> nn.Module:
    """The model in training mode, but for what would change by that alone."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    was_training, state = model.training, np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        np.random.set_state(state)
        model.train(was_training)
