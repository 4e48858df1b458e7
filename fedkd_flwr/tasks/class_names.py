"""Which class a value means: the one rule for labels of tables and for options that name a class.

A value is the class of its name. A number is the class whose name has its value, so that 1, "1", "01" and "1.0" are
one class; only where no name is a number is it a place in the order, from 0. A truth value is the class called true or
false (or yes or no, on or off).
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from math import isfinite, isnan
from typing import Annotated, Any

from pydantic import BeforeValidator

Label = str | int | float | bool
"""A label as it is compared: a text, a number (whole ones as int) or a truth value."""

SHOWN_CLASSES = 8  # in a message about more
_SHOWN_CHARACTERS = 40  # of a name or a value in a message

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
_TRUTHS = (frozenset(("false", "no", "off")), frozenset(("true", "yes", "on")))  # YAML 1.1 reads all of them so


class AmbiguousLabelError(ValueError):
    """A value that may be one class or another."""


def plain(value: Any) -> Label | None:
    """A value of a table as it is compared; None where it is missing.

    A whole number that a table with empty cells made a floating-point one is whole again, a decimal number is a number,
    a date is its ISO text.

    Raises:
        TypeError: if it is no text, number, truth value or date.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        if isnan(value):
            return None
        # Of a decimal number the text decides: its digits are what a file holds.
        return int(value) if isfinite(value) and value == int(value) else float(value)
    if isinstance(value, datetime):
        midnight = value.tzinfo is None and (value.hour, value.minute, value.second, value.microsecond) == (0, 0, 0, 0)
        return value.date().isoformat() if midnight else value.isoformat(" ")
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no label")


def number_of(text: str) -> int | float | None:
    """The number that a text is, in digits; None of any other text."""
    if not _NUMBER.fullmatch(text):
        return None
    exact = Decimal(text)
    return int(exact) if exact == exact.to_integral_value() else float(exact)


def folded(name: str) -> str:
    """A name without what is easily overlooked: case, width of letters, kinds and number of spaces, those around it."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def listed(names: Sequence[str], most: int = SHOWN_CLASSES) -> str:
    """Names in a message, each cut where it is long, the first few of many."""
    cut = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..." for name in names[:most]]
    return ", ".join(cut) + (", ..." if len(names) > most else "")


def by_name(names: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """For names of one order the classes of another that they are: of the same name, or else of the same case aside.

    Args:
        names: such as those that a file or a checkpoint gives to numbers.
        classes: the classes.

    Returns:
        The class of each name that is one of them. No two names have one class.
    """
    exact, alike = set(classes), defaultdict(list)
    for name in classes:
        alike[folded(name)].append(name)
    times = Counter(map(folded, names))
    found = {}
    for name in names:
        of_fold = alike.get(folded(name), [])
        if name in exact:
            found[name] = name
        elif len(of_fold) == 1 and times[folded(name)] == 1:
            found[name] = of_fold[0]
    return found


class Classes:
    """Names of classes in order, and which of them a value means; see the module's text.

    Args:
        names: in order, no two alike.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._places = {name: place for place, name in enumerate(self.names)}
        self._numbers: dict[int | float, list[int]] = defaultdict(list)
        for place, name in enumerate(self.names):
            if (number := number_of(name)) is not None:
                self._numbers[number].append(place)
        self._all_numbers = sum(map(len, self._numbers.values())) == len(self.names)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def place(self, value: Label, *, places: bool = True) -> int | None:
        """The place of the class that a value means, None where it is none of them.

        Args:
            value: see `plain`.
            places: whether a truth value may be a place, where two classes have other names than those.

        Raises:
            AmbiguousLabelError: if it may be either of two.
        """
        if isinstance(value, bool):
            return self._of_truth(value, places=places)
        if not isinstance(value, str):
            return self._of_number(value)
        if value in self._places:
            return self._places[value]
        if (number := number_of(value)) is not None:
            return self._of_number(number)
        if (truth := value.casefold()) in ("true", "false"):
            return self._of_truth(truth == "true", places=places)
        return None

    def called(self, truth: bool) -> int | None:
        """The place of the only class that is called true or false, in whatever case."""
        found = [place for name, place in self._places.items() if name.casefold() == str(truth).casefold()]
        return found[0] if len(found) == 1 else None

    def allowed(self) -> str:
        """What a label must be, for errors."""
        names = f"one of {listed(self.names)}"
        return names if self._all_numbers else f"0 to {len(self) - 1} or {names}"

    def _of_number(self, value: int | float) -> int | None:
        named = self._numbers.get(value, [])
        place = value if isinstance(value, int) and 0 <= value < len(self) and not self._all_numbers else None
        if len(named) > 1:
            raise AmbiguousLabelError(
                f"which may be any of the classes called {listed([self.names[place] for place in named])}; "
                "store names as texts"
            )
        if not named or self._all_numbers or named == [place]:
            return named[0] if named else place
        raise AmbiguousLabelError(
            f"which may be the class called {value} or the class in place {value} of {listed(self.names)}; "
            "name all classes by numbers, or none"
        )

    def _of_truth(self, value: bool, *, places: bool) -> int | None:
        if (place := self.called(value)) is not None:
            return place
        meant = [[place for name, place in self._places.items() if name.casefold() in words] for words in _TRUTHS]
        if any(meant):
            return meant[value][0] if len(meant[value]) == 1 else None
        return self._of_number(int(value)) if len(self) == 2 and (places or self._all_numbers) else None


