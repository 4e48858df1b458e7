"""Tags of words: their names in order, and those of other schemes as IOB2.

In IOB2 B- begins an entity and I- goes on with it. IOBES and BILOU mark its end and single words besides, IOB1 begins
an entity with B- only after another of its type.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd_flwr.tasks.class_names import listed, shown
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.scores import entity_spans
from fedkd_flwr.tasks.source import column_values
from fedkd_flwr.tasks.stored_names import Names

if TYPE_CHECKING:
    from datasets import Dataset

OUTSIDE = "O"

_KEY = "task.data.columns.tags"
_SCHEMES = {"IOBES": {"E": "I", "S": "B"}, "BILOU": {"L": "I", "U": "B"}, "BMEWO": {"M": "I", "E": "I", "W": "B"}}
_TO_IOB2 = {prefix: other for scheme in _SCHEMES.values() for prefix, other in scheme.items()}

Tags = list[Any] | None


def in_iob2(tag: Any) -> Any:
    """One tag of any scheme but IOB1; what is none stays, and is refused later."""
    if not isinstance(tag, str) or tag[1:2] != "-" or len(tag) < 3:
        return tag
    return _TO_IOB2.get(tag[0], tag[0]) + tag[1:]


def names_in_iob2(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tags as IOB2, in order.

    Raises:
        ValueError: if one is there twice.
    """
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"task.label_names: names {twice[0]!r} twice; give each tag once")
    return tuple(dict.fromkeys(in_iob2(name) for name in names))


def rows_in_iob2(rows: Sequence[Tags], begins: Callable[[str], bool]) -> tuple[list[Tags], str | None]:
    """The tags of rows, and the scheme that they were in where that was another.

    Args:
        rows: the tags of each row, None where a row has none; numbers stay.
        begins: whether there is a tag to begin an entity of this type with.
    """
    present = {tag for row in rows for tag in row or ()}
    if scheme := scheme_of(present):
        changed = {tag: in_iob2(tag) for tag in present}
        return [None if row is None else [changed[tag] for tag in row] for row in rows], scheme
    kinds = {tag[2:] for tag in present if isinstance(tag, str) and tag.startswith("I-")}
    if all(map(begins, kinds)) and _is_iob1(rows):
        return [None if row is None else _begun(row) for row in rows], "IOB1"
    return list(rows), None


def scheme_of(tags: Iterable[Any]) -> str | None:
    """The scheme that tags are in, where it has other prefixes than B- and I-."""
    prefixes = {tag[0] for tag in tags if isinstance(tag, str) and tag[1:2] == "-" and len(tag) > 2}
    if not prefixes & _TO_IOB2.keys():
        return None
    fitting = [name for name, changes in _SCHEMES.items() if prefixes <= changes.keys() | {"B", "I"}]
    return fitting[0] if fitting else None


def _is_iob1(rows: Sequence[Tags]) -> bool:
    """Whether entities begin with I-, and with B- only where one of their type is right before."""
    begun_inside = False
    for row in rows:
        before = ""
        for tag in row or ():
            prefix, _, kind = tag.partition("-") if isinstance(tag, str) else ("", "", "")
            if prefix == "B" and kind != before:
                return False
            begun_inside |= prefix == "I" and kind != before
            before = kind
    return begun_inside


def _begun(tags: Sequence[Any]) -> list[Any]:
    """Tags in IOB1 as IOB2."""
    before, found = "", []
    for tag in tags:
        prefix, _, kind = tag.partition("-") if isinstance(tag, str) else ("", "", "")
        found.append(f"B-{kind}" if prefix == "I" and kind != before else tag)
        before = kind
    return found


def tag_texts(
    table: "Dataset", column: str, stored: Names | None, names: Sequence[str] | None
) -> list[list[Any] | None]:
    """Tags of each row, numbers by their names where they have any.

    Args:
        table: a split.
        column: holds the tags.
        stored: what the split's files call numbers, see `stored_names`; None stands for what the table says.
        names: of all tags in order, which numbers without names are places in; None where there are none.
    """
    values = column_values(table, column, _KEY)
    feature = table.features[column]
    inner = getattr(feature, "feature", None)
    if inner is None or isinstance(inner, dict) or hasattr(inner, "feature"):  # no lists, or lists of what is no tag
        raise ValueError(
            f"{_KEY}: {column!r} of split {str(table.split)!r} must hold a list of tags in every row, "
            f"its type is {feature}; name another column"
        )
    called = stored or getattr(inner, "names", None) or names
    if called is None:
        return values
    named: dict[Any, Any] = dict(enumerate(called))
    return [None if row is None else [named.get(tag, tag) for tag in row] for row in values]


def tag_names(tags: Sequence[Any], usable: Rows) -> tuple[str, ...]:
    """The tags that occur: "O" first, then by type, B- before I-; numbers can't be told apart without names."""
    present = {tag for row in usable.tolist() for tag in tags[row]}
    if numbers := [tag for tag in present if not isinstance(tag, str)]:
        raise ValueError(
            f"task.label_names: required, because the tags are numbers such as {numbers[0]}; name them in order, "
            "as O, B-PER, I-PER"
        )
    kinds = sorted({tag.partition("-")[2] for tag in present} - {""})
    pairs = [f"{prefix}-{kind}" for kind in kinds for prefix in "BI"]
    return (OUTSIDE, *pairs, *sorted(present - {OUTSIDE, *pairs}))


def require_iob2(names: Sequence[str], key: str) -> None:
    """Check names of tags.

    Raises:
        ValueError: naming `key`, if one is none of IOB2, or there is no "O".
    """
    wrong = [name for name in names if name != OUTSIDE and (name[:2] not in ("B-", "I-") or len(name) < 3)]
    if wrong or OUTSIDE not in names:
        got = shown(wrong[0]) if wrong else "no 'O'"
        remedy = "correct them" if key == "task.label_names" else "correct the tags, or name another column"
        raise ValueError(
            f"{key}: tags must be 'O', 'B-...' and 'I-...' (IOB2, or IOB1, IOBES, BILOU, which are read as IOB2), "
            f"got {got}; {remedy}"
        )


def tag_indices(tags: Sequence[Any], usable: Rows, names: Sequence[str], column: str, split: str) -> list[Rows]:
    """Tags of each row as numbers, [words]; empty for a row that can't be used."""
    numbers: dict[Any, int] = {name: label for label, name in enumerate(names)}
    found = [np.zeros(0, np.int64)] * len(tags)
    for row in usable.tolist():
        known = [numbers.get(tag, tag) if isinstance(tag, str) else tag for tag in tags[row]]
        for tag in known:
            if not isinstance(tag, int) or not 0 <= tag < len(names):
                raise ValueError(
                    f"{_KEY}: {column!r} has {shown(tag)} in row {row} of split {split!r}, which is none "
                    f"of {listed(names)}; set task.label_names, or correct the row"
                )
        found[row] = np.array(known, np.int64)
    return found


def entity_counts(tags: Sequence[Rows], names: Sequence[str], kinds: Sequence[str]) -> Rows:
    """Entities of each type in each row: [rows, types]."""
    counts = np.zeros((len(tags), len(kinds)), np.int64)
    for row, of_words in enumerate(tags):
        for _, _, kind in entity_spans([names[tag] for tag in of_words]):
            counts[row, kinds.index(kind)] += 1
    return counts
