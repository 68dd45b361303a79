"""UDP sockets for IPv6 and IPv4 at once, and what the operating system knows of the ways from this machine."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import List, Optional, Sequence

from .addresses import Address, plain


def open_socket(port: int = 0) -> socket.socket:
    """A UDP socket for both IPv6 and IPv4, or for IPv4 alone where the machine has no IPv6."""
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
            return sock
        except OSError:
            sock.close()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    return sock


def send_to(sock: socket.socket, datagram: bytes, address: Address) -> None:
    """Send if there is a way; that there is none shows in the answer that does not come."""
    if sock.family == socket.AF_INET6 and ":" not in address[0]:
        address = ("::ffff:" + address[0], address[1])
    with contextlib.suppress(OSError):
        sock.sendto(datagram, address)


def is_readable(sock: socket.socket, seconds: float) -> bool:
    """Whether something has come within seconds. select() itself would not do: games may have a thousand descriptors."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def resolve(servers: Sequence[Address], ipv6: bool = True) -> List[Address]:
    """The IP addresses of servers, all of each; none of those whose name is unknown."""
    found: List[Address] = []
    for host, port in servers:
        with contextlib.suppress(OSError):
            found += [plain(each[4]) for each in socket.getaddrinfo(host, port, 0 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)]
    return [address for address in dict.fromkeys(found) if own_address_towards(address)]


def own_address_towards(address: Address) -> Optional[str]:
    """From which of its addresses this machine reaches another, or None if there is no way. Connecting a UDP socket sends nothing, but has
    the system choose."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
    return None
