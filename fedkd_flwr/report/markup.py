"""Text of others in a page of ours."""

from html import escape

MOST_CHARACTERS = 400


def as_text(value: object, limit: int | None = MOST_CHARACTERS) -> str:
    """Anything as text of a page: escaped, without characters that nobody sees, cut where it is very long."""
    text = str(value)
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))
