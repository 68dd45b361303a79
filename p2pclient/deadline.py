"""How much of a budget of time is left."""

from __future__ import annotations

import time
from typing import Optional


class Deadline:
    """A budget of seconds for several steps; None is without end."""

    def __init__(self, seconds: Optional[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return 1e9 if self._end is None else max(0.0, self._end - time.monotonic())
