"""One call to the server over HTTP, repeated while that makes sense."""

from __future__ import annotations

import time
import urllib.parse
from typing import Any, Dict, NamedTuple, Optional

import requests

from .addresses import Address
from .deadline import Deadline


class RendezvousError(Exception):
    """The server refused a call, or could not be reached (status 0). errors: the faults of the request by field; retry_after: seconds that
    the server asks to wait."""

    def __init__(self, status: int, detail: str, errors: Optional[Dict[str, str]] = None, retry_after: float = 0) -> None:
        super().__init__(f"{detail} ({status})" if status else detail)
        self.status, self.detail, self.errors, self.retry_after = status, detail, errors or {}, retry_after


class PassingFailure(RendezvousError):
    """No answer (status 0), a proxy's word that there is none (502, 504), 429 or 503: the same call may succeed a little later."""


class RepeatedNotFound(RendezvousError):
    """404 to a call that was repeated because its answer was lost: the first try may have done it."""


class Reply(NamedTuple):
    """Status and body of an answer, and whether it says that the server let the call wait."""

    status: int
    body: Any
    waited: bool


class Transport:
    """JSON over HTTP with one server, from any thread. Arguments and errors are those of RendezvousClient."""

    def __init__(self, base_url: str, session: Optional[requests.Session], timeout: float, patience: float) -> None:
        if "://" not in base_url:
            base_url = "http://" + base_url
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not the URL of a server, such as http://example.net:8000")
        self.base_url = base_url.rstrip("/")
        self.address: Address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._session = session or requests.Session()
        self._timeout, self._patience = timeout, patience

    def call(self, method: str, path: str, body: Optional[Dict[str, Any]] = None, wait: float = 0) -> Reply:
        """The answer to a call that is repeated while patience lasts. The server may hold it for wait seconds (RFC 7240 section 4.3)."""
        patience: Optional[Deadline] = None     # from the first failure on: before that the server may have held the call
        pause, repeated = 0.1, False
        while True:
            try:
                return self._try(method, path, body, wait, repeated)
            except PassingFailure as failure:
                repeated = repeated or failure.status in (0, 502, 504)
                patience = patience or Deadline(self._patience)
                rest = max(pause, failure.retry_after)
                if rest > patience.left():
                    raise
            time.sleep(rest)
            pause = min(2 * pause, 2.0)

    def _try(self, method: str, path: str, body: Optional[Dict[str, Any]], wait: float, repeated: bool) -> Reply:
        """repeated: an earlier try may have reached the server. PassingFailure: to try again may help."""
        headers = {"Prefer": f"wait={int(wait)}"} if wait >= 1 else {}
        try:
            response = self._session.request(method, self.base_url + path, json=body, headers=headers, timeout=self._timeout + wait,
                                             allow_redirects=False)
        except (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL) as error:
            raise RendezvousError(0, f"this cannot be sent: {error}") from None
        except requests.RequestException as error:
            raise PassingFailure(0, f"cannot reach {self.base_url}: {plain_reason(error)}") from None
        if response.status_code >= 300:
            raise refusal(response, repeated)
        return Reply(response.status_code, json_of(response), "Preference-Applied" in response.headers)


def json_of(response: requests.Response) -> Body:
    try:
        return Body(response.json() if response.content else {})
    except (ValueError, TypeError):
        raise RendezvousError(response.status_code, f"{response.url} does not answer as a rendezvous server does") from None


def refusal(response: requests.Response, repeated: bool) -> RendezvousError:
    """The error that a problem document stands for (RFC 9457), or any other answer that is no success."""
    try:
        problem = response.json()
        detail, errors = str(problem["detail"]), problem.get("errors")
    except (ValueError, KeyError, TypeError):
        detail, errors = f"{response.url} answers {response.reason}", None
    kind = RendezvousError
    if response.status_code in (429, 502, 503, 504):
        kind = PassingFailure
    elif response.status_code == 404 and repeated:
        kind = RepeatedNotFound
    return kind(response.status_code, detail, errors, number(response.headers.get("Retry-After", "")))


def number(text: str) -> float:
    """Seconds of a Retry-After; 0 if it is a date or missing, which leaves the pause to us."""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def plain_reason(error: BaseException) -> str:
    """What the innermost cause of a failed call says: requests wraps it several times over."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Body(Dict[str, Any]):
    """A JSON object of a server. RendezvousError: it has not the member that is asked for, so it is of another kind of server."""

    def __missing__(self, name: str) -> Any:
        raise RendezvousError(0, f"this is no rendezvous server: its answer has no {name}")
