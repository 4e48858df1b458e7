"""Untrusted text as one line of bounded length, in which no terminal finds a command."""

MOST_CHARACTERS = 500
_CUT = " ..."
# Characters that are shown as nothing although Unicode counts them among letters and marks.
_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
    + "".join(map(chr, range(0xFE00, 0xFE10)))
    + "".join(map(chr, range(0xE0100, 0xE01F0)))
)


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text of unknown origin in one line.

    White space of any kind and length becomes one space. Whatever can't be seen or moves what is seen (controls,
    terminal escapes, marks of direction and of no width, halves of surrogate pairs) is written as its escape.

    Args:
        text: of any length.
        most: characters of the result; what is longer is cut, and says so.
    """
    # Four times as much, because white space shrinks; a huge text is not looked through.
    begun = text[: 4 * most]
    line = "".join(map(shown, " ".join(begun.split())))
    if len(line) <= most and len(begun) == len(text):
        return line
    return line[: most - len(_CUT)].rstrip() + _CUT


def shown(character: str) -> str:
    """A character as it is, or its escape where it can't be seen or moves the text around it."""
    if character.isprintable() and character not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
