"""A public UDP port from one's own router: UPnP Internet Gateway Device, versions 1 and 2.

Only the default gateway is believed: an answer to the search counts if it came from its address, and its URL, and that of the service, must be
there. What it sends is read up to a limit of bytes and of time, redirects are not followed. XML is not parsed: three kinds of elements are looked
for as text, so there are no entities that could be expanded and no depth; the expressions take time in proportion to the text.
"""

from __future__ import annotations

import http.client
import re
import secrets
import socket
import urllib.parse
from typing import List, Optional

from .portmap import LIFETIME, Mapping, Place, first_answer
from .sockets import send_to
from .tcp import TimedResponse

SSDP = ("239.255.255.250", 1900)
SEARCHES = (0.5, 1.5)       # seconds that each of two searches has; a device answers within MX = 1
HTTP_TIME = 2.0             # seconds for a connection, and for an answer
MAX_ANSWER = 64 * 1024      # bytes of an answer that are read
MAX_SERVICES = 3            # of one device that are tried: a router with a modem has WANIPConnection and WANPPPConnection, and uses one
ATTEMPTS = 4                # to find a free port
ONLY_PERMANENT, CONFLICT = 725, 718     # errors of AddPortMapping
UNREACHABLE = (OSError, http.client.HTTPException, ValueError)

SEARCH = 'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: {}\r\n\r\n'
DEVICES = [f"urn:schemas-upnp-org:device:InternetGatewayDevice:{version}" for version in (1, 2)]
LOCATION = re.compile(rb"^location:[ \t]*(http://[!-~]{1,512})[ \t]*\r?$", re.I | re.M)
SERVICE_TYPE = re.compile(r"<serviceType>\s*(urn:schemas-upnp-org:service:WAN(?:IP|PPP)Connection:[12])\s*</serviceType>")
CONTROL_URL = re.compile(r"<controlURL>\s*([!-;=-~]{1,512})\s*</controlURL>")
EXTERNAL_ADDRESS = re.compile(r"<NewExternalIPAddress>\s*([\d.]{7,15})\s*</NewExternalIPAddress>")
ERROR_CODE = re.compile(r"<errorCode>\s*(\d{3})\s*</errorCode>")
ENVELOPE = """<?xml version="1.0"?>
<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/">\
<s:Body><u:{action} xmlns:u="{service}">{arguments}</u:{action}></s:Body></s:Envelope>"""


class Refused(Exception):
    """The router answers with an error. code: UPnP's, or 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"error {code}")
        self.code = code


class HttpConnection(http.client.HTTPConnection):
    response_class = TimedResponse


class Service:
    """The part of a router that maps ports. kind: its URN; url: where it is controlled; own: this machine's address."""

    def __init__(self, kind: str, url: str, own: str) -> None:
        self.kind, self.url, self._own = kind, url, own

    def map(self, port: int, outside: int) -> Mapping:
        """A mapping of our port, to the public port outside if that is free. AddPortMapping is in both versions. Refused; one of UNREACHABLE."""
        found, lifetime = EXTERNAL_ADDRESS.search(self._call("GetExternalIPAddress")), LIFETIME
        if not found:
            raise Refused(0)
        for _ in range(ATTEMPTS):
            try:
                self._call("AddPortMapping", NewRemoteHost="", NewExternalPort=outside, NewProtocol="UDP", NewInternalPort=port, NewEnabled=1,
                           NewInternalClient=self._own, NewPortMappingDescription="p2pclient", NewLeaseDuration=lifetime)
                return Mapping(found[1], outside, LIFETIME)
            except Refused as refusal:
                if refusal.code == CONFLICT:
                    outside = 49152 + secrets.randbelow(16384)
                elif refusal.code == ONLY_PERMANENT and lifetime:
                    lifetime = 0
                else:
                    raise
        raise Refused(CONFLICT)

    def unmap(self, outside: int) -> None:
        """Refused; one of UNREACHABLE."""
        self._call("DeletePortMapping", NewRemoteHost="", NewExternalPort=outside, NewProtocol="UDP")

    def _call(self, action: str, **arguments: object) -> str:
        """What an action answers."""
        body = ENVELOPE.format(action=action, service=self.kind, arguments="".join(f"<{name}>{value}</{name}>" for name, value in arguments.items()))
        headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{self.kind}#{action}"', "Connection": "close"}
        return fetch(self.url, "POST", body, headers)


class Upnp:
    """The router's Internet Gateway Device, which is looked for when it is first asked."""

    name = "UPnP"

    def __init__(self, place: Place, port: int) -> None:
        self._place, self._port = place, port
        self._service: Optional[Service] = None

    def ask(self, outside: int) -> Optional[Mapping]:
        """A mapping of our port, to the public port outside if that is free. OSError."""
        for service in [self._service] if self._service else self._find():
            try:
                mapping = service.map(self._port, outside)
            except (Refused, *UNREACHABLE):
                continue
            self._service = service
            return mapping
        return None

    def give_back(self, outside: int) -> None:
        """OSError."""
        try:
            if self._service:
                self._service.unmap(outside)
        except (Refused, *UNREACHABLE) as error:
            raise OSError(str(error)) from None

    def _find(self) -> List[Service]:
        url = search(self._place)
        try:
            return services_in(fetch(url), url, self._place) if url else []
        except (Refused, *UNREACHABLE):
            return []


def search(place: Place) -> Optional[str]:
    """The URL of the router's description. Asked for by multicast, in the network of the router alone, and, as some prefer, of the router itself. OSError."""
    def read(answer: bytes, source: str) -> Optional[bytes]:
        found = LOCATION.search(answer)
        return found[1] if found and source == place.router and is_at(found[1].decode("ascii"), place.router) else None

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((place.own, 0))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(place.own))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)     # UPnP Device Architecture 1.1, section 1.3.2
        for seconds in SEARCHES:
            for device in DEVICES:
                for host in (SSDP[0], place.router):
                    send_to(sock, SEARCH.format(device).encode(), (host, SSDP[1]))
            location = first_answer(sock, seconds, read)
            if location:
                return location.decode("ascii")
    return None


def is_at(url: str, router: str) -> bool:
    """Whether a URL leads to the router, and nowhere else: what calls us elsewhere would have us attack others (CVE-2020-12695)."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme == "http" and parts.hostname == router and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False


def services_in(description: str, location: str, place: Place) -> List[Service]:
    """The services of a description that map ports, WANIPConnection first, and of the later version."""
    found = []
    for part in description.split("<service>")[1:]:
        part = part.partition("</service>")[0]
        kind, control = SERVICE_TYPE.search(part), CONTROL_URL.search(part)
        url = urllib.parse.urljoin(location, control[1].replace("&amp;", "&")) if control else ""
        if kind and is_at(url, place.router):
            found.append(Service(kind[1], url, place.own))
    return sorted(found, key=lambda service: ("WANPPP" in service.kind, -int(service.kind[-1])))[:MAX_SERVICES]


def fetch(url: str, method: str = "GET", body: Optional[str] = None, headers: Optional[dict[str, str]] = None) -> str:
    """The text of an answer, as far as its first 64 KB. Refused; one of UNREACHABLE."""
    parts = urllib.parse.urlsplit(url)
    connection = HttpConnection(parts.hostname or "", parts.port or 80, timeout=HTTP_TIME)
    try:
        connection.request(method, urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), body, headers or {"Connection": "close"})
        response = connection.getresponse()
        text = response.read(MAX_ANSWER).decode("utf-8", "replace")
    finally:
        connection.close()
    if response.status != 200:
        error = ERROR_CODE.search(text)
        raise Refused(int(error[1]) if error else 0)
    return text
