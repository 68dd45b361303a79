"""The signals by which a program is told to end."""

from __future__ import annotations

import signal

HANGUP = getattr(signal, "SIGHUP", None)    # the terminal closes; Windows has none


def end_by_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread; SIGHUP not where it is ignored, as nohup has it."""
    for number in (signal.SIGINT, signal.SIGTERM):      # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, interrupt)
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        signal.signal(HANGUP, interrupt)


def interrupt(number: int, frame: object) -> None:
    if HANGUP:      # of which a terminal that closes may send several
        signal.signal(HANGUP, signal.SIG_IGN)
    raise KeyboardInterrupt
