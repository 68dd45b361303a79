"""How much of a budget of time is left, and what takes long."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Callable, Iterator, Optional


class Deadline:
    """A budget of seconds for several steps; None is without end."""

    def __init__(self, seconds: Optional[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return 1e9 if self._end is None else max(0.0, self._end - time.monotonic())


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
