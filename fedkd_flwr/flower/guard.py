"""What a node answers where something went wrong: the reason, and no place on the node."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.errors import MessageError, NodeError, StateError
from fedkd_flwr.flower.replies import reason_of

_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/[^\s'\",;]+")
_AS_THEY_ARE = (ConfigError, StateError, MessageError)  # kinds that the server tells apart
_NODE_PATHS = ("data-path", "state-dir")

_log = logging.getLogger("fedkd")


@contextmanager
def unplaced(context: Context) -> Iterator[None]:
    """Answer one message; an error of any kind names no place on this node, because the server reads what is raised.

    The whole error, with its traceback, is in this node's own log.

    Args:
        context: of the message. Paths that stand in its experiment are the server's own, and stay.

    Raises:
        NodeError: instead of an error whose text named a place; errors of this package keep their kind.
    """
    try:
        yield
    except Exception as error:
        places, known = _places(context), str(context.run_config.get("config-text", ""))
        told = without_places(str(error), places, known)
        clean = all(without_places(str(part), places, known) == str(part) for part in _chain(error))
        if clean and "data-path" not in context.node_config:
            raise
        _log.exception("a message can't be answered")  # here the places may be named
        if isinstance(error, _AS_THEY_ARE):
            error.args = (told,)
            raise error.with_traceback(None) from None
        raise NodeError(without_places(reason_of(error), places, known)) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it: Flower sends the text of them all."""
    part: BaseException | None = error
    while part is not None:
        yield part
        part = part.__cause__ or part.__context__


def without_places(text: str, places: Mapping[str, str], known: str = "") -> str:
    """A text in one line that names no place on this node, however whoever wrote it quoted, cut or spaced it.

    Args:
        text: to clean.
        places: paths of this node, and what to say instead of each.
        known: a text whose absolute paths are no secret.
    """
    for place, name in places.items():
        for form in (place, repr(place)[1:-1], " ".join(place.split())):
            text = text.replace(form, name)
    for place in places:
        root = "/".join(place.split("/")[:3])  # what a longer text was cut from may have left
        if len(root) > 1 and root in text and root not in known:
            text = text.split(root)[0] + "..."
    return _ABSOLUTE_PATH.sub(lambda found: found[0] if found[0] in known else "(a path)", " ".join(text.split()))


def _places(context: Context) -> dict[str, str]:
    """The paths that this node was given, as they were written and as they are, the longest first."""
    found = {str(Path.home()): "(home)"}
    for key in _NODE_PATHS:
        for config in (context.node_config, context.run_config):
            if value := str(config.get(key, "")):
                found[value] = key
                found[str(Path(value).expanduser().absolute())] = key
                found[str(Path(value).expanduser().resolve())] = key
    return {place: found[place] for place in sorted(found, key=len, reverse=True) if len(place) > 1}
