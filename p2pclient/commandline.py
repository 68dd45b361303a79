"""What the programs share: arguments."""

from __future__ import annotations

import argparse
import urllib.parse

from .addresses import Address


def seconds(text: str) -> float:
    """A number of seconds. For argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def parse_server(text: str) -> Address:
    """HOST:PORT, [IPV6]:PORT or HOST with STUN's port 3478. For argparse."""
    parts = urllib.parse.urlsplit("//" + text)
    try:
        port = parts.port or 3478
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return parts.hostname, port
