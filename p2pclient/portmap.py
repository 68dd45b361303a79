"""A public UDP port from one's own router: PCP (RFC 6887) and NAT-PMP (RFC 6886). Only the default gateway is spoken to.

What a router answers is believed only as far as it has the form of an answer to what was asked; every wait and every answer is bounded.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import socket
import struct
import subprocess
import sys
from typing import Callable, NamedTuple, Optional

from .addresses import parse_candidate, plain_ip, private_network, text_of
from .deadline import Deadline
from .sockets import own_address_towards

PORT = 5351                 # of both protocols
LIFETIME = 3600             # seconds that a mapping is asked for: as long as it outlives a host that has crashed
TRIES = (0.25, 0.5, 1.0)    # seconds that each of three requests has (RFC 6886 section 3.1; PCP's own times are for programs that have longer)
MAX_ANSWERS = 32            # datagrams that are looked at for one request
MAX_ANSWER = 1100           # bytes (RFC 6887 section 7)
UDP = 17
RTF_GATEWAY = 2             # flag of Linux's routing table


class Mapping(NamedTuple):
    """What a router grants: a public IPv4 address and port that lead to our socket, for so many seconds."""

    host: str
    port: int
    lifetime: int

    @property
    def text(self) -> str:
        return text_of((self.host, self.port))

    @property
    def is_public(self) -> bool:
        """Whether others may reach it: a router behind another one maps a port of a private address, which leads nowhere."""
        return parse_candidate(self.text) is not None and not private_network(self.host) and not plain_ip(self.host).is_loopback


class Place(NamedTuple):
    """Where this machine is: the IPv4 address of its default gateway, and its own one towards that."""

    router: str
    own: str


def find_place() -> Optional[Place]:
    """None: there is no default gateway, or no NAT of it, as this machine's address is not private."""
    router = default_gateway()
    own = own_address_towards((router, PORT)) if router else None
    return Place(router, own) if router and own and private_network(own) else None


def default_gateway() -> Optional[str]:
    """The IPv4 address of the default gateway, as the operating system knows it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "linux":
            with open("/proc/net/route", encoding="ascii") as table:
                return gateway_in(table.read())
        if sys.platform == "win32":
            return gateway_of_windows()
        found = subprocess.run(["route", "-n", "get", "default"], capture_output=True, text=True, timeout=2)
        gateway = re.search(r"gateway: ([\d.]+)\s", found.stdout)
        return gateway[1] if gateway else None
    return None


def gateway_in(table: str) -> Optional[str]:
    """The gateway of the default route of the lowest metric. The columns of /proc/net/route are interface, destination, gateway, flags, references,
    use, metric, mask and others; addresses are numbers in the order of this machine's bytes."""
    rows = [line.split() for line in table.splitlines()[1:]]
    defaults = [row for row in rows if row[1] == row[7] == "00000000" and int(row[3], 16) & RTF_GATEWAY]
    best = min(defaults, key=lambda row: int(row[6]), default=None)
    return socket.inet_ntoa(struct.pack("=I", int(best[2], 16))) if best else None


def gateway_of_windows() -> Optional[str]:
    """GetBestRoute() fills a MIB_IPFORWARDROW of 14 numbers, whose fourth is the next hop."""
    import ctypes
    row = (ctypes.c_uint32 * 14)()
    if ctypes.windll.iphlpapi.GetBestRoute(0, 0, ctypes.byref(row)):     # type: ignore[attr-defined,unused-ignore]
        return None
    return socket.inet_ntoa(struct.pack("=I", row[3])) if row[3] else None


