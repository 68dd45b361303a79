"""A thread that keeps something for a game for as long as it is on offer, and holds up nobody else."""

from __future__ import annotations

import threading

GIVE_BACK_TIME = 1.0        # seconds that the end of a game waits for who gave it


class Background:
    """What such threads have in common. A subclass has _run(), which returns when the end has come, and starts the thread when it is ready."""

    def __init__(self, name: str) -> None:
        self._ended, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def ask_soon(self) -> None:
        """Ask again, as we or who gave it may have moved or begun anew. Does not block."""
        self._woken.set()

    def end(self) -> None:
        """Have it given back. Does not block."""
        self._ended.set()
        self._woken.set()

    def join(self, seconds: float = GIVE_BACK_TIME) -> None:
        """Wait until it is given back."""
        if self._thread is not threading.current_thread():      # a game that is closed by its own report
            self._thread.join(seconds)

    def _run(self) -> None:
        raise NotImplementedError

    def _rest(self, pause: float, least: float) -> None:
        """Wait so many seconds, or from the least on until it is to ask soon; no longer than until the end."""
        if not self._ended.wait(min(least, pause)):
            self._woken.wait(max(0.0, pause - least))