def chosen_class(value: Label | None, names: Sequence[str], key: str) -> int | None:
    """The place of the class that an option names; None of None.

    Args:
        value: as YAML reads it.
        names: of the classes.
        key: of the option, for errors.

    Raises:
        ValueError: if it is none of them, or a truth value that no class is called by.
    """
    if value is None:
        return None
    classes = Classes(names)
    if isinstance(value, bool):
        if (named := classes.called(value)) is None:
            words = ", ".join(sorted(_TRUTHS[value]))
            raise ValueError(
                f"{key}: must be one of {listed(names)}, got the truth value {str(value).lower()} "
                f'(YAML reads {words} so); quote it, as "{_example(names, value)}"'
            )
        return named
    try:
        place = classes.place(plain(value) or value)
    except AmbiguousLabelError as error:
        raise ValueError(f"{key}: got {shown(value)}, {error}") from None
    if place is None:
        numbers = "" if classes.allowed().startswith("one") else f", or 0 to {len(names) - 1}"
        raise ValueError(f"{key}: must be one of {listed(names)}{numbers}, got {shown(value)}")
    return place


def _example(names: Sequence[str], truth: bool) -> str:
    """The class that was probably meant by a word that YAML reads as a truth value."""
    return next((name for name in names if name.casefold() in _TRUTHS[truth]), "yes" if truth else "no")


def _quoted_names(value: object) -> object:
    """Refuse names that YAML has read as something else: no, yes, 007 and 1.0 would be other names, or none."""
    if isinstance(value, list | tuple):
        for place, name in enumerate(value):
            if not isinstance(name, str):
                kind = "the truth value " if isinstance(name, bool) else ""
                got = str(name).lower() if isinstance(name, bool) else "null" if name is None else shown(name)
                raise ValueError(
                    f'must be texts, got {kind}{got} in place {place}; quote each name, as ["no", "yes"] or ["1", "2"]'
                )
    return value


LabelNames = Annotated[tuple[str, ...], BeforeValidator(_quoted_names)]
"""Names of classes as an option."""


def _read_class(value: object) -> object:
    """An option that names a class, as YAML has it: a truth value is no number here."""
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"must be the name of a class, got {shown(value)}; quote it")
    return value


ClassName = Annotated[Any, BeforeValidator(_read_class)]
"""An option that names a class: a text, a number, or a truth value where a class is called so; see `chosen_class`."""


def near_equal(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that differ in case, spaces or the writing of a number alone, sorted."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name in names:
        number = number_of(name.strip())
        groups[folded(name) if number is None else number].append(name)
    return sorted(tuple(group) for group in groups.values() if len(group) > 1)


def near_equal_notes(names: Sequence[str]) -> tuple[str, ...]:
    """Classes that are probably one, in one line; see `near_equal`."""
    groups = near_equal(names)
    if not groups:
        return ()
    called = " and ".join(shown(name) for name in groups[0])
    more = f" (and {len(groups) - 1} more such groups)" if len(groups) > 1 else ""
    return (f"classes {called}{more} are nearly equal; if they are one class, give it one name in the data",)
