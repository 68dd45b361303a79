"""What the server answers: bodies whose every field is checked, and refusals."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Optional

from .addresses import plain_ip
from .texts import line_of

LEAST_SECONDS, MOST_SECONDS = 0.1, 3600.0       # what a server may ask us to wait
MAX_TEXT = 1024                 # bytes of a text
MAX_IDENTIFIER = 250            # of a sessionId or sessionKey: USERNAME has room for two and a colon (RFC 8489 section 14.3)
MAX_CURSOR = 2 ** 63


class RendezvousError(Exception):
    """The server refused a call, or could not be reached (status 0). errors: the faults of the request by field; retry_after: seconds that
    the server asks to wait; has_advice: the text says what helps. What the server says is in them made harmless for a terminal."""

    has_advice = False

    def __init__(self, status: int, detail: str, errors: Optional[Dict[str, str]] = None, retry_after: float = 0) -> None:
        detail = line_of(detail)
        super().__init__(f"{detail} ({status})" if status else detail)
        self.status, self.detail, self.errors, self.retry_after = status, detail, errors or {}, retry_after


class PassingFailure(RendezvousError):
    """No answer (status 0), 429, 502, 503 or 504: the same call may succeed a little later. is_cut: a proxy, or who it was, ended it halfway."""

    is_cut = False


class RepeatedNotFound(RendezvousError):
    """404 to a call that was repeated because its answer was lost: the first try may have done it."""


class Body(Dict[str, Any]):
    """A JSON object of a server. RendezvousError from each method: the field is missing, or not as it should be, so this is another kind
    of server."""

    def __missing__(self, name: str) -> Any:
        raise RendezvousError(0, f"this is no rendezvous server: its answer has no {name}")

    def text(self, name: str) -> str:
        """A text that can be sent back."""
        value = self[name]
        require(is_text(value), name)
        return str(value)

    def identifier(self, name: str) -> str:
        """A sessionId or sessionKey: ASCII without spaces, as STUN takes it unchanged."""
        value = self.text(name)
        require(value.isascii() and value.isprintable() and " " not in value and len(value) <= MAX_IDENTIFIER, name)
        return value

    def seconds(self, name: str) -> float:
        """Seconds, from 0.1 to 3,600 whatever the server says."""
        value = self[name]
        require(isinstance(value, (int, float)) and not isinstance(value, bool) and value == value, name)
        return clamp(value)

    def whole(self, name: str) -> int:
        """A whole number that is not negative, such as a cursor."""
        value = self[name]
        require(is_whole(value, MAX_CURSOR), name)
        return int(value)

    def flag(self, name: str) -> bool:
        value = self[name]
        require(isinstance(value, bool), name)
        return bool(value)

    def members(self, name: str) -> List[Any]:
        """A list of anything: addresses are whatever the players agree on."""
        value = self[name]
        require(isinstance(value, list), name)
        return list(value)

    def objects(self, name: str) -> List[Body]:
        """A list of objects."""
        members = self.members(name)
        require(all(isinstance(each, dict) for each in members), name)
        return [Body(each) for each in members]

    def texts(self, name: str) -> List[str]:
        """A list of texts; empty if it is missing."""
        members = self.members(name) if name in self else []
        require(all(map(is_text, members)), name)
        return members

    def mapping(self, name: str) -> Dict[str, Any]:
        value = self[name]
        require(isinstance(value, dict), name)
        return dict(value)

    def ports(self, name: str) -> Optional[List[int]]:
        """A list of ports; None if it is missing, for older servers do not tell."""
        if name not in self:
            return None
        members = self.members(name)
        require(len(members) <= 8 and all(is_whole(each, 65535) and each for each in members), name)
        return members

    def ip(self, name: str) -> str:
        """An IP address; "" if it is missing."""
        if name not in self:
            return ""
        try:
            return str(plain_ip(self.text(name)))
        except ValueError:
            raise wrong(name) from None


def wrong(name: str) -> RendezvousError:
    return RendezvousError(0, f"this is no rendezvous server: the {name} of its answer is not as it should be")


def require(condition: bool, name: str) -> None:
    if not condition:
        raise wrong(name)


def is_text(value: Any) -> bool:
    """Whether a value is a text of bounded length, not empty, that can be encoded: JSON may hold halves of characters."""
    try:
        return isinstance(value, str) and 0 < len(value.encode("utf-8")) <= MAX_TEXT
    except UnicodeEncodeError:
        return False


def is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def clamp(seconds: float) -> float:
    return max(LEAST_SECONDS, min(MOST_SECONDS, seconds))


def parse(data: bytes) -> Any:
    """JSON. ValueError: it is none, or nested too deep."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
