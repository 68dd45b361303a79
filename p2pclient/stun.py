"""The codec of STUN (RFC 8489) as far as Binding goes, apart from any socket; turn.py has what TURN adds."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import struct
import zlib
from typing import Dict, Iterable, NamedTuple, Optional, Tuple, Union

from .addresses import Address, parse_candidate, plain_ip, text_of

COOKIE = 0x2112A442
REQUEST, INDICATION, SUCCESS, ERROR = 0x0001, 0x0011, 0x0101, 0x0111        # Binding, by class
USERNAME, MESSAGE_INTEGRITY, ERROR_CODE, XOR_MAPPED_ADDRESS = 0x0006, 0x0008, 0x0009, 0x0020
PRIORITY, USE_CANDIDATE, FINGERPRINT, ICE_CONTROLLED, ICE_CONTROLLING = 0x0024, 0x0025, 0x8028, 0x8029, 0x802A     # RFC 8445 section 20.1
P2P = 0xD7A2            # our own, comprehension-optional, of the range for designated experts (RFC 8489 section 18.3): see checks.py
ROLE_CONFLICT = 487     # RFC 8445 section 7.3.1.1
MAX_MESSAGE, MAX_ATTRIBUTES = 1500, 16      # bytes and attributes of a message that is looked at

Key = Union[str, bytes]     # a sessionKey, or what TURN makes of a password


class Message(NamedTuple):
    """A STUN message. attributes: the first of each kind up to MESSAGE-INTEGRITY, as what follows that is not protected;
    signed: the bytes that MESSAGE-INTEGRITY covers, or nothing; fingerprint: it has one, and it is right."""

    kind: int
    transaction: bytes
    attributes: Dict[int, bytes]
    signed: bytes
    fingerprint: bool


def encode(kind: int, transaction: bytes, attributes: Iterable[Tuple[int, bytes]] = (), key: Optional[Key] = None) -> bytes:
    """A STUN message with FINGERPRINT, and with MESSAGE-INTEGRITY if there is a key."""
    body = b"".join(attribute(*each) for each in attributes)
    if key is not None:
        body += attribute(MESSAGE_INTEGRITY, integrity(head(kind, len(body) + 24, transaction) + body, key))
    message = head(kind, len(body) + 8, transaction) + body
    return message + attribute(FINGERPRINT, fingerprint(message))


def decode(datagram: bytes) -> Optional[Message]:
    """The message, or None for what is not STUN: wrong first bits, cookie or lengths, a wrong FINGERPRINT; nor is one that is larger than
    any of ours, or has more attributes."""
    if not 20 <= len(datagram) <= MAX_MESSAGE or len(datagram) % 4 or datagram[0] > 3:      # RFC 7983: 0 to 3 is STUN
        return None
    kind, length, cookie = struct.unpack_from(">HHI", datagram)
    if length != len(datagram) - 20 or cookie != COOKIE:
        return None
    transaction, signed, position = datagram[8:20], b"", 20
    attributes: Dict[int, bytes] = {}
    count = 0
    while position < len(datagram):
        count += 1
        name, size = struct.unpack_from(">HH", datagram, position)
        value = datagram[position + 4:position + 4 + size]
        if len(value) < size or count > MAX_ATTRIBUTES:
            return None
        if name == FINGERPRINT:
            right = position + 8 == len(datagram) and value == fingerprint(datagram[:position])
            return Message(kind, transaction, attributes, signed, True) if right else None
        if not signed:
            attributes.setdefault(name, value)
            if name == MESSAGE_INTEGRITY:
                signed = head(kind, position + 4, transaction) + datagram[20:position]
        position += 4 + size + -size % 4
    return Message(kind, transaction, attributes, signed, False)


def authentic(message: Message, key: Key) -> bool:
    """Whether who sent it knows the key."""
    return bool(message.signed) and hmac.compare_digest(message.attributes[MESSAGE_INTEGRITY], integrity(message.signed, key))


def head(kind: int, length: int, transaction: bytes) -> bytes:
    return struct.pack(">HHI", kind, length, COOKIE) + transaction


def attribute(name: int, value: bytes) -> bytes:
    return struct.pack(">HH", name, len(value)) + value + bytes(-len(value) % 4)


def integrity(signed: bytes, key: Key) -> bytes:
    """RFC 8489 section 14.5: HMAC-SHA1 over the message so far, its length counting MESSAGE-INTEGRITY already."""
    return hmac.new(key.encode("utf-8") if isinstance(key, str) else key, signed, hashlib.sha1).digest()


def fingerprint(message: bytes) -> bytes:
    """RFC 8489 section 14.7, over the message so far, its length counting FINGERPRINT already."""
    return struct.pack(">I", zlib.crc32(message) ^ 0x5354554E)


def pack_address(address: Address, transaction: bytes) -> bytes:
    """The value of XOR-MAPPED-ADDRESS (RFC 8489 section 14.2)."""
    ip = plain_ip(address[0])
    mask = struct.pack(">I", COOKIE) + transaction
    return struct.pack(">HH", 1 if ip.version == 4 else 2, address[1] ^ COOKIE >> 16) + bytes(a ^ b for a, b in zip(ip.packed, mask))


def unpack_address(value: bytes, transaction: bytes) -> Optional[Address]:
    """The address in an XOR-MAPPED-ADDRESS, or None if it is malformed."""
    if len(value) not in (8, 20) or value[1] != (1 if len(value) == 8 else 2):
        return None
    mask = struct.pack(">I", COOKIE) + transaction
    ip = ipaddress.ip_address(bytes(a ^ b for a, b in zip(value[4:], mask)))
    return str(ip), struct.unpack(">H", value[2:4])[0] ^ COOKIE >> 16


def error_code(number: int, reason: str) -> Tuple[int, bytes]:
    """An ERROR-CODE attribute (RFC 8489 section 14.8)."""
    return ERROR_CODE, struct.pack(">HBB", 0, number // 100, number % 100) + reason.encode("ascii")


def error_number(message: Message) -> int:
    """The number of a message's ERROR-CODE; 0 if it has none."""
    value = message.attributes.get(ERROR_CODE, b"")
    return 100 * (value[2] & 7) + value[3] if len(value) >= 4 else 0


def mapped_address(message: Message) -> Optional[Address]:
    """The address that a Binding success tells."""
    if message.kind != SUCCESS or XOR_MAPPED_ADDRESS not in message.attributes:
        return None
    address = unpack_address(message.attributes[XOR_MAPPED_ADDRESS], message.transaction)
    return address and parse_candidate(text_of(address))
