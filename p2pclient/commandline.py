"""What the programs share: arguments, the peerId that a player keeps, lines of output, and which URL was meant."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import socket
import sys
import threading
import urllib.parse
import warnings
from typing import IO, List, Optional

import requests

from .addresses import Address
from .answers import RendezvousError
from .rendezvous import new_peer_id
from .texts import printable

try:
    import fcntl
except ImportError:     # on Windows two programs must be given two files
    fcntl = None        # type: ignore[assignment]

SLOW = 3.0              # seconds of silence after which a program says what it waits for
PROBE_TIME = 2.0        # seconds for a server to show itself at another URL

_in_use: List[IO[str]] = []     # files of peerIds, which stay locked until the program ends
_printing = threading.Lock()
output_lost = threading.Event()     # nobody reads the output any more, or its disk is full


class OutputLost(Exception):
    """To go on makes no sense: nobody would know."""


def say(line: str) -> None:
    """Print a line at once. OutputLost in the main thread; other threads leave it to that one."""
    with _printing:     # so that one thread alone tells that the output is lost
        try:
            if not output_lost.is_set():
                print(line, flush=True)
        except OSError as error:
            give_up_output(error)
    if output_lost.is_set() and threading.current_thread() is threading.main_thread():
        raise OutputLost


def give_up_output(error: OSError) -> None:
    """Nothing is printed any more, nor what is still in the buffer: Python would complain of that at its end."""
    output_lost.set()
    if error.errno != errno.EPIPE:      # who has closed a pipe wants to know no more
        complain(f"the output is lost: {error.strerror}")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def complain(line: str) -> None:
    """Print a line of trouble on the standard error, as far as that works."""
    with contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0]).partition('.')[0]}: {printable(line)}", file=sys.stderr, flush=True)


def explain(error: RendezvousError, url: str, question: str = "") -> str:
    """The failure of a first call, after the URL that may have been meant. question: follows where nothing is known to help."""
    url = url if "://" in url else "http://" + url
    has_path = urllib.parse.urlsplit(url).path.strip("/") != ""
    meant = better_url(url) if error.status == 0 or error.status in (404, 405) and has_path else ""
    if meant:
        return f"a p2pserver answers at {meant}: use that as --server ({error})"
    return str(error) if error.has_advice else f"{error}{question}"


def better_url(url: str) -> str:
    """The URL at which a p2pserver answers: without the path of this one, or with the other scheme; "" if there is none."""
    parts = urllib.parse.urlsplit(url)
    other = "http" if parts.scheme == "https" else "https"
    for scheme in (parts.scheme, other):
        candidate = f"{scheme}://{parts.netloc}"
        if candidate != url.rstrip("/") and is_server(candidate):
            return candidate
    return ""


def is_server(url: str) -> bool:
    """Whether a p2pserver answers there. Nothing is told it, so its certificate does not matter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            health = requests.get(url + "/healthz", timeout=PROBE_TIME, verify=False, allow_redirects=False).json()
    except (requests.RequestException, ValueError):
        return False
    return isinstance(health, dict) and {"status", "version", "games", "guests"} <= health.keys()


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


def add_search(parser: argparse.ArgumentParser) -> None:
    """The options --no-prediction and --probing, for Endpoint."""
    parser.add_argument("--no-prediction", dest="prediction", action="store_false",
                        help="do not predict the ports of routers that give each destination another one")
    parser.add_argument("--probing", action="store_true", help="where such a router chooses ports at random, try up to 1024, if the other side wants it "
                                                               "too; small routers may not like it")


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