class Pcp:
    """Port Control Protocol. The nonce makes the mapping ours, so it is the same one in every request (RFC 6887 section 11.2)."""

    name = "PCP"

    def __init__(self, place: Place, port: int) -> None:
        self._place, self._port, self._nonce = place, port, secrets.token_bytes(12)

    def ask(self, outside: int) -> Optional[Mapping]:
        """A mapping of our port, to the public port outside if that is free. OSError."""
        answer = exchange(self._place.router, self._request(outside, LIFETIME), self._is_answer)
        return self._read(answer) if answer else None

    def give_back(self, outside: int) -> None:
        """OSError."""
        exchange(self._place.router, self._request(outside, 0), self._is_answer)

    def _request(self, outside: int, lifetime: int) -> bytes:
        """RFC 6887 sections 7.1 and 11.1: version 2, opcode MAP."""
        return struct.pack(">BBHI16s12sB3xHH16s", 2, 1, 0, lifetime, in_ipv6(self._place.own), self._nonce, UDP, self._port, outside, in_ipv6("0.0.0.0"))

    def _is_answer(self, answer: bytes) -> bool:
        """Whether it belongs to our request. A router that knows NAT-PMP alone answers in its version 0 (RFC 6886 section 3.5)."""
        return answer[:1] == b"\0" or answer[:2] == b"\2\x81" and (len(answer) < 60 or answer[24:36] == self._nonce)

    def _read(self, answer: bytes) -> Optional[Mapping]:
        """RFC 6887 sections 7.2 and 11.1."""
        if len(answer) < 60 or answer[:2] != b"\2\x81" or answer[3] != 0:
            return None
        lifetime, = struct.unpack_from(">I", answer, 4)
        protocol, inside, outside, host = struct.unpack_from(">B3xHH16s", answer, 36)
        ipv4 = ipaddress.IPv6Address(host).ipv4_mapped
        return Mapping(str(ipv4), outside, lifetime) if ipv4 and lifetime and (protocol, inside) == (UDP, self._port) else None


class NatPmp:
    """NAT Port Mapping Protocol."""

    name = "NAT-PMP"

    def __init__(self, place: Place, port: int) -> None:
        self._place, self._port = place, port

    def ask(self, outside: int) -> Optional[Mapping]:
        """A mapping of our port, to the public port outside if that is free. OSError."""
        address = exchange(self._place.router, b"\0\0", lambda answer: answer[:2] == b"\0\x80" and len(answer) >= 12)
        if not address or address[2:4] != b"\0\0":      # the result
            return None
        answer = self._map(outside, LIFETIME)
        if not answer or answer[2:4] != b"\0\0":
            return None
        port, lifetime = struct.unpack_from(">HI", answer, 10)
        return Mapping(socket.inet_ntoa(address[8:12]), port, lifetime) if lifetime else None

    def give_back(self, outside: int) -> None:
        """OSError."""
        self._map(0, 0)

    def _map(self, outside: int, lifetime: int) -> Optional[bytes]:
        """RFC 6886 sections 3.3 and 3.4."""
        inside = struct.pack(">H", self._port)
        request = struct.pack(">BBH2sHI", 0, 1, 0, inside, outside, lifetime)
        return exchange(self._place.router, request, lambda answer: answer[:2] == b"\0\x81" and len(answer) >= 16 and answer[8:10] == inside)


def in_ipv6(host: str) -> bytes:
    return ipaddress.IPv6Address("::ffff:" + host).packed


def exchange(router: str, request: bytes, is_answer: Callable[[bytes], bool]) -> Optional[bytes]:
    """What the router answers; None: nothing in 1.75 seconds. OSError: it has nobody at this port, or there is no way to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((router, PORT))        # so that nobody else's datagrams come
        for seconds in TRIES:
            sock.send(request)
            answer = first_answer(sock, seconds, lambda datagram, _: datagram if is_answer(datagram) else None)
            if answer:
                return answer
    return None


def first_answer(sock: socket.socket, seconds: float, read: Callable[[bytes, str], Optional[bytes]]) -> Optional[bytes]:
    """What read() makes of the first datagram of which it makes something: it is given each one, and the IP address from which it came.
    OSError."""
    deadline = Deadline(seconds)
    for _ in range(MAX_ANSWERS):
        sock.settimeout(deadline.left() or 0.001)
        try:
            datagram, source = sock.recvfrom(MAX_ANSWER)
        except socket.timeout:
            return None
        except ConnectionResetError:        # Windows: one of the addresses that were asked refuses; another may answer
            continue
        found = read(datagram, source[0])
        if found or not deadline.left():
            return found
    return None
