"""TCP connections to the server, and the time that an answer over them may take: what requests leaves open."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import io
import socket
from typing import Any, Dict, List, Tuple

import requests.adapters
import urllib3
import urllib3.connection

from .addresses import Address
from .deadline import Deadline, begin

CONNECT_TIME = 2.0      # seconds for one IP address of a server; where one family leads nowhere, the other has its turn then
# A server that a router has forgotten is noticed 9 seconds after its last word: 5 of silence, and two probes 2 apart without an answer.
PROBE_AFTER, PROBE_INTERVAL, PROBES, UNANSWERED = 5, 2, 2, 8

_worked: Dict[Address, str] = {}                # the IP address that worked last, by host and port
_early: Dict[Address, socket.socket] = {}       # a connection that was made before it is needed


def keep_alive_options() -> List[Tuple[int, int, int]]:
    """The options of a socket that have the system ask a silent server whether it is there, as far as this system has them."""
    wanted = [("TCP_KEEPIDLE", PROBE_AFTER), ("TCP_KEEPALIVE", PROBE_AFTER), ("TCP_KEEPINTVL", PROBE_INTERVAL), ("TCP_KEEPCNT", PROBES),
              ("TCP_USER_TIMEOUT", 1000 * UNANSWERED), ("TCP_NODELAY", 1)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            *[(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in wanted if hasattr(socket, name)]]


def look_up(address: Address, seconds: float) -> List[Any]:
    """What getaddrinfo gives for a host and port. The system takes its own time for a name, so another thread asks it. OSError."""
    try:
        return begin("look-up", socket.getaddrinfo, address[0].strip("[]"), address[1], 0, socket.SOCK_STREAM).result(seconds)
    except concurrent.futures.TimeoutError:
        raise OSError("the name was not found in time") from None
    except UnicodeError:
        raise OSError("this is no name of a host") from None
    except RuntimeError as error:       # there can be no more threads
        raise OSError(str(error)) from None


def connect(address: Address, seconds: float) -> socket.socket:
    """A connection with a host and port, in so many seconds. Once the name is found, each of its IP addresses has two, all of them four, or what is
    left; the one that worked last has its turn first. The name is looked up each time, for it may lead elsewhere by now. OSError."""
    whole, failure = Deadline(seconds), OSError("the name was found too late")
    found = look_up(address, seconds)
    each_has = min(CONNECT_TIME, whole.left() / 2)
    deadline = Deadline(2 * each_has)
    for family, kind, protocol, _, target in sorted(found, key=lambda each: each[4][0] != _worked.get(address)):
        if not deadline.left():
            break
        sock = socket.socket(family, kind, protocol)
        try:
            for option in keep_alive_options():
                with contextlib.suppress(OSError):
                    sock.setsockopt(*option)
            sock.settimeout(min(each_has, deadline.left() or each_has))
            sock.connect(target)
        except OSError as error:
            failure = error
            sock.close()
        else:
            _worked[address] = str(target[0])
            return sock
    raise failure


def connect_early(address: Address, seconds: float) -> None:
    """Make a connection for the next call that needs one. That there is none shows then."""
    with contextlib.suppress(OSError):
        _early[address] = connect(address, seconds)


class TimedFile(io.RawIOBase):
    """What comes over a socket, until the time that the socket has for a single read is over for all of them together."""

    def __init__(self, sock: Any) -> None:
        self._socket, self._file, self._deadline = sock, sock.makefile("rb", 0), Deadline(sock.gettimeout())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        if not self._deadline.left():
            raise socket.timeout("timed out")
        self._socket.settimeout(self._deadline.left() or 0.001)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """An answer whose head and body have the time together that requests would give to each read."""

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(TimedFile(sock))


class HttpConnection(urllib3.connection.HTTPConnection):
    response_class = TimedResponse

    def _new_conn(self) -> Any:
        return new_connection(self)


class HttpsConnection(urllib3.connection.HTTPSConnection):
    response_class = TimedResponse

    def _new_conn(self) -> Any:
        return new_connection(self)


def new_connection(connection: Any) -> socket.socket:
    address = connection._dns_host, connection.port
    try:
        return _early.pop(address, None) or connect(address, connection.timeout)
    except OSError as error:    # urllib3 takes a bare ECONNRESET for one of a connection that was made, and goes on
        raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error


class HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = HttpConnection


class HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = HttpsConnection


class Adapter(requests.adapters.HTTPAdapter):
    """Has requests make its connections here."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if isinstance(manager, urllib3.ProxyManager) and not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
        return manager


def new_session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session
