"""A thread that calls the server again and again, each call held until there is news."""

from __future__ import annotations

import threading
import time
from typing import Callable, List, Optional

from .deadline import Deadline

LEAST_INTERVAL = 1.0    # seconds between two beginnings, so that none of many at once is lost, and only the last is made
LEAST_HOLD = 1.0        # seconds after which an answer without news shows that the server holds calls indeed


class Repeater:
    """Calls that follow each other in a thread, until they are ended or begun anew.

    ask: makes one call, and passes its answer on where is_current(), which it is given, still holds; returns seconds until the next.
    failed: takes what ask() raised, of whatever kind; returns seconds until the next.
    """

    def __init__(self, name: str, ask: Callable[[Callable[[], bool]], float], failed: Callable[[Exception], float]) -> None:
        self._name, self._ask, self._failed = name, ask, failed
        self._ended = threading.Event()
        self._current: Optional[threading.Thread] = None    # which calls; an earlier one ends when it notices
        self._threads: List[threading.Thread] = []          # that wait for answers yet
        self._begun = float("-inf")

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def begin_anew(self) -> None:
        """Call in a new thread; does not block. The answer to the call that the server holds may never come: a router that forgot the mappings of
        UDP has forgotten our connection to the server too."""
        if not self.ended:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()      # if there can be no more threads, the one before goes on
            self._threads = [each for each in [*self._threads, thread] if each.is_alive()]

    def pause(self) -> None:
        """Make no further call until it is begun anew."""
        self._current = None

    def end(self) -> None:
        """Make no further call."""
        self._ended.set()

    def join(self, seconds: float) -> bool:
        """Wait for the threads, each of which waits for the answer to its call. Whether they have ended."""
        deadline, others = Deadline(seconds), [each for each in self._threads if each is not threading.current_thread()]
        for thread in others:
            thread.join(deadline.left())
        return not any(thread.is_alive() for thread in others)

    def _run(self) -> None:
        this = self._current = threading.current_thread()

        def is_current() -> bool:
            return not self.ended and self._current is this

        self._ended.wait(self._begun + LEAST_INTERVAL - time.monotonic())
        self._begun = time.monotonic()
        while is_current():
            try:
                pause = self._ask(is_current)
            except Exception as error:
                pause = self._failed(error) if is_current() else 0.0
            self._ended.wait(pause)


def pause_between(waited: bool, has_news: bool, passed: float, otherwise: float) -> float:
    """Seconds until the next call: who was held can ask again at once, unless the server holds calls in name only.

    waited: the answer says that the server holds calls; passed: seconds that it took; otherwise: the pause where it does not hold them.
    """
    return 0.0 if waited and (has_news or passed > LEAST_HOLD) else otherwise
