"""Why there is no connection, and what a NAT means for one, in words."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable

from .addresses import private_network, text_of
from .candidates import Candidates, PeerCandidates, read_published
from .checks import NO_WAY, Session
from .prediction import BLOCK, RANDOM, SEQUENTIAL
from .probing import Methods, way_of

RELAY = "What would help: a port forwarded on the router of one of you, IPv6 on both sides, or a relay (TURN)."
PROBING = "What would help: probing on both sides (--probing), a port forwarded on the router of one of you, IPv6 on both sides, or a relay (TURN)."
PREDICTION = {
    SEQUENTIAL: "they can be predicted, so players behind port-restricted routers, and behind others that go in sequence, can connect with you all the same",
    BLOCK: "players behind easier routers may find one in a small block, and probing (--probing on both sides) finds one in a larger block too, "
           "or where the other router goes in sequence or has a block as well",
    RANDOM: "prediction cannot help; probing (--probing on both sides) can, with players behind easier routers",
}
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


def describe_prediction(candidates: Candidates) -> str:
    """How a symmetric NAT allocates ports, and whether prediction or probing can help; "" for another NAT."""
    if candidates.nat != "symmetric":
        return ""
    if candidates.ports is None:
        return "how the router allocates ports could not be told"
    return f"the router gives new destinations {candidates.ports.describe()}: {PREDICTION[candidates.ports.kind]}"


def without_stun(candidates: Candidates) -> str:
    """What follows for a player if no STUN server has answered; "" if one has."""
    if candidates.mapped:
        return ""
    reason, advice = NAT_KINDS[candidates.nat], "open the server's port for UDP, or name another STUN server (--stun)"
    if candidates.nat == "not asked":
        reason, advice = "there is no STUN server", "name one (--stun HOST:PORT)"
    return f"{reason}, so players outside of this network may not get through to this one; {advice}"


def would_probing_help(own: Candidates, peer: PeerCandidates) -> bool:
    """Whether there would be a way if both sides asked for probing, and they have not."""
    way = way_of(own, dataclasses.replace(peer, probing=True), Methods(probing=True))
    return way is not None and way.is_probing and not (own.probing and peer.probing)


def why_not(session: Session, own: Candidates, published: Iterable[Any]) -> ConnectFailed:
    """Why a guest did not reach its host, as far as can be told from what was seen."""
    host = read_published(published, own, loopback=False)
    yours, hosts = own.nat == "symmetric", host.nat == "symmetric"
    advice = PROBING if would_probing_help(own, host) else RELAY
    if session.over != NO_WAY:
        reason, advice = session.over, ""
    elif own.nat == "no answer":
        reason = "no UDP datagram comes back to you, not even from the STUN server"
        advice = "A firewall or router seems to block UDP: try another network, or a VPN."
    elif host.nat == "no answer":
        reason = "the host never answered, nor does any STUN server answer it"
        advice = "Its firewall or router seems to block UDP: it might try another network, or a VPN."
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
    yours_told, hosts_told = (f", {ports.describe()}" if ports and is_hard else "" for ports, is_hard in ((own.ports, yours), (host.ports, hosts)))
    checked = f"{session.sent} checks to {', '.join(map(text_of, session.remotes)) or 'no usable address'}; heard from {len(session.heard)} of these"
    seen = f"you: {NAT_KINDS[own.nat]}{yours_told}; {checked}; the host: {NAT_KINDS.get(host.nat, 'tells nothing of its NAT')}{hosts_told}"
    return ConnectFailed(f"{reason} ({seen})", advice)
