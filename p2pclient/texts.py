"""The log, and texts from the network and callbacks of the game, made harmless."""

from __future__ import annotations

import logging
from typing import Any, Callable

log = logging.getLogger("p2pclient")

MAX_LINE = 500      # characters of a text from the network that are shown in one line


def printable(text: str) -> str:
    """A text from the network, safe for a terminal: what does not print (newlines, escapes, changes of direction) is written as an escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii") for each in text)


def line_of(text: object) -> str:
    """The same in one line of bounded length."""
    line = printable(str(text)[:MAX_LINE + 1])
    return line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ..."


def harmless(callback: Callable[..., None]) -> Callable[..., None]:
    """A callback of the game's, but what it raises is logged: it must not end the thread that calls it."""
    def call(*arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("a callback failed: %s", arguments)
    return call
