"""Addresses as the socket module has them, and as players tell them each other: candidates, "ip:port" and "[ipv6]:port"."""

from __future__ import annotations

import ipaddress
from typing import Any, Optional, Tuple

Address = Tuple[str, int]       # IP address, port; an IPv4-mapped IPv6 address is written as IPv4
Sending = Tuple[bytes, Address]     # a datagram, and where it goes

WEB_PORTS = (80, 443)       # a host is there on purpose, to be reached from networks that let nothing else out
# Private and shared address space (RFC 1918, RFC 6598, RFC 4193), and how many leading bits two addresses there that may be neighbours share:
# we do not know each other's netmasks. ipaddress's is_private counts more, such as the ranges for documentation.
PRIVATE = [(ipaddress.ip_network(text), bits) for text, bits in (
    ("10.0.0.0/8", 16), ("172.16.0.0/12", 16), ("192.168.0.0/16", 24), ("100.64.0.0/10", 16), ("fc00::/7", 48))]


class Relayed(Tuple[str, int]):
    """The address of a peer that is reached by way of our own relay. It equals no address that is reached directly, not even the same one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Relayed) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(("relayed", *self))


def plain_ip(text: str) -> Any:
    """The IP address; an IPv4-mapped IPv6 address is the IPv4 one. ValueError if it is none."""
    ip = ipaddress.ip_address(text)
    return getattr(ip, "ipv4_mapped", None) or ip


def plain(address: Any) -> Address:
    """What recvfrom gives, as an Address."""
    return address[0][7:] if address[0].startswith("::ffff:") else address[0], address[1]


def text_of(address: Address) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def parse_candidate(text: Any) -> Optional[Address]:
    """The address that a candidate stands for; None if it is of another form, or not to be sent to whoever asks for it: multicast, broadcast,
    unspecified and link-local addresses, and ports below 1024 but for those of the web (RFC 8445 section 19.5.1)."""
    host, _, port = str(text).rpartition(":")
    if "%" in host or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        return None     # a zone (%) means something to one machine alone
    if int(port) < 1024 and int(port) not in WEB_PORTS:
        return None
    try:
        ip = plain_ip(host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host)
    except ValueError:
        return None
    if ip.is_multicast or ip.is_unspecified or ip.is_link_local or str(ip) == "255.255.255.255":
        return None
    return str(ip), int(port)


def is_loopback(candidate: Any) -> bool:
    address = parse_candidate(candidate)
    return address is not None and bool(plain_ip(address[0]).is_loopback)


def private_network(host: str) -> str:
    """The network of a private address as far as it can be told from the address alone, such as "192.168.7.0/24"; "" for other addresses."""
    ip = plain_ip(host)
    for network, bits in PRIVATE:
        if ip in network:
            return str(ipaddress.ip_network((ip, bits), strict=False))
    return ""
