"""UDP sockets for IPv6 and IPv4 at once, and what the operating system knows of this machine's addresses and ways."""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import struct
import sys
from typing import Any, Iterable, List, Optional, Sequence

from .addresses import Address, plain

# Destinations of the documentation ranges (RFC 3849, RFC 5737): any behind the default route would do.
SOMEWHERE = [("2001:db8::1", 9), ("192.0.2.1", 9)]
# Requests of ioctl, their numbers on Linux and on macOS.
SIOCGIFFLAGS, SIOCGIFADDR = (0x8913, 0x8915) if sys.platform == "linux" else (0xC0206911, 0xC0206921)
IFF_UP, IFF_RUNNING = 0x1, 0x40
# Where the IPv4 address is in a NAT64 address, by the length of the prefix (RFC 6052 section 2.2).
EMBEDDED = {96: (12, 13, 14, 15), 64: (9, 10, 11, 12), 56: (7, 9, 10, 11), 48: (6, 7, 9, 10), 40: (5, 6, 7, 9), 32: (4, 5, 6, 7)}


class Nat64:
    """How an IPv6-only network reaches IPv4 addresses. prefix: its first bytes, with zeros up to 16; length: in bits."""

    def __init__(self, prefix: bytes, length: int) -> None:
        self._prefix, self._places = prefix, EMBEDDED[length]

    def to_ipv6(self, host: str) -> str:
        """The IPv6 address that stands for an IPv4 address."""
        packed = bytearray(self._prefix)
        for place, byte in zip(self._places, ipaddress.IPv4Address(host).packed):
            packed[place] = byte
        return str(ipaddress.IPv6Address(bytes(packed)))

    def to_ipv4(self, host: str) -> str:
        """The IPv4 address that an IPv6 address stands for; the address itself if it stands for none."""
        if ":" not in host or "%" in host:
            return host
        ipv4 = ipv4_in(ipaddress.IPv6Address(host).packed, self._places)
        return ipv4 if ipaddress.IPv6Address(self.to_ipv6(ipv4)) == ipaddress.IPv6Address(host) else host

    @classmethod
    def of(cls, answers: Iterable[str]) -> Optional[Nat64]:
        """What the IPv6 addresses of ipv4only.arpa tell (RFC 7050 section 3): it has the IPv4 addresses 192.0.0.170 and 192.0.0.171 alone."""
        for packed in (ipaddress.IPv6Address(answer).packed for answer in answers):
            for length, places in EMBEDDED.items():
                if ipv4_in(packed, places) in ("192.0.0.170", "192.0.0.171"):
                    return cls(packed[:length // 8] + bytes(16 - length // 8), length)
        return None


def ipv4_in(packed: bytes, places: Sequence[int]) -> str:
    return str(ipaddress.IPv4Address(bytes(packed[place] for place in places)))


def find_nat64() -> Optional[Nat64]:
    """The NAT64 of this network, if it is one of IPv6 alone. Asks DNS then, which may take seconds."""
    if own_address_towards(SOMEWHERE[1]) or not own_address_towards(SOMEWHERE[0]):
        return None
    try:
        return Nat64.of(str(each[4][0]) for each in socket.getaddrinfo("ipv4only.arpa", None, socket.AF_INET6, socket.SOCK_DGRAM))
    except OSError:
        return None


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


def send_to(sock: socket.socket, datagram: bytes, address: Address, nat64: Optional[Nat64] = None) -> None:
    """Send if there is a way; that there is none shows in the answer that does not come."""
    if sock.family == socket.AF_INET6 and ":" not in address[0]:
        address = (nat64.to_ipv6(address[0]) if nat64 else "::ffff:" + address[0], address[1])
    with contextlib.suppress(OSError):
        sock.sendto(datagram, address)


def plain_source(source: Any, nat64: Optional[Nat64] = None) -> Address:
    """What recvfrom gives, as an Address: IPv4 if it came by way of the NAT64."""
    host, port = plain(source)
    return nat64.to_ipv4(host) if nat64 else host, port


def is_readable(sock: socket.socket, seconds: float) -> bool:
    """Whether something has come within seconds. select() itself would not do: games may have a thousand descriptors."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def resolve(servers: Sequence[Address], ipv6: bool = True, nat64: Optional[Nat64] = None) -> List[Address]:
    """The IP addresses of servers, all of each to which there is a way; none of those whose name is unknown."""
    found: List[Address] = []
    for host, port in servers:
        with contextlib.suppress(OSError, UnicodeError):
            found += [plain(each[4]) for each in socket.getaddrinfo(host, port, 0 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)]
    if nat64:       # DNS64 gives a server's IPv4 address as IPv6 one
        found = [plain_source(address, nat64) for address in found]
    return [address for address in dict.fromkeys(found) if nat64 or own_address_towards(address)]


def own_address_towards(address: Address) -> Optional[str]:
    """From which of its addresses this machine reaches another, or None if there is no way. Connecting a UDP socket sends nothing, but has
    the system choose."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
    return None


def interface_addresses() -> List[str]:
    """The addresses of this machine's interfaces that are up and have a carrier: in a second LAN, or a VPN that is no way to the world, a
    neighbour is reached by them. Linux and macOS tell one IPv4 address of each interface, Linux all IPv6 ones; Windows by the host's own name."""
    found = ipv4_of_interfaces() + ipv6_of_interfaces()
    if sys.platform == "win32" or not found:
        with contextlib.suppress(OSError):
            found += [str(each[4][0]) for each in socket.getaddrinfo(socket.gethostname(), None, 0, socket.SOCK_DGRAM)]
    return list(dict.fromkeys(found))


def ipv4_of_interfaces() -> List[str]:
    try:
        import fcntl
    except ImportError:     # on Windows
        return []
    found: List[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):      # it has no IPv4 address
                flags, = struct.unpack_from("=H", fcntl.ioctl(probe, SIOCGIFFLAGS, request), 16)
                if flags & IFF_UP and flags & IFF_RUNNING:
                    found.append(socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]))
    return found


def ipv6_of_interfaces() -> List[str]:
    """From the kernel's table on Linux, whose columns are address, index, length of the prefix, scope, flags, name. Deprecated, tentative and
    failed addresses (flags 0x20, 0x40, 0x08) are left out."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        rows = [line.split() for line in table]
        return [str(ipaddress.IPv6Address(bytes.fromhex(row[0]))) for row in rows if not int(row[4], 16) & 0x68]
    return []
