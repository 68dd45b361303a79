"""One call to the server over HTTP, repeated while that makes sense."""

from __future__ import annotations

import contextlib
import ssl
import time
import urllib.parse
from typing import Any, Dict, NamedTuple, Optional, Tuple

import requests
import urllib3

from .addresses import Address, plain_ip
from .answers import Body, PassingFailure, RendezvousError, RepeatedNotFound, clamp, parse
from .deadline import Deadline
from .tcp import CONNECT_TIME, connect_early, new_session
from .texts import line_of

MAX_ANSWER = 1_000_000  # bytes of a body
MARGIN = 0.5            # seconds that an answer may be late to a call that is held for as long as its caller has time
LONGEST_WAIT = 600.0    # seconds for which servers are asked to hold a call at the most
SELF_SIGNED = "; if the server's certificate is self-signed, set REQUESTS_CA_BUNDLE to its file (PEM)"
PASSING = (429, 502, 503, 504)


class Reply(NamedTuple):
    """Status and body of an answer, and whether it says that the server let the call wait."""

    status: int
    body: Body
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
        self._own_session = session is None
        self._session = session or new_session()
        self._timeout, self._patience = timeout, patience
        self._longest_wait = LONGEST_WAIT       # seconds that a proxy between lets a call wait, as far as we know
        self._connected = False                 # a call was answered over a connection that may be there still

    def call(self, method: str, path: str, body: Optional[Dict[str, Any]] = None, wait: float = 0, within: Optional[float] = None) -> Reply:
        """The answer to a call that is repeated while patience lasts. The server may hold it for wait seconds (RFC 7240 section 4.3).
        within: seconds for all of it."""
        deadline = Deadline(within)
        patience: Optional[Deadline] = None     # from the first failure on: before that the server may have held the call
        pause, repeated = 0.1, False
        while True:
            held, began = max(0, int(min(wait, self._longest_wait, deadline.left() - MARGIN))), time.monotonic()
            try:
                reply = self._try(method, path, body, held, repeated, deadline)
            except PassingFailure as failure:
                repeated = repeated or not failure.status
                passed = time.monotonic() - began
                if failure.is_cut and held and passed > 1:      # a proxy does not let calls wait for so long
                    self._longest_wait = 0.8 * passed
                    continue
                patience = patience or Deadline(self._patience)
                rest = max(pause, failure.retry_after)
                if rest > min(patience.left(), deadline.left()):
                    raise
            else:
                self._connected = True
                self._longest_wait = min(LONGEST_WAIT, 1.1 * self._longest_wait)    # who cut a call may have been no proxy
                return reply
            time.sleep(rest)
            pause = min(2 * pause, 2.0)

    def connect(self, within: Optional[float] = None) -> None:
        """Make a connection for the next call, where there is none yet: that takes a round trip."""
        if self._own_session and not self._connected and not self._proxy():
            connect_early(self.address, min(self._timeout, Deadline(within).left()))

    def reconnect(self) -> None:
        """Use no connection of before: a router may have forgotten them."""
        self._session.close()

    def _try(self, method: str, path: str, body: Optional[Dict[str, Any]], held: int, repeated: bool, deadline: Deadline) -> Reply:
        """repeated: an earlier try may have reached the server. PassingFailure: to try again may help."""
        headers = {"Accept-Encoding": "identity", **({"Prefer": f"wait={held}"} if held else {})}
        left = max(0.01, deadline.left())
        connect = min(left, self._timeout if self._own_session else CONNECT_TIME)
        timeout: Any = urllib3.Timeout(connect=connect, read=self._timeout + held, total=left)
        try:
            with contextlib.closing(self._session.request(
                    method, self.base_url + path, json=body, headers=headers, timeout=timeout, allow_redirects=False, stream=True,
                    proxies={"http": "", "https": "", "all": ""} if is_this_machine(self.address[0]) else None)) as response:
                data = response.raw.read(MAX_ANSWER + 1, decode_content=False)
        except (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL) as error:
            raise RendezvousError(0, f"this cannot be sent: {error}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from None
        if len(data) > MAX_ANSWER:
            raise RendezvousError(0, f"{self.base_url} answers with more than {MAX_ANSWER} bytes")
        if response.status_code >= 300:
            raise refusal(response, data, repeated, self._by_proxy())
        return Reply(response.status_code, body_of(response, data), "Preference-Applied" in response.headers)

    def _unreachable(self, error: Exception) -> PassingFailure:
        cause = innermost(error)
        has_advice = is_about_trust(error, cause)
        failure = PassingFailure(0, f"cannot reach {self.base_url}{self._by_proxy()}: {plain_reason(cause)}{SELF_SIGNED if has_advice else ''}")
        failure.has_advice = has_advice
        failure.is_cut = isinstance(cause, (ConnectionResetError, urllib3.exceptions.IncompleteRead))     # what ends without an answer is among these
        return failure

    def _proxy(self) -> str:
        """The proxy that the environment (HTTP_PROXY and its like) has between us and the server, without its password."""
        if is_this_machine(self.address[0]) or not self._session.trust_env:
            return ""
        parts = urllib.parse.urlsplit(requests.utils.select_proxy(self.base_url, requests.utils.get_environ_proxies(self.base_url)) or "")
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else parts.path

    def _by_proxy(self) -> str:
        return f" by the proxy {self._proxy()} (HTTP_PROXY, HTTPS_PROXY, NO_PROXY)" if self._proxy() else ""


def is_this_machine(host: str) -> bool:
    """Whether a host is this machine, as far as can be told without asking anybody: loopback addresses and localhost (RFC 6761 section 6.3)."""
    try:
        return bool(plain_ip(host).is_loopback)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def body_of(response: requests.Response, data: bytes) -> Body:
    """The object that an answer holds."""
    try:
        return Body(parse(data) if data else {})
    except (ValueError, TypeError):
        raise RendezvousError(response.status_code, f"{response.url} does not answer as a rendezvous server does") from None


def refusal(response: requests.Response, data: bytes, repeated: bool, by_proxy: str) -> RendezvousError:
    """The error that a problem document stands for (RFC 9457), or any other answer that is no success."""
    status, location = response.status_code, response.headers.get("Location")
    detail, errors = problem_of(data)
    if status < 400:
        detail = f"{response.url} sends us elsewhere, where we do not go: to {location}"
    elif not detail:
        detail = f"{response.url} answers {response.reason}{by_proxy}"
    kind = RendezvousError
    if status in PASSING:
        kind = PassingFailure
    elif status == 404 and repeated:
        kind = RepeatedNotFound
    failure = kind(status, detail, errors, seconds_of(response.headers.get("Retry-After", "")))
    if isinstance(failure, PassingFailure):
        failure.is_cut = status in (502, 504)
    return failure


def problem_of(data: bytes) -> Tuple[str, Dict[str, str]]:
    """Detail and errors of a problem document; "" and none if it is something else."""
    try:
        problem = parse(data)
        errors = problem.get("errors", {})
        return str(problem["detail"]), {line_of(field): line_of(rule) for field, rule in errors.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", {}


def seconds_of(text: str) -> float:
    """Seconds of a Retry-After; 0 if it is a date or missing, which leaves the pause to us."""
    return clamp(float(text)) if text.isascii() and text.isdigit() else 0.0


def innermost(error: BaseException) -> BaseException:
    """The cause of a failed call: requests wraps it several times over."""
    while True:
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None:
            return error
        error = inner


def is_about_trust(error: Exception, cause: BaseException) -> bool:
    """Whether a certificate cannot be verified, or the file of those that are trusted cannot be read. cause: the innermost one of the error."""
    is_unreadable = isinstance(error, requests.exceptions.SSLError) and getattr(cause, "library", "") != "SSL"
    return isinstance(cause, ssl.SSLCertVerificationError) or is_unreadable or "CA certificate bundle" in str(cause)


def plain_reason(cause: BaseException) -> str:
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
