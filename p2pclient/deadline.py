"""How much of a budget of time is left, and what takes long."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from typing import Any, Callable, Iterator, Optional, TypeVar

Result = TypeVar("Result")


class Deadline:
    """A budget of seconds for several steps; None is without end."""

    def __init__(self, seconds: Optional[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return 1e9 if self._end is None else max(0.0, self._end - time.monotonic())


def begin(name: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> concurrent.futures.Future[Result]:
    """What a call gives, to come: a thread of this name makes it, for whose end nobody has to wait."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextlib.contextmanager
def told_if_slow(seconds: float, report: Callable[[str], None], line: str) -> Iterator[None]:
    """Have a line reported if the block takes longer than that."""
    timer = threading.Timer(seconds, report, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
