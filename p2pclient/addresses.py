"""Addresses as the socket module has them, and as players tell them each other: candidates, "ip:port" and "[ipv6]:port"."""

from __future__ import annotations

import ipaddress
from typing import Any, Optional, Tuple

Address = Tuple[str, int]       # IP address, port; an IPv4-mapped IPv6 address is written as IPv4
Sending = Tuple[bytes, Address]     # a datagram, and where it goes


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
    """The address that a candidate stands for; None if it is of another form, or not to be sent to whoever asks for it:
    multicast, broadcast and unspecified addresses and ports below 1024 (RFC 8445 section 19.5.1)."""
    host, _, port = str(text).rpartition(":")
    if "%" in host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1024 <= int(port) <= 65535):
        return None     # a zone (%) means something to one machine alone
    try:
        ip = plain_ip(host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host)
    except ValueError:
        return None
    return None if ip.is_multicast or ip.is_unspecified or str(ip) == "255.255.255.255" else (str(ip), int(port))


def is_loopback(candidate: Any) -> bool:
    address = parse_candidate(candidate)
    return address is not None and bool(plain_ip(address[0]).is_loopback)
