"""Why there is no connection, and what a NAT means for one, in words."""

from __future__ import annotations

from typing import Any, Iterable

from .addresses import private_network, text_of
from .candidates import Candidates, about_peer
from .checks import NO_WAY, Session

RELAY = "What would help: a port forwarded on the router of one of you, IPv6 on both sides, or a relay (TURN)."
NAT_KINDS = {
    "none": "there is no NAT between here and this server",
    "endpoint-independent": "the NAT keeps one port for all destinations: good",
    "symmetric": "the NAT gives each destination another port (symmetric): only hosts and guests with an easier one can connect with you",
    "unknown": "there is a NAT; with a second --stun server its kind can be told",
    "no answer": "no STUN server answers",
    "not asked": "no STUN server was asked",
}


class ConnectFailed(Exception):
    """No way to the other player was found. reason: what was seen; advice: what would help."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}. {advice}".strip(" ") if advice else reason)
        self.reason, self.advice = reason, advice


def describe(candidates: Candidates) -> str:
    """Candidates in a line, and the kind of NAT as far as STUN has told it."""
    addresses = f"candidates {', '.join(candidates.addresses) or 'none'}"
    return f"{addresses}; {describe_nat(candidates)}" if candidates.mapped else addresses


def describe_nat(candidates: Candidates) -> str:
    if candidates.mapped and private_network(candidates.mapped[0]):
        return "the STUN server is behind the same router, so the kind of NAT is unknown; use one outside (--stun)"
    return NAT_KINDS[candidates.nat]


def without_stun(candidates: Candidates) -> str:
    """What follows for a player if no STUN server has answered; "" if one has."""
    if candidates.mapped:
        return ""
    return f"{NAT_KINDS[candidates.nat]}, so players outside of this network may not get through to this one; " \
           "open the server's port for UDP, or name another STUN server (--stun)"


def why_not(session: Session, own: Candidates, published: Iterable[Any]) -> ConnectFailed:
    """Why a guest did not reach its host, as far as can be told from what was seen."""
    told = about_peer(list(published))[1]
    yours, hosts = own.nat == "symmetric", told == "symmetric"
    advice = RELAY
    if session.over != NO_WAY:
        reason, advice = session.over, ""
    elif own.nat == "no answer":
        reason = "no UDP datagram comes back to you, not even from the STUN server"
        advice = "A firewall or router seems to block UDP: try another network, or a relay (TURN)."
    elif told == "no answer":
        reason = "the host never answered, nor does any STUN server answer it"
        advice = "Its firewall or router seems to block UDP: it might try another network, or a relay (TURN)."
    elif yours and hosts:
        reason = "both routers give each destination another port (symmetric NAT), so neither of you can be told where to send"
    elif yours or hosts:
        whose, others = ("your", "the host's") if yours else ("the host's", "your")
        reason = f"{whose} router gives each destination another port (symmetric NAT), and {others} router lets in only ports it knows"
    elif session.heard:
        reason = "the host's datagrams came, but yours did not arrive"
    else:
        reason = "the host never answered"
        advice = f"It may be gone, or its network may block UDP. {advice}"
    seen = f"you: {NAT_KINDS[own.nat]}; {session.sent} checks to {', '.join(map(text_of, session.remotes)) or 'no usable address'}; " \
           f"heard from {len(session.heard)} of these; the host: {NAT_KINDS.get(told, 'tells nothing of its NAT')}"
    return ConnectFailed(f"{reason} ({seen})", advice)
