"""Values of others in messages for people: short whatever they are, and in a time that does not follow their size."""

from reprlib import Repr

_MOST_CHARACTERS = 80


class _Short(Repr):
    """A representation of a few items of a few levels: what is nested often costs no more."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, _MOST_CHARACTERS
        self.maxstring = self.maxlong = _MOST_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write an integer of many digits, and would take long."""
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 4 * self.maxlong else repr(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        """Of a few bytes only."""
        return f"{x[: self.maxstring // 4]!r}" + ("..." if len(x) > self.maxstring // 4 else "")


_short = _Short()


def quoted(value: object, most: int = _MOST_CHARACTERS) -> str:
    """A value as Python would write it, cut to so many characters.

    Args:
        value: anything that was read.
        most: characters, the mark of the cut included.
    """
    return cut(_short.repr(value), most)


def cut(text: str, most: int = _MOST_CHARACTERS) -> str:
    """A text in one line, cut to so many characters; what a terminal would not show is a question mark.

    Args:
        text: anything that was read.
        most: characters, the mark of the cut included.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * most].split()))
    shortened = len(text) > 4 * most or len(line) > most
    return line[: most - 3] + "..." if shortened else line
