"""What the programs share: arguments, and the peerId that a player keeps."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import urllib.parse
from typing import IO, List, Optional

from .addresses import Address
from .rendezvous import new_peer_id

try:
    import fcntl
except ImportError:     # on Windows two programs must be given two files
    fcntl = None        # type: ignore[assignment]

_in_use: List[IO[str]] = []     # files of peerIds, which stay locked until the program ends


def seconds(text: str) -> float:
    """A number of seconds. For argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def parse_server(text: str) -> Address:
    """HOST:PORT, [IPV6]:PORT or HOST with STUN's port 3478. For argparse, which says so if there is no such host."""
    parts = urllib.parse.urlsplit("//" + text)
    try:
        port = parts.port or 3478
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    try:
        socket.getaddrinfo(parts.hostname, port)
    except (OSError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"no such name: {parts.hostname!r} ({getattr(error, 'strerror', error)})") from None
    return parts.hostname, port


def add_peer_id_file(parser: argparse.ArgumentParser, role: str) -> None:
    """The option --peer-id-file of a host or guest, for kept_peer_id()."""
    folder = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    parser.add_argument("--peer-id-file", metavar="FILE",
                        help=f"where this {role} keeps its secret peerId, so that it is the same one when it comes back; while another program uses the "
                             f"file it has one for itself (default: {os.path.join(folder, 'p2pclient', role)})")
    parser.set_defaults(default_peer_id_file=os.path.join(folder, "p2pclient", role))


def kept_peer_id(options: argparse.Namespace) -> str:
    """The peerId of an earlier run. ValueError: the named file cannot be used; without the option that is no fault."""
    try:
        return peer_id_in(options.peer_id_file or options.default_peer_id_file)
    except OSError as error:
        if options.peer_id_file:
            raise ValueError(f"--peer-id-file {options.peer_id_file}: {error.strerror}") from None
        return new_peer_id()


def peer_id_in(path: str) -> str:
    """The peerId that a file keeps, which only its owner may read; a new one, if there is none yet or another program uses the file.
    ValueError: the file is something else. OSError."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8", errors="replace"))
        if not is_locked(file):
            return new_peer_id()
        text: Optional[str] = file.read(200).strip() or None
        if text is None:
            text = new_peer_id()
            file.write(text + "\n")
            file.flush()
        elif not re.fullmatch("[A-Za-z0-9_-]{32}", text):
            raise ValueError(f"{path} is no file with a peerId")
        os.chmod(path, 0o600)
        stack.pop_all()
        _in_use.append(file)
        return text


def is_locked(file: IO[str]) -> bool:
    """Lock a file against other programs; False if one of them has done so. Where the system has no locks, it is ours."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
