"""Good-byes of connections that have ended: each is said three times, as datagrams may be lost."""

from __future__ import annotations

from typing import List, Tuple

from .addresses import Sending

PAUSES = (0.1, 0.3)         # seconds after which a good-bye is said again


class Farewells:
    """The good-byes that are yet to be repeated."""

    def __init__(self) -> None:
        self._waiting: List[Tuple[float, List[Sending]]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def due(self) -> float:
        """When the next one is."""
        return min([due for due, _ in self._waiting], default=float("inf"))

    def add(self, goodbye: List[Sending], now: float) -> None:
        """Take a good-bye that was said for the first time."""
        self._waiting += [(now + pause, goodbye) for pause in PAUSES if goodbye]

    def left(self, until: float = float("inf")) -> List[Sending]:
        """What is to be said again until then, earliest first."""
        due = sorted([each for each in self._waiting if each[0] <= until], key=lambda each: each[0])
        return [sending for _, goodbye in due for sending in goodbye]

    def take(self, now: float) -> List[Sending]:
        """What is to be said again by now, and then counts as said."""
        due = self.left(now)
        self._waiting = [each for each in self._waiting if each[0] > now]
        return due
