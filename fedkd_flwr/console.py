"""Console output that never raises: on any stream, in any encoding, also after its reader has gone."""

import os
import sys
from typing import Any, TextIO

from rich.console import Console

from fedkd_flwr.core.printable import shown


class Terminal(Console):
    """A console that shows what can't be shown by its escape, and goes on in silence once its reader has gone.

    Text that comes from elsewhere (paths, labels, reasons of clients) can't move the cursor or turn the writing round.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich` does, with escapes for characters that are not printable."""
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def on_broken_pipe(self) -> None:
        """Say nothing more, as after `| head`: what was asked for is done all the same."""
        self.quiet = True
        _discard(self.file)


def printable(text: str) -> str:
    """The text with every character that is neither printable nor the end of a line by its escape."""
    return "".join(c if c == "\n" else shown(c) for c in text)


def one_line(text: str) -> str:
    """The text with everything that is not printable by its escape, and in one line."""
    return printable(" ".join(text.splitlines()))


def print_line(line: str) -> None:
    """Print a line to standard output at once, with escapes of what the stream's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(one_line(line).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def escape_what_streams_lack() -> None:
    """Let standard output and error write escapes of what their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _discard(stream: TextIO | Any) -> None:
    """Let a stream write nowhere, so that what is left in its buffer raises nothing when it is flushed."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
