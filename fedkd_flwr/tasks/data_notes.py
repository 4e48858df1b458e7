"""What is worth knowing of a table before it is learned from: repeated rows, classes that a split lacks, a majority."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedkd_flwr.tasks.class_names import shown
from fedkd_flwr.tasks.labels import Labels
from fedkd_flwr.tasks.partition import Rows

if TYPE_CHECKING:
    from datasets import Dataset

MAJORITY = 0.8  # share of one class from which accuracy says little
_NAMED_CLASSES = 5  # in a note about more
_ROWS_AT_ONCE = 256  # images are as large as they like


def class_notes(labels: Labels, rows: tuple[Rows, Rows], splits: tuple[str, str], remedy: str) -> tuple[str, ...]:
    """Classes that nobody can learn, or whose score nobody can know, and a class that nearly all rows have.

    Args:
        labels: of a table.
        rows: of the training split and of the test split, those that can be used.
        splits: what they are called, such as "train[:80%]".
        remedy: the options to look at where one class has nearly all rows.
    """
    train, test = (
        np.bincount(of_split[mine], minlength=len(labels.names))
        for of_split, mine in zip((labels.train, labels.test), rows, strict=True)
    )
    found = lacking_notes(labels.names, train, test, splits, "class")
    largest = int(train.argmax())
    if (share := train[largest] / max(int(train.sum()), 1)) > MAJORITY and len(labels.names) > 1:
        found += (
            f"{share:.0%} of the training labels are {shown(labels.names[largest])}: a model that always says so is "
            f"right as often; see {remedy}",
        )
    return found


def lacking_notes(
    names: Sequence[str], train: Rows, test: Rows, splits: tuple[str, str], kind: Literal["class", "type"]
) -> tuple[str, ...]:
    """Classes, or types of entities, that a split has no examples of, one line for each way to lack them.

    Args:
        names: of the classes.
        train: examples of each in the training split, [classes].
        test: the same of the test split.
        splits: what they are called.
        kind: what names are of.
    """
    called = np.array(names, dtype=object)
    slices = [split for split in splits if "[" in split]
    sliced = f"; {slices[0]!r} is a slice: shuffle rows that are sorted by class first" if slices else ""
    return (
        *_lacking(called[(train == 0) & (test > 0)], kind, f"no training examples, but some in {splits[1]!r}{sliced}"),
        *_lacking(called[(train == 0) & (test == 0)], kind, f"no training examples{sliced}"),
        *_lacking(called[(train > 0) & (test == 0)], kind, f"no examples in split {splits[1]!r} to score on{sliced}"),
    )


def _lacking(names: Sequence[str], kind: str, what: str) -> tuple[str, ...]:
    """Classes that lack something, in one line; empty where there is none."""
    if not len(names):
        return ()
    more = f" and {len(names) - _NAMED_CLASSES} more" if len(names) > _NAMED_CLASSES else ""
    named = ", ".join(map(shown, names[:_NAMED_CLASSES]))
    several = "classes" if kind == "class" else "types"
    return (f"{kind} {named} has {what}" if len(names) == 1 else f"{several} {named}{more} have {what}",)


def repeated_notes(train: Rows, test: Rows, splits: tuple[str, str]) -> tuple[str, ...]:
    """Rows that a split has twice, and rows of the test split that are to learn from, too.

    Args:
        train: a number for what each usable row of the training split holds, equal where rows are alike.
        test: the same of the test split.
        splits: what they are called.
    """
    notes = []
    for rows, split in zip((train, test), splits, strict=True):
        if again := len(rows) - len(np.unique(rows)):
            notes.append(f"split {split!r}: {again} of {len(rows)} rows ({again / len(rows):.1%}) repeat another one")
    if known := int(np.isin(test, train).sum()):
        notes.append(
            f"split {splits[1]!r}: {known} of {len(test)} rows ({known / len(test):.1%}) are in split {splits[0]!r} "
            "too, so scores count examples that models were trained on"
        )
    return tuple(notes)


def digests(rows: Iterable[Any]) -> Rows:
    """A number for each row, the same for equal ones within this process: [rows]."""
    return np.fromiter(map(hash, rows), np.int64)


def image_digests(encoded: "Dataset", column: str, located: Callable[[Any], Any]) -> Rows:
    """A number for each image, the same for images of the same bytes: [rows].

    Args:
        encoded: the images as they are stored.
        column: holds them.
        located: makes the path of an image that is a file one that can be opened from here.
    """
    found: list[int] = []
    for rows in encoded.iter(_ROWS_AT_ONCE):
        found.extend(_image_digest(located(value)) for value in rows[column])
    return np.array(found, np.int64)


def _image_digest(value: Any) -> int:
    content = None if value is None else value["bytes"]
    if content is None and (value is None or value["path"] is None):
        return 0
    if content is None:
        try:
            content = Path(value["path"]).read_bytes()
        except (OSError, ValueError):  # such a row is not used
            content = str(value["path"]).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)
