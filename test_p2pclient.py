"""The tests of p2pclient and of the simulators: its parts first, then the whole with real servers and processes. Traffic goes to loopback only.

The sections follow the client's files.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import hmac
import ipaddress
import itertools
import json
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import pytest

import p2pclient
import p2pserver
from p2pclient import __main__ as doctor
from p2pclient import (
    addresses,
    candidates,
    channel,
    checklist,
    checks,
    diagnosis,
    early,
    forwarding,
    games,
    pacing,
    portmap,
    prediction,
    presence,
    probing,
    relay,
    sockets,
    stun,
    tcp,
    transport,
    turn,
    upnp,
    whereabouts,
)
from test_p2pserver import ROOT, WAIT, certificate, no_thread_stays, wait_until  # noqa: F401


@pytest.fixture(scope="module")
def stop_server():
    """Has servers stopped, each of which takes a moment, while the next tests run."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stopping = []
        yield lambda server: stopping.append(pool.submit(server.stop))
        for each in stopping:
            each.result()


@pytest.fixture
def start_server(stop_server):
    """Starts servers on loopback, and stops them after the test."""
    servers = []

    def start(**values):
        server = p2pserver.open_server(p2pserver.Settings(**{"host": "127.0.0.1", "port": 0, "poll_after": 0.1, **values}))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        stop_server(server)


def url_of(server):
    return f"http://127.0.0.1:{server.server_port}"


# ---- STUN -----------------------------------------------------------------------------------------------------------

KEY = "VOkJxbRl1RmTxUk/WvJxBt"      # the password of RFC 5769's sections 2.1 to 2.3
RFC5769 = {name: bytes.fromhex(text) for name, text in {
    "request": """000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932ff9b151263b36
                  000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf""",
    "response over IPv4": """0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643
                             000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96""",
    "response over IPv6": """010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9
                             00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c""",
    "request with long-term key": """000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382afe382b900000015001c662f2f3439396b393534
                                     64364f4c33346f4c394653547679363473410014000b6578616d706c652e6f72670000080014f67024656dd64a3e02b8e0712e85c9a28ca89666""",
}.items()}


@pytest.mark.parametrize("name", ["request", "response over IPv4", "response over IPv6"])
def test_a_vector_of_rfc_5769_is_authentic_with_its_key_alone(name):
    message = stun.decode(RFC5769[name])
    assert message.fingerprint
    assert stun.authentic(message, KEY)
    assert not stun.authentic(message, KEY + "x")


def test_the_long_term_vector_of_rfc_5769_has_the_integrity_that_its_key_gives():
    message = stun.decode(RFC5769["request with long-term key"])
    key = hashlib.md5("マトリックス:example.org:TheMatrIX".encode()).digest()
    assert message.attributes[stun.USERNAME].decode() == "マトリックス"
    assert stun.authentic(message, key) and not stun.authentic(message, key + b"x")


@pytest.mark.parametrize("name, address", [("response over IPv4", ("192.0.2.1", 32853)),
                                           ("response over IPv6", ("2001:db8:1234:5678:11:2233:4455:6677", 32853))])
def test_the_mapped_address_of_a_vector_is_that_of_rfc_5769(name, address):
    assert stun.mapped_address(stun.decode(RFC5769[name])) == address


@pytest.mark.parametrize("address", [("192.0.2.1", 1), ("2001:db8::1", 65535)])
def test_an_address_survives_packing(address):
    transaction = bytes(range(12))
    assert stun.unpack_address(stun.pack_address(address, transaction), transaction) == address


def test_every_flipped_bit_of_a_check_is_noticed():
    check = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session")], "key")
    for bit in range(8 * len(check)):
        flipped = bytearray(check)
        flipped[bit // 8] ^= 1 << bit % 8
        message = stun.decode(bytes(flipped))
        assert message is None or not message.fingerprint or not stun.authentic(message, "key"), bit


@pytest.mark.parametrize("junk", [b"", b"\0" * 19, b"hello, world, this is a game", RFC5769["request"][:-4], RFC5769["request"] + b"\0\0\0\0",
                                  b"\x40" + RFC5769["request"][1:], RFC5769["request"][:4] + b"\0\0\0\0" + RFC5769["request"][8:],
                                  struct.pack(">HHI12sHH", 1, 4, 0x2112A442, b"", 6, 9)],
                         ids=["empty", "short", "text", "cut", "longer", "first bits", "cookie", "overrun"])
def test_what_is_not_stun_decodes_to_nothing(junk):
    assert stun.decode(junk) is None


def test_what_follows_the_integrity_is_not_taken():
    inner = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session")], "key")[:-8]
    added = inner + stun.attribute(stun.USE_CANDIDATE, b"")
    longer = stun.head(stun.REQUEST, len(added) - 20 + 8, bytes(12)) + added[20:]
    message = stun.decode(longer + stun.attribute(stun.FINGERPRINT, stun.fingerprint(longer)))
    assert stun.authentic(message, "key") and stun.USE_CANDIDATE not in message.attributes


@pytest.mark.parametrize("attributes, is_read", [([(0x8100, bytes(1400))], True), ([(0x8100, bytes(1472))], False),
                                                 ([(0x8100, b"")] * 15, True), ([(0x8100, b"")] * 16, False)])
def test_messages_beyond_1500_bytes_or_16_attributes_are_not_read(attributes, is_read):
    assert bool(stun.decode(stun.encode(stun.REQUEST, bytes(12), attributes))) == is_read


def test_the_integrity_is_compared_in_constant_time(monkeypatch):
    """It is hmac.compare_digest that decides."""
    message = stun.decode(RFC5769["request"])
    monkeypatch.setattr(stun.hmac, "compare_digest", lambda ours, theirs: True)
    assert stun.authentic(message, KEY + "x")
    monkeypatch.setattr(stun.hmac, "compare_digest", lambda ours, theirs: False)
    assert not stun.authentic(message, KEY)


def test_the_tag_of_a_datagram_is_compared_in_constant_time(monkeypatch):
    near, far = channel.Direction("key", True, b"g" * 8, b"h" * 8), channel.Direction("key", False, b"h" * 8, b"g" * 8)
    sealed = near.seal(1, b"content")
    monkeypatch.setattr(channel.hmac, "compare_digest", lambda ours, theirs: False)
    assert far.open(sealed) is None
    monkeypatch.setattr(channel.hmac, "compare_digest", lambda ours, theirs: True)
    assert far.open(sealed[:-1] + b"!") == b"conten!"


# ---- candidates -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, address", [
    ("203.0.113.7:4000", ("203.0.113.7", 4000)), ("[2001:db8::1]:4000", ("2001:db8::1", 4000)), ("[::ffff:203.0.113.7]:4000", ("203.0.113.7", 4000)),
    ("224.0.0.1:4000", None), ("[ff02::1]:4000", None), ("255.255.255.255:4000", None), ("0.0.0.0:4000", None), ("[::]:4000", None),
    ("203.0.113.7:443", ("203.0.113.7", 443)), ("203.0.113.7:80", ("203.0.113.7", 80)), ("203.0.113.7:53", None), ("169.254.1.2:4000", None),
    ("[fe80::1]:4000", None), ("203.0.113.7:00102499", None), ("[fe80::1%eth0]:4000", None), ("[fe80::1%\0]:4000", None), ("203.0.113.7:1023", None),
    ("203.0.113.7:65536", None), ("203.0.113.7:", None), ("203.0.113.7", None), ("host:4000", None), ({"nat": "x"}, None),
])
def test_a_candidate_is_an_address_that_anybody_may_be_sent_to_or_none(text, address):
    assert addresses.parse_candidate(text) == address


def test_a_socket_has_its_own_addresses_and_loopback_only_on_request():
    with contextlib.closing(sockets.open_socket()) as sock:
        port = sock.getsockname()[1]
        assert f"127.0.0.1:{port}" in candidates.gather_addresses(sock, loopback=True)
        assert not any(map(addresses.is_loopback, candidates.gather_addresses(sock)))


def gathered(sock, stun_servers, loopback=False):
    """The candidates of a socket that nobody else reads."""
    return whereabouts.Whereabouts(sock, stun_servers, loopback, whereabouts.KEEPALIVE, [], print, time.monotonic).candidates


def test_the_server_reflexive_address_is_gathered_from_the_server(start_server):
    server = start_server()
    with contextlib.closing(sockets.open_socket()) as sock:
        found = gathered(sock, [("127.0.0.1", server.stuns[0].server_address[1])], loopback=True)
        assert found.mapped == ("127.0.0.1", sock.getsockname()[1]) and found.nat == "none"


def test_without_an_answer_gathering_ends_and_says_so(monkeypatch):
    monkeypatch.setattr(candidates, "STUN_PATIENCE", 0.2)
    with contextlib.closing(sockets.open_socket()) as sock, contextlib.closing(sockets.open_socket()) as silent:
        found = gathered(sock, [("127.0.0.1", silent.getsockname()[1])])
        assert found.mapped is None and found.nat == "no answer"


@pytest.mark.parametrize("lost", [1, 3])
def test_a_question_that_was_lost_is_asked_again(lost):
    """The first datagrams are left unanswered."""
    with contextlib.closing(sockets.open_socket()) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lossy:
        lossy.bind(("127.0.0.1", 0))
        lossy.settimeout(5)

        def answer_the_next():
            unanswered = {lossy.recv(2048) for _ in range(lost)}
            request, source = lossy.recvfrom(2048)
            assert {request} == unanswered
            lossy.sendto(p2pserver.stun_answer(request, source), source)

        thread = threading.Thread(target=answer_the_next)
        thread.start()
        assert candidates.ask_stun(sock, [lossy.getsockname()]) == {lossy.getsockname(): ("127.0.0.1", sock.getsockname()[1])}
        thread.join()


def test_a_stun_server_whose_answer_is_lost_is_asked_again_as_soon_as_another_has_answered():
    """One of two leaves the first datagram unanswered; the others' patience ends before the usual retransmission."""
    with contextlib.closing(sockets.open_socket()) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lossy, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as prompt:
        for each in (lossy, prompt):
            each.bind(("127.0.0.1", 0))
            each.settimeout(5)

        def answer():
            request, source = prompt.recvfrom(2048)
            first, _ = lossy.recvfrom(2048)
            prompt.sendto(p2pserver.stun_answer(request, source), source)
            second, _ = lossy.recvfrom(2048)
            assert first == second
            lossy.sendto(p2pserver.stun_answer(second, source), source)

        thread = threading.Thread(target=answer)
        thread.start()
        assert set(candidates.ask_stun(sock, [lossy.getsockname(), prompt.getsockname()])) == {lossy.getsockname(), prompt.getsockname()}
        thread.join()


def test_an_answer_from_another_address_than_was_asked_does_not_count(monkeypatch):
    monkeypatch.setattr(candidates, "STUN_PATIENCE", 0.3)
    with contextlib.closing(sockets.open_socket()) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        asked.bind(("127.0.0.1", 0))
        asked.settimeout(5)
        other.bind(("127.0.0.1", 0))

        def answer_from_elsewhere():
            request, source = asked.recvfrom(2048)
            other.sendto(p2pserver.stun_answer(request, source), source)

        thread = threading.Thread(target=answer_from_elsewhere)
        thread.start()
        assert candidates.ask_stun(sock, [asked.getsockname()]) == {}
        thread.join()


STUN_A, STUN_B = ("203.0.113.1", 3478), ("203.0.113.2", 3478)
OWN = "192.168.0.2:5000"


@pytest.mark.parametrize("seen, nat", [
    ({}, "no answer"),
    ({STUN_A: ("203.0.113.9", 5000)}, "none"),
    ({STUN_A: ("192.168.0.2", 5000)}, "unknown"),       # the server is behind the same router
    ({STUN_A: ("192.168.0.2", 5000), STUN_B: ("198.51.100.1", 6000)}, "unknown"),
    ({STUN_A: ("198.51.100.1", 6000)}, "unknown"),
    ({STUN_A: ("198.51.100.1", 6000), STUN_B: ("198.51.100.1", 6000)}, "endpoint-independent"),
    ({STUN_A: ("198.51.100.1", 6000), STUN_B: ("198.51.100.1", 6001)}, "symmetric"),
    ({STUN_A: ("198.51.100.1", 6000), STUN_B: ("2001:db8::2", 5000)}, "unknown"),
])
def test_the_kind_of_the_nat_follows_from_what_the_servers_saw(seen, nat):
    assert candidates.candidates_from([OWN, "203.0.113.9:5000"], seen, asked=True).nat == nat


def test_servers_that_are_reached_from_different_addresses_of_ours_do_not_make_a_nat_symmetric(monkeypatch):
    monkeypatch.setattr(candidates, "own_address_towards", {STUN_A: "192.168.0.2", STUN_B: "10.0.0.2"}.get)
    assert candidates.candidates_from([OWN], {STUN_A: ("198.51.100.1", 6000), STUN_B: ("198.51.100.9", 6001)}, asked=True).nat == "unknown"


def test_a_stun_server_behind_the_same_router_is_told_with_advice():
    found = candidates.candidates_from([OWN], {STUN_A: ("192.168.0.2", 5000)}, asked=True)
    assert "behind the same router" in diagnosis.describe(found) and "--stun" in diagnosis.describe(found)


def test_pacing_and_the_kind_of_the_nat_are_told_to_the_peer_among_the_addresses():
    own = candidates.candidates_from([OWN], {STUN_A: ("198.51.100.1", 6000), STUN_B: ("198.51.100.1", 6001)}, asked=True)
    assert own.published == [OWN, "198.51.100.1:6000", "198.51.100.1:6001", {"p2p": {"pacing": 5, "nat": "symmetric"}}]
    assert candidates.about_peer(own.published) == (0.005, "symmetric", "")
    assert candidates.about_peer(dataclasses.replace(own, attempt="second").published) == (0.005, "symmetric", "second")


@pytest.mark.parametrize("odd", [{}, {"p2p": None}, {"p2p": []}, {"p2p": {"pacing": "5", "nat": 5, "attempt": []}}, {"p2p": {"pacing": -1}},
                                 {"p2p": {"pacing": True}}, {"p2p": {"pacing": float("nan")}}, {"nat": "symmetric"}, "p2p"])
def test_a_peer_that_tells_no_pacing_or_an_odd_one_has_that_of_rfc_8445(odd):
    assert candidates.about_peer([OWN, odd]) == (0.05, "", "")


def test_there_are_at_most_eight_candidates_and_the_server_reflexive_one_is_among_them():
    own = [f"192.168.0.{i}:5000" for i in range(20)]
    assert len(candidates.candidates_from(own, {}, asked=False).addresses) == 8
    seen = candidates.candidates_from(own, {STUN_A: ("198.51.100.1", 6000)}, asked=True).addresses
    assert len(seen) == 8 and seen[0] == own[0] and seen[-1] == "198.51.100.1:6000"


def test_a_forwarded_public_address_is_a_candidate():
    with contextlib.closing(p2pclient.Endpoint(public_address="198.51.100.7:443")) as endpoint:
        assert "198.51.100.7:443" in endpoint.candidates.addresses
    with pytest.raises(ValueError, match="is not an address"):
        p2pclient.Endpoint(public_address="198.51.100.7")


def test_the_addresses_of_all_interfaces_that_are_up_are_candidates():
    """Those of the kernel, asked in another way, are the expected ones."""
    listed = subprocess.run(["ip", "-o", "addr", "show", "up", "scope", "global"], capture_output=True, text=True, check=False).stdout \
        if shutil.which("ip") else pytest.skip("there is no program ip here")
    expected = {line.split()[3].partition("/")[0] for line in listed.splitlines() if "deprecated" not in line and "tentative" not in line}
    assert expected <= set(sockets.interface_addresses())


PEER = candidates.Candidates(["192.168.0.2:5000", "198.51.100.1:6000"], ("198.51.100.1", 6000))


@pytest.mark.parametrize("published, checked", [
    (["192.168.0.9:1024", "203.0.113.1:1024"], [("203.0.113.1", 1024), ("192.168.0.9", 1024)]),
    (["203.0.113.1:1024", "198.51.100.1:1024", "192.168.0.9:1024"], [("192.168.0.9", 1024), ("203.0.113.1", 1024), ("198.51.100.1", 1024)]),
    (["192.168.7.9:1024", "10.0.0.1:1024", "172.16.0.1:1024", "100.64.0.1:1024", "[fd00::1]:1024"], []),
    (["169.254.1.1:1024", "[fe80::1]:1024", "127.0.0.1:1024", "[::1]:1024", "127.9.9.9:1024"], []),
    (["203.0.113.1:443", "203.0.113.1:80", "203.0.113.1:22", "203.0.113.1:53"], [("203.0.113.1", 443), ("203.0.113.1", 80)]),
    (["[2001:db8::1]:1024", "203.0.113.1:1024"], [("203.0.113.1", 1024), ("2001:db8::1", 1024)]),
], ids=["public first", "neighbours' private first", "other private networks", "link-local and loopback", "ports", "IPv6 last without IPv6"])
def test_of_a_peers_addresses_the_usable_ones_are_checked_likeliest_first(published, checked):
    assert candidates.read_published(published, PEER, loopback=False).addresses == checked


def test_ipv6_is_first_where_both_have_it():
    own = candidates.Candidates(["[2001:db8::2]:5000", *PEER.addresses], PEER.mapped)
    assert candidates.read_published(["203.0.113.1:1024", "[2001:db8::1]:1024"], own, loopback=False).addresses[0] == ("2001:db8::1", 1024)


def test_at_most_sixteen_addresses_of_a_peer_are_checked():
    assert len(candidates.read_published([f"203.0.113.{i}:1024" for i in range(40)], PEER, loopback=False).addresses) == 16


@pytest.mark.parametrize("answer, ipv6", [
    ("64:ff9b::192.0.0.170", "64:ff9b::192.0.2.33"), ("2001:db8:c000:aa::", "2001:db8:c000:221::"), ("2001:db8:1c0:0:aa::", "2001:db8:1c0:2:21::"),
    ("2001:db8:122:c000:0:aa00::", "2001:db8:122:c000:2:2100::"), ("2001:db8:122:3c0:0:aa::", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344:c0:0:aa00::", "2001:db8:122:344:c0:2:2100::"), ("2001:db8:122:344::192.0.0.171", "2001:db8:122:344::192.0.2.33"),
])
def test_behind_a_nat64_an_ipv4_address_is_synthesised_with_the_prefix_that_dns_tells(answer, ipv6):
    """The prefixes and addresses are those of RFC 6052 section 2.4."""
    nat64 = sockets.Nat64.of([answer])
    assert ipaddress.ip_address(nat64.to_ipv6("192.0.2.33")) == ipaddress.ip_address(ipv6)
    assert nat64.to_ipv4(nat64.to_ipv6("192.0.2.33")) == "192.0.2.33"
    assert nat64.to_ipv4("2001:db8:ffff::1") == "2001:db8:ffff::1" and nat64.to_ipv4("192.0.2.1") == "192.0.2.1"


def test_without_a_nat64_there_is_no_prefix():
    assert sockets.Nat64.of(["2001:db8::1"]) is None and sockets.Nat64.of([]) is None


# ---- prediction and probing -----------------------------------------------------------------------------------------

SEQUENTIAL, BLOCK, RANDOM = (prediction.Ports(kind, *values) for kind, *values in (("sequential", 40007, 1), ("block", 40000, 0, 40099), ("random",)))


@pytest.mark.parametrize("samples, ports", [
    ([40000, 40001, 40002, 40003, 40004], ("sequential", 40004, 1)),
    ([40000, 40001, 40004, 40005, 40007, 40008], ("sequential", 40008, 1)),     # others behind the router take some
    ([40000, 40008, 40016, 40024], ("sequential", 40024, 8)),
    ([40003, 40002, 40001, 40000], ("sequential", 40000, -1)),
    ([65533, 65534, 65535, 1024, 1025, 1026], ("sequential", 1026, 1)),         # the range begins again
    ([40010, 40300, 40050, 40490, 40007, 40111], ("block", 40007, 0, 40490)),
    ([1500, 61000, 20000, 33000, 50000, 9000], ("random",)),
    ([1500, 61000, 20000], None),
])
def test_how_a_nat_allocates_ports_is_learnt_from_a_few_mappings(samples, ports):
    assert prediction.learn(samples) == (ports and prediction.Ports(*ports))


@pytest.mark.parametrize("ports, likely", [
    (SEQUENTIAL, [40008, 40009, 40010]), (prediction.Ports("sequential", 65530, 4), [65534]), (prediction.Ports("sequential", 1030, -5), [1025]),
])
def test_the_likely_ports_of_a_sequential_nat_are_the_next_ones(ports, likely):
    assert ports.likely(3) == likely


def test_the_likely_ports_of_a_block_are_in_it_and_each_is_tried_once():
    assert sorted(BLOCK.likely(1000)) == list(range(40000, 40100))
    found = RANDOM.likely(1024)
    assert len(set(found)) == 1024 and min(found) >= 1024 and max(found) <= 65535


@pytest.mark.parametrize("ports", [SEQUENTIAL, BLOCK, RANDOM._replace(round=3)])
def test_what_a_peer_tells_of_its_ports_is_read_as_it_was_meant(ports):
    assert prediction.Ports.of(json.loads(json.dumps(ports.published))) == ports


@pytest.mark.parametrize("odd", [
    None, [], "x", {}, {"round": True}, {"round": -1}, {"round": 10 ** 9}, {"round": 0, "last": 5, "step": 1}, {"round": 0, "last": 40000, "step": 0},
    {"round": 0, "last": 40000}, {"round": 0, "last": 40000, "step": 2000}, {"round": 0, "low": 40000, "high": 60000},
    {"round": 0, "low": 40000, "high": 39000}, {"round": 0, "low": "40000", "high": 40001}, {"round": 0, "last": 40000.5, "step": 1},
])
def test_odd_words_of_a_peer_on_its_ports_are_as_if_it_had_said_nothing(odd):
    assert prediction.Ports.of(odd) is None


def own_of(nat, ports=None, addresses=("198.51.100.1:6000",), probing=False):
    seen = {STUN_A: ("198.51.100.1", 6000)}
    return candidates.Candidates(["192.168.0.2:5000", *addresses], ("198.51.100.1", 6000), nat, seen, ports=ports, probing=probing)


def peer_of(nat, ports=None, found=(("203.0.113.1", 6000),), probing=False):
    return candidates.PeerCandidates(list(found), nat=nat, ports=ports, probing=probing)


EASY_ONE, HARD_ONES = ("endpoint-independent", None), [("symmetric", ports) for ports in (SEQUENTIAL, BLOCK, RANDOM)]


@pytest.mark.parametrize("mine, theirs, sent, probed", [
    (EASY_ONE, EASY_ONE, None, None),
    (HARD_ONES[0], EASY_ONE, 12, 12), (HARD_ONES[1], EASY_ONE, 24, 64), (HARD_ONES[2], EASY_ONE, None, 256),
    (EASY_ONE, HARD_ONES[0], 24, 24), (EASY_ONE, HARD_ONES[1], 24, 100), (EASY_ONE, HARD_ONES[2], None, 1024),
    (HARD_ONES[0], HARD_ONES[0], 24, 24), (HARD_ONES[0], HARD_ONES[1], None, 48), (HARD_ONES[1], HARD_ONES[0], None, 512),
    (HARD_ONES[1], HARD_ONES[1], None, 512), (HARD_ONES[0], HARD_ONES[2], None, None), (HARD_ONES[1], HARD_ONES[2], None, None),
    (HARD_ONES[2], HARD_ONES[2], None, None), (("symmetric", None), EASY_ONE, None, None), (("no answer", None), HARD_ONES[0], None, None),
], ids=str)
def test_a_side_sends_24_datagrams_at_most_and_more_only_where_both_want_to_probe(mine, theirs, sent, probed):
    for is_probing, expected in ((False, sent), (True, probed)):
        own, peer = own_of(*mine, probing=True), peer_of(*theirs, probing=is_probing)
        way = probing.way_of(own, peer, probing.Methods(probing=True))
        assert (way and len(probing.steps_of(way, own, peer))) == expected
        one_sided = probing.way_of(own, peer_of(*theirs, probing=True), probing.Methods())
        assert (one_sided and len(probing.steps_of(one_sided, own, peer))) == sent
    assert probing.way_of(own_of(*mine), peer_of(*theirs), probing.Methods(prediction=False)) is None


def test_two_sequential_routers_are_aimed_at_each_others_port_that_the_twelfth_socket_gets():
    """So up to eleven mappings that others make in between do no harm."""
    own, peer = own_of("symmetric", SEQUENTIAL), peer_of("symmetric", prediction.Ports("sequential", 50000, 8))
    steps = probing.steps_of(probing.way_of(own, peer, probing.Methods()), own, peer)
    assert steps == [(number, ("203.0.113.1", 50096)) for number in range(1, 13)] * 2


def test_a_block_is_used_up_towards_one_port_the_twelfth_of_a_router_in_sequence_or_any_of_another_block():
    """So eleven mappings that others make in between do no harm, nor do twelve guesses that need no new mapping."""
    own, allowed = own_of("symmetric", BLOCK, probing=True), probing.Methods(probing=True)
    for ports, targets in ((SEQUENTIAL, [40019]), (BLOCK, range(40000, 40100))):
        peer = peer_of("symmetric", ports, probing=True)
        numbers, addresses = zip(*probing.steps_of(probing.way_of(own, peer, allowed), own, peer))
        assert list(numbers) == [*range(1, 257)] * 2 and len(set(addresses)) == 1 and addresses[0][1] in targets
    own, peer = own_of("symmetric", SEQUENTIAL, probing=True), peer_of("symmetric", BLOCK, probing=True)
    steps = probing.steps_of(probing.way_of(own, peer, allowed), own, peer)
    assert len({port for _, (_, port) in steps if port in range(40000, 40100)}) == 24 and {number for number, _ in steps} == {0}


def search_of(own, peer, is_guest=True, **methods):
    search = probing.PortSearch(is_guest, probing.Methods(**methods), 1000.0)
    search.learn(peer, 1000.0)
    return search


def test_the_easy_side_begins_when_the_other_one_tells_of_a_new_round_and_sends_a_hundred_a_second():
    own, search = own_of("endpoint-independent"), search_of(own_of("endpoint-independent"), peer_of("symmetric", SEQUENTIAL._replace(round=5)))
    assert not any(search.tick(own, 1000 + i / 100) for i in range(200)) and not search.wants_measurement(own, 1002)
    search.learn(peer_of("symmetric", SEQUENTIAL._replace(round=6)), 1002)
    sent = [(1002 + i / 1000, step) for i in range(1000) for step in search.tick(own, 1002 + i / 1000)]
    assert [step for _, step in sent] == [(0, ("203.0.113.1", port)) for port in range(40008, 40032)]
    assert min(gaps([when for when, _ in sent])) > 0.0099 and search.due == float("inf")


def test_a_host_takes_the_first_round_of_a_guest_for_its_own_also_if_it_hears_of_both_at_once():
    own = own_of("endpoint-independent")
    search = search_of(own, peer_of("symmetric", SEQUENTIAL._replace(round=1)), is_guest=False)
    assert search.tick(own, 1000.0)


def test_the_hard_side_measures_itself_when_ordinary_checks_have_had_their_time_and_opens_mappings_then():
    own, search = own_of("symmetric", SEQUENTIAL), search_of(None, peer_of("endpoint-independent"))
    assert not search.wants_measurement(own, 1000.39) and search.wants_measurement(own, 1000.41) and not search.wants_measurement(own, 1000.5)
    assert search.tick(own, 1000.6) == []
    anew = own_of("symmetric", SEQUENTIAL._replace(round=1))
    steps = [step for i in range(100) for step in search.tick(anew, 1000.7 + i / 100)]
    assert steps == [(number, ("203.0.113.1", 6000)) for number in range(1, 5)] * 3


@pytest.mark.parametrize("own, peer", [("symmetric", "unknown"), ("unknown", "symmetric")])
def test_where_both_probe_a_kind_of_nat_that_is_unknown_has_two_seconds_to_become_known(own, peer):
    own, peer = own_of(own, BLOCK, probing=True), peer_of(peer, BLOCK, probing=True)
    search = search_of(own, peer, probing=True)
    assert search.tick(own, 1001.99) == [] and search.tick(own, 1002.01)
    search, known = search_of(own, peer, probing=True), own_of("symmetric", BLOCK, probing=True)
    assert search.tick(own, 1000.5) == []
    search.learn(peer_of("symmetric", BLOCK, probing=True), 1000.6)
    assert search.tick(known, 1000.61) and search.way == probing.USING_UP


def test_a_router_in_sequence_is_not_measured_anew_before_its_way_is_known():
    own, peer = own_of("symmetric", SEQUENTIAL, probing=True), peer_of("unknown", probing=True)
    search = search_of(own, peer, probing=True)
    assert not search.wants_measurement(own, 1001.99) and search.wants_measurement(own, 1002.01)


@pytest.mark.parametrize("ports", [BLOCK, SEQUENTIAL])
def test_a_block_is_used_up_without_being_measured_anew_but_not_before_the_next_ports_of_a_router_in_sequence_are_known(ports):
    own = own_of("symmetric", BLOCK, probing=True)
    search = search_of(own, peer_of("symmetric", ports, probing=True), probing=True)
    assert not search.wants_measurement(own, 1000.41) and bool(search.tick(own, 1000.42)) == (ports is BLOCK)
    search.learn(peer_of("symmetric", ports._replace(round=1), probing=True), 1000.5)
    assert search.tick(own, 1000.6)


def test_a_router_in_sequence_is_measured_anew_before_its_ports_go_to_guesses_in_a_block():
    own, search = own_of("symmetric", SEQUENTIAL, probing=True), search_of(None, peer_of("symmetric", BLOCK, probing=True), probing=True)
    assert search.tick(own, 1000.41) == [] and search.wants_measurement(own, 1000.41)
    assert search.tick(own, 1000.51) == [] and search.tick(own_of("symmetric", SEQUENTIAL._replace(round=1), probing=True), 1000.62)


PRIVATE, OTHERS = ("192.168.0.9", 5000), ("203.0.113.1", 7000)


@pytest.mark.parametrize("own, peer, hopeless", [
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM), True),
    (own_of("symmetric", RANDOM), peer_of("endpoint-independent"), True),
    (own_of("endpoint-independent"), peer_of("symmetric", RANDOM), True),
    (own_of("symmetric", BLOCK), peer_of("symmetric", SEQUENTIAL), True),
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM, [("203.0.113.1", 6000), OTHERS]), True),     # two STUN servers have seen it
    (own_of("symmetric", SEQUENTIAL), peer_of("symmetric", SEQUENTIAL), False),
    (own_of("symmetric", SEQUENTIAL), peer_of("endpoint-independent"), False),
    (own_of("endpoint-independent"), peer_of("endpoint-independent"), False),
    (own_of("symmetric", RANDOM), peer_of("none"), False),
    (own_of("symmetric", RANDOM), peer_of(""), False),
    (own_of("symmetric", None), peer_of("symmetric", RANDOM), False),
    (own_of("symmetric", RANDOM), peer_of("symmetric", None), False),                                   # a port is forwarded to it, perhaps
    (own_of("symmetric", RANDOM, ["198.51.100.1:6000", "198.51.100.1:7000"]), peer_of("symmetric", RANDOM), False),      # one is forwarded to us
    (own_of("symmetric", RANDOM), peer_of("endpoint-independent", found=[("203.0.113.1", 6000), OTHERS]), False),       # likewise, or it has a relay
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM, [PRIVATE, OTHERS]), False),              # a LAN, or a VPN
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM, [("198.51.100.1", 6000)]), False),       # a neighbour
    (own_of("symmetric", RANDOM, ["198.51.100.1:6000", "[2001:db8::1]:1"]), peer_of("symmetric", RANDOM, [("2001:db8::2", 1), OTHERS]), False),
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM, [("2001:db8::2", 1), OTHERS]), True),    # we have no IPv6
    (own_of("symmetric", RANDOM), peer_of("symmetric", RANDOM, []), False),
    (own_of("no answer"), peer_of("symmetric", RANDOM), False),
])
def test_a_pair_is_hopeless_only_where_that_is_certain(own, peer, hopeless):
    assert probing.is_hopeless(own, peer, probing.Methods()) == hopeless


def blocked(addresses=()):
    return candidates.Candidates(["192.168.0.2:5000", *addresses], nat="no answer")


NOWHERE = peer_of("no answer", found=[])


@pytest.mark.parametrize("own, peer, hopeless", [
    *[(blocked(), peer_of(nat), True) for nat in ("none", "endpoint-independent", "symmetric")],
    *[(own_of(nat), NOWHERE, True) for nat in ("none", "endpoint-independent", "symmetric")],
    (blocked(), NOWHERE, True),
    *[(blocked(), peer_of(nat), False) for nat in ("no answer", "not asked", "unknown", "")],          # the server's port is closed, perhaps
    *[(own_of(nat), NOWHERE, False) for nat in ("no answer", "not asked", "unknown")],
    (blocked(["198.51.100.1:6000"]), peer_of("endpoint-independent"), False),                           # a port is forwarded to us, perhaps
    (own_of("endpoint-independent"), peer_of("no answer"), False),                                      # or to the peer
    (blocked(), peer_of("endpoint-independent", found=[PRIVATE, OTHERS]), False),                       # a LAN, or a VPN
    (blocked(["[2001:db8::1]:1"]), peer_of("none", found=[("2001:db8::2", 1), OTHERS]), False),
    (blocked(), peer_of("none", found=[("2001:db8::2", 1), OTHERS]), True),                             # we have no IPv6
    (blocked(), dataclasses.replace(peer_of("none"), relay=OTHERS), False),
], ids=str)
def test_who_has_no_answer_of_stun_is_without_udp_only_where_that_is_certain(own, peer, hopeless):
    assert probing.is_hopeless(own, peer, probing.Methods()) == hopeless


def test_where_both_probe_a_random_router_and_an_easy_one_are_not_hopeless():
    own = own_of("symmetric", RANDOM, probing=True)
    assert not probing.is_hopeless(own, peer_of("endpoint-independent", probing=True), probing.Methods(probing=True))
    assert probing.is_hopeless(own, peer_of("symmetric", RANDOM, probing=True), probing.Methods(probing=True))


@pytest.mark.parametrize("ports", [SEQUENTIAL, BLOCK])
def test_where_both_probe_a_router_with_a_block_is_not_hopeless_with_one_of_either_kind(ports):
    own, peer = own_of("symmetric", BLOCK, probing=True), peer_of("symmetric", ports, probing=True)
    assert not probing.is_hopeless(own, peer, probing.Methods(probing=True)) and probing.is_hopeless(own, peer, probing.Methods())


def test_who_can_be_reached_otherwise_tells_no_ports():
    assert own_of("symmetric", BLOCK).published[-1]["p2p"]["ports"] == {"low": 40000, "high": 40099, "round": 0}
    assert "ports" not in own_of("symmetric", BLOCK, ["198.51.100.1:6000", "198.51.100.1:7000"]).published[-1]["p2p"]
    assert "ports" not in own_of("endpoint-independent", BLOCK).published[-1]["p2p"]
    assert own_of("unknown", probing=True).published[-1] == {"p2p": {"pacing": 5, "nat": "unknown", "probing": True}}
    told = candidates.read_published(own_of("symmetric", BLOCK, probing=True).published, PEER, loopback=False)
    assert (told.ports, told.probing) == (BLOCK, True)


@pytest.mark.parametrize("is_guest", [True, False])
def test_probes_go_only_to_an_address_from_which_the_server_saw_the_peer_call(is_guest):
    session = checks.Session("session", "key", is_guest, 1000.0)
    session.add([HOST_AT], 1000.0, seen_at="203.0.113.1")
    assert len([1 for port in range(2000, 3000) for _ in session.probe(("203.0.113.1", port), 1000.0, is_probing=True)]) == 1000
    assert not any(session.probe(("192.0.2.50", port), 1000.0, is_probing=True) for port in range(2000, 3000))


@pytest.mark.parametrize("is_guest, most", [(True, 100), (False, 5)])
def test_predicted_ports_of_a_third_party_count_with_its_other_datagrams(is_guest, most):
    session, third, sent = checks.Session("session", "key", is_guest, 1000.0), "192.0.2.50", 0
    session.add([(third, 7000)], 1000.0)
    for i in range(1600):
        now = 1000 + i / 100
        sent += len(session.tick(now)) + len(session.probe((third, 8000 + i), now, is_probing=False))
    assert sent == most


# ---- sessions -------------------------------------------------------------------------------------------------------
# Two sessions and a network between them that is a function: who hears what one sends, and from where it seems to come.

GUEST_AT, HOST_AT, STRANGER = ("198.51.100.1", 5000), ("203.0.113.1", 6000), ("192.0.2.99", 7000)


class Wire:
    """A guest's and a host's session on one clock. way(source, destination) is what becomes of a datagram: (source, destination), or None: lost."""

    def __init__(self, way=lambda source, destination: (source, destination), guest_knows=(HOST_AT,), host_knows=(GUEST_AT,), key="key"):
        self.now, self.way = 1000.0, way
        self.sessions = {GUEST_AT: checks.Session("session", "key", True, self.now), HOST_AT: checks.Session("session", key, False, self.now)}
        self.guest, self.host = self.sessions[GUEST_AT], self.sessions[HOST_AT]
        self.guest.add(guest_knows, self.now, pacing.LEAST_PACING)
        self.host.add(host_knows, self.now, pacing.LEAST_PACING, seen_at=GUEST_AT[0])
        self.sent = []      # (time, source, destination, datagram)

    def send(self, source, sendings):
        for datagram, destination in sendings:
            self.sent.append((self.now, source, destination, datagram))
            passage = self.way(source, destination)
            if passage and passage[1] in self.sessions:
                self.deliver(datagram, *passage)

    def deliver(self, datagram, source, destination):
        message = stun.decode(datagram)
        self.send(destination, self.sessions[destination].receive(message, source, self.now) if message else [])

    def run(self, seconds, step=0.01):
        end = self.now + seconds
        while self.now < end:
            for address, session in self.sessions.items():
                if session.due <= self.now:
                    self.send(address, session.tick(self.now))
            self.now += step

    def checks(self, source):
        return [(when, destination) for when, sender, destination, datagram in self.sent
                if sender == source and stun.decode(datagram).kind == stun.REQUEST]


def test_a_guest_and_a_host_find_each_other():
    wire = Wire()
    wire.run(0.3)
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT)
    assert (wire.guest.local, wire.host.local) == (GUEST_AT, HOST_AT)


@pytest.mark.parametrize("deaf", [GUEST_AT, HOST_AT])
def test_what_works_in_one_direction_alone_does_not_connect(deaf):
    wire = Wire(way=lambda source, destination: None if destination == deaf else (source, destination))
    wire.run(20)
    assert wire.guest.selected is wire.host.selected is None
    assert wire.guest.over == wire.host.over == checks.NO_WAY


def test_a_host_is_not_connected_before_the_guest_has_nominated():
    wire = Wire()
    wire.guest._encode = lambda kind, transaction, nominates=False, echo=None: checks.Session._encode(wire.guest, kind, transaction)
    wire.run(5)
    assert wire.guest.selected == HOST_AT and wire.host.selected is None and GUEST_AT in wire.host.heard


def test_a_host_that_nominates_is_not_followed():
    """Two addresses lead to the host, who nominates the other one; both have answered the guest."""
    other = ("203.0.113.9", 6000)
    wire = Wire(guest_knows=(HOST_AT, other))
    wire.way = lambda source, destination: (source, HOST_AT if destination == other else destination)
    wire.sessions[other] = wire.host
    wire.run(0.5)
    wire.guest._list.proven.add(other)
    nomination = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session:session"), (stun.ICE_CONTROLLED, bytes(8)), (stun.USE_CANDIDATE, b""),
                                                       (stun.P2P, wire.host.channel.mark())], "key")
    wire.deliver(nomination, other, GUEST_AT)
    assert other in wire.guest.heard and wire.guest.selected == HOST_AT


def test_an_address_that_nobody_listed_is_learnt_from_an_authentic_check():
    """The guest's router is symmetric: the host hears it from elsewhere than it was told."""
    elsewhere = ("198.51.100.1", 9999)

    def way(source, destination):
        if source == GUEST_AT:
            return elsewhere, destination
        return (source, GUEST_AT) if destination == elsewhere else None

    wire = Wire(way)
    wire.run(0.3)
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, elsewhere)


def test_with_another_key_nothing_is_learnt():
    wire = Wire(key="another key", guest_knows=(HOST_AT,), host_knows=())
    wire.run(20)
    assert wire.host.remotes == [] and not wire.host.heard and not wire.guest.heard


def gaps(times):
    return [later - earlier for earlier, later in zip(times, times[1:])]


@pytest.mark.parametrize("pace, second", [(pacing.LEAST_PACING, 0.01), (pacing.DEFAULT_PACING, 0.05)], ids=["ours", "a stock agent's"])
def test_checks_to_who_was_not_heard_keep_fifty_milliseconds_apart_but_for_the_second_and_end_at_a_hundred(pace, second):
    wire = Wire(way=lambda source, destination: None, guest_knows=())
    wire.guest.add([HOST_AT], wire.now, pace)
    wire.run(20, step=0.001)
    times = [when for when, _ in wire.checks(GUEST_AT)]
    assert len(times) == 100
    assert second - 1e-6 <= gaps(times)[0] <= second + 0.002 and min(gaps(times)[1:]) > 0.0499
    assert times[-1] - times[0] <= checks.CHECK_TIME == 15
    assert wire.guest.over == checks.NO_WAY


def foreign_check(transaction, *attributes, role=stun.ICE_CONTROLLING):
    """A check of an agent that has no P2P attribute."""
    return stun.encode(stun.REQUEST, transaction, [(stun.USERNAME, b"session:session"), (role, bytes(8)), *attributes], "key")


@pytest.mark.parametrize("pace", [pacing.LEAST_PACING, pacing.DEFAULT_PACING])
def test_addresses_newly_heard_are_checked_at_once_eight_of_a_session_as_far_as_the_pacing_allows(pace):
    wire = Wire(guest_knows=(), host_knows=())
    wire.host.add([], wire.now, pace)
    for i in range(50):
        wire.deliver(foreign_check(bytes([i]) * 12), ("192.0.2.99", 2000 + i), HOST_AT)
    wire.run(20, step=0.001)
    times = [when for when, _ in wire.checks(HOST_AT)]
    assert min(gaps(times)) > pace - 1e-4 and min(gaps(times)[8:]) > 0.0499
    assert pace > 0.04 or times[7] - times[0] < 0.05
    assert len(times) <= 100 and len({destination for _, destination in wire.checks(HOST_AT)}) <= checklist.MAX_CHECKED


def test_all_sessions_of_a_socket_keep_five_milliseconds_apart_together():
    shared, now, times = pacing.Pace(), 1000.0, []
    sessions = [checks.Session(f"session {i}", "key", True, now, pace=shared) for i in range(40)]
    for i, session in enumerate(sessions):
        session.add([("203.0.113.1", 6000 + i)], now, pacing.LEAST_PACING)
    while now < 1001:
        for session in sessions:
            times += [now] * len(session.tick(now)) if session.due <= now else []
        now += 0.001
    assert len(times) > 100 and min(gaps(times)) > 0.0049


def test_a_guest_and_a_host_are_connected_after_one_and_a_half_round_trips():
    """The host's first check is lost at the guest's router, as the guest has sent nothing yet; each way takes 50 ms."""
    wire = Wire(host_knows=())
    wire.host.add([GUEST_AT], wire.now, pacing.LEAST_PACING)
    arrivals, began = [], wire.now
    wire.send = lambda source, sendings: arrivals.extend((wire.now + 0.05, source, destination, datagram) for datagram, destination in sendings)
    while wire.host.selected is None or wire.guest.selected is None:
        for arrival in [each for each in arrivals if each[0] <= wire.now]:
            arrivals.remove(arrival)
            wire.deliver(arrival[3], *arrival[1:3])
        wire.run(0.001, step=0.001)
    assert wire.now - began < 0.16


class Nat:
    """A router of one of the laboratory's kinds (lab/README.md): where a datagram seems to come from, and whom it lets in."""

    def __init__(self, kind, host):
        self.kind, self.host, self.ports, self.sent = kind, host, {}, set()
        self.mapped = self.out(("203.0.113.10", 3478))

    def out(self, destination):
        port = self.ports.setdefault(destination if self.kind == "symmetric" else "any", 6000 + len(self.ports))
        self.sent.add((port, destination))
        return self.host, port

    def lets_in(self, source, port):
        if self.kind in ("none", "full-cone"):
            return port in self.ports.values()
        return any(out == port and (to == source or self.kind == "restricted" and to[0] == source[0]) for out, to in self.sent)


def seconds_to_connect(kinds, told, delay):
    """From when the later one of guest and host, told at these times, is told of the other until both are connected."""
    routers, sessions, early, underway, now = [Nat(kind, f"198.51.100.{i}") for i, kind in enumerate(kinds)], {}, ([], []), [], 0.0

    def send(i, sendings):
        underway.extend((now + delay, 1 - i, stun.decode(datagram), routers[i].out(to), to) for datagram, to in sendings)

    while len(sessions) < 2 or not all(session.selected for session in sessions.values()):
        for i in (0, 1):
            if i not in sessions and now >= told[i]:
                other = routers[1 - i].mapped
                sessions[i] = checks.Session("session", "key", i == 0, now)
                sessions[i].add([other], now, pacing.LEAST_PACING, seen_at=other[0])
                for each in early[i]:
                    send(i, sessions[i].receive(*each, now))
            if i in sessions and now >= sessions[i].due:
                send(i, sessions[i].tick(now))
        for each in [each for each in underway if each[0] <= now]:
            underway.remove(each)
            _, i, message, source, to = each
            if to[0] == routers[i].host and routers[i].lets_in(source, to[1]):
                early[i].append((message, source)) if i not in sessions else send(i, sessions[i].receive(message, source, now))
        now += 0.001
        assert now < max(told) + 1
    return now - max(told)


PUNCHABLE = [pair for pair in itertools.product(("none", "full-cone", "restricted", "port-restricted", "symmetric"), repeat=2)
             if pair not in (("symmetric", "symmetric"), ("symmetric", "port-restricted"), ("port-restricted", "symmetric"))]


@pytest.mark.parametrize("guest, host", PUNCHABLE)
def test_through_routers_of_all_kinds_that_let_them_two_are_connected_soon_whoever_is_told_first(guest, host):
    """At the latest with the third check, 50 ms after the second; mostly with the first. Behind a symmetric router half a round trip later, as
    its peer cannot know the port before it hears from there, and must have an answer from there before it sends."""
    headstarts = [each / 250 for each in range(-12, 13)]
    assert max(seconds_to_connect((guest, host), (max(0, -each), max(0, each)), 0) for each in headstarts) < 0.06
    round_trips = 1.5 if "symmetric" in (guest, host) else 1
    assert max(seconds_to_connect((guest, host), (max(0, -each), max(0, each)), 0.05) for each in headstarts if abs(each) < 0.01) < 0.1 * round_trips + 0.02


def test_until_it_has_selected_each_check_of_a_guest_nominates():
    wire = Wire(way=lambda source, destination: None)
    wire.run(1)
    assert all(stun.USE_CANDIDATE in stun.decode(datagram).attributes for _, source, _, datagram in wire.sent if source == GUEST_AT)
    assert not any(stun.USE_CANDIDATE in stun.decode(datagram).attributes for _, source, _, datagram in wire.sent if source == HOST_AT)


def test_every_address_has_its_turn():
    many = [("203.0.113.1", 6000 + i) for i in range(8)]
    wire = Wire(way=lambda source, destination: None, guest_knows=many)
    wire.run(0.40)
    assert [destination for _, destination in wire.checks(GUEST_AT)] == [many[0], *many]


def test_the_second_check_goes_to_the_likeliest_address_of_the_other_family():
    both = [("2001:db8::1", 6000), ("2001:db8::2", 6000), ("203.0.113.1", 6000)]
    wire = Wire(way=lambda source, destination: None, guest_knows=both)
    wire.run(0.05)
    assert [destination for _, destination in wire.checks(GUEST_AT)] == [both[0], both[2]]


def test_a_host_sends_five_datagrams_at_most_to_an_address_that_may_be_a_third_partys_spread_over_the_time_of_the_checks():
    third = ("192.0.2.50", 7000)
    wire = Wire(way=lambda source, destination: None, host_knows=[third, ("192.0.2.50", 7001), GUEST_AT])
    wire.run(20)
    times = [when for when, destination in wire.checks(HOST_AT) if destination[0] == third[0]]
    assert len(times) == 5 and times[-1] - times[0] > 9
    assert len([1 for _, destination in wire.checks(HOST_AT) if destination == GUEST_AT]) > 50
    again = wire.host.again(wire.now, [third])
    for i in range(20):
        assert again.tick(wire.now + i) == []


def test_a_guest_sends_a_hundred_datagrams_at_most_to_a_third_party_also_when_it_is_told_again_and_again():
    wire = Wire(way=lambda source, destination: None)
    for i in range(140):
        wire.guest.add([(HOST_AT[0], 7000 + i)], wire.now, pacing.LEAST_PACING)
        wire.run(0.1)
    assert len(wire.checks(GUEST_AT)) == 100


def test_an_address_from_which_the_peer_is_heard_takes_the_place_of_a_silent_one():
    wire = Wire(host_knows=[("192.0.2.1", 2000 + i) for i in range(16)])
    wire.run(1)
    assert wire.host.selected == GUEST_AT and len(wire.host.remotes) == 16


def test_a_replayed_check_gets_no_answer_and_changes_nothing():
    wire = Wire()
    wire.run(1)
    _, _, _, check = next(sent for sent in wire.sent if sent[1] == GUEST_AT)
    before = (wire.host.selected, list(wire.host.remotes), set(wire.host.heard))
    assert wire.host.receive(stun.decode(check), STRANGER, wire.now) == []
    assert (wire.host.selected, wire.host.remotes, wire.host.heard) == before


def test_an_answer_from_an_address_that_has_made_room_for_another_is_ignored():
    wire = Wire(guest_knows=[("203.0.113.1", 6000 + i) for i in range(16)], way=lambda source, destination: None)
    wire.run(1)
    address = wire.guest.remotes[-1]
    check = next(datagram for _, source, destination, datagram in wire.sent if (source, destination) == (GUEST_AT, address))
    hosts = [(stun.USERNAME, b"session"), (stun.ICE_CONTROLLED, bytes(8))]
    wire.deliver(stun.encode(stun.REQUEST, bytes(12), hosts, "key"), STRANGER, GUEST_AT)
    assert address not in wire.guest.remotes
    transaction = stun.decode(check).transaction
    answer = stun.encode(stun.SUCCESS, transaction, [(stun.XOR_MAPPED_ADDRESS, stun.pack_address(GUEST_AT, transaction))], "key")
    wire.deliver(answer, address, GUEST_AT)
    wire.run(1)
    assert wire.guest.selected is None


def test_a_copy_of_an_answer_from_elsewhere_does_not_spoil_the_true_one():
    wire = Wire()

    def way(source, destination):
        if source == HOST_AT:
            wire.deliver(wire.sent[-1][3], STRANGER, GUEST_AT)
        return source, destination

    wire.way = way
    wire.run(1)
    assert wire.guest.selected == HOST_AT


def test_the_same_check_twice_from_its_own_address_is_answered_twice():
    wire = Wire(guest_knows=(), host_knows=())
    check = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session"), (stun.ICE_CONTROLLING, bytes(8))], "key")
    answers = [wire.host.receive(stun.decode(check), GUEST_AT, wire.now)[0][0] for _ in range(2)]
    assert answers[0] == answers[1] and stun.decode(answers[0]).kind == stun.SUCCESS


def test_a_copy_that_comes_before_its_lost_original_leads_no_connection_astray():
    """A stranger's copy of the first check, which nominates, is what arrives, and the stranger passes on what is then sent to it."""
    wire = Wire(host_knows=())

    def way(source, destination):
        if destination == STRANGER or len(wire.checks(GUEST_AT)) == 1 and source == GUEST_AT:
            return STRANGER, HOST_AT if source == GUEST_AT else GUEST_AT
        return source, destination

    wire.way = way
    wire.run(0.5)
    assert STRANGER in wire.host.heard
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT)


def test_a_check_that_is_sent_back_to_its_sender_is_ignored():
    wire = Wire()
    wire.run(1)
    for _, source, _, datagram in wire.sent:
        assert wire.sessions[source].receive(stun.decode(datagram), STRANGER, wire.now) == []
    assert STRANGER not in wire.guest.heard | wire.host.heard


def test_an_answer_from_elsewhere_than_the_check_went_proves_nothing():
    wire = Wire(way=lambda source, destination: (("203.0.113.1", 6001), GUEST_AT) if source == HOST_AT else (source, destination), host_knows=())
    wire.run(2)
    assert wire.guest.selected is None


def test_in_the_first_moments_a_guest_prefers_what_the_host_wants_more():
    """Both addresses lead to the host; the first datagrams to the more wanted one are lost."""
    wanted, other = HOST_AT, ("203.0.113.9", 6000)
    wire = Wire(guest_knows=(wanted, other), host_knows=())

    def way(source, destination):
        if source == GUEST_AT:
            return (source, HOST_AT) if destination == other or wire.now > 1000.2 else None
        return (wanted if wire.sent[-2][2] == wanted else other, destination)

    wire.way = way
    wire.run(0.12)
    assert wire.guest.selected == other
    wire.run(0.3, step=0.001)
    assert wire.guest.selected == wanted
    proof, nomination = [(when, stun.USE_CANDIDATE in stun.decode(datagram).attributes) for when, _, destination, datagram in wire.sent
                         if destination == wanted and when > 1000.2][:2]
    assert (proof[1], nomination[1]) == (False, True) and nomination[0] - proof[0] < 0.007, "a new nomination goes as soon as the pacing allows"


def test_later_a_guest_stays_with_what_works():
    wanted, other = HOST_AT, ("203.0.113.9", 6000)
    wire = Wire(guest_knows=(wanted, other), host_knows=())

    def way(source, destination):
        if source == GUEST_AT:
            return (source, HOST_AT) if destination == other or wire.now > 1001 else None
        return (wanted if wire.sent[-2][2] == wanted else other, destination)

    wire.way = way
    wire.run(5)
    assert wire.guest.selected == other


def test_consent_is_asked_for_about_every_five_seconds():
    wire = Wire()
    wire.run(1)
    wire.sent.clear()
    wire.run(60)
    assert 9 <= len(wire.checks(GUEST_AT)) <= 16 and 9 <= len(wire.checks(HOST_AT)) <= 16
    assert not wire.guest.over and not wire.host.over


def test_a_peer_that_is_silent_for_forty_seconds_is_lost():
    wire = Wire()
    wire.run(1)
    wire.way = lambda source, destination: None
    wire.run(33)
    assert not wire.guest.over
    wire.run(12)
    assert "silent for 40 seconds" in wire.guest.over and "silent for 40 seconds" in wire.host.over


def test_the_host_follows_a_guest_whose_address_has_changed():
    moved = ("198.51.100.1", 5555)
    wire = Wire()
    wire.run(1)

    def way(source, destination):
        if source == GUEST_AT:
            return moved, destination
        return (source, GUEST_AT) if destination == moved else None

    wire.way = way
    wire.run(10)
    assert wire.host.selected == moved and not wire.guest.over


def test_a_good_bye_ends_the_other_side_at_once():
    wire = Wire()
    wire.run(1)
    wire.send(GUEST_AT, wire.guest.goodbye())
    assert wire.host.over == "the other player has left"


def test_a_good_bye_that_was_forged_ends_nothing():
    wire = Wire()
    wire.run(1)
    forged = stun.encode(stun.INDICATION, bytes(12), [(stun.USERNAME, b"session"), (stun.ICE_CONTROLLING, bytes(8))], "a guess")
    wire.deliver(forged, GUEST_AT, HOST_AT)
    assert not wire.host.over


def test_random_loss_of_every_third_datagram_keeps_nobody_apart():
    chance = random.Random(5)
    for _ in range(100):
        wire = Wire(way=lambda source, destination: (source, destination) if chance.random() > 0.33 else None)
        wire.run(10)
        assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT)


def connected(seconds=1.0, **values):
    wire = Wire(**values)
    wire.run(seconds)
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT)
    return wire


def captured(wire, kind, source=GUEST_AT):
    return [datagram for _, sender, _, datagram in wire.sent if sender == source and stun.decode(datagram).kind == kind]


def test_datagrams_are_authentic_and_each_comes_through_once():
    wire = connected()
    sealed = [wire.guest.channel.seal(b"%d" % i) for i in range(3)]
    assert [wire.host.open(sealed[i], wire.now) for i in (2, 0, 1)] == [b"2", b"0", b"1"]
    assert [wire.host.open(each, wire.now) for each in sealed] == [None] * 3
    assert wire.guest.open(wire.guest.channel.seal(b"our own, sent back"), wire.now) is None
    assert wire.host.open(b"as it is", wire.now) is None and wire.host.open(b"", wire.now) is None


def test_every_flipped_bit_of_a_datagram_is_noticed():
    wire = connected()
    sealed = wire.guest.channel.seal(b"hello")
    assert len(sealed) == 5 + channel.OVERHEAD and stun.decode(sealed) is None
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert wire.host.open(bytes(flipped), wire.now) is None, bit
    assert wire.host.open(sealed, wire.now) == b"hello"


def test_a_sequence_number_counts_once_and_not_when_it_is_too_old():
    window = channel.ReplayWindow()
    assert [window.accept(number) for number in (5, 5, 3, 3, 2000, 5, 2000 - 1023, 2000 - 1024, 10**15, 2000)] == [
        True, False, True, False, True, False, True, False, True, False]


def test_a_datagram_that_comes_before_the_hosts_check_is_answered_is_not_lost():
    """The guest is connected first; its datagram proves who it is."""
    wire = Wire(host_knows=())
    wire.way = lambda source, destination: (source, destination) if source == GUEST_AT or stun.decode(wire.sent[-1][3]).kind == stun.SUCCESS else None
    wire.run(0.1)
    assert wire.guest.selected and not wire.host.selected
    assert wire.host.open(wire.guest.channel.seal(b"first"), wire.now) == b"first"


def test_nothing_of_an_earlier_connection_counts_in_a_later_one_of_the_same_session():
    """Both sides have been started again, so nobody remembers what came; a stranger who can send from the guest's address has kept everything."""
    earlier = connected()
    kept = [earlier.guest.channel.seal(b"old")]
    earlier.send(GUEST_AT, earlier.guest.goodbye())
    kept += captured(earlier, stun.REQUEST) + captured(earlier, stun.INDICATION)
    assert earlier.host.over == checks.LEFT and len(kept) >= 3
    later = connected()
    before = later.host.selected, set(later.host.heard)
    for datagram in kept:
        message = stun.decode(datagram)
        if message:
            later.host.receive(message, GUEST_AT, later.now)
        assert not later.host.over and (message or later.host.open(datagram, later.now) is None)
    assert (later.host.selected, later.host.heard) == before


def test_a_kept_nomination_or_good_bye_does_not_count_in_a_later_connection_not_even_before_its_guest_is_known():
    earlier = connected()
    earlier.send(GUEST_AT, earlier.guest.goodbye())
    old = captured(earlier, stun.REQUEST) + captured(earlier, stun.INDICATION)
    later = Wire(guest_knows=(), host_knows=())
    later.host.add([GUEST_AT], later.now, pacing.LEAST_PACING)
    later.guest._encode = lambda kind, transaction, nominates=False, echo=None: checks.Session._encode(later.guest, kind, transaction, False, echo)
    for datagram in old:
        later.host.receive(stun.decode(datagram), GUEST_AT, later.now)
    later.run(1)
    assert GUEST_AT in later.host._list.proven and later.host.selected is None and not later.host.over


def test_where_the_peer_sees_us_is_told_of_the_address_that_is_used_not_of_one_that_answers_too():
    wire, elsewhere = connected(), ("2001:db8::9", 9999)
    wire.guest.remotes.append(elsewhere)
    [(check, _)] = wire.guest._check(elsewhere, wire.now)
    answers = [stun.decode(datagram) for datagram, _ in wire.host.receive(stun.decode(check), ("2001:db8::1", 1111), wire.now)]
    wire.guest.receive(next(each for each in answers if each.kind == stun.SUCCESS), elsewhere, wire.now + 1)
    assert elsewhere in wire.guest.heard and wire.guest.selected == HOST_AT
    assert wire.guest.local == GUEST_AT and wire.guest.rtt < 1


def test_of_two_nominations_the_later_one_counts_also_when_they_come_in_the_other_order():
    moved = ("198.51.100.1", 5555)
    wire = Wire(way=lambda source, destination: None, host_knows=())
    early, late = (stun.decode(wire.guest._encode(stun.REQUEST, bytes([i]) * 12, True)) for i in range(2))
    wire.host.receive(late, GUEST_AT, wire.now)
    wire.host.receive(early, moved, wire.now)
    assert wire.host._nominated[0] == GUEST_AT


def test_a_check_of_another_session_of_the_guests_has_the_host_look_who_is_there():
    """It may be a replay of what came before this program was started. Only an answer tells that the guest has begun anew."""
    old = stun.decode(captured(connected(), stun.REQUEST)[0])
    wire = connected()
    sent = len(wire.checks(HOST_AT))
    assert [stun.decode(datagram).kind for datagram, _ in wire.host.receive(old, GUEST_AT, wire.now)] == [stun.REQUEST]
    wire.run(1)
    assert wire.host.selected == GUEST_AT and not wire.host.over and len(wire.checks(HOST_AT)) == sent
    wire.sessions[GUEST_AT] = wire.guest = checks.Session("session", "key", True, wire.now)
    wire.guest.add([HOST_AT], wire.now, pacing.LEAST_PACING)
    wire.run(0.2)
    assert wire.host.over == checks.BEGUN_ANEW


def test_a_check_that_is_repeated_from_where_it_came_is_answered_and_changes_nothing():
    wire = connected()
    check, moved = stun.decode(captured(wire, stun.REQUEST)[-1]), ("198.51.100.1", 5555)
    wire.host.selected, wire.host._nominated = moved, None
    assert [stun.decode(datagram).kind for datagram, _ in wire.host.receive(check, GUEST_AT, wire.now)] == [stun.SUCCESS]
    assert wire.host.selected == moved and wire.host._nominated is None


def test_a_replay_is_known_as_one_beyond_the_latest_thousand_checks():
    """Its sequence number tells when its transaction is forgotten; what is remembered stays bounded."""
    wire = connected()
    check = stun.decode(captured(wire, stun.REQUEST)[0])
    for i in range(2000):
        wire.host.receive(stun.decode(wire.guest._encode(stun.REQUEST, struct.pack(">III", i, 0, 1))), GUEST_AT, wire.now)
    assert len(wire.host._requests) <= 1024 and check.transaction not in wire.host._requests
    heard = set(wire.host.heard)
    wire.host.receive(check, STRANGER, wire.now)
    assert wire.host.heard == heard


def test_what_checks_addresses_and_offers_leave_in_memory_is_bounded():
    wire, budget, offered = connected(), pacing.UnheardBudget(is_host=True), channel.Channel("key", False)
    for i in range(2000):
        wire.guest._check(HOST_AT, wire.now)
        budget.count(f"host {i}", wire.now)
        offered.is_fresh(channel.Mark(struct.pack(">Q", i), channel.NO_NONCE, 1))
    assert len(wire.guest._pending) == len(budget._sent) == 1024 and len(offered._peers) == channel.MAX_OFFERS


def test_a_good_bye_counts_only_from_where_the_peer_was_heard():
    wire = connected()
    goodbye = stun.decode(wire.guest.goodbye()[0][0])
    wire.host.receive(goodbye, STRANGER, wire.now)
    assert not wire.host.over
    again = stun.decode(wire.guest.goodbye()[0][0])
    wire.host.receive(again, GUEST_AT, wire.now)
    assert wire.host.over == checks.LEFT


def test_a_good_bye_of_another_session_of_the_guests_than_the_one_that_is_connected_does_not_count():
    wire = connected()
    other = checks.Session("session", "key", True, wire.now)
    wire.host.receive(stun.decode(other._encode(stun.INDICATION, bytes(12), echo=wire.host.channel.nonce)), GUEST_AT, wire.now)
    assert not wire.host.over


def test_a_host_does_not_go_to_where_no_check_of_its_own_was_answered():
    """Whoever is first with a copy of a nomination is heard, but gets nothing of the game."""
    wire = connected()
    wire.way = lambda source, destination: None
    [(nomination, _)] = wire.guest._check(HOST_AT, wire.now)
    wire.deliver(nomination, STRANGER, HOST_AT)
    wire.run(1)
    assert STRANGER in wire.host.heard and wire.host.selected == GUEST_AT


def test_a_check_to_a_connection_that_has_ended_is_answered_by_a_good_bye():
    wire = connected()
    wire.guest.goodbye()        # which is lost
    wire.run(7)
    assert wire.host.over == checks.LEFT


def test_a_peer_is_silent_after_seven_seconds_without_anything_authentic():
    wire = connected()
    wire.run(30)
    assert not wire.guest.is_silent(wire.now) and not wire.host.is_silent(wire.now)
    wire.way = lambda source, destination: None
    for session in (wire.guest, wire.host):
        latest = max(session._last_answer, session._last_heard)
        assert latest > wire.now - 6.1 and not session.is_silent(latest + 6.9) and session.is_silent(latest + 7.1)


def test_a_connection_goes_on_when_both_have_moved_and_told_each_other_through_the_server():
    """Both are behind port-restricted routers that were restarted: each lets in only whom it has sent to."""
    others = [(ip, port) for ip in (GUEST_AT[0], HOST_AT[0]) for port in range(2000, 2006)]
    wire = connected(guest_knows=[HOST_AT, *others], host_knows=[GUEST_AT, *others])
    new_guest, new_host, sent = ("198.51.100.1", 5555), ("203.0.113.1", 6666), set()

    def way(source, destination):
        outside = new_guest if source == GUEST_AT else new_host
        sent.add((outside, destination))
        inside = {new_guest: GUEST_AT, new_host: HOST_AT}.get(destination)
        return (outside, inside) if inside and (destination, outside) in sent else None

    wire.way = way
    wire.run(10)
    assert wire.guest.is_silent(wire.now) and wire.host.is_silent(wire.now)
    wire.guest.add([new_host], wire.now, pacing.LEAST_PACING)
    wire.run(0.3)
    wire.host.add([new_guest], wire.now, pacing.LEAST_PACING, seen_at=new_guest[0])
    wire.run(1)
    assert (wire.guest.selected, wire.host.selected) == (new_host, new_guest) and not wire.guest.over and not wire.host.over
    assert wire.host.open(wire.guest.channel.seal(b"on"), wire.now) == b"on"


def test_a_link_that_was_down_for_twenty_five_seconds_is_used_again():
    wire = connected()
    wire.way = lambda source, destination: None
    wire.run(25)
    wire.way = lambda source, destination: (source, destination)
    wire.run(7)
    assert not wire.guest.is_silent(wire.now) and not wire.host.is_silent(wire.now)


def test_seconds_in_which_this_program_did_not_run_are_not_the_peers_silence():
    wire = connected()
    wire.now += 60
    wire.guest.forgive(60, wire.now)
    wire.host.forgive(60, wire.now)
    wire.run(10)
    assert not wire.guest.over and not wire.host.over


def test_a_check_without_fingerprint_is_not_taken(endpoint):
    host = endpoint()
    host.expect(p2pclient.Guest("session", "key", []))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.settimeout(5)
        bare = foreign_check(bytes(12))[:-8]
        stranger.sendto(bare[:2] + struct.pack(">H", len(bare) - 20) + bare[4:], loopback_of(host))
        stranger.sendto(foreign_check(b"1" * 12), loopback_of(host))
        assert stun.decode(stranger.recv(2048)).transaction == b"1" * 12


def test_to_one_address_go_a_hundred_checks_at_once_over_all_sessions_and_then_twenty_a_second():
    limiter = pacing.UnheardLimiter()
    assert sum(limiter.allows("192.0.2.1", 1000.0) for _ in range(500)) == 100
    assert sum(limiter.allows("192.0.2.1", 1000.0 + i / 100) for i in range(1, 501)) in range(98, 102)
    assert limiter.allows("192.0.2.2", 1000.0)
    for i in range(5000):
        limiter.allows(f"host {i}", 1000.0)
    assert len(limiter._full_at) == 1024


def test_the_limit_for_who_was_not_heard_holds_over_all_sessions_of_an_endpoint(endpoint):
    """A hundred and fifty sessions list one third party, and each might send it two datagrams in the first second."""
    host = endpoint()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as third:
        third.bind(("127.0.0.1", 0))
        began = time.monotonic()
        for i in range(150):
            host.expect(p2pclient.Guest(f"session {i}", "key", [addresses.text_of(third.getsockname())]))
        third.settimeout(0.01)
        count = 0
        while time.monotonic() < began + 2:
            with contextlib.suppress(socket.timeout):
                third.recv(2048)
                count += 1
        assert 0 < count <= 101 + 20 * (time.monotonic() - began)


# Stock ICE agents: theirs is what RFC 8445 says, without our attribute.

def test_a_check_is_as_rfc_8445_has_it():
    wire = connected()
    for source, role in ((GUEST_AT, stun.ICE_CONTROLLING), (HOST_AT, stun.ICE_CONTROLLED)):
        check = stun.decode(captured(wire, stun.REQUEST, source)[0])
        assert check.attributes[stun.USERNAME] == b"session:session" and len(check.attributes[stun.PRIORITY]) == 4
        assert len(check.attributes[role]) == 8 and check.attributes[role] != bytes(8) and check.fingerprint


def test_a_stock_agents_datagrams_are_taken_as_they_are():
    wire = Wire(guest_knows=(), host_knows=())
    wire.host.receive(stun.decode(foreign_check(bytes(12), (stun.USE_CANDIDATE, b""))), GUEST_AT, wire.now)
    assert wire.host.open(b"as it is", wire.now) == b"as it is" and not wire.host.channel.is_open
    assert wire.host.channel.seal(b"as it is") == b"as it is"


@pytest.mark.parametrize("theirs, answered", [(bytes(8), stun.ERROR), (b"\xff" * 8, stun.SUCCESS)], ids=["smaller tie-breaker", "larger tie-breaker"])
def test_a_guest_in_a_conflict_of_roles_keeps_its_role_with_the_larger_tie_breaker(theirs, answered):
    wire = Wire(guest_knows=())
    check = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session:session"), (stun.ICE_CONTROLLING, theirs)], "key")
    answer = stun.decode(wire.guest.receive(stun.decode(check), HOST_AT, wire.now)[0][0])
    assert answer.kind == answered and wire.guest.controlling == (answered == stun.ERROR) and stun.authentic(answer, "key")
    assert answered == stun.SUCCESS or stun.error_number(answer) == 487


@pytest.mark.parametrize("theirs, answered", [(bytes(8), stun.SUCCESS), (b"\xff" * 8, stun.ERROR)], ids=["smaller tie-breaker", "larger tie-breaker"])
def test_a_host_in_a_conflict_of_roles_takes_the_other_with_the_larger_tie_breaker(theirs, answered):
    wire = Wire(host_knows=())
    check = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session:session"), (stun.ICE_CONTROLLED, theirs)], "key")
    answer = stun.decode(wire.host.receive(stun.decode(check), GUEST_AT, wire.now)[0][0])
    assert answer.kind == answered and wire.host.controlling == (answered == stun.SUCCESS)


def test_who_is_told_of_a_conflict_of_roles_takes_the_other_and_checks_again():
    wire = Wire(way=lambda source, destination: None)
    wire.run(0.005)
    check = stun.decode(wire.sent[0][3])
    refusal = stun.encode(stun.ERROR, check.transaction, [stun.error_code(487, "Role Conflict")], "key")
    wire.deliver(refusal, HOST_AT, GUEST_AT)
    wire.run(0.1)
    assert not wire.guest.controlling and stun.ICE_CONTROLLED in stun.decode(captured(wire, stun.REQUEST)[-1]).attributes


# ---- whereabouts ----------------------------------------------------------------------------------------------------

class Watch:
    """Whereabouts on a clock of its own, with two STUN servers that are this object."""

    def __init__(self, monkeypatch, servers=(STUN_A, STUN_B), first=None):
        """first: the servers that answer the constructor, None: all."""
        self.now, self.mapped, self.own, self.lines, self.asked, self.source = 1000.0, ("198.51.100.1", 6000), [OWN], [], [], None
        monkeypatch.setattr(whereabouts, "gather_addresses", lambda *_: self.own)
        monkeypatch.setattr(whereabouts, "resolve", lambda *_: list(servers))
        monkeypatch.setattr(whereabouts, "ask_stun", lambda *_: dict.fromkeys(servers if first is None else first, self.mapped))
        self.socket = sockets.open_socket()
        self.it = whereabouts.Whereabouts(self.socket, servers, False, whereabouts.KEEPALIVE, [], self.lines.append, lambda: self.now)
        self.socket.close()

    def run(self, seconds, answering=(STUN_A, STUN_B)):
        end = self.now + seconds
        while self.now < end:
            for datagram, server in self.it.tick(self.now):
                self.asked.append(self.now)
                if server in answering and self.mapped:
                    message = stun.decode(datagram)
                    value = stun.pack_address(self.mapped, message.transaction)
                    answer = stun.decode(stun.encode(stun.SUCCESS, message.transaction, [(stun.XOR_MAPPED_ADDRESS, value)]))
                    if self.it.awaits(message.transaction):
                        self.it.receive(answer, self.source or server, self.now)
            self.now += 0.1

    def news(self):
        was, self.it.is_news = self.it.is_news, False
        return was


def test_a_new_mapping_is_news_and_has_the_router_asked_more_often(monkeypatch):
    """A router that forgets after ten seconds is asked every seven and a half from then on."""
    watch = Watch(monkeypatch)
    watch.run(14)
    assert not watch.asked
    watch.mapped = ("198.51.100.1", 6001)
    watch.run(2)
    assert watch.news() and "198.51.100.1:6001" in watch.it.candidates.addresses and watch.lines == ["the public address is now 198.51.100.1:6001"]
    watch.asked.clear()
    watch.run(30)
    assert not watch.news() and len(watch.asked) == 8 and max(gaps(watch.asked)) < 8


def test_a_kind_of_nat_that_one_of_two_servers_could_not_tell_at_first_is_asked_for_at_once(monkeypatch):
    watch = Watch(monkeypatch, first=(STUN_A,))
    assert watch.it.candidates.nat == "unknown"
    watch.run(0.05)
    assert watch.it.candidates.nat == "endpoint-independent" and len(watch.asked) == 2
    watch.run(14)
    assert len(watch.asked) == 2


def test_a_server_that_does_not_answer_when_another_one_does_is_asked_five_times_at_the_most_and_again_with_the_keep_alive(monkeypatch):
    watch = Watch(monkeypatch, first=(STUN_A,))
    watch.run(14, answering=(STUN_A,))
    assert 4 <= len(watch.asked) - 1 <= 5 and watch.asked[2] - watch.asked[0] < 0.21 and watch.asked[-1] - watch.asked[0] < 1
    watch.run(15, answering=(STUN_A,))
    assert 8 <= len(watch.asked) - 2 <= 10


def test_an_answer_that_is_lost_makes_no_known_kind_of_nat_unknown_unless_the_router_has_forgotten_us(monkeypatch):
    watch = Watch(monkeypatch)
    watch.run(20, answering=(STUN_B,))
    assert watch.it.candidates.nat == "endpoint-independent" and not watch.news()
    watch.mapped = ("198.51.100.1", 6001)
    watch.run(20, answering=(STUN_B,))
    assert watch.it.candidates.nat == "unknown" and watch.news()


def test_a_nat_that_gives_two_servers_one_port_by_chance_is_symmetric_once_a_second_socket_has_shown_it_until_it_is_another_nat(monkeypatch):
    watch = Watch(monkeypatch)
    assert (watch.it.candidates.nat, watch.it.candidates.is_certain) == ("endpoint-independent", False)
    watch.it.learn_kind(True)
    assert (watch.it.candidates.nat, watch.it.candidates.is_certain) == ("symmetric", True) and watch.news()
    watch.run(20)
    assert watch.it.candidates.nat == "symmetric" and not watch.news()
    watch.mapped = ("198.51.100.2", 6000)
    watch.run(20)
    assert (watch.it.candidates.nat, watch.it.candidates.is_certain) == ("endpoint-independent", False)
    watch.it.learn_kind(False)
    assert (watch.it.candidates.nat, watch.it.candidates.is_certain) == ("endpoint-independent", True)


def test_servers_that_are_told_while_others_are_asked_are_asked_at_once(monkeypatch):
    watch = Watch(monkeypatch, servers=(STUN_A,), first=())
    watch.run(1.2, answering=())
    assert watch.it.is_asking
    watch.it.use_stun([STUN_A, STUN_B], True, watch.now)
    watch.run(0.05)
    assert watch.it.candidates.nat == "endpoint-independent"


@pytest.mark.parametrize("told", [[STUN_A, STUN_B], []])
def test_servers_that_were_guessed_are_asked_no_more_once_the_server_has_told_where_it_answers(monkeypatch, told):
    watch = Watch(monkeypatch, servers=(STUN_A,), first=())
    watch.run(1.2, answering=())
    watch.it.use_stun(told, bool(told), watch.now)
    watch.asked.clear()
    watch.run(14)
    assert len(watch.asked) == len(told)


def test_a_new_address_of_this_machine_is_news_within_three_seconds_and_stun_is_asked(monkeypatch):
    watch = Watch(monkeypatch)
    watch.own = ["10.0.0.7:5000"]
    watch.run(3.2)
    assert watch.news() and "10.0.0.7:5000" in watch.it.candidates.addresses and len(watch.asked) == 2
    watch.mapped = ("198.51.100.9", 7000)
    watch.run(16)
    assert watch.it._keepalive == whereabouts.KEEPALIVE / 2


def test_a_new_address_of_this_machine_is_news_without_stun_too(monkeypatch):
    watch = Watch(monkeypatch, servers=())
    watch.own = ["10.0.0.7:5000"]
    watch.run(3.2)
    assert watch.news() and watch.it.candidates.addresses == ["10.0.0.7:5000"]


def test_with_too_many_open_files_a_machine_keeps_the_addresses_that_it_had(monkeypatch):
    watch = Watch(monkeypatch, servers=())

    def fail(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(whereabouts, "gather_addresses", fail)
    watch.run(4)
    assert not watch.news() and watch.it.candidates.addresses == [OWN]


def test_a_keep_alive_that_nobody_answers_is_put_again_soon_and_then_less_often(monkeypatch):
    watch = Watch(monkeypatch)
    watch.run(60, answering=())
    times = sorted(set(watch.asked))
    assert gaps(times)[0] == pytest.approx(0.5, abs=0.11) and times[2] - times[0] < 2.2 and times[-1] - times[-3] > 10
    watch.run(20)
    assert not watch.news() and not watch.it.is_asking


def test_a_keep_alive_answer_from_another_address_than_was_asked_does_not_count(monkeypatch):
    watch = Watch(monkeypatch)
    watch.mapped, watch.source = ("192.0.2.66", 6666), STRANGER
    watch.run(40)
    assert watch.asked and not watch.news() and watch.it.candidates.mapped == ("198.51.100.1", 6000)


def test_one_silent_stun_server_of_two_costs_little(start_server):
    port = start_server().stuns[0].server_address[1]
    with contextlib.closing(sockets.open_socket()) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(0.1)
        found = candidates.ask_stun(sock, [("127.0.0.1", port), silent.getsockname()])
        assert list(found) == [("127.0.0.1", port)]
        with pytest.raises(socket.timeout):
            for _ in range(4):      # it is asked three times in the 0.3 seconds that it has
                silent.recv(2048)


# ---- connections ----------------------------------------------------------------------------------------------------

@pytest.fixture
def endpoint():
    """Makes endpoints on loopback, and closes them after the test."""
    made = []

    def make(**values):
        made.append(p2pclient.Endpoint(loopback=True, **values))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer_as_a_symmetric_router_shows(sock, port, lost):
    """Be a STUN server that sees everybody at one port, but loses the first so many questions. Ends when the socket is closed or silent for long."""
    with contextlib.suppress(OSError):
        while True:
            request, source = sock.recvfrom(2048)
            lost -= 1
            if lost < 0:
                sock.sendto(p2pserver.stun_answer(request, ("198.51.100.1", port)), source)


def test_a_symmetric_router_is_told_of_soon_also_if_one_of_two_stun_servers_loses_all_first_questions(endpoint):
    told, made = threading.Event(), []
    with contextlib.ExitStack() as stack:
        for port, lost in ((6000, 0), (6001, 3)):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(10)
            made.append(sock.getsockname())
            threading.Thread(target=answer_as_a_symmetric_router_shows, args=(sock, port, lost), daemon=True).start()
        it = endpoint(stun_servers=made, moved=told.set)
        assert told.wait(5) and it.candidates.nat == "symmetric"
        assert {"198.51.100.1:6000", "198.51.100.1:6001"} < set(it.candidates.addresses)


def asleep(endpoint):
    """Wait until an endpoint's thread waits for minutes, as it does where nothing is due."""
    wait_until(lambda: endpoint._expected > time.monotonic() + 60)


@pytest.fixture
def long_sleep(monkeypatch):
    """An endpoint's thread that has nothing to do is woken by what it is told alone."""
    for module, name in ((p2pclient.endpoint, "LONGEST_PAUSE"), (whereabouts, "LOOK_INTERVAL"), (checks, "SILENT_TIME"), (checks, "CONSENT_TIME")):
        monkeypatch.setattr(module, name, 600)


def test_stun_servers_that_are_told_wake_the_thread_that_asks_them(endpoint, long_sleep):
    it = endpoint()
    asleep(it)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stun_server:
        stun_server.bind(("127.0.0.1", 0))
        stun_server.settimeout(WAIT)
        it.use_stun([stun_server.getsockname()], instead_of=[])
        assert stun.decode(stun_server.recv(2048)).kind == stun.REQUEST


def test_a_slow_look_up_of_told_stun_servers_holds_up_no_connection(endpoint, monkeypatch):
    hosts, guests = pair(endpoint(), endpoint())
    real, asked, came, in_time = socket.getaddrinfo, threading.Event(), threading.Event(), []

    def slow(name, *more, **options):
        if name == "slow.test":
            asked.set()
            in_time.append(came.wait(WAIT))
            name = "127.0.0.1"
        return real(name, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        telling = pool.submit(hosts._endpoint.use_stun, [("slow.test", 3478)], [])
        assert asked.wait(WAIT)
        guests.send(b"hello")
        assert hosts.recv(5) == b"hello"
        came.set()
        telling.result(WAIT)
    assert in_time == [True]


def test_what_a_callback_raises_ends_no_connection(endpoint, monkeypatch):
    called = []

    def fail(*arguments):
        called.append(arguments)
        raise RuntimeError("a callback that fails")

    host = endpoint(report=fail, moved=fail)
    hosts, guests = pair(host, endpoint())
    host.forward("198.51.100.1:4000")
    monkeypatch.setattr(checks, "CHECK_TIME", 0.1)
    host.expect(p2pclient.Guest("another session", "key", ["127.0.0.1:9"]))
    wait_until(lambda: set(called) == {(), ("a guest could not be reached: no check got through in both directions",)})
    guests.send(b"hello")
    assert hosts.recv(5) == b"hello"


def pair(host, guest, session_id="session", key="key"):
    """Connect two endpoints as a server would have them do; the host's and the guest's connection."""
    host.expect(p2pclient.Guest(session_id, key, guest.candidates.addresses[:1]))
    connection = guest.connect(p2pclient.Start("game", session_id, key, host.candidates.addresses[:1], 1, 60, 2))
    return host.accept(5), connection


def test_datagrams_go_both_ways(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    guests.send(b"hello")
    assert hosts.recv(5) == b"hello"
    hosts.send(b"")
    assert guests.recv(5) == b""
    assert hosts.remote_address == guests.local_address and guests.remote_address == hosts.local_address and 0 < guests.rtt < 5


def test_a_host_has_many_guests_on_one_socket(endpoint):
    host = endpoint()
    pairs = [pair(host, endpoint(), f"session {i}", f"key {i}") for i in range(8)]
    for i, (_, guests) in enumerate(pairs):
        guests.send(b"from %d" % i)
    for i, (hosts, guests) in enumerate(pairs):
        assert hosts.recv(5) == b"from %d" % i
        hosts.send(b"to %d" % i)
        assert guests.recv(5) == b"to %d" % i


def test_recv_waits_and_then_times_out(endpoint):
    _, guests = pair(endpoint(), endpoint())
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        guests.recv(0.2)
    assert time.monotonic() - began >= 0.2


def test_recv_is_woken_by_a_datagram_and_by_the_end(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    got = []

    def receive():
        got.append(guests.recv())
        try:
            guests.recv()
        except p2pclient.PeerLost as end:
            got.append(str(end))

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not got
    hosts.send(b"now")
    wait_until(lambda: got == [b"now"])
    hosts.close()
    thread.join(5)
    assert got == [b"now", "the other player has left"]


def test_what_came_before_the_end_can_still_be_read(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    guests.send(b"last words")
    guests.close()
    assert hosts.recv(5) == b"last words"
    with pytest.raises(p2pclient.PeerLost, match="the other player has left"):
        hosts.recv(5)


def test_after_the_end_nothing_can_be_sent(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    guests.close()
    with pytest.raises(p2pclient.PeerLost, match="closed"):
        guests.send(b"x")
    with pytest.raises(p2pclient.PeerLost):
        hosts.recv(5)
    with pytest.raises(p2pclient.PeerLost):
        hosts.send(b"x")


def test_a_datagram_that_is_too_long_is_refused(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    with pytest.raises(ValueError):
        guests.send(bytes(1201))
    guests.send(bytes(1200))
    assert hosts.recv(5) == bytes(1200)


def test_datagrams_from_a_stranger_are_dropped(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"from a stranger", addresses.parse_candidate(guests.remote_address))
        stranger.sendto(stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session")], "a guess"),
                        addresses.parse_candidate(guests.remote_address))
        guests.send(b"from the guest")
        assert hosts.recv(5) == b"from the guest"
        stranger.settimeout(0.2)
        with pytest.raises(socket.timeout):
            stranger.recv(2048)


def parted(endpoint):
    """A host, and the connection of its guest, which has left."""
    host = endpoint()
    hosts, guests = pair(host, endpoint())
    guests.close()
    with pytest.raises(p2pclient.PeerLost):
        hosts.recv(5)
    return host, guests


def test_a_guest_that_left_may_come_back_in_the_same_session(endpoint):
    host, _ = parted(endpoint)
    hosts, guests = pair(host, endpoint())
    guests.send(b"again")
    assert hosts.recv(5) == b"again"


def test_a_closed_endpoint_ends_its_connections_and_who_waits_for_more(endpoint):
    host = endpoint()
    hosts, guests = pair(host, endpoint())
    waiting = threading.Thread(target=lambda: pytest.raises(p2pclient.PeerLost, host.accept))
    waiting.start()
    host.close()
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises(p2pclient.PeerLost):
        guests.recv(5)


def test_nothing_can_be_begun_on_a_closed_endpoint(endpoint):
    closed = endpoint()
    closed.close()
    with pytest.raises(p2pclient.ConnectFailed, match="the endpoint is closed"):
        closed.connect(p2pclient.Start("game", "session", "key", ["127.0.0.1:5000"], 1, 60, 2))


def test_an_endpoint_works_beside_a_thousand_open_files(endpoint):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("no more than a thousand files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(__file__))
        hosts, guests = pair(endpoint(), endpoint())
        guests.send(b"hello")
        assert hosts.recv(5) == b"hello"
        hosts.close()
        guests.close()


def loopback_of(endpoint):
    return "127.0.0.1", endpoint.socket.getsockname()[1]


def lossy(endpoint, is_lost):
    """Have an endpoint's datagrams lost as a function says."""
    send = endpoint.send
    endpoint.send = lambda datagram, address: None if is_lost(datagram, address) else send(datagram, address)


def test_datagrams_between_our_like_are_authentic(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    assert hosts.authentic and guests.authentic
    with hosts._endpoint._lock:
        sealed = guests.session.channel.seal(b"once")
        for datagram in (b"forged", sealed, sealed, sealed[:-1] + b"!"):
            hosts._endpoint._take(datagram, hosts.session.selected)     # as if a stranger spoofed the guest's address
    assert hosts.recv(5) == b"once"
    guests.send(stun.encode(stun.REQUEST, bytes(12)))       # reads as STUN, which does not matter here
    assert stun.decode(hosts.recv(5))


def test_datagrams_that_are_too_long_are_dropped_on_receipt(endpoint):
    hosts, guests = pair(endpoint(), endpoint())
    with hosts._endpoint._lock:
        for size in (1201, 1900):
            hosts._endpoint._take(guests.session.channel.seal(bytes(size)), hosts.session.selected)
    guests.send(b"short")
    assert hosts.recv(5) == b"short"
    host = endpoint()
    host.expect(p2pclient.Guest("session", "key", []))
    with host._lock:
        host._take(foreign_check(bytes(12)), STRANGER)
        for size in (1201, 1, 1900):
            host._take(bytes(size), STRANGER)
        assert [len(each) for each in host._connections["session"]._inbox] == [1]


@pytest.mark.parametrize("size, count", [(1000, 65), (0, 1024)], ids=["bytes", "datagrams"])
def test_an_inbox_keeps_the_latest_64_kilobytes_and_1024_datagrams(endpoint, size, count):
    hosts, _ = pair(endpoint(), endpoint())
    with hosts._endpoint._lock:
        for i in range(2000):
            hosts.deliver(bytes([i % 256]) * size)
    got = []
    with pytest.raises(TimeoutError):
        while True:
            got.append(hosts.recv(0))
    assert len(got) == count and got[-1] == bytes([1999 % 256]) * size


def test_a_check_that_comes_before_the_poll_tells_of_its_session_is_taken_then(endpoint):
    host = endpoint()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest:
        guest.settimeout(5)
        guest.sendto(foreign_check(bytes(12)), loopback_of(host))
        wait_until(lambda: host._early._kept)
        host.expect(p2pclient.Guest("session", "key", []))
        assert stun.decode(guest.recv(2048)).transaction == bytes(12)


def test_early_checks_are_kept_for_two_seconds_and_are_few():
    kept = early.EarlyChecks()
    for i in range(200):
        kept.keep(f"session {i}", stun.decode(foreign_check(bytes(12))), GUEST_AT, 1000.0)
    assert len(kept._kept) == 64
    assert kept.take("session 0", 1000.0) == [] and len(kept.take("session 199", 1002.0)) == 1 and kept.take("session 199", 1002.0) == []
    assert kept.take("session 198", 1002.1) == []
    kept.keep("session", stun.decode(foreign_check(bytes(12), (0x8100, bytes(600)))), GUEST_AT, 1000.0)
    assert kept.take("session", 1000.0) == []


def test_a_copy_of_an_early_check_is_a_replay_also_if_its_sender_has_checked_again_meanwhile(endpoint):
    host = endpoint()
    guest, stranger = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with guest, stranger:
        for sock, transaction in ((guest, b"1"), (stranger, b"1"), (guest, b"2")):
            sock.sendto(foreign_check(12 * transaction), loopback_of(host))
        wait_until(lambda: any(message.transaction == 12 * b"2" for message, *_ in list(host._early._kept.values())))
        host.expect(p2pclient.Guest("session", "key", []))
        stranger.sendto(foreign_check(12 * b"2"), loopback_of(host))
        guest.sendto(foreign_check(12 * b"3"), loopback_of(host))
        answered = set()
        guest.settimeout(5)
        while 12 * b"3" not in answered:
            answered.add(stun.decode(guest.recv(2048)).transaction)
        assert {12 * each for each in (b"1", b"2", b"3")} <= answered
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(2048)


class Relay:
    """Another way to an endpoint: a router that passes on what comes to its outer port, from another port."""

    def __init__(self, inner):
        self.inner, self.peer = inner, None
        self.front, self.back = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for each in (self.front, self.back):
            each.bind(("127.0.0.1", 0))
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self.inwards, self.outwards)]
        for thread in self.threads:
            thread.start()

    def inwards(self):
        with contextlib.suppress(OSError):
            while True:
                datagram, self.peer = self.front.recvfrom(2048)
                self.back.sendto(datagram, self.inner)

    def outwards(self):
        with contextlib.suppress(OSError):
            while True:
                self.front.sendto(self.back.recv(2048), self.peer)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for each in (self.front, self.back):
            each.close()


def test_a_connection_whose_peer_is_silent_asks_for_its_new_addresses_and_goes_on(endpoint, monkeypatch):
    monkeypatch.setattr(checks, "SILENT_TIME", 0.5)
    host, guest = endpoint(consent_interval=0.1), endpoint(consent_interval=0.1)
    hosts, guests = pair(host, guest)
    called = threading.Event()
    guest.moved = called.set
    with Relay(loopback_of(host)) as relay:
        assert not called.wait(1)
        for each, unreachable in ((host, loopback_of(guest)), (guest, loopback_of(host))):
            lossy(each, lambda datagram, address, unreachable=unreachable: address == unreachable)
        assert called.wait(WAIT)
        guest.renew(p2pclient.Start("game", "session", "key", [addresses.text_of(relay.front.getsockname())], 2, 60, 2))
        wait_until(lambda: guests.remote_address == addresses.text_of(relay.front.getsockname()))
        wait_until(lambda: hosts.remote_address == addresses.text_of(relay.back.getsockname()))
        guests.send(b"still there?")
        assert hosts.recv(5) == b"still there?"
        hosts.send(b"yes")
        assert guests.recv(5) == b"yes"


def test_a_guest_that_nobody_answers_asks_for_the_hosts_addresses_again(endpoint, monkeypatch):
    monkeypatch.setattr(checks, "UNHEARD_TIME", 0.2)
    host, guest = endpoint(), endpoint()
    host.expect(p2pclient.Guest("session", "key", []))
    start = p2pclient.Start("game", "session", "key", [f"127.0.0.1:{free_port()}"], 1, 60, 2)
    guest.moved = lambda: guest.renew(dataclasses.replace(start, addresses=host.candidates.addresses[:1]))
    assert guest.connect(start).remote_address == addresses.text_of(loopback_of(host))


def test_a_renewal_of_a_session_that_is_not_there_begins_none(endpoint):
    guest = endpoint()
    guest.renew(p2pclient.Start("game", "session", "key", ["127.0.0.1:5000"], 1, 60, 2))
    assert not guest._connections


def test_a_program_that_was_suspended_goes_on(endpoint, monkeypatch):
    """Neither thread runs for longer than a peer may be silent."""
    monkeypatch.setattr(checks, "CONSENT_TIME", 3.0)     # on a busy machine the two may need some of it afterwards
    host, guest = endpoint(consent_interval=0.1), endpoint(consent_interval=0.1)
    hosts, guests = pair(host, guest)
    with host._lock, guest._lock:
        time.sleep(3.5)
    wait_until(lambda: time.monotonic() - guests.session._last_answer < 0.2)
    guests.send(b"awake")
    assert hosts.recv(5) == b"awake"


def is_goodbye(datagram, address):
    message = stun.decode(datagram)
    return message is not None and message.kind == stun.INDICATION


@pytest.mark.parametrize("is_closed", [False, True], ids=["connection", "endpoint"])
def test_a_good_bye_that_is_lost_is_said_again(endpoint, is_closed):
    hosts, guests = pair(endpoint(), endpoint())
    said = []
    lossy(guests._endpoint, lambda datagram, address: is_goodbye(datagram, address) and (said.append(1) or len(said) == 1))
    (guests._endpoint if is_closed else guests).close()
    with pytest.raises(p2pclient.PeerLost, match="has left"):
        hosts.recv(5)
    assert len(said) > 1


def test_good_byes_are_repeated_by_the_socket_that_reaches_the_peer_also_when_the_endpoint_is_closed(endpoint, monkeypatch):
    """A further socket, as behind a symmetric router."""
    host, guest = endpoint(), endpoint()
    hosts, _ = pair(host, guest)
    with host._lock:
        branch = host._branches._socket_of("session", 1)
        host._branches.routes[hosts.session.selected] = branch
    sent, real = [], p2pclient.endpoint.send_to
    monkeypatch.setattr(p2pclient.endpoint, "send_to", lambda sock, *rest: (is_goodbye(*rest[:2]) and sent.append(sock), real(sock, *rest)))
    host.close()
    assert sent[:3] == 3 * [branch]


def test_a_good_bye_wakes_the_thread_that_says_it_again(endpoint, long_sleep):
    host, guest = endpoint(consent_interval=300), endpoint(consent_interval=300)
    _, guests = pair(host, guest)
    for each in (host, guest):
        asleep(each)
    lossy(guest, is_goodbye)
    guests.close()
    wait_until(lambda: not guest._farewells)


def test_a_host_with_many_guests_closes_as_soon_as_one_with_a_single_guest(endpoint, monkeypatch):
    host = endpoint()
    guests = [pair(host, endpoint(), f"session {i}")[1] for i in range(12)]
    monkeypatch.setattr(p2pclient.endpoint, "LAST_FAREWELLS", 1)
    in_seconds(8, host.close)
    for each in guests:
        with pytest.raises(p2pclient.PeerLost, match="has left"):
            each.recv(5)


def test_who_missed_the_good_bye_is_told_when_it_checks(endpoint):
    hosts, guests = pair(endpoint(consent_interval=0.2), endpoint())
    lost = []
    lossy(guests._endpoint, lambda datagram, address: is_goodbye(datagram, address) and len(lost) < 3 and not lost.append(1))
    guests.close()
    with pytest.raises(p2pclient.PeerLost, match="has left"):
        hosts.recv(5)


def test_a_player_who_crashed_comes_back_in_the_same_session_from_the_same_port(endpoint):
    host, port = endpoint(), free_port()
    crashing = endpoint(sock=sockets.open_socket(port))
    hosts, _ = pair(host, crashing)
    lossy(crashing, lambda datagram, address: True)
    crashing.close()
    guests = endpoint(sock=sockets.open_socket(port)).connect(p2pclient.Start("game", "session", "key", host.candidates.addresses[:1], 1, 60, 2))
    again = host.accept(5)
    with pytest.raises(p2pclient.PeerLost, match="begun anew"):
        hosts.recv(5)
    guests.send(b"back")
    assert again.recv(5) == b"back"
    again.send(b"welcome")
    assert guests.recv(5) == b"welcome"


def test_a_host_that_crashed_and_is_back_is_not_taken_for_the_one_that_the_guest_knew(endpoint):
    port = free_port()
    crashing, guest = endpoint(sock=sockets.open_socket(port)), endpoint(consent_interval=0.2)
    _, guests = pair(crashing, guest)
    lossy(crashing, lambda datagram, address: True)
    crashing.close()
    endpoint(sock=sockets.open_socket(port)).expect(p2pclient.Guest("session", "key", guest.candidates.addresses[:1]))
    with pytest.raises(p2pclient.PeerLost, match="begun anew|has left"):
        guests.recv(WAIT)


def test_a_guest_that_left_or_failed_is_not_tried_again_at_addresses_that_were_tried(endpoint):
    host, guests = parted(endpoint)
    host.expect(p2pclient.Guest("session", "key", guests._endpoint.candidates.addresses[:1]))
    assert not host._connections


def test_an_endpoint_remembers_the_latest_thousand_sessions(endpoint):
    host = endpoint()
    for i in range(1100):
        host.expect(p2pclient.Guest(f"session {i}", "key", []))
        host.end(host._connections[f"session {i}"])
    assert list(host._ended) == list(host._attempts.latest) == [f"session {i}" for i in range(76, 1100)]


def test_a_guest_that_tries_again_from_the_same_port_publishes_something_new_and_is_tried_again(endpoint):
    host, guest = endpoint(), endpoint()
    first = guest.candidates.published
    host.expect(p2pclient.Guest("session", "key", first))
    guests = guest.connect(p2pclient.Start("game", "session", "key", host.candidates.addresses[:1], 1, 60, 2))
    host.accept(5)
    guests.close()
    wait_until(lambda: not host._connections)
    second = guest.candidates.published
    assert second[:-1] == first[:-1] and second != first
    host.expect(p2pclient.Guest("session", "key", first))
    assert not host._connections
    host.expect(p2pclient.Guest("session", "key", second))
    assert host._connections


def test_a_replayed_check_begins_no_connection_anew(endpoint):
    """Two guests have come and left in one session; what the first one sent is from another session than the latest, but known."""
    host, seen = endpoint(), []
    taking = host._take
    host._take = lambda datagram, source: (seen.append((datagram, source)), taking(datagram, source))
    for _ in range(2):
        hosts, guests = pair(host, endpoint())
        guests.close()
        with pytest.raises(p2pclient.PeerLost):
            hosts.recv(5)
    with host._lock:
        for datagram, source in list(seen):
            taking(datagram, source)
        assert not host._connections


@pytest.mark.parametrize("theirs_controlling", [False, True], ids=["it is controlled", "it is controlling"])
@pytest.mark.parametrize("is_guest", [False, True], ids=["our host", "our guest"])
def test_a_stock_ice_agent_connects_with(endpoint, is_guest, theirs_controlling):
    """aioice, whose username fragment is the sessionId and whose password the sessionKey; in two of the four cases both want the same role."""
    aioice = pytest.importorskip("aioice")
    ours = p2pclient.Endpoint()
    name, key = "sessionid0123456", "sessionkey0123456789abcdef"

    async def run():
        agent = aioice.Connection(ice_controlling=theirs_controlling, use_ipv6=False, local_username=name, local_password=key)
        agent.remote_username, agent.remote_password = name, key
        await agent.gather_candidates()
        for i, text in enumerate(ours.candidates.addresses):
            host, port = addresses.parse_candidate(text)
            await agent.add_remote_candidate(aioice.Candidate(str(i), 1, "udp", 1000 - i, host, port, "host"))
        await agent.add_remote_candidate(None)
        theirs = [addresses.text_of((each.host, each.port)) for each in agent.local_candidates]
        connecting = asyncio.ensure_future(agent.connect())
        if is_guest:
            connection = await asyncio.to_thread(ours.connect, p2pclient.Start("game", name, key, theirs, 1, 60, 2))
        else:
            ours.expect(p2pclient.Guest(name, key, theirs))
            connection = await asyncio.to_thread(ours.accept, WAIT)
        await connecting
        await agent.send(b"from a stock agent")
        assert await asyncio.to_thread(connection.recv, 5) == b"from a stock agent"
        connection.send(b"to a stock agent")
        assert await asyncio.wait_for(agent.recv(), 5) == b"to a stock agent"
        assert not connection.authentic
        with pytest.raises(ValueError, match="STUN"):
            connection.send(stun.encode(stun.REQUEST, bytes(12)))
        await agent.close()

    with contextlib.closing(ours):
        if not ours.candidates.addresses:
            pytest.skip("this machine has no address but loopback")
        asyncio.run(run())


@pytest.mark.parametrize("role", ["controlling", "controlled"])
@pytest.mark.parametrize("is_guest", [False, True], ids=["our host", "our guest"])
def test_libnice_connects_with(is_guest, role):
    python = shutil.which("python3", path="/usr/bin")
    if not python or subprocess.run([python, "-c", "import gi; gi.require_version('Nice', '0.1')"], capture_output=True, check=False).returncode:
        pytest.skip("libnice is missing; apt-get install python3-gi gir1.2-nice-0.1 installs it")
    name, key = "sessionid0123456", "sessionkey0123456789abcdef"
    with subprocess.Popen([python, ROOT / "lab" / "nice_agent.py", role, name, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent, \
            contextlib.closing(p2pclient.Endpoint()) as ours:
        theirs = [addresses.text_of((ip, port)) for ip, port in json.loads(agent.stdout.readline())]
        print(json.dumps([addresses.parse_candidate(text) for text in ours.candidates.addresses]), file=agent.stdin, flush=True)
        if is_guest:
            connection = ours.connect(p2pclient.Start("game", name, key, theirs, 1, 60, 2))
        else:
            ours.expect(p2pclient.Guest(name, key, theirs))
            connection = ours.accept(WAIT)
        assert connection.recv(5) == b"from stock" and not connection.authentic
        connection.send(b"to stock")
        assert json.loads(agent.stdout.readline()) == "to stock"
        agent.kill()


def test_loopback_addresses_can_be_left_out(endpoint):
    own = endpoint()
    assert any(map(addresses.is_loopback, own.candidates.addresses)) and own.leave_loopback()
    assert not any(map(addresses.is_loopback, own.candidates.addresses)) and not own.leave_loopback()


def test_loopback_candidates_of_a_peer_are_not_tried_unless_the_server_is_on_loopback(monkeypatch):
    monkeypatch.setattr(checks, "CHECK_TIME", 0.3)
    with contextlib.closing(p2pclient.Endpoint(loopback=False)) as guest, contextlib.closing(sockets.open_socket()) as service:
        service.setblocking(False)
        with pytest.raises(p2pclient.ConnectFailed, match="no usable address"):
            guest.connect(p2pclient.Start("game", "session", "key", [f"127.0.0.1:{service.getsockname()[1]}"], 1, 60, 2))
        with pytest.raises(BlockingIOError):
            service.recv(2048)


@pytest.mark.parametrize("own, published, words", [
    ("no answer", [], "no UDP datagram comes back to you"),
    ("symmetric", [{"p2p": {"nat": "symmetric"}}], "both routers give each destination another port"),
    ("symmetric", [], "your router gives each destination another port"),
    ("none", [{"p2p": {"nat": "symmetric"}}], "the host's router gives each destination another port"),
    ("not asked", [], "the host never answered"),
    ("none", [], "the host never answered"),
])
def test_a_failure_is_explained_from_what_was_seen(own, published, words):
    session = checks.Session("session", "key", True, 0.0)
    session.over = checks.NO_WAY
    assert words in str(diagnosis.why_not(session, candidates.Candidates([], nat=own), published))


@pytest.mark.parametrize("own, host, helps", [
    (("symmetric", RANDOM), EASY_ONE, True), (EASY_ONE, ("symmetric", BLOCK), True), (("symmetric", SEQUENTIAL), EASY_ONE, False),
    (("symmetric", SEQUENTIAL), ("symmetric", BLOCK), True), (("symmetric", BLOCK), ("symmetric", BLOCK), True),
    (("symmetric", BLOCK), ("symmetric", RANDOM), False), (("symmetric", None), ("symmetric", BLOCK), False),
], ids=str)
def test_probing_is_advised_where_it_would_help_and_not_both_have_asked_for_it(own, host, helps):
    for mine, theirs in itertools.product((False, True), repeat=2):
        session, published = checks.Session("session", "key", True, 0.0), own_of(*host, probing=theirs).published
        session.over = checks.NO_WAY
        advice = diagnosis.why_not(session, own_of(*own, probing=mine), published).advice
        assert ("--probing" in advice) == (helps and not (mine and theirs)) and "a relay" in advice


def test_a_failure_names_what_each_side_saw():
    session = checks.Session("session", "key", True, 0.0)
    session.add([("198.51.100.1", 5000)], 0.0)
    session.over = checks.NO_WAY
    text = str(diagnosis.why_not(session, candidates.Candidates([], nat="endpoint-independent"), [{"p2p": {"nat": "symmetric"}}]))
    assert "you: the NAT keeps one port for all destinations: good; 0 checks to 198.51.100.1:5000; heard from 0 of these" in text
    assert "the host: the NAT gives each destination another port (symmetric)" in text


@pytest.mark.parametrize("published", [[], [None, 1, "x"], [{"nat": []}], [{"p2p": "symmetric"}], [{"p2p": {"nat": "\x1b[2J"}}], [{"p2p": {}}], [{"x": {}}]])
def test_what_a_peer_tells_in_a_form_that_we_do_not_know_is_ignored(published):
    session, own = checks.Session("session", "key", True, 0.0), candidates.Candidates([], nat="none")
    session.over = checks.NO_WAY
    text = str(diagnosis.why_not(session, own, published))
    assert "tells nothing of its NAT" in text and text.isprintable() and not candidates.read_published(published, own, True).addresses


# ---- the server's calls ---------------------------------------------------------------------------------------------

def test_each_call_gives_what_the_server_says(start_server):
    server = start_server()
    client, stun_ports = p2pclient.RendezvousClient(url_of(server)), server.stun_ports
    assert client.register_game("castle", "ada", info={"map": "x"}) == p2pclient.Registration("castle", True, 60, 0.1, stun_ports)
    assert client.register_game("castle", "ada").created is False
    start = client.start_game("castle", "ben", ["198.51.100.9:5000"])
    assert start.addresses == [] and start.stun_ports == stun_ports
    poll = client.poll_game("castle", "ada", ["203.0.113.7:4000"], replies={start.session_id: ["203.0.113.7:4001"], "gone": []})
    assert poll.guests == [p2pclient.Guest(start.session_id, start.session_key, ["198.51.100.9:5000"], "127.0.0.1")] and poll.gone == ["gone"]
    assert client.poll_game("castle", "ada", ["203.0.113.7:4000"], after=poll.cursor).guests == []
    assert client.start_game("castle", "ben", ["198.51.100.9:5000"]).addresses == ["203.0.113.7:4001"]
    game = p2pclient.GameInfo("castle", {"map": "x"}, 1, True)
    assert client.list_games() == [game] and client.get_game("castle") == game
    assert client.update_game("castle", "ada", new_name="a/b".replace("/", " & "), info={}) == p2pclient.GameInfo("a & b", {}, 1, True)
    client.delete_game("a & b", "ada")
    assert client.list_games() == []


def test_a_guest_that_leaves_or_is_sent_away_is_told_to_the_host(start_server):
    client = p2pclient.RendezvousClient(url_of(start_server()))
    client.register_game("castle", "ada")
    ben, eve = (client.start_game("castle", name, []).session_id for name in ("ben", "eve"))
    cursor = client.poll_game("castle", "ada", []).cursor
    client.leave_game("castle", "ben")
    poll = client.poll_game("castle", "ada", [], after=cursor, dismiss=[eve])
    assert set(poll.left) == {ben, eve} and poll.guests == []
    with pytest.raises(p2pclient.RendezvousError) as caught:
        client.start_game("castle", "eve", [])
    assert caught.value.status == 403


def test_a_guest_that_knows_the_hosts_addresses_can_wait_for_other_ones(start_server):
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    client.register_game("castle", "ada")
    client.poll_game("castle", "ada", ["203.0.113.7:4000"])
    cursor = client.start_game("castle", "ben", []).cursor
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        starting = pool.submit(client.start_game, "castle", "ben", [], wait=WAIT, after=cursor)
        wait_until(lambda: server.registry.counts()["waiting"])
        client.poll_game("castle", "ada", ["203.0.113.7:4001"])
        assert starting.result(WAIT).addresses == ["203.0.113.7:4001"]


@pytest.mark.parametrize("no_stun", [False, True])
def test_the_server_says_where_it_answers_stun(start_server, no_stun):
    server = start_server(no_stun=no_stun, **({} if no_stun else {"stun_port": free_port()}))
    client = p2pclient.RendezvousClient(url_of(server))
    assert client.stun_servers == [("127.0.0.1", server.server_port), ("127.0.0.1", server.server_port + 1)]       # a guess
    client.register_game("castle", "ada")
    assert client.stun_servers == [("127.0.0.1", stun.server_address[1]) for stun in server.stuns] != client.likely_stun


def test_a_refusal_tells_status_detail_and_the_faults_by_field(start_server):
    client = p2pclient.RendezvousClient(url_of(start_server()))
    with pytest.raises(p2pclient.RendezvousError) as caught:
        client.register_game("", "")
    assert caught.value.status == 400 and set(caught.value.errors) == {"name", "peerId"} and "name must be" in caught.value.detail


def test_secrets_are_not_in_what_results_look_like():
    guest, start = p2pclient.Guest("id", "hidden", []), p2pclient.Start("game", "id", "hidden", [], 1, 60, 2)
    assert "hidden" not in repr(guest) + repr(start)


@pytest.mark.parametrize("url", ["ftp://example.net", "http://", "http://:8000"])
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(ValueError):
        p2pclient.RendezvousClient(url)


def free_port():
    """A port that is free for TCP and UDP."""
    while True:
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                udp.bind(tcp.getsockname())
                return tcp.getsockname()[1]


def test_a_call_waits_for_a_server_that_is_not_up_yet(start_server):
    port = free_port()
    client = p2pclient.RendezvousClient(f"http://127.0.0.1:{port}")
    games = []
    thread = threading.Thread(target=lambda: games.append(client.list_games()))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    start_server(port=port)
    thread.join(10)
    assert games == [[]]


def test_a_call_gives_up_when_its_patience_ends():
    client = p2pclient.RendezvousClient(f"http://127.0.0.1:{free_port()}", patience=0.3)
    with pytest.raises(p2pclient.RendezvousError, match="cannot reach .*: Connection refused") as caught:
        client.list_games()
    assert caught.value.status == 0


def test_503_is_repeated_after_as_long_as_the_server_says(start_server, monkeypatch):
    monkeypatch.setattr(p2pserver, "RETRY_AFTER", 2)
    server = start_server(max_games=1)
    host, other = p2pclient.RendezvousClient(url_of(server)), p2pclient.RendezvousClient(url_of(server), patience=30)
    host.register_game("first", "ada")
    began, results = time.monotonic(), []
    thread = threading.Thread(target=lambda: results.append(other.register_game("second", "ben")))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    host.delete_game("first", "ada")
    thread.join(20)
    assert results[0].created and time.monotonic() - began >= p2pserver.RETRY_AFTER


def test_503_beyond_patience_is_raised_at_once(start_server):
    client = p2pclient.RendezvousClient(url_of(start_server(max_games=1)), patience=5)
    client.register_game("first", "ada")
    began = time.monotonic()
    with pytest.raises(p2pclient.RendezvousError) as caught:
        client.register_game("second", "ben")
    assert caught.value.status == 503 and time.monotonic() - began < 5


def test_a_game_that_the_server_has_forgotten_is_registered_again(start_server):
    port = free_port()
    first = start_server(port=port)
    client = p2pclient.RendezvousClient(url_of(first))
    client.register_game("castle", "ada", info={"map": "x"}, listed=False)
    first.stop()
    start_server(port=port)
    assert client.poll_game("castle", "ada", [], after=5).guests == []
    assert client.get_game("castle").info == {"map": "x"} and client.list_games() == []


def test_a_name_that_the_server_writes_otherwise_is_registered_again_too(start_server):
    port = free_port()
    first = start_server(port=port)
    client = p2pclient.RendezvousClient(url_of(first))
    assert client.register_game("Zoe\u0308", "ada").name == "Zo\u00eb"
    first.stop()
    start_server(port=port)
    assert client.poll_game("Zoe\u0308", "ada", []).guests == [] and client.poll_game("Zo\u00eb", "ada", []).guests == []


def delayed(client, monkeypatch, path, condition):
    """Has a client's calls of a path wait for a condition before they go out. An event: one waits."""
    once, waiting = client._transport._try, threading.Event()

    def delay(method, called, *call):
        if called == path:
            waiting.set()
            wait_until(condition)
        return once(method, called, *call)

    monkeypatch.setattr(client._transport, "_try", delay)
    return waiting


@pytest.mark.parametrize("call", [lambda client: client.renew_turn("castle"), lambda client: client.poll_game("castle", "ada", [])],
                         ids=["a renewal", "a poll after a restart"])
def test_a_registration_that_comes_to_the_server_after_its_game_was_deleted_leaves_no_game(start_server, monkeypatch, call):
    first = start_server(port=free_port())
    client, deleted = p2pclient.RendezvousClient(url_of(first)), threading.Event()
    client.register_game("castle", "ada")
    first.stop()
    server = start_server(port=first.server_port)
    late = delayed(client, monkeypatch, "/games/register", deleted.is_set)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call, client)
        assert late.wait(WAIT)
        with pytest.raises(p2pclient.RendezvousError, match="404"):
            client.delete_game("castle", "ada")
        deleted.set()
        assert isinstance(calling.exception(WAIT), (p2pclient.RendezvousError, type(None)))
    assert server.counters[p2pserver.REQUESTS, ("register_game", 201)] == 1 and server.registry.counts()["games"] == 0


def test_a_poll_that_a_renaming_overtakes_does_not_register_the_old_name_again(start_server, monkeypatch):
    """The poll is refused before the answer to the renaming has come."""
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    client.register_game("castle", "ada")
    once = client._transport._try

    def slow(method, path, *call):
        reply = once(method, path, *call)
        if method == "PATCH":
            polling.append(pool.submit(client.poll_game, "castle", "ada", []))
            wait_until(lambda: server.counters[p2pserver.REQUESTS, ("poll_game", 404)])
        return reply

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        polling = []
        monkeypatch.setattr(client._transport, "_try", slow)
        client.update_game("castle", "ada", new_name="fortress")
        assert polling[0].exception(WAIT).status == 404
    assert [game.name for game in client.list_games()] == ["fortress"]
    assert client.poll_game("fortress", "ada", []).name == "fortress"


class Constant:
    """A server that gives one answer to everything, and counts how often."""

    def __init__(self, answer):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url, self.answer, self.count = f"http://127.0.0.1:{self.listener.getsockname()[1]}", answer, 0
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}" % self.answer)
                    self.count += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.mark.parametrize("call", [lambda client: client.list_games(), lambda client: client.get_game("x"), lambda client: client.register_game("x", "y"),
                                  lambda client: client.poll_game("x", "y", []), lambda client: client.start_game("x", "y", [])])
def test_an_answer_of_another_kind_of_server_is_an_error_of_ours(call):
    with Constant(b"200 OK") as server, pytest.raises(p2pclient.RendezvousError, match="no rendezvous server"):
        call(p2pclient.RendezvousClient(server.url))


class Script:
    """A server whose every connection, in a thread of its own, is a function's business: it gets the socket and the bytes of each request, and
    closes the connection by returning False."""

    def __init__(self, handle, host="127.0.0.1", port=0):
        self.listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port, self.handle, self.requests = self.listener.getsockname()[1], handle, []
        self.url = f"http://127.0.0.1:{self.port}"
        self.clients, self.threads = [], [threading.Thread(target=self.accept)]

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.clients.append(client)
                self.threads.append(threading.Thread(target=self.serve, args=(client,)))
                self.threads[-1].start()

    def serve(self, client):
        with client, contextlib.suppress(OSError):
            while True:
                request = client.recv(65536)
                if not request:
                    return
                while int((re.findall(rb"(?i)content-length: (\d+)", request) or [0])[0]) > len(request.partition(b"\r\n\r\n")[2]):
                    request += client.recv(65536)       # head and body may come apart
                self.requests.append(request)
                if self.handle(client, request) is False:
                    return

    def __enter__(self):
        self.threads[0].start()
        return self

    def __exit__(self, *exception):
        for each in [self.listener, *self.clients]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self.threads:
            thread.join(5)


def http_answer(body, status="200 OK", *fields):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *fields, "", ""]).encode() + data


def answering(*answer):
    return lambda client, request: client.sendall(http_answer(*answer))


POLL = {"name": "castle", "guests": [], "cursor": 1, "expiresIn": 60, "pollAfter": 2}
GUEST = {"sessionId": "s", "sessionKey": "k", "addresses": []}
START = {**GUEST, "name": "castle", "cursor": 1, "expiresIn": 60, "pollAfter": 2}
GAME = {"name": "castle", "info": {}, "guests": 0, "ready": True}
HANDED = {"urls": ["turn:t"], "username": "u", "credential": "c", "ttl_seconds": 60}
CALLS = {
    "register": (lambda client: client.register_game("x", "y"), {"name": "castle", "expiresIn": 60, "pollAfter": 2}),
    "poll": (lambda client: client.poll_game("x", "y", []), POLL), "start": (lambda client: client.start_game("x", "y", []), START),
    "list": (lambda client: client.list_games(), {"games": [GAME]}), "get": (lambda client: client.get_game("x"), GAME),
    "health": (lambda client: client.health(), {"version": "1"}),
}


@pytest.mark.parametrize("call, change", [
    *[("register", change) for change in ({"name": 1}, {"name": ""}, {"name": "\ud800"}, {"name": "x" * 2000}, {"expiresIn": "60"}, {"pollAfter": True},
                                          {"pollAfter": float("nan")}, {"pollAfter": None}, {"stun": 3478}, {"stun": [0]}, {"stun": [65536]}, {"stun": ["1"]},
                                          {"turn": 1}, {"turn": {}}, *({"turn": {**HANDED, **fault}} for fault in (
                                              {"urls": "turn:t"}, {"urls": [1]}, {"username": 1}, {"credential": ""}, {"ttl_seconds": "60"})))],
    *[("poll", change) for change in ({"guests": {}}, {"guests": [1]}, {"guests": [{}]}, {"cursor": -1}, {"cursor": 1.5}, {"cursor": 2 ** 70}, {"left": [1]},
                                      {"gone": "x"}, {"left": None}, *({"guests": [{**GUEST, **fault}]} for fault in (
                                          {"sessionId": 1}, {"sessionId": "\u00e9"}, {"sessionId": "x" * 251}, {"sessionKey": ""}, {"sessionKey": "a b"},
                                          {"addresses": "x"}, {"addresses": None}, {"from": "here"}, {"from": 1})))],
    *[("start", change) for change in ({"sessionId": None}, {"sessionKey": []}, {"addresses": {}}, {"cursor": "1"}, {"name": None}, {"stun": {}})],
    *[("get", change) for change in ({"info": []}, {"guests": -1}, {"ready": 1}, {"name": None})],
    ("list", {"games": [1]}), ("list", {"games": {}}), ("health", {"version": 1}),
], ids=lambda value: value if isinstance(value, str) else ascii(value)[:60])
def test_a_field_of_an_answer_that_is_not_as_it_should_be_is_an_error_of_ours(call, change):
    function, good = CALLS[call]
    answers = iter([good, {**good, **change}])
    with Script(lambda client, request: client.sendall(http_answer(next(answers)))) as server:
        client = p2pclient.RendezvousClient(server.url, patience=0)
        function(client)
        with pytest.raises(p2pclient.RendezvousError, match="no rendezvous server"):
            function(client)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"[1]", b"null", b"\xff", b"<html>", b'"' * 3])
def test_an_answer_that_is_no_json_object_is_an_error_of_ours(body):
    with Script(answering(body)) as server, pytest.raises(p2pclient.RendezvousError, match="does not answer as a rendezvous server does"):
        p2pclient.RendezvousClient(server.url, patience=0).list_games()


@pytest.mark.parametrize("told, taken", [(0, 0.1), (-5, 0.1), (1e300, 3600), (10 ** 400, 3600), (float("inf"), 3600), (7, 7)])
def test_seconds_that_a_server_asks_for_are_from_a_tenth_to_an_hour(told, taken):
    with Script(answering({**POLL, "expiresIn": told, "pollAfter": told})) as server:
        poll = p2pclient.RendezvousClient(server.url).poll_game("castle", "ada", [])
        assert poll.expires_in == poll.poll_after == taken


@pytest.mark.parametrize("told, taken", [("5", 5), ("99999999999", 3600), ("9" * 400, 3600), ("-1", 0), ("soon", 0)])
def test_retry_after_is_an_hour_at_the_most(told, taken):
    with Script(answering({}, "503 Service Unavailable", f"Retry-After: {told}")) as server, pytest.raises(p2pclient.RendezvousError) as caught:
        p2pclient.RendezvousClient(server.url, patience=0).list_games()
    assert caught.value.retry_after == taken


def test_a_redirect_is_not_followed_and_its_target_is_named():
    with Script(answering({"games": []})) as target, \
            Script(answering({}, "307 Temporary Redirect", f"Location: {target.url}/\x1b[2J")) as server:
        with pytest.raises(p2pclient.RendezvousError, match=re.escape(f"{target.url}/\\x1b[2J")) as caught:
            p2pclient.RendezvousClient(server.url).list_games()
        assert caught.value.status == 307 and not target.requests


def test_what_a_refusal_says_is_harmless_and_short():
    problem = {"detail": "\x1b]0;owned\x07\n\u202e" + "x" * 10_000, "errors": {"na\nme": "\x1b[2J", "x": 1}}
    with Script(answering(problem, "400 Bad Request")) as server, pytest.raises(p2pclient.RendezvousError) as caught:
        p2pclient.RendezvousClient(server.url).list_games()
    text = str(caught.value) + "".join(caught.value.errors) + "".join(caught.value.errors.values())
    assert text.isprintable() and "\\x1b]0;owned" in text and len(text) < 1000


@pytest.mark.parametrize("errors", [[], "x", 1, None])
def test_a_refusal_with_errors_of_another_kind_is_told_as_well(errors):
    with Script(answering({"detail": "no", "errors": errors}, "400 Bad Request")) as server, pytest.raises(p2pclient.RendezvousError) as caught:
        p2pclient.RendezvousClient(server.url).list_games()
    assert caught.value.status == 400 and caught.value.errors == {}


def test_an_answer_of_more_than_a_megabyte_is_not_read_to_its_end():
    sent = []

    def flood(client, request):
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent.append(client.send(bytes(100_000)))

    with Script(flood) as server, pytest.raises(p2pclient.RendezvousError, match="more than 1000000 bytes"):
        p2pclient.RendezvousClient(server.url).list_games()
    assert sum(sent) < 20_000_000       # what lies in the sockets' buffers is on top


def test_a_compressed_answer_is_not_asked_for_and_never_inflated():
    bomb = zlib.compress(bytes(100_000_000))
    with Script(answering(bomb, "200 OK", "Content-Encoding: deflate")) as server:
        with pytest.raises(p2pclient.RendezvousError, match="does not answer as a rendezvous server does"):
            p2pclient.RendezvousClient(server.url).list_games()
        assert b"Accept-Encoding: identity\r\n" in server.requests[0]


def dribble(data):
    """Sends data forever, slowly."""
    def handle(client, request):
        client.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            client.sendall(data)
            time.sleep(0.02)
    return handle


def flood_of_heads(client, request):
    while True:
        client.sendall(100 * b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("handle", [dribble(b"X: y\r\n"), dribble(b"\r\nHTTP/1.1 100 Continue\r\n"), dribble(b"\r\n"), lambda client, request: None,
                                    flood_of_heads], ids=["head", "continue", "body", "silence", "flood"])
def test_an_answer_that_never_ends_takes_no_longer_than_its_call(handle):
    # Newer versions of Python give up themselves after 100 interim answers.
    with Script(handle) as server:
        client = p2pclient.RendezvousClient(server.url, timeout=0.5, patience=0)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(p2pclient.RendezvousError, match="timed out|interim responses"):
            pool.submit(client.list_games).result(WAIT)


def test_a_call_within_a_time_ends_with_it_however_patient_the_client_is():
    with Script(lambda client, request: None) as server:
        client = p2pclient.RendezvousClient(server.url, timeout=1000, patience=1000)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(p2pclient.RendezvousError):
            pool.submit(client.start_game, "castle", "ben", [], wait=1000, within=1).result(WAIT)


@pytest.mark.parametrize("end", [http_answer({}, "504 Gateway Timeout"), http_answer({}, "502 Bad Gateway"), b""], ids=["504", "502", "closed"])
def test_a_call_that_a_proxy_cuts_while_it_is_held_is_repeated_at_once_and_held_for_less(end):
    def handle(client, request):
        first = len(server.requests) == 1
        if first:
            time.sleep(1.3)     # the proxy's time-out
        client.sendall(end if first else http_answer(POLL))
        return bool(end) or not first

    with Script(handle) as server:
        assert p2pclient.RendezvousClient(server.url, patience=0).poll_game("castle", "ada", [], wait=25).guests == []
        assert [re.findall(rb"Prefer: wait=(\d+)", request) for request in server.requests] == [[b"25"], [b"1"]]


def test_502_at_once_is_a_failure_that_is_repeated_while_patience_lasts():
    answers = iter(["502 Bad Gateway", "504 Gateway Timeout", "200 OK"])
    with Script(lambda client, request: client.sendall(http_answer(POLL, next(answers)))) as server:
        assert p2pclient.RendezvousClient(server.url).poll_game("castle", "ada", [], wait=25).guests == []
        assert all(b"Prefer: wait=25\r\n" in request for request in server.requests) and len(server.requests) == 3


@pytest.fixture
def black_hole():
    """Makes listeners that take no connection: the system drops what would open one."""
    with contextlib.ExitStack() as stack:
        def dig(host, port):
            listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(0)
            for _ in range(3):      # the system's queue is full then
                filler = stack.enter_context(socket.socket(listener.family))
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            return listener
        yield dig


@pytest.fixture
def name_leads_to(monkeypatch):
    """Gives the name example.test addresses, in the resolver's place: a machine's own names may have one address each."""
    monkeypatch.setattr(tcp, "_worked", {})
    real = socket.getaddrinfo

    def lead(*targets):
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *more, **options: [
            each for target in targets for each in real(target, port, *more, **options)] if host == "example.test" else real(host, port, *more, **options))
    return lead


def test_an_address_of_a_name_that_leads_nowhere_costs_its_time_once(start_server, black_hole, name_leads_to, monkeypatch):
    monkeypatch.setattr(tcp, "CONNECT_TIME", 0.5)
    server = start_server()
    name_leads_to("::1", "127.0.0.1")
    client = p2pclient.RendezvousClient(f"http://example.test:{server.server_port}", patience=0)
    began = time.monotonic()
    with contextlib.closing(black_hole("::1", server.server_port)):
        assert client.list_games() == [] and time.monotonic() - began >= 0.5
    with Script(answering({"games": []}), "::1", server.server_port) as elsewhere:
        client.reconnect()
        assert client.list_games() == [] and not elsewhere.clients


@pytest.fixture
def slow_dns(monkeypatch):
    """The name example.test is found after the event, at 127.0.0.1."""
    real, answered = socket.getaddrinfo, threading.Event()

    def look_up(host, *more, **options):
        return real("127.0.0.1" if host == "example.test" and answered.wait(WAIT) else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield answered
    answered.set()


def test_a_server_whose_name_is_found_late_is_reached(start_server, slow_dns, monkeypatch):
    """As where the first name server of two is dead: the system gives it five seconds."""
    monkeypatch.setattr(tcp, "CONNECT_TIME", 0.1)
    client = p2pclient.RendezvousClient(f"http://example.test:{start_server().server_port}", patience=0)
    threading.Timer(1, slow_dns.set).start()
    assert client.list_games() == []


def test_a_call_within_a_time_ends_with_it_however_slow_the_look_up_of_a_name_is(slow_dns):
    client = p2pclient.RendezvousClient("http://example.test:8000")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(p2pclient.RendezvousError, match="the name was not found in time"):
        pool.submit(client.leave_game, "castle", "ben", within=0.5).result(WAIT / 2)


def test_what_is_no_name_of_a_host_is_an_error_of_ours_and_no_stun_server():
    with pytest.raises(p2pclient.RendezvousError, match="this is no name of a host"):
        p2pclient.RendezvousClient("http://a..b:8000", patience=0).list_games()
    assert sockets.resolve([("a..b", 3478), ("127.0.0.1", 3478)]) == [("127.0.0.1", 3478)]


def test_a_connection_that_is_reset_while_it_is_made_is_an_error_of_ours(start_server, monkeypatch):
    """As by a server that stops at this moment."""
    class Reset(socket.socket):
        def connect(self, address):
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    client = p2pclient.RendezvousClient(url_of(start_server()), patience=0)
    monkeypatch.setattr(socket, "socket", Reset)
    with pytest.raises(p2pclient.RendezvousError, match="cannot reach .*: Connection reset by peer"):
        client.list_games()


def test_a_server_whose_name_leads_elsewhere_by_now_is_found(start_server, name_leads_to):
    first = start_server()
    name_leads_to("127.0.0.1")
    client = p2pclient.RendezvousClient(f"http://example.test:{first.server_port}")
    client.register_game("castle", "ada")
    second = start_server(host="127.0.0.2", port=first.server_port)
    name_leads_to("127.0.0.2")
    client.reconnect()
    assert client.list_games() == []
    first.stop()
    assert client.poll_game("castle", "ada", []).guests == [] and second.registry.counts()["games"] == 1


def test_a_dead_connection_is_noticed_within_ten_seconds():
    with Script(answering({"games": []})) as server, contextlib.closing(tcp.connect(("127.0.0.1", server.port), 1)) as sock:
        def option(name):
            return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT") <= 10
        assert option("TCP_USER_TIMEOUT") <= 9000


def test_a_held_call_over_a_connection_that_a_router_has_forgotten_fails_before_its_time():
    """In a network of its own, in which nothing arrives any more from one moment on."""
    code = """if True:
        import os, subprocess, threading, p2pclient, p2pserver
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        server = p2pserver.open_server(p2pserver.Settings(host="127.0.0.1", port=0, no_stun=True))
        server.start()
        client = p2pclient.RendezvousClient(f"http://127.0.0.1:{server.server_port}", patience=0)
        client.register_game("castle", "ada")

        def forget():
            while not server.registry.counts()["waiting"]:
                pass
            subprocess.run(["nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }"], check=True)

        threading.Thread(target=forget).start()
        try:
            client.poll_game("castle", "ada", [], wait=25)
        except p2pclient.RendezvousError as error:
            print(error, flush=True)
        os._exit(0)
    """
    if not (shutil.which("unshare") and shutil.which("nft") and shutil.which("ip")) or subprocess.run(["unshare", "-rn", "nft", "list", "tables"]).returncode:
        pytest.skip("networks of one's own take unshare, ip and nft")
    ended = subprocess.run(["unshare", "-rn", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    assert "Connection timed out" in ended.stdout


def test_a_connection_that_was_made_early_is_the_first_calls(start_server):
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    client.connect()
    wait_until(lambda: len(server.connections) == 1)
    assert client.list_games() == [] and len(server.connections) == 1
    client.connect()        # there is one
    assert client.list_games() == [] and len(server.connections) == 1


def test_a_proxy_of_the_environment_is_not_asked_for_loopback_and_named_otherwise(start_server, monkeypatch):
    proxy = f"http://127.0.0.1:{free_port()}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.replace("//", "//user:secret@"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = start_server()
    for host in ("127.0.0.1", "localhost"):
        assert p2pclient.RendezvousClient(f"http://{host}:{server.server_port}", patience=0).list_games() == []
    with pytest.raises(p2pclient.RendezvousError, match=f"cannot reach http://192.0.2.1 by the proxy {proxy} ") as caught:
        p2pclient.RendezvousClient("http://192.0.2.1", patience=0).list_games()
    assert "secret" not in str(caught.value)


def test_a_game_that_was_never_ours_is_not_registered_by_a_poll(start_server):
    client = p2pclient.RendezvousClient(url_of(start_server()))
    with pytest.raises(p2pclient.RendezvousError) as caught:
        client.poll_game("castle", "ada", [])
    assert caught.value.status == 404


class AnswerEater:
    """A relay to a server that passes the first request on, but eats its answer and cuts the connection."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url, self.port = f"http://127.0.0.1:{self.listener.getsockname()[1]}", port
        self.eaten = b""
        self.listener.settimeout(WAIT)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with self.listener, contextlib.suppress(OSError):       # which shutdown() raises in accept()
            for eat in (True, False, False):
                client, _ = self.listener.accept()
                with client, socket.create_connection(("127.0.0.1", self.port)) as server:
                    request = b""
                    while b"}" not in request:      # head and body may come apart
                        request += client.recv(65536)
                    server.sendall(request)
                    answer = server.recv(65536)
                    if eat:
                        self.eaten = answer
                    else:
                        client.sendall(answer)


@pytest.mark.parametrize("call", [
    lambda client: client.delete_game("castle", "ada"),
    lambda client: client.update_game("castle", "ada", new_name="fortress"),
    lambda client: client.register_game("castle", "ada"),
    lambda client: client.start_game("castle", "ben", []),
], ids=["delete", "rename", "register", "start"])
def test_a_call_whose_answer_was_lost_is_repeated_without_harm(start_server, call):
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    client.register_game("castle", "ada")
    relay = AnswerEater(server.server_port)
    call(p2pclient.RendezvousClient(relay.url))
    assert b"HTTP/1.1 20" in relay.eaten
    with contextlib.suppress(OSError):
        relay.listener.shutdown(socket.SHUT_RDWR)


# ---- games ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def heard_good_byes(monkeypatch):
    """The server hears of all who leave, however busy this machine is."""
    for module in (games, presence):
        monkeypatch.setattr(module, "CLOSE_TIME", WAIT)


def test_a_hosted_game_is_joined(start_server, heard_good_byes):
    url = url_of(start_server())
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle") as game, p2pclient.join_game(p2pclient.RendezvousClient(url), "castle") as guest:
        guest.send(b"hello")
        assert game.accept(5).recv(5) == b"hello"
    assert p2pclient.RendezvousClient(url).list_games() == []


def test_a_hosted_game_can_be_renamed_and_described(start_server):
    url = url_of(start_server())
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle") as game:
        game.update("fortress", info={"players": 1})
        with p2pclient.join_game(p2pclient.RendezvousClient(url), "fortress"):
            game.accept(5)
            assert p2pclient.RendezvousClient(url).get_game("fortress").info == {"players": 1}


def test_a_hosted_game_lives_on_across_a_restart_of_the_server(start_server, monkeypatch):
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    port, lines = free_port(), []
    first = start_server(port=port)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first), patience=0.1), "castle", report=lines.append) as game:
        first.stop()
        wait_until(lambda: any("trying again" in line for line in lines))
        second = start_server(port=port)
        wait_until(lambda: "the server is back" in lines)
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(second)), "castle"):
            game.accept(5)


def test_a_game_that_its_owner_renames_by_another_client_comes_back_after_a_restart_of_the_server(start_server, monkeypatch):
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    port = free_port()
    first = start_server(port=port)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first), patience=0.1), "castle", peer_id="ada", info={"map": 1}) as game:
        wait_until(lambda: first.registry.counts()["waiting"])
        p2pclient.RendezvousClient(url_of(first)).update_game("castle", "ada", new_name="fortress")
        wait_until(lambda: game.name == "fortress")
        first.stop()
        second = p2pclient.RendezvousClient(url_of(start_server(port=port)))
        wait_until(lambda: [(each.name, each.info) for each in second.list_games()] == [("fortress", {"map": 1})])


@pytest.mark.parametrize("timeout, max_waiting", [(1.0, 100), (2.5, 100), (8.0, 0)])
def test_a_guest_takes_the_addresses_that_its_host_publishes_shortly_before_its_time_is_over(start_server, timeout, max_waiting):
    """It asks once more, however long pollAfter is."""
    url = url_of(start_server(poll_after=2, max_waiting=max_waiting))
    p2pclient.RendezvousClient(url).register_game("castle", "ada")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(p2pclient.join_game, p2pclient.RendezvousClient(url), "castle", [], timeout)
        time.sleep(timeout - 0.75)
        with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle", peer_id="ada"), joining.result(WAIT) as connection:
            assert connection.remote_address


def test_a_guest_that_waits_is_not_lost_when_the_server_is_restarted(start_server):
    """Its host comes back a moment later than itself."""
    port = free_port()
    first = start_server(port=port)
    p2pclient.RendezvousClient(url_of(first)).register_game("castle", "ada")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(p2pclient.join_game, p2pclient.RendezvousClient(url_of(first)), "castle")
        wait_until(lambda: first.registry.counts()["waiting"])
        first.stop()
        second = start_server(port=port)
        wait_until(lambda: second.counters[p2pserver.REQUESTS, ("start_game", 404)])
        with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(second)), "castle") as game, joining.result(WAIT):
            assert game.accept(5)


def test_a_host_does_not_hammer_a_server_that_is_sick(start_server, monkeypatch):
    port = free_port()
    first = start_server(port=port)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first), patience=0.1), "castle") as game:
        first.stop()
        with Constant(b"502 Bad Gateway") as sick:
            game._client._transport.base_url = sick.url
            wait_until(lambda: sick.count)
            time.sleep(1)      # seconds in which there could be many calls
            assert sick.count <= 2


def test_a_game_that_is_interrupted_while_names_are_looked_up_is_deleted(start_server, heard_good_byes, monkeypatch):
    server, real = start_server(), socket.getaddrinfo

    def look_up(host, *more, **options):
        if host == "example.test" and server.registry.counts()["games"] and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return real("127.0.0.1" if host == "example.test" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(KeyboardInterrupt):
        p2pclient.HostedGame(p2pclient.RendezvousClient(f"http://example.test:{server.server_port}"), "castle")
    assert server.registry.counts()["games"] == 0
    wait_until(lambda: not any(thread.name in ("host", "endpoint") for thread in threading.enumerate()))


def test_a_game_may_be_closed_by_its_own_report(start_server):
    """Here by the thread of the relay, which then cannot wait for itself."""
    url, made, closed = url_of(start_server()), threading.Event(), []

    def report(line):
        made.wait(WAIT)
        game.close()
        closed.append(line)

    game = p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle", report=report, turn=turn.TurnServer(("127.0.0.1", 0), "", ""))
    made.set()
    wait_until(lambda: closed)
    assert p2pclient.RendezvousClient(url).list_games() == []


def test_a_host_that_moves_when_no_thread_can_be_begun_still_hears_of_its_guests(start_server, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle") as game:
        wait_until(lambda: server.registry.counts()["waiting"])
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError):
                game._moved()
            with pytest.raises(p2pclient.RendezvousError, match="can't start new thread"):
                p2pclient.RendezvousClient(url_of(server), patience=0).list_games()
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle"):
            game.accept(5)


def test_a_taken_name_is_told_at_once(start_server):
    url = url_of(start_server())
    p2pclient.RendezvousClient(url).register_game("castle", "ada")
    with pytest.raises(p2pclient.RendezvousError) as caught:
        p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle")
    assert caught.value.status == 409


def test_a_game_that_a_stranger_has_taken_over_is_lost_and_said_so_and_its_connections_go_on_until_it_is_ours_again(start_server, monkeypatch):
    monkeypatch.setattr(presence, "REFUSED_PAUSE", 0.1)
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    port, lines = free_port(), []
    first = start_server(port=port)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first), patience=0.1), "castle", report=lines.append) as game, \
            p2pclient.join_game(p2pclient.RendezvousClient(url_of(first)), "castle") as guest:
        hosts = game.accept(5)
        first.stop()
        wait_until(lambda: any("trying again" in line for line in lines))
        second = p2pserver.open_server(p2pserver.Settings(host="127.0.0.1", port=port))
        second.registry.register_game("castle", b"somebody else")
        with contextlib.closing(types.SimpleNamespace(close=second.stop)):
            second.start()
            wait_until(lambda: any("no longer offered: the" in line for line in lines))
            guest.send(b"still here?")
            hosts.send(hosts.recv(5))
            assert guest.recv(5) == b"still here?"
            second.registry.delete_game("castle", b"somebody else")
            wait_until(lambda: "the game is offered again" in lines)
            with p2pclient.join_game(p2pclient.RendezvousClient(url_of(second)), "castle") as other:
                assert other.session_id == game.accept(5).session_id


@pytest.mark.parametrize("status", ["400 Bad Request", "403 Forbidden", "404 Not Found", "409 Conflict"])
def test_a_poll_that_is_refused_ends_no_connection_and_is_tried_again(start_server, status, monkeypatch):
    monkeypatch.setattr(presence, "REFUSED_PAUSE", 0.1)
    server, lines = start_server(), []
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle", report=lines.append) as game, \
            p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle") as guest:
        hosts = game.accept(5)
        with Script(answering({"detail": "no"}, status)) as refusing:
            game._client._transport.base_url = refusing.url
            game._moved()
            wait_until(lambda: len(refusing.requests) > 2)
        game._client._transport.base_url = url_of(server)
        wait_until(lambda: "the game is offered again" in lines)
        assert sum("no longer offered: no" in line for line in lines) == 1
        guest.send(b"hello")
        assert hosts.recv(5) == b"hello"


@pytest.mark.parametrize("answer", [{**POLL, "guests": [{}]}, {**POLL, "guests": [{**GUEST, "sessionId": "\ud800"}]}, {}, {**POLL, "cursor": None}])
def test_an_answer_that_is_none_ends_neither_the_polling_nor_a_connection(start_server, answer, monkeypatch):
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    server, lines = start_server(), []
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle", report=lines.append) as game:
        with Script(answering(answer)) as broken:
            game._client._transport.base_url = broken.url
            game._moved()
            wait_until(lambda: any("no rendezvous server" in line and "trying again" in line for line in lines))
        game._client._transport.base_url = url_of(server)
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle"):
            game.accept(5)
        assert "the server is back" in lines


def test_an_exception_of_any_kind_is_reported_and_the_polling_goes_on(start_server, monkeypatch):
    """Here one that a game's own report raises, and one from inside."""
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    server, lines = start_server(), []

    def report(line):
        lines.append(line)
        raise RuntimeError("a report that fails")

    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle", report=report) as game:
        good, game._client._transport.base_url = game._client._transport.base_url, None
        game._moved()
        wait_until(lambda: any("TypeError" in line and "trying again" in line for line in lines))
        game._client._transport.base_url = good
        wait_until(lambda: "the server is back" in lines)


def test_a_host_and_a_guest_that_come_back_with_their_peer_id_have_their_game_and_session_again(start_server):
    """Both have crashed: nobody was told that they are gone."""
    url = url_of(start_server())
    game = p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle", peer_id="ada")
    guest = p2pclient.join_game(p2pclient.RendezvousClient(url), "castle", peer_id="ben")
    crash(game, guest)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle", peer_id="ada") as game, \
            p2pclient.join_game(p2pclient.RendezvousClient(url), "castle", peer_id="ben") as again:
        assert again.session_id == game.accept(5).session_id == guest.session_id


def crash(game, guest):
    """Ends a host and its guest, without a word to the server."""
    for repeater, endpoint in ((game._repeater, game.endpoint), (guest.closing.__self__._repeater, guest._endpoint)):
        repeater.end()
        endpoint.close()
    game._client._transport.base_url = guest.closing.__self__._client._transport.base_url = "http://127.0.0.1:1"


def test_the_connection_to_the_server_is_made_while_stun_is_asked(start_server):
    """STUN answers only when that connection is there."""
    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stun_server:
        before = len(server.connections)
        stun_server.bind(("127.0.0.1", 0))
        stun_server.settimeout(WAIT)

        def answer_late():
            request, source = stun_server.recvfrom(2048)
            wait_until(lambda: len(server.connections) > before)
            stun_server.sendto(p2pserver.stun_answer(request, source), source)

        thread = threading.Thread(target=answer_late)
        thread.start()
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle", [stun_server.getsockname()]) as guest:
            assert guest._endpoint.candidates.mapped
        thread.join()


def test_with_an_endpoint_and_a_connection_to_the_server_one_call_alone_goes_before_the_first_check(start_server, endpoint, monkeypatch):
    """So it takes two round trips: that call and that check, if no router needs another one."""
    client, own = p2pclient.RendezvousClient(url_of(start_server())), endpoint()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(client.base_url), "castle") as game:
        wait_until(lambda: client.list_games()[0].ready)
        monkeypatch.setattr(transport, "connect_early", None)       # nobody calls it
        trips, once, send, mine = [], client._transport._try, own.send, threading.current_thread()
        monkeypatch.setattr(client._transport, "_try", lambda *call: (threading.current_thread() is mine and trips.append(call[1]), once(*call))[1])
        own.send = lambda datagram, address: (trips.append("check") if stun.decode(datagram).kind == stun.REQUEST else None, send(datagram, address))
        with p2pclient.join_game(client, "castle", endpoint=own) as guest:
            assert trips[:2] == ["/games/start", "check"] and trips.count("/games/start") == 1
            assert game.accept(5).session_id == guest.session_id


def test_a_guest_that_closes_its_connection_leaves_the_game(start_server, heard_good_byes):
    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle"):
        guest = p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle")
        assert server.registry.counts()["guests"] == 1
        guest.close()
        assert server.registry.counts()["guests"] == 0
        wait_until(lambda: not any(thread.name == "guest" for thread in threading.enumerate()))
        assert server.registry.counts()["guests"] == 0


def test_a_start_that_comes_to_the_server_after_its_guest_has_left_leaves_no_session(start_server, heard_good_byes, monkeypatch):
    """It begins a session anew, and the server would hold it for 25 seconds."""
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    with p2pclient.HostedGame(p2pclient.RendezvousClient(client.base_url), "castle") as game:
        guest = p2pclient.join_game(client, "castle")
        wait_until(lambda: server.registry.counts()["waiting"] == 2)
        late = delayed(client, monkeypatch, "/games/start", lambda: server.counters[p2pserver.REQUESTS, ("leave_game", 204)])
        game.endpoint.forward("198.51.100.1:4000")      # which the guest hears, and then starts again
        assert late.wait(WAIT)
        guest.close()
        assert server.registry.counts()["guests"] == 0 and server.counters[p2pserver.REQUESTS, ("leave_game", 204)] == 2


def test_a_guest_that_has_moved_and_leaves_waits_for_its_earlier_start_too(start_server, heard_good_byes, monkeypatch):
    """That one comes to the server last of all, and begins a session anew."""
    server = start_server()
    client = p2pclient.RendezvousClient(url_of(server))
    with p2pclient.HostedGame(p2pclient.RendezvousClient(client.base_url), "castle") as game:
        guest = p2pclient.join_game(client, "castle")
        wait_until(lambda: server.registry.counts()["waiting"] == 2)
        left, once, late = threading.Event(), client._transport._try, []

        def overtaken(method, path, *call):
            if path == "/games/start" and not late:
                late.append(path)
                wait_until(left.is_set)
            reply = once(method, path, *call)
            if path == "/games/leave":
                left.set()
            return reply

        monkeypatch.setattr(client._transport, "_try", overtaken)
        game.endpoint.forward("198.51.100.1:4000")      # which the guest hears, and then starts again
        wait_until(lambda: late)
        guest._endpoint.moved()
        wait_until(lambda: server.registry.counts()["waiting"] == 2)
        guest.close()
        assert server.registry.counts()["guests"] == 0 and server.counters[p2pserver.REQUESTS, ("leave_game", 204)] == 2


def test_a_game_that_closes_while_it_is_registered_again_is_deleted(start_server, heard_good_byes, monkeypatch):
    """The registration comes to the restarted server after the deletion."""
    first = start_server(port=free_port())
    client, servers = p2pclient.RendezvousClient(url_of(first)), []
    game = p2pclient.HostedGame(client, "castle")
    late = delayed(client, monkeypatch, "/games/register", lambda: servers and servers[0].counters[p2pserver.REQUESTS, ("delete_game", 404)])
    first.stop()
    servers.append(start_server(port=first.server_port))
    assert late.wait(WAIT)
    game.close()
    assert servers[0].counters[p2pserver.REQUESTS, ("register_game", 201)] == 1 and servers[0].registry.counts()["games"] == 0


def test_a_guest_that_leaves_while_its_game_is_renamed_leaves_it_under_its_new_name(start_server, heard_good_byes, monkeypatch):
    """The start that tells of the new name is answered while the guest leaves under the old one."""
    server, renamed = start_server(), threading.Event()
    client = p2pclient.RendezvousClient(url_of(server))
    once = client._transport._try

    def slow(method, path, *call):
        reply = once(method, path, *call)
        if path == "/games/start" and reply.body.text("name") == "fortress":
            renamed.set()
            wait_until(lambda: server.counters[p2pserver.REQUESTS, ("leave_game", 404)])
        return reply

    with p2pclient.HostedGame(p2pclient.RendezvousClient(client.base_url), "castle") as game:
        monkeypatch.setattr(client._transport, "_try", slow)
        guest = p2pclient.join_game(client, "castle")
        wait_until(lambda: server.registry.counts()["waiting"] == 2)
        game.update(new_name="fortress")
        assert renamed.wait(WAIT)
        guest.close()
        assert server.registry.counts()["guests"] == 0


def test_a_connection_that_is_closed_twice_does_not_leave_the_game_which_its_guest_has_joined_again(start_server, heard_good_byes):
    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle"):
        first = p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle", peer_id="ben")
        first.close()
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle", peer_id="ben"):
            first.close()
            assert server.registry.counts()["guests"] == 1


def test_a_guest_that_gives_up_before_its_host_has_an_address_leaves_the_game(start_server, heard_good_byes):
    server = start_server(max_wait=0, poll_after=50)
    p2pclient.RendezvousClient(url_of(server)).register_game("castle", "ada")
    with pytest.raises(p2pclient.ConnectFailed, match="published no address"):
        p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle")
    assert server.counters[p2pserver.REQUESTS, ("leave_game", 204)] == 1 and server.registry.counts()["guests"] == 0


def test_a_guest_that_does_not_get_through_leaves_the_game(start_server, heard_good_byes, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_TIME", 0.5)
    server = start_server()
    host = p2pclient.RendezvousClient(url_of(server))
    host.register_game("castle", "ada")
    host.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}"])
    with pytest.raises(p2pclient.ConnectFailed, match="the host never answered"):
        p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle")
    assert server.registry.counts()["guests"] == 0


def test_a_guest_stays_known_to_the_server_for_as_long_as_it_plays(start_server):
    server = start_server(guest_ttl=1, max_wait=1)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle") as game, \
            p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle") as guest:
        time.sleep(2.5)     # seconds, of which the server remembers a silent guest for one
        assert server.registry.counts()["guests"] == 1
        guest.send(b"hello")
        assert game.accept(5).recv(5) == b"hello"


def test_a_guest_that_checks_hears_where_its_host_has_moved_to(start_server, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_TIME", 3)
    host = p2pclient.RendezvousClient(url_of(start_server()))
    host.register_game("castle", "ada")
    host.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}"])
    with concurrent.futures.ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.settimeout(WAIT)
        joining = pool.submit(p2pclient.join_game, p2pclient.RendezvousClient(host.base_url), "castle")
        wait_until(lambda: host.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}"]).guests)
        host.poll_game("castle", "ada", [f"127.0.0.1:{elsewhere.getsockname()[1]}"])
        assert stun.decode(elsewhere.recv(2048)).kind == stun.REQUEST
        with pytest.raises(p2pclient.ConnectFailed):
            joining.result(WAIT)


def test_a_guest_that_moves_tells_its_host_where_it_is(start_server):
    url = url_of(start_server())
    host = p2pclient.RendezvousClient(url)
    with p2pclient.HostedGame(host, "castle", peer_id="ada") as game, p2pclient.join_game(p2pclient.RendezvousClient(url), "castle", peer_id="ben") as guest:
        game.accept(5)
        own = guest._endpoint
        wait_until(lambda: len(own.candidates.seen) == 2)       # STUN has nothing more to say for a while
        own._whereabouts.candidates = candidates.Candidates(["127.0.0.1:5000"])
        own.moved()
        told = wait_until(lambda: [each for each in p2pclient.RendezvousClient(url).poll_game("castle", "ada", ["127.0.0.1:4000"]).guests
                                   if each.addresses[0] == "127.0.0.1:5000"])
        assert [each.session_id for each in told] == [guest.session_id]


def test_a_guest_that_has_joined_another_game_over_its_endpoint_still_tells_where_it_is_when_the_first_connection_is_closed(start_server, endpoint):
    url, own = url_of(start_server()), endpoint()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle"), p2pclient.HostedGame(p2pclient.RendezvousClient(url), "fortress") as game:
        first = p2pclient.join_game(p2pclient.RendezvousClient(url), "castle", endpoint=own)
        with p2pclient.join_game(p2pclient.RendezvousClient(url), "fortress", endpoint=own):
            hosts = game.accept(5)
            first.close()
            own.forward("198.51.100.1:4000")
            wait_until(lambda: ("198.51.100.1", 4000) in hosts.session.remotes)


def test_a_session_that_a_restarted_server_has_lost_ends_no_connection_and_is_not_begun_anew(start_server, monkeypatch):
    monkeypatch.setattr(presence, "REFUSED_PAUSE", 0.1)
    port = free_port()
    first = start_server(port=port, guest_ttl=3)     # so that the guest calls again soon
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first)), "castle") as game, \
            p2pclient.join_game(p2pclient.RendezvousClient(url_of(first)), "castle") as guest:
        hosts = game.accept(5)
        first.stop()
        second = start_server(port=port, guest_ttl=6)
        wait_until(lambda: second.counters[p2pserver.REQUESTS, ("leave_game", 204)], 60)
        guest.send(b"hello")
        assert hosts.recv(5) == b"hello" and second.registry.counts() == {**second.registry.counts(), "games": 1, "guests": 0}


def test_players_who_moved_find_each_other_though_a_restarted_server_has_lost_their_session(start_server, endpoint, monkeypatch):
    monkeypatch.setattr(checks, "SILENT_TIME", 0.5)
    monkeypatch.setattr(presence, "WAIT", 5.0)      # a start that is on its way as the guest leaves is held so long, and then left too
    port, own = free_port(), endpoint(consent_interval=0.1)
    first = start_server(port=port)
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(first)), "castle") as game:
        game.endpoint._consent_interval = 0.1
        with p2pclient.join_game(p2pclient.RendezvousClient(url_of(first)), "castle", endpoint=own) as guest, Relay(loopback_of(game.endpoint)) as relay:
            hosts, elsewhere = game.accept(5), addresses.text_of(relay.front.getsockname())
            first.stop()
            second = start_server(port=port)
            game.endpoint._whereabouts._public = [elsewhere]
            for each, unreachable in ((own, loopback_of(game.endpoint)), (game.endpoint, loopback_of(own))):
                lossy(each, lambda datagram, address, unreachable=unreachable: address[1] == unreachable[1])
            wait_until(lambda: guest.remote_address == elsewhere, 30)
            wait_until(lambda: hosts.remote_address == addresses.text_of(relay.back.getsockname()))
            guest.send(b"still there?")
            assert hosts.recv(5) == b"still there?"
            hosts.send(b"yes")
            assert guest.recv(5) == b"yes"
            assert second.registry.counts()["guests"] == 1 and len(game.endpoint._connections) == 1
            with pytest.raises(TimeoutError):
                game.accept(0)
        wait_until(lambda: second.registry.counts()["guests"] == 0)


def in_seconds(seconds, function, *arguments, **options):
    """What a call gives or raises, which it must do in so many seconds: a daemon thread makes it."""
    results = []

    def run():
        try:
            results.append(function(*arguments, **options))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    return results[0]


@pytest.mark.parametrize("handle", [lambda client, request: None, dribble(b"X: y\r\n"), answering({}, "503 Busy", "Retry-After: 1"),
                                    answering({**START, "pollAfter": 3600}), answering(START, "200 OK", "Preference-Applied: wait=1")],
                         ids=["silence", "dribble", "503", "slow pace", "nothing"])
def test_who_joins_waits_no_longer_than_he_wants_whatever_the_server_does(handle):
    with Script(handle) as server:
        failure = in_seconds(1 + 5, p2pclient.join_game, p2pclient.RendezvousClient(server.url), "castle", [], timeout=1)
        assert isinstance(failure, (p2pclient.RendezvousError, p2pclient.ConnectFailed))


def test_closing_takes_two_seconds_at_the_most_where_the_server_hangs(start_server, monkeypatch):
    monkeypatch.setattr(transport, "LONGEST_WAIT", 1)       # seconds, so that the threads that wait end soon as well
    assert presence.CLOSE_TIME == games.CLOSE_TIME == 1.5
    for module in (presence, games):        # a machine that is busy has a second more
        monkeypatch.setattr(module, "CLOSE_TIME", 0.5)
    server = start_server()
    clients = [p2pclient.RendezvousClient(url_of(server), timeout=3, patience=0) for _ in range(2)]
    game = p2pclient.HostedGame(clients[0], "castle")
    guest = p2pclient.join_game(clients[1], "castle")
    with Script(lambda client, request: None) as hanging:
        for client in clients:
            client._transport.base_url = hanging.url
        game._moved()
        guest._endpoint.moved()
        wait_until(lambda: len(hanging.requests) >= 2)
        for each in (guest, game):
            began = time.monotonic()
            each.close()
            assert time.monotonic() - began < 2
    wait_until(lambda: not any(thread.name in ("guest", "host") for thread in threading.enumerate()))


def test_a_server_can_begin_at_most_64_sessions(start_server):
    guests = [{**GUEST, "sessionId": f"s{i}", "addresses": ["192.0.2.1:4000"]} for i in range(200)]
    server, lines = start_server(), []
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle", report=lines.append) as game, \
            Script(answering({**POLL, "guests": guests})) as hostile:
        game._client._transport.base_url = hostile.url
        game._moved()
        wait_until(lambda: len(hostile.requests) > 1)
        assert len(game.endpoint._connections) == 64
        game._client._transport.base_url = url_of(server)


def test_nobody_is_told_that_udp_is_blocked_where_the_server_has_no_stun(start_server, monkeypatch):
    monkeypatch.setattr(candidates, "STUN_PATIENCE", 0.2)
    monkeypatch.setattr(checks, "CHECK_TIME", 0.5)
    server = start_server(no_stun=True)
    client = p2pclient.RendezvousClient(url_of(server))
    with p2pclient.HostedGame(client, "castle") as game:
        assert game.endpoint.candidates.nat == "not asked"
    client.register_game("castle", "ada")
    client.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}"])
    with pytest.raises(p2pclient.ConnectFailed) as caught:
        p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle")
    assert "never answered" in str(caught.value) and "not even from the STUN server" not in str(caught.value)


@pytest.fixture
def late_stun(monkeypatch):
    """STUN is silent until the event, and then gives no answer either. answers: whether that came in time."""
    come, answers = threading.Event(), []

    def ask_stun(sock, servers, nat64):
        if servers:
            answers.append(come.wait(WAIT))
        return {}

    monkeypatch.setattr(whereabouts, "ask_stun", ask_stun)
    return come, answers


def test_a_host_does_not_wait_for_the_answer_of_stun_where_the_server_tells_that_it_has_none(start_server, late_stun):
    offered, answers = late_stun
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(start_server(no_stun=True))), "castle") as game:
        offered.set()
        wait_until(lambda: answers == [True])
        assert game.endpoint.candidates.nat == "not asked" and game.endpoint.candidates.addresses


def test_a_guest_does_not_wait_for_the_answer_of_stun_where_the_server_tells_that_it_has_none(start_server, late_stun):
    joined, answers = late_stun
    url = url_of(start_server(no_stun=True))
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle") as game, p2pclient.join_game(p2pclient.RendezvousClient(url), "castle") as guest:
        joined.set()
        assert guest._endpoint.candidates.nat == "not asked" and game.accept(5).session_id == guest.session_id
        wait_until(lambda: answers == [True, True])


def test_stun_at_another_port_is_found_when_the_server_tells(start_server, monkeypatch):
    monkeypatch.setattr(candidates, "STUN_PATIENCE", 0.2)
    server = start_server(stun_port=free_port())
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle") as game:
        wait_until(lambda: game.endpoint.candidates.mapped)


def test_a_host_whose_network_comes_as_it_registers_looks_up_its_stun_servers_again(start_server, monkeypatch):
    server, real, asked = start_server(), socket.getaddrinfo, []

    def look_up(name, *more, **options):
        if name != "example.test":
            return real(name, *more, **options)
        asked.append(name)
        if len(asked) == 1 or not server.counters[p2pserver.REQUESTS, ("register_game", 201)] and socket.SOCK_DGRAM in more:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    client, stun_server = p2pclient.RendezvousClient(f"http://example.test:{server.server_port}"), ("example.test", server.stuns[0].server_address[1])
    with p2pclient.HostedGame(client, "castle", stun_servers=[stun_server]) as game:
        wait_until(lambda: game.endpoint.candidates.mapped)


def test_a_host_asks_stun_where_the_name_of_a_server_that_has_moved_leads_by_now(start_server, name_leads_to, monkeypatch):
    monkeypatch.setattr(presence, "FAILED_PAUSE", 0.1)
    ports = {"port": free_port(), "stun_port": free_port()}
    first = start_server(**ports)
    name_leads_to("127.0.0.1")
    with p2pclient.HostedGame(p2pclient.RendezvousClient(f"http://example.test:{ports['port']}", patience=0.1), "castle") as game:
        wait_until(lambda: ("127.0.0.1", ports["stun_port"]) in game.endpoint.candidates.seen)
        name_leads_to("127.0.0.2")
        first.stop()
        wait_until(lambda: game._trouble)
        start_server(host="127.0.0.2", **ports)
        wait_until(lambda: ("127.0.0.2", ports["stun_port"]) in game.endpoint.candidates.seen)


def test_who_joins_a_silent_host_is_told_so(start_server, monkeypatch):
    monkeypatch.setattr(games, "UNHEARD_TIME", 0.2)
    monkeypatch.setattr(checks, "CHECK_TIME", 1)
    host, lines = p2pclient.RendezvousClient(url_of(start_server())), []
    host.register_game("castle", "ada")
    host.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}", {"p2p": 5}, {"p2p": {"nat": []}}, {"x": "y:5000"}])
    with pytest.raises(p2pclient.ConnectFailed):
        p2pclient.join_game(p2pclient.RendezvousClient(host.base_url), "castle", report=lines.append)
    assert len(lines) == 1 and "the host has not answered for 0.2 seconds" in lines[0]


@pytest.mark.parametrize("timeout", [0.3, 2])
def test_a_host_that_publishes_nothing_is_named_as_the_reason(start_server, timeout):
    url = url_of(start_server())
    p2pclient.RendezvousClient(url).register_game("castle", "ada")
    with pytest.raises(p2pclient.ConnectFailed, match="published no address"):
        p2pclient.join_game(p2pclient.RendezvousClient(url), "castle", timeout=timeout)


def test_a_start_for_whose_answer_there_is_no_time_is_not_made():
    """That it is not answered would say that the server is away."""
    ends_at = time.monotonic() + 3

    def answer_in_time(client, request):
        if time.monotonic() < ends_at - transport.MARGIN / 2:
            client.sendall(http_answer({**START, "pollAfter": 2}))

    with Script(answer_in_time) as server, pytest.raises(p2pclient.ConnectFailed, match="published no address"):
        p2pclient.join_game(p2pclient.RendezvousClient(server.url), "castle", [], timeout=3)


def silent_host(start_server):
    """A server with the game castle, and its host's client. Nobody is at the address that it publishes."""
    server = start_server()
    host = p2pclient.RendezvousClient(url_of(server))
    host.register_game("castle", "ada")
    host.poll_game("castle", "ada", [f"127.0.0.1:{free_port()}"])
    return server, host


def test_a_host_that_is_gone_is_named_as_the_reason(start_server, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_TIME", 0.5)
    server, host = silent_host(start_server)
    threading.Timer(0.2, host.delete_game, ("castle", "ada")).start()
    with pytest.raises(p2pclient.ConnectFailed, match="the host is gone"):
        p2pclient.join_game(p2pclient.RendezvousClient(url_of(server)), "castle")


def test_a_host_that_is_silent_is_not_said_to_be_gone_because_the_server_is(start_server, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_TIME", 1)
    server, _ = silent_host(start_server)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(p2pclient.join_game, p2pclient.RendezvousClient(url_of(server), patience=0.1), "castle")
        wait_until(lambda: server.counters[p2pserver.REQUESTS, ("start_game", 200)] or server.registry.counts()["waiting"])
        server.stop()
        with pytest.raises(p2pclient.ConnectFailed, match="the host never answered"):
            joining.result(WAIT)


def test_the_doctor_finds_all_well(start_server):
    lines = []
    assert doctor.check_server(url_of(start_server()), report=lines.append)
    assert [line.split()[:2] for line in lines] == [["ok", "HTTP:"], ["ok", "STUN:"], ["ok", "NAT:"], ["ok", "CONNECTION:"]]


def test_the_doctor_says_what_is_wrong_without_a_server():
    lines = []
    assert not doctor.check_server(f"http://127.0.0.1:{free_port()}", report=lines.append)
    assert len(lines) == 1 and lines[0].startswith("FAILED  HTTP: cannot reach")


def test_the_doctor_says_what_is_wrong_without_stun(start_server, monkeypatch):
    monkeypatch.setattr(candidates, "STUN_PATIENCE", 0.2)
    lines = []
    assert not doctor.check_server(url_of(start_server(no_stun=True)), report=lines.append)
    assert lines[1].startswith("FAILED  STUN: this server answers none") and lines[3].startswith("ok      CONNECTION")
    with contextlib.closing(sockets.open_socket()) as silent:
        assert not doctor.check_server(url_of(start_server()), [("127.0.0.1", silent.getsockname()[1])], lines.append)
    assert lines[5].startswith("FAILED  STUN: no answer") and lines[7].startswith("ok      CONNECTION")


def test_the_doctor_finds_stun_at_another_port(start_server):
    lines = []
    assert doctor.check_server(url_of(start_server(stun_port=free_port())), report=lines.append), lines


def test_the_doctors_lines_are_harmless():
    lines = []
    with Script(answering({"version": "\x1b[2J\n\u202e"})) as server:
        assert not doctor.check_server(server.url, report=lines.append)
    assert "\\x1b[2J\\n\\u202e" in lines[0] and all(line.isprintable() for line in lines)


# ---- port mapping ---------------------------------------------------------------------------------------------------

NONSENSE = b"\2\x81\0\0" + bytes(56)        # in the form of an answer by PCP, but to nobody's request
IGD_KIND = "urn:schemas-upnp-org:service:WANIPConnection:1"
BOMB = '<!DOCTYPE lolz [<!ENTITY a "' + "a" * 1000 + '">' + "".join(
    f'<!ENTITY {name} "{f"&{inner};" * 100}">' for inner, name in zip("abcdefg", "bcdefgh")) + "]>"


def description(*services):
    """Of a device with services of a kind each, and the URL that controls it."""
    return "<root><device>" + "".join(f"<serviceList><service><serviceType>{kind}</serviceType><controlURL>{url}</controlURL></service></serviceList>"
                                      for kind, url in services) + "</device></root>"


class Router:
    """A router on a loopback address of its own, whose answers are functions: pcp, from a request and how many came before to datagrams; upnp,
    from the first line of an HTTP request and all of it to bytes. Without them nobody is there. location: the URL that it tells, or a function."""

    def __init__(self, pcp=None, upnp=None, location=None):
        self.place = portmap.Place(f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}", "127.0.0.1")
        self.pcp, self.upnp = pcp, upnp
        self.requests, self.searches, self.calls = [], [], []
        self.sockets, self.threads, self.speaker = [], [], None
        self.web = Script(self.answer_http, self.place.router) if upnp else None
        self.url = f"http://{self.place.router}:{self.web.port}/description.xml" if upnp else ""
        self.location = location or self.url

    def __enter__(self):
        if self.web:
            self.web.__enter__()
        for port, serve, wanted in ((5351, self.answer_pcp, self.pcp), (1900, self.answer_search, self.upnp)):
            if wanted:
                self.sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                self.sockets[-1].bind((self.place.router, port))
                self.threads.append(threading.Thread(target=self.listen, args=(self.sockets[-1], serve)))
                self.threads[-1].start()
        return self

    def __exit__(self, *_):
        for sock in self.sockets:
            sock.sendto(b"", sock.getsockname())
        for thread in self.threads:
            thread.join()
        for sock in self.sockets:
            sock.close()
        if self.web:
            self.web.__exit__()

    def listen(self, sock, serve):
        while True:
            request, source = sock.recvfrom(2048)
            if not request:
                return
            serve(sock, request, source)

    def answer_pcp(self, sock, request, source):
        self.requests.append(request)
        for answer in self.pcp(request, len(self.requests) - 1):
            sock.sendto(answer, source)

    def answer_search(self, sock, request, source):
        self.searches.append(request)
        (self.speaker or sock).sendto(f"HTTP/1.1 200 OK\r\nST: x\r\nLocation: {self.location}\r\n\r\n".encode(), source)

    def answer_http(self, client, request):
        action = re.search(rb'SOAPAction: "\S+#(\w+)"', request)
        self.calls.append((action[1].decode() if action else "description", request.decode()))
        answer = self.upnp(*self.calls[-1])
        for part in [answer] if isinstance(answer, (str, bytes)) else answer:
            client.sendall(part.encode() if isinstance(part, str) else part)
        return False


def ok(body, status="200 OK"):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}"


def fault(code):
    return ok(f"<s:Fault><detail><UPnPError><errorCode>{code}</errorCode></UPnPError></detail></s:Fault>", "500 Internal Server Error")


def granting(request, *_, **changes):
    """What a router answers by PCP that grants a mapping (RFC 6887 sections 7.2 and 11.1), with changes."""
    if request[0] != 2:
        return []
    version, opcode, lifetime, own, nonce, protocol, inside, outside, _ = struct.unpack(">BBxxI16s12sB3xHH16s", request)
    assert (version, opcode, own) == (2, 1, ipaddress.IPv6Address("::ffff:127.0.0.1").packed)
    given = {"version": version, "opcode": opcode | 0x80, "result": 0, "lifetime": lifetime, "nonce": nonce, "protocol": protocol, "inside": inside,
             "outside": outside, "host": "::ffff:198.51.100.7", **changes}
    return [struct.pack(">BBxBII12x12sB3xHH16s", given["version"], given["opcode"], given["result"], given["lifetime"], 1, given["nonce"],
                        given["protocol"], given["inside"], given["outside"], ipaddress.IPv6Address(given["host"]).packed)]


def granting_by_nat_pmp(request, *_):
    """What a router answers that knows NAT-PMP alone (RFC 6886 sections 3.2, 3.3 and 3.5)."""
    if request[0] != 0:
        return [struct.pack(">BBHI", 0, 128 + request[1], 1, 1)]
    if request == b"\0\0":
        return [struct.pack(">BBHI4s", 0, 128, 0, 1, socket.inet_aton("198.51.100.7"))]
    inside, _, lifetime = struct.unpack_from(">HHI", request, 4)
    return [struct.pack(">BBHIHHI", 0, 129, 0, 1, inside, 40000 if lifetime else 0, lifetime)]


def igd(kind=IGD_KIND, add=lambda request: ok(""), host="198.51.100.7"):
    """What a router with an Internet Gateway Device answers."""
    def answer(action, request):
        if action == "GetExternalIPAddress":
            return ok(f"<NewExternalIPAddress>{host}</NewExternalIPAddress>")
        return ok(description((kind, "/control"))) if action == "description" else add(request) if action == "AddPortMapping" else ok("")
    return answer


@pytest.fixture
def quick_router(monkeypatch):
    """A router has less time than in a network, and enough for a machine that is busy."""
    monkeypatch.setattr(portmap, "TRIES", (0.5,))
    monkeypatch.setattr(upnp, "SEARCHES", (0.1, 0.4))
    monkeypatch.setattr(upnp, "HTTP_TIME", 1.0)


def test_a_router_grants_a_port_by_pcp_and_takes_it_back():
    with Router(granting) as router:
        way = portmap.Pcp(router.place, 5000)
        assert way.ask(5000) == ("198.51.100.7", 5000, portmap.LIFETIME)
        way.give_back(5000)
    first, second = (struct.unpack(">BBxxI16s12sB3xHH16s", request) for request in router.requests)
    assert first[2] == portmap.LIFETIME and second[2] == 0 and first[4] == second[4] != bytes(12)
    assert first[5:8] == second[5:8] == (17, 5000, 5000)


@pytest.mark.parametrize("changes", [{"version": 1}, {"opcode": 1}, {"result": 2}, {"lifetime": 0}, {"nonce": b"another one!"}, {"protocol": 6},
                                     {"inside": 5001}, {"host": "2001:db8::1"}], ids=str)
def test_what_is_no_grant_by_pcp_gives_no_port(changes, quick_router):
    with Router(lambda request, _: granting(request, **changes)) as router:
        assert portmap.Pcp(router.place, 5000).ask(5000) is None


@pytest.mark.parametrize("length", (0, 1, 3, 24, 59))
def test_an_answer_by_pcp_that_is_cut_gives_no_port(length, quick_router):
    with Router(lambda request, _: [granting(request)[0][:length]]) as router:
        assert portmap.Pcp(router.place, 5000).ask(5000) is None


def test_a_router_that_has_missed_a_request_is_asked_again():
    with Router(lambda request, number: granting(request) if number else []) as router:
        assert portmap.Pcp(router.place, 5000).ask(5000)
    assert len(router.requests) == 2


def test_a_router_that_answers_endlessly_is_not_listened_to_endlessly(monkeypatch):
    monkeypatch.setattr(portmap, "TRIES", (60,))
    with Router(lambda *_: [NONSENSE] * portmap.MAX_ANSWERS) as router:
        began = time.monotonic()
        assert portmap.Pcp(router.place, 5000).ask(5000) is None
        assert time.monotonic() - began < 30


def test_a_router_that_knows_nat_pmp_alone_grants_a_port_by_it_and_takes_it_back(quick_router):
    with Router(granting_by_nat_pmp) as router:
        assert portmap.Pcp(router.place, 5000).ask(5000) is None
        way = portmap.NatPmp(router.place, 5000)
        assert way.ask(5000) == ("198.51.100.7", 40000, portmap.LIFETIME)
        way.give_back(40000)
    assert router.requests[-1] == bytes.fromhex("0001000013880000" "00000000")


@pytest.mark.parametrize("answer", [struct.pack(">BBHI4s", 0, 128, 3, 1, bytes(4)), b"\0\x80\0\0", struct.pack(">BBHIHHI", 0, 129, 0, 1, 5000, 5000, 60)],
                         ids=["network failure", "cut", "of another kind"])
def test_what_is_no_grant_by_nat_pmp_gives_no_port(answer, quick_router):
    with Router(lambda *_: [answer]) as router:
        assert portmap.NatPmp(router.place, 5000).ask(5000) is None


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("service", ("WANIPConnection", "WANPPPConnection"))
def test_a_router_grants_a_port_by_upnp_and_takes_it_back(service, version):
    kind = f"urn:schemas-upnp-org:service:{service}:{version}"
    with Router(upnp=igd(kind)) as router:
        way = upnp.Upnp(router.place, 5000)
        assert way.ask(5000) == ("198.51.100.7", 5000, portmap.LIFETIME)
        way.give_back(5000)
    assert [action for action, _ in router.calls] == ["description", "GetExternalIPAddress", "AddPortMapping", "DeletePortMapping"]
    added = router.calls[2][1]
    assert added.startswith("POST /control HTTP/1.1\r\n") and f'SOAPAction: "{kind}#AddPortMapping"' in added
    for element in ("<NewExternalPort>5000</", "<NewInternalPort>5000</", "<NewInternalClient>127.0.0.1</", "<NewProtocol>UDP</", "<NewRemoteHost></"):
        assert element in added and (element in router.calls[3][1]) == (element.split(">")[0][1:] in ("NewExternalPort", "NewProtocol", "NewRemoteHost"))


def test_a_port_that_upnp_has_given_to_another_is_not_taken_from_him():
    with Router(upnp=igd(add=lambda request: fault(718) if "<NewExternalPort>5000<" in request else ok(""))) as router:
        mapping = upnp.Upnp(router.place, 5000).ask(5000)
    assert mapping.port >= 49152 and f"<NewExternalPort>{mapping.port}<" in router.calls[-1][1]


def test_a_router_that_grants_for_ever_alone_is_asked_for_that():
    with Router(upnp=igd(add=lambda request: ok("") if "<NewLeaseDuration>0<" in request else fault(725))) as router:
        assert upnp.Upnp(router.place, 5000).ask(5000) == ("198.51.100.7", 5000, portmap.LIFETIME)


@pytest.mark.parametrize("code", (718, 725, 606, 402))
def test_a_router_that_refuses_by_upnp_whatever_is_asked_is_asked_a_few_times(code):
    with Router(upnp=igd(add=lambda request: fault(code))) as router:
        assert upnp.Upnp(router.place, 5000).ask(5000) is None
    assert len(router.calls) <= 2 + upnp.ATTEMPTS


def test_the_service_that_is_asked_first_is_of_the_later_version_and_others_are_not_asked():
    kinds = [f"urn:schemas-upnp-org:service:{each}" for each in ("WANPPPConnection:1", "WANIPConnection:1", "Layer3Forwarding:1", "WANIPConnection:2")]
    place = portmap.Place("192.168.0.1", "192.168.0.2")
    services = upnp.services_in(description(*((kind, f"/{kind[-1]}?a=1&amp;b=2") for kind in kinds)), "http://192.168.0.1:80/", place)
    assert [service.kind for service in services] == [kinds[3], kinds[1], kinds[0]]
    assert services[0].url == "http://192.168.0.1:80/2?a=1&b=2"


@pytest.mark.parametrize("location", ["http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/{router}", "http://{router}@127.0.0.1:{port}/", "https://{router}:{port}/",
                                      "http://{router}:0/", "http://{router}:99999/", "http://[{router}]/", "ftp://{router}/", "", "http://{router}.example:{port}/"])
def test_nothing_is_fetched_from_a_url_that_is_not_the_routers(location, quick_router):
    with Router(upnp=igd()) as router, Script(router.answer_http) as elsewhere:
        router.location = location.format(router=router.place.router, port=elsewhere.port)
        assert upnp.Upnp(router.place, 5000).ask(5000) is None
        assert router.searches and not router.calls


def test_an_answer_to_the_search_that_comes_from_elsewhere_is_not_believed(quick_router):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbour, Router(upnp=igd()) as router:
        neighbour.bind(("127.0.0.1", 0))
        router.speaker = neighbour
        assert upnp.Upnp(router.place, 5000).ask(5000) is None
        assert router.searches and not router.calls


def test_no_service_is_called_that_is_not_at_the_router(quick_router):
    with Script(lambda *_: False) as elsewhere:
        control = f"http://127.0.0.1:{elsewhere.port}/control"
        with Router(upnp=lambda *_: ok(description((IGD_KIND, control)))) as router:
            assert upnp.Upnp(router.place, 5000).ask(5000) is None
        assert len(router.calls) == 1 and not elsewhere.requests


@pytest.mark.parametrize("length, is_read", ((upnp.MAX_ANSWER - 1000, True), (upnp.MAX_ANSWER, False)))
def test_of_a_description_64_kilobytes_are_read(length, is_read):
    padded = ok(" " * length + description((IGD_KIND, "/control")))
    with Router(upnp=lambda action, request: padded if action == "description" else igd()(action, request)) as router:
        assert bool(upnp.Upnp(router.place, 5000).ask(5000)) == is_read


def endless(text):
    yield "HTTP/1.1 200 OK\r\n\r\n"
    while True:
        yield text * 1000


def dripping():
    yield "HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"
    while True:
        time.sleep(0.05)
        yield " "


LIES = {
    "nothing": lambda: b"",
    "no HTTP": lambda: b"\xff" * 100,
    "no XML": lambda: ok("<<<>&&&"),
    "not found": lambda: ok("", "404 Not Found"),
    "redirect": lambda: "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "entities of entities": lambda: ok(BOMB + "<root>&h;</root>"),
    "endless": lambda: endless("<service>"),
    "endless head": lambda: ["HTTP/1.1 200 OK\r\n", "X: y\r\n" * 100000],
    "endless line": lambda: ["HTTP/1.1 200 ", "x" * 10000000],
    "dripping": dripping,
    "cut": lambda: "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n<root>",
    "chunks of no number": lambda: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "continue for ever": lambda: itertools.repeat("HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "deep": lambda: ok("<a>" * 20000),
    "services without end": lambda: ok("<service><serviceType>" * 2500),
    "spaces": lambda: ok("<controlURL>" + " " * 60000),
}


# To AddPortMapping a success is a success, whatever it says.
SUCCESSES = ("cut", "no XML", "entities of entities", "endless", "deep", "services without end", "spaces")


@pytest.mark.parametrize("about, lie", [(about, lie) for about in ("description", "GetExternalIPAddress", "AddPortMapping") for lie in LIES
                                        if about != "AddPortMapping" or lie not in SUCCESSES])
def test_a_router_that_lies_by_upnp_costs_seconds_at_the_most_and_gives_no_port(about, lie, monkeypatch):
    monkeypatch.setattr(upnp, "HTTP_TIME", 1.0)     # for each of three calls, of which the honest ones must not be late on a busy machine
    with Router(upnp=lambda action, request: LIES[lie]() if action == about else igd()(action, request)) as router:
        began = time.monotonic()
        assert upnp.Upnp(router.place, 5000).ask(5000) is None
        assert time.monotonic() - began < 10
        assert [action for action, _ in router.calls].count(about) == 1


@pytest.fixture
def forward(monkeypatch, quick_router):
    """Starts a Forwarding of port 5000 at a router, and ends it after the test. Without a pause that is worth mention."""
    started = []

    def start(router):
        monkeypatch.setattr(forwarding, "LEAST_PAUSE", 0.05)
        monkeypatch.setattr(forwarding, "find_place", lambda: router and router.place)
        published, lines = [], []
        started.append(forwarding.Forwarding(5000, lambda address: not published.append(address), lines.append))
        return started[-1], published, lines

    yield start
    for each in started:
        each.end()
        each.join(WAIT)


def lifetimes(router):
    return [struct.unpack_from(">I", request, 4)[0] for request in router.requests if request[0] == 2]


def test_a_forwarded_port_is_published_once_renewed_at_half_its_life_and_given_back_at_the_end(forward):
    times = []
    with Router(lambda request, _: times.append(time.monotonic()) or granting(request, lifetime=2)) as router:
        it, published, lines = forward(router)
        wait_until(lambda: len(times) == 3)
        it.end()
        it.join(WAIT)
        # The better of the two, for the machine may be busy.
        assert 0.99 <= min(gaps(times[:3])) < 2
        assert lifetimes(router) == [portmap.LIFETIME] * 3 + [0] and published == ["198.51.100.7:5000"]
        assert lines == ["the router forwards 198.51.100.7:5000 to this game (PCP)"]


def test_a_port_that_a_router_gives_by_upnp_is_published_and_given_back(forward):
    with Router(upnp=igd()) as router:
        it, published, lines = forward(router)
        wait_until(lambda: published == ["198.51.100.7:5000"])
        it.end()
        it.join(WAIT)
        assert router.calls[-1][0] == "DeletePortMapping" and lines == ["the router forwards 198.51.100.7:5000 to this game (UPnP)"]


def test_a_port_that_a_router_does_not_renew_is_published_until_its_life_ends(forward):
    with Router(lambda request, number: [] if number else granting(request, lifetime=1)) as router:
        began = time.monotonic()
        _, published, _ = forward(router)
        wait_until(lambda: published == ["198.51.100.7:5000", ""])
        assert time.monotonic() - began >= 1 and len(router.requests) > 2


def test_a_router_that_may_have_begun_anew_is_asked_again(forward):
    with Router(lambda request, number: granting(request, outside=5000 + number)) as router:
        it, published, _ = forward(router)
        wait_until(lambda: published == ["198.51.100.7:5000"])
        it.ask_soon()
        wait_until(lambda: published == ["198.51.100.7:5000", "198.51.100.7:5001"])


def test_who_moves_to_another_router_has_its_port_in_place_of_the_other_ones(forward, monkeypatch):
    with Router(granting) as router, Router(lambda request, _: granting(request, host="::ffff:203.0.113.9")) as another:
        it, published, _ = forward(router)
        wait_until(lambda: published == ["198.51.100.7:5000"])
        monkeypatch.setattr(forwarding, "find_place", lambda: another.place)
        it.ask_soon()
        wait_until(lambda: published == ["198.51.100.7:5000", "", "203.0.113.9:5000"])


@pytest.mark.parametrize("changes", [{"host": f"::ffff:{host}"} for host in ("10.0.0.1", "100.64.0.1", "127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1")]
                         + [{"outside": 0}, {"outside": 53}], ids=str)
def test_a_forwarded_address_that_nobody_can_reach_is_given_back_and_never_published(changes, forward):
    with Router(lambda request, _: granting(request, **changes)) as router:
        _, published, lines = forward(router)
        wait_until(lambda: len(lifetimes(router)) == 2)
        assert lifetimes(router) == [portmap.LIFETIME, 0] and not published and not lines


def test_a_network_without_a_router_is_asked_nothing_and_left_at_once(forward):
    it, published, lines = forward(None)
    it.end()
    it.join(WAIT)
    assert not it._thread.is_alive() and not published and not lines


def test_a_forwarded_address_is_a_candidate_while_stun_does_not_see_us_elsewhere(monkeypatch):
    watch = Watch(monkeypatch)
    assert watch.it.forward("198.51.100.1:5000") and watch.news() and watch.it.candidates.addresses == [OWN, "198.51.100.1:5000", "198.51.100.1:6000"]
    assert not watch.it.forward("203.0.113.9:5000") and watch.news() and watch.it.candidates.addresses == [OWN, "198.51.100.1:6000"]
    watch.it.forward("198.51.100.1:5000")
    watch.mapped = ("198.51.100.9", 7000)
    watch.run(16)
    assert watch.it.candidates.addresses == [OWN, "198.51.100.9:7000"]
    assert watch.it.forward("198.51.100.9:5000") and not watch.it.forward("") and watch.it.candidates.addresses == [OWN, "198.51.100.9:7000"]


@pytest.mark.parametrize("mapped", [None, ("192.168.0.2", 5000), ("2001:db8::1", 5000)])
def test_a_forwarded_address_is_a_candidate_where_stun_tells_of_no_public_ipv4_address(monkeypatch, mapped):
    watch = Watch(monkeypatch, (STUN_A,) if mapped else ())
    watch.mapped = mapped
    watch.run(20)
    assert watch.it.forward("198.51.100.1:5000") and "198.51.100.1:5000" in watch.it.candidates.addresses


def test_a_host_publishes_the_port_that_its_router_forwards_and_gives_it_back_when_it_closes(start_server, monkeypatch):
    """The router hears only the second time that it has the port back: closing waits for that."""
    monkeypatch.setattr(p2pclient.RendezvousClient, "on_loopback", False)
    client = p2pclient.RendezvousClient(url_of(start_server()))
    with Router(lambda request, _: granting(request) if lifetimes(router)[-1] or lifetimes(router)[-2:] == [0, 0] else []) as router:
        monkeypatch.setattr(forwarding, "find_place", lambda: router.place)
        with p2pclient.HostedGame(client, "castle") as game:
            mapped = f"198.51.100.7:{game.endpoint.socket.getsockname()[1]}"
            wait_until(lambda: mapped in client.start_game("castle", "a guest", []).addresses)
        assert lifetimes(router)[-2:] == [0, 0]


@pytest.mark.parametrize("on_loopback, port_mapping", ((True, True), (False, False)))
def test_no_router_is_asked_by_a_host_of_a_server_on_this_machine_nor_by_one_that_does_not_want_it(start_server, monkeypatch, on_loopback, port_mapping):
    monkeypatch.setattr(p2pclient.RendezvousClient, "on_loopback", on_loopback)
    asked = []
    monkeypatch.setattr(forwarding, "find_place", lambda: asked.append(True))
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(start_server())), "castle", port_mapping=port_mapping):
        assert not [thread for thread in threading.enumerate() if thread.name == "forwarding"]
    assert not asked


def test_first_candidates_do_not_wait_for_a_router_that_does_not_answer(start_server, monkeypatch):
    monkeypatch.setattr(p2pclient.RendezvousClient, "on_loopback", False)
    client, asked, go = p2pclient.RendezvousClient(url_of(start_server())), threading.Event(), threading.Event()
    monkeypatch.setattr(forwarding, "find_place", lambda: asked.set() or go.wait(WAIT) and None)
    with p2pclient.HostedGame(client, "castle"):
        assert asked.wait(WAIT)
        wait_until(lambda: client.start_game("castle", "a guest", []).addresses)
        assert not go.is_set()
        go.set()


def test_the_default_gateway_is_that_of_the_route_of_the_lowest_metric():
    table = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
wlan0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0
tun0 00000000 0101000A 0003 0 0 50 00000080 0 0 0
eth0 00000000 FE01A8C0 0003 0 0 100 00000000 0 0 0
ppp0 00000000 00000000 0001 0 0 1 00000000 0 0 0
eth0 0001A8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0
"""
    if sys.byteorder == "little":
        assert portmap.gateway_in(table) == "192.168.1.254"
    assert portmap.gateway_in(table.splitlines()[0]) is None


@pytest.mark.parametrize("pcp, said", [(granting, "the router forwards 198.51.100.7:"), (lambda *_: [], "no router here forwards ports")])
def test_the_doctor_tells_whether_the_router_forwards_ports(start_server, quick_router, monkeypatch, pcp, said):
    monkeypatch.setattr(p2pclient.RendezvousClient, "on_loopback", False)
    lines = []
    with Router(pcp) as router:
        monkeypatch.setattr(forwarding, "find_place", lambda: router.place)
        doctor.check_server(url_of(start_server()), report=lines.append)
    assert any(line.startswith(f"ok      PORTS: {said}") for line in lines) and (said.startswith("no") or lifetimes(router) == [portmap.LIFETIME, 0])


# ---- relay ----------------------------------------------------------------------------------------------------------

class TurnDouble:
    """A TURN server of one user, on loopback. change(request, answer) makes another answer of each, or None. seen: the requests and indications that
    came, decoded; permitted: the IP addresses that may send."""

    def __init__(self, change=lambda request, answer: answer, username="ada", password="a password"):
        self.change, self.key = change, hashlib.md5(f"{username}:realm:{password}".encode()).digest()
        self.nonce, self.life, self.seen, self.permitted, self.client = b"nonce", 600, [], set(), None
        self.front, self.back = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for each in (self.front, self.back):
            each.bind(("127.0.0.1", 0))
        self.relayed = self.back.getsockname()
        self.server = turn.TurnServer(self.front.getsockname(), username, password)
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self.serve, self.take)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        for each in (self.front, self.back):
            each.sendto(b"", each.getsockname())
        for thread in self.threads:
            thread.join()

    def kinds(self):
        return [each.kind for each in self.seen]

    def answer(self, datagram):
        """The answer to a request, or None."""
        request = stun.decode(datagram)
        self.seen.append(request)
        given, number = request.attributes, 0
        if stun.USERNAME not in given:
            number = 401
        elif given[turn.NONCE] != self.nonce:
            number = 438
        elif not stun.authentic(request, self.key):
            number = 401
        attributes, key = [stun.error_code(number, "No"), (turn.REALM, b"realm"), (turn.NONCE, self.nonce)], None
        if not number:
            attributes, key = [(turn.LIFETIME, given.get(turn.LIFETIME, struct.pack(">I", self.life)))], self.key
            attributes.append((turn.XOR_RELAYED_ADDRESS, stun.pack_address(self.relayed, request.transaction)))
            if turn.XOR_PEER_ADDRESS in given:
                self.permitted.add(stun.unpack_address(given[turn.XOR_PEER_ADDRESS], request.transaction)[0])
        kind = request.kind | (turn.ERROR if number else turn.SUCCESS)
        return self.change(request, stun.encode(kind, request.transaction, attributes, key))

    def serve(self):
        while True:
            datagram, self.client = self.front.recvfrom(2048)
            if not datagram:
                return self.front.close()
            kind = stun.decode(datagram).kind
            if kind in (turn.SEND, stun.INDICATION):
                message = stun.decode(datagram)
                self.seen.append(message)
                if kind == turn.SEND:
                    peer = stun.unpack_address(message.attributes[turn.XOR_PEER_ADDRESS], message.transaction)
                    with contextlib.suppress(OSError):      # it is closed first when the test ends
                        self.back.sendto(message.attributes[turn.DATA], peer)
                continue
            answer = self.answer(datagram)
            if answer:
                self.front.sendto(answer, self.client)

    def take(self):
        while True:
            datagram, source = self.back.recvfrom(2048)
            if not datagram:
                return self.back.close()
            if source[0] in self.permitted:
                self.front.sendto(data_indication(datagram, source), self.client)


def data_indication(datagram, peer):
    return stun.encode(turn.DATA_INDICATION, bytes(12), [(turn.XOR_PEER_ADDRESS, stun.pack_address(peer, bytes(12))), (turn.DATA, datagram)])


class Allocated:
    """An allocation of a TurnDouble on a clock of its own. kinds: what it has asked for, each with the time."""

    def __init__(self, *arguments, password="a password", **options):
        self.double, self.now, self.kinds = TurnDouble(*arguments, **options), 0.0, []
        self.it = turn.Allocation("ada", password, self.now)

    def run(self, seconds, hosts=(), answers=True):
        end = self.now + seconds
        while self.now < end and not self.it.over:
            self.it.permit(hosts, self.now)
            for datagram in self.it.tick(self.now):
                self.kinds.append((round(self.now, 1), stun.decode(datagram).kind))
                answer = self.double.answer(datagram) if answers and self.kinds[-1][1] != stun.INDICATION else None
                if answer:
                    self.it.receive(answer, self.now)
            self.now += 0.1
        return self

    def times(self, kind):
        return [when for when, each in self.kinds if each == kind]


@pytest.mark.parametrize("url, address", [
    ("turn:turn.example.net", ("turn.example.net", 3478)), ("turn:192.0.2.1:5000", ("192.0.2.1", 5000)), ("turn:[2001:db8::1]:443", ("2001:db8::1", 443)),
    ("turn:t?transport=udp", ("t", 3478)), ("turn:t?transport=tcp", None), ("turns:t", None), ("turn:t:0", None), ("turn:t:65536", None), ("turn:", None),
    ("turn:a b", None), ("turn://t", None), ("stun:t", None), ("turn:t:80:80", None), ("turn:u@t", None)])
def test_of_the_urls_of_turn_servers_those_over_udp_are_taken(url, address):
    assert turn.parse_turn_url(url) == address


def test_credentials_of_a_shared_secret_are_those_of_coturns_scheme():
    username, password = turn.TurnServer(("t", 3478), secret="the secret").credentials
    assert 86390 < int(username.partition(":")[0]) - time.time() <= 86400
    assert password == base64.b64encode(hmac.digest(b"the secret", username.encode(), "sha1")).decode()
    assert "the secret" not in repr(turn.TurnServer(("t", 3478), "u", "the secret", "the secret"))


def test_a_relay_is_refreshed_at_half_its_life_and_kept_alive_between():
    made = Allocated().run(700)
    assert made.it.address == made.double.relayed and made.times(turn.ALLOCATE) == [0.0, 0.1]
    assert made.times(turn.REFRESH) == pytest.approx([300.1, 600.2], abs=0.3)
    assert {round(gap, 1) for gap in gaps(made.times(stun.INDICATION))} <= {15.0, 15.1} and len(made.times(stun.INDICATION)) > 40


def test_a_permission_is_asked_for_each_ipv4_address_and_renewed_while_it_is_wanted():
    made = Allocated().run(250, ["198.51.100.1", "2001:db8::1", "198.51.100.2"])
    assert made.double.permitted == {"198.51.100.1", "198.51.100.2"} and len(made.times(turn.CREATE_PERMISSION)) == 4
    assert made.times(turn.CREATE_PERMISSION)[2] == pytest.approx(200, abs=1)
    made.run(500)
    assert len(made.times(turn.CREATE_PERMISSION)) == 4
    assert made.it.receive(data_indication(b"late", ("198.51.100.1", 5000)), made.now) is None


def test_a_permission_that_is_forbidden_is_not_asked_for_again_at_once_and_the_relay_stays():
    made = Allocated(lambda request, answer: answer if request.kind != turn.CREATE_PERMISSION else stun.encode(
        request.kind | turn.ERROR, request.transaction, [stun.error_code(403, "Forbidden")])).run(100, ["198.51.100.1"])
    assert len(made.times(turn.CREATE_PERMISSION)) == 1 and not made.it.over


def test_a_stale_nonce_is_replaced():
    made = Allocated().run(1)
    made.double.nonce = b"another"
    made.run(1, ["198.51.100.1"])
    assert made.double.permitted == {"198.51.100.1"} and not made.it.over


def test_a_server_that_finds_each_nonce_stale_is_given_up():
    made = Allocated().run(6)
    made.double.change = lambda request, answer: stun.encode(request.kind | turn.ERROR, request.transaction, [
        stun.error_code(438, "Stale Nonce"), (turn.NONCE, b"%d" % len(made.double.seen))])
    made.it.refresh_soon(made.now)
    made.run(20)
    assert made.it.over == "the TURN server refuses (error 438)" and len(made.times(turn.REFRESH)) == 1 + turn.MAX_CHALLENGES


def test_a_server_that_is_silent_is_asked_three_times():
    made = Allocated().run(60, answers=False)
    assert made.it.over == "the TURN server does not answer" and made.times(turn.ALLOCATE) == [0.0, 0.5, 1.5] and made.now == pytest.approx(3.6, abs=0.2)


def test_a_relay_that_is_not_prolonged_ends_with_its_life():
    made = Allocated().run(1).run(700, answers=False)
    assert made.it.over == "the TURN server did not prolong the relay" and made.now == pytest.approx(600, abs=1)


def test_a_wrong_password_is_refused_and_not_tried_again():
    made = Allocated(password="another").run(10)
    assert made.it.over == "the TURN server refuses (error 401)" and made.it.is_refused and len(made.times(turn.ALLOCATE)) == 2


@pytest.mark.parametrize("server_error", [437, 441, 486, 508])
def test_a_relay_that_the_server_knows_no_more_is_over(server_error):
    made = Allocated().run(6)
    made.double.change = lambda request, answer: stun.encode(request.kind | turn.ERROR, request.transaction, [stun.error_code(server_error, "No")])
    made.it.refresh_soon(made.now)
    made.run(10)
    assert made.it.over == f"the TURN server refuses (error {server_error})" and made.it.is_refused == (server_error == 441)


def test_a_relay_is_given_back_with_a_life_of_nothing():
    made = Allocated().run(1)
    made.it.release(made.now)
    made.run(5)
    assert made.it.over == "ended" and made.double.seen[-1].kind == turn.REFRESH and made.double.seen[-1].attributes[turn.LIFETIME] == bytes(4)


def relayed_at(address, key=None):
    """An answer that tells of this address."""
    return lambda request, answer: answer if stun.USERNAME not in request.attributes else stun.encode(
        request.kind | turn.SUCCESS, request.transaction, [(turn.XOR_RELAYED_ADDRESS, stun.pack_address(address, request.transaction))] if address else [],
        key or hashlib.md5(b"ada:realm:a password").digest())


TURN_LIES = {
    "nothing": lambda request, answer: None,
    "junk": lambda request, answer: b"junk",
    "an answer that is cut": lambda request, answer: answer[:-4],
    "a success without credentials": lambda request, answer: stun.encode(request.kind | turn.SUCCESS, request.transaction, [
        (turn.XOR_RELAYED_ADDRESS, stun.pack_address(("198.51.100.7", 5000), request.transaction))]),
    "a success signed by another": relayed_at(("198.51.100.7", 5000), b"another key"),
    "another transaction": lambda request, answer: answer[:8] + bytes(12) + answer[20:],
    "no address": relayed_at(None),
    "an address that is none": relayed_at(("0.0.0.0", 5000)),
    "a multicast address": relayed_at(("224.0.0.1", 5000)),
    "a port of the system": relayed_at(("198.51.100.7", 53)),
    "a challenge without a nonce": lambda request, answer: stun.encode(request.kind | turn.ERROR, request.transaction, [stun.error_code(401, "No")]),
    "a challenge that is too long": lambda request, answer: stun.encode(request.kind | turn.ERROR, request.transaction, [
        stun.error_code(401, "No"), (turn.REALM, b"r"), (turn.NONCE, b"n" * 764)]),
    "another server": lambda request, answer: stun.encode(request.kind | turn.ERROR, request.transaction, [stun.error_code(300, "Try Alternate")]),
}


@pytest.mark.parametrize("lie", TURN_LIES)
def test_a_turn_server_that_lies_gives_no_relay_and_keeps_nobody_waiting(lie):
    made = Allocated(TURN_LIES[lie]).run(60)
    assert made.it.over and made.it.address is None and made.now < 5


@pytest.mark.parametrize("life, kept", [(0, 10), (1, 10), (2 ** 32 - 1, 3600)])
def test_the_life_of_a_relay_is_taken_within_bounds(life, kept):
    made = Allocated()
    made.double.life = life
    made.run(2)
    assert not made.it.over and made.it._next_refresh == pytest.approx(kept / 2, abs=0.5)


def test_what_a_turn_server_passes_on_counts_from_those_who_were_permitted_alone():
    made = Allocated().run(1, ["198.51.100.1"])
    assert made.it.receive(data_indication(b"hello", ("198.51.100.1", 5000)), made.now) == (b"hello", addresses.Relayed(("198.51.100.1", 5000)))
    for peer in (("198.51.100.2", 5000), ("198.51.100.1", 53), ("2001:db8::1", 5000)):
        assert made.it.receive(data_indication(b"hello", peer), made.now) is None
    for attributes in ([], [(turn.DATA, b"hello")], [(turn.XOR_PEER_ADDRESS, b"")],
                       [(turn.XOR_PEER_ADDRESS, stun.pack_address(("198.51.100.1", 5000), bytes(12)))]):
        assert made.it.receive(stun.encode(turn.DATA_INDICATION, bytes(12), attributes), made.now) is None


def test_an_address_by_the_relay_is_another_one_than_the_same_address_directly():
    direct, relayed = ("198.51.100.1", 5000), addresses.Relayed(("198.51.100.1", 5000))
    assert direct != relayed and relayed != direct and len({direct, relayed}) == 2 and [direct, relayed].index(relayed) == 1
    assert relayed == addresses.Relayed(direct) and addresses.text_of(relayed) == "198.51.100.1:5000"


RELAY_AT = ("192.0.2.7", 50000)
BY_RELAY = addresses.Relayed(GUEST_AT)


def relaying(wire, direct=lambda source, destination: None, knows=(HOST_AT, RELAY_AT)):
    """Have a wire carry what goes by the host's relay, and of the rest what direct() says."""
    def way(source, destination):
        if destination == RELAY_AT:
            return BY_RELAY, HOST_AT
        return (RELAY_AT, GUEST_AT) if isinstance(destination, addresses.Relayed) else direct(source, destination)

    wire.way = way
    wire.guest.add(knows, wire.now, pacing.LEAST_PACING, relay=RELAY_AT)
    return wire


def test_a_guest_checks_a_relay_a_second_later_than_all_else_and_then_connects_by_it():
    wire = relaying(Wire(guest_knows=()))
    wire.run(2)
    assert (wire.guest.selected, wire.host.selected) == (RELAY_AT, BY_RELAY)
    assert 1.0 <= min(when for when, address in wire.checks(GUEST_AT) if address == RELAY_AT) - 1000 < 1.2


def test_a_host_sends_by_its_relay_to_nobody_whom_it_has_not_heard_there():
    wire = Wire(way=lambda source, destination: None)
    relaying(wire, knows=())
    wire.run(20)
    assert wire.checks(HOST_AT) and not [each for _, _, each, _ in wire.sent if isinstance(each, addresses.Relayed)]


def test_a_guest_that_is_connected_directly_checks_no_relay():
    wire = relaying(Wire(guest_knows=()), direct=lambda source, destination: (source, destination))
    wire.run(5)
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT) and not [each for _, each in wire.checks(GUEST_AT) if each == RELAY_AT]


@pytest.mark.parametrize("later", [0.5, 20])
def test_a_direct_way_takes_over_from_the_relay_whenever_it_works(later):
    wire = relaying(Wire(guest_knows=()))
    wire.run(1.3)
    assert wire.guest.selected == RELAY_AT
    begins = wire.now + later
    relaying(wire, lambda source, destination: (source, destination) if wire.now >= begins else None)
    wire.run(later + 6)
    assert (wire.guest.selected, wire.host.selected) == (HOST_AT, GUEST_AT) and wire.guest.sent <= 100


def test_a_relay_takes_over_when_the_direct_way_falls_silent():
    wire = relaying(Wire(guest_knows=()), direct=lambda source, destination: (source, destination))
    wire.run(5)
    relaying(wire)
    wire.run(15)
    assert (wire.guest.selected, wire.host.selected) == (RELAY_AT, BY_RELAY)


@pytest.mark.parametrize("told, relay, checked", [
    ("192.0.2.7:50000", RELAY_AT, [HOST_AT, ("2001:db8::1", 5000), RELAY_AT]), (None, None, [RELAY_AT, HOST_AT, ("2001:db8::1", 5000)]),
    ("10.9.9.9:5000", None, [RELAY_AT, HOST_AT, ("2001:db8::1", 5000)]), (["192.0.2.7:50000"], None, [RELAY_AT, HOST_AT, ("2001:db8::1", 5000)])])
def test_a_relay_is_the_last_of_a_peers_addresses_if_it_is_one_of_them(told, relay, checked):
    published = ["192.0.2.7:50000", addresses.text_of(HOST_AT), "[2001:db8::1]:5000", {"p2p": {"relay": told}}]
    found = candidates.read_published(published, PEER, loopback=False)
    assert (found.addresses, found.relay) == (checked, relay)


def test_a_relay_is_published_behind_all_else_and_is_news(monkeypatch):
    watch = Watch(monkeypatch)
    assert watch.it.forward("192.0.2.7:50000", is_relay=True) and watch.news()
    *listed, about = watch.it.candidates.published
    assert listed == [*watch.it.candidates.addresses, "192.0.2.7:50000"] and about["p2p"]["relay"] == "192.0.2.7:50000"
    watch.it.begin_attempt()
    assert watch.it.candidates.relay == "192.0.2.7:50000"
    assert not watch.it.forward("", is_relay=True) and watch.news() and "relay" not in watch.it.candidates.published[-1]["p2p"]


@pytest.fixture
def relayed(endpoint):
    """Starts a Relay of a host at a server, and ends it after the test. The host, the relay and the lines that it reports."""
    started = []

    def start(server, **options):
        host, lines = endpoint(), []
        started.append(relay.Relay(host, lambda is_refused: server, **{"loopback": True, **options}, report=lines.append))
        host.send_relayed = started[-1].send
        return host, started[-1], lines

    yield start
    for each in started:
        each.end()
        each.join(WAIT)


def test_a_guest_is_connected_by_the_relay_alone_with_authentic_datagrams(relayed, endpoint):
    with TurnDouble() as double:
        host, it, lines = relayed(double.server)
        guest, text = endpoint(), addresses.text_of(double.relayed)
        wait_until(lambda: host.candidates.relay == text)
        lossy(host, lambda datagram, address: not isinstance(address, addresses.Relayed))
        host.expect(p2pclient.Guest("session", "key", guest.candidates.addresses[:1]))
        connection = guest.connect(p2pclient.Start("game", "session", "key", [text, {"p2p": {"relay": text}}], 1, 60, 2))
        hosts = host.accept(5)
        connection.send(b"hello")
        assert hosts.recv(5) == b"hello" and hosts.authentic
        hosts.send(b"x" * 1200)
        assert connection.recv(5) == b"x" * 1200 and connection.authentic
        assert connection.remote_address == hosts.local_address == text
        it.end()
        it.join(WAIT)
        assert double.seen[-1].kind == turn.REFRESH and double.seen[-1].attributes[turn.LIFETIME] == bytes(4)
        assert host.candidates.relay == "" and lines == [f"a relay stands by at {text}"]


def test_a_relay_is_sent_permissions_alone_until_a_guest_is_heard_through_it(relayed):
    with TurnDouble() as double, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as third:
        third.bind(("127.0.0.1", 0))
        host, _, _ = relayed(double.server)
        wait_until(lambda: host.candidates.relay)
        host.expect(p2pclient.Guest("session", "key", [addresses.text_of(third.getsockname()), "203.0.113.77:5000"], "203.0.113.78"))
        wait_until(lambda: double.permitted == {"127.0.0.1", "203.0.113.77", "203.0.113.78"})
        stranger = stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session:session"), (stun.ICE_CONTROLLING, bytes(8))], "another key")
        third.sendto(stranger, double.relayed)
        third.sendto(stun.encode(stun.REQUEST, bytes(12), [(stun.USERNAME, b"session:session"), (stun.ICE_CONTROLLING, bytes(8))], "key"), double.relayed)
        wait_until(lambda: turn.SEND in double.kinds())
        before = double.kinds()[:double.kinds().index(turn.SEND)]
        assert set(before) <= {turn.ALLOCATE, turn.REFRESH, turn.CREATE_PERMISSION, stun.INDICATION}
        answer = stun.decode(double.seen[len(before)].attributes[turn.DATA])
        assert answer.kind == stun.SUCCESS and stun.authentic(answer, "key")


@pytest.mark.parametrize("address, loopback", [(("172.29.250.250", 3478), True), (("192.168.250.1", 3478), True), (("127.0.0.1", 3478), False)], ids=str)
def test_a_turn_server_in_a_network_that_this_machine_is_not_in_is_not_asked(address, loopback, relayed):
    if addresses.private_network(address[0]) in [addresses.private_network(host) or "none" for host in sockets.interface_addresses()]:
        pytest.skip("this machine is in that network")
    _, _, lines = relayed(turn.TurnServer(address, "ada", "a password"), loopback=loopback)
    wait_until(lambda: lines == [f"no relay: the TURN server {addresses.text_of(address)} has no address that may be used from here"])


def test_a_relay_whose_server_begins_anew_is_taken_again_once_we_look(relayed, monkeypatch):
    monkeypatch.setattr(turn, "REFRESH_AGAIN", 0.1)
    monkeypatch.setattr(relay, "LEAST_PAUSE", 0.05)
    refusal = []
    with TurnDouble(lambda request, answer: refusal.pop()(request) if refusal and request.kind == turn.REFRESH else answer) as double:
        host, it, lines = relayed(double.server)
        wait_until(lambda: host.candidates.relay)
        refusal.append(lambda request: stun.encode(request.kind | turn.ERROR, request.transaction, [stun.error_code(437, "Allocation Mismatch")]))
        time.sleep(0.1)     # as a test of real time must: what is refreshed too soon is not refreshed again
        it.ask_soon()
        wait_until(lambda: len(lines) == 3)
        assert "error 437" in lines[1] and lines[0] == lines[2]


def test_a_relay_that_is_not_given_is_asked_for_less_and_less_often_also_after_a_move(endpoint, monkeypatch):
    monkeypatch.setattr(relay, "LEAST_PAUSE", 0.01)
    asked = []
    it = relay.Relay(endpoint(), lambda is_refused: asked.append(time.monotonic()), True, print)
    it.ask_soon()
    wait_until(lambda: len(asked) > 8)
    it.end()
    it.join(WAIT)
    assert gaps(asked)[7] > 1       # seconds: 0.01, doubled with each time


def test_a_relay_for_which_there_are_too_many_open_files_is_taken_later(relayed, monkeypatch):
    monkeypatch.setattr(relay, "LEAST_PAUSE", 0.05)
    failures = [OSError(errno.EMFILE, "Too many open files")]

    def open_socket():
        if failures:
            raise failures.pop()
        return sockets.open_socket()

    monkeypatch.setattr(relay, "open_socket", open_socket)
    with TurnDouble() as double:
        host, _, lines = relayed(double.server)
        wait_until(lambda: host.candidates.relay)
        assert lines[0] == "no relay: [Errno 24] Too many open files"


def test_a_host_takes_the_relay_that_its_server_hands_it_and_registers_again_when_it_is_refused(start_server, monkeypatch):
    """The TURN server knows the second credentials alone."""
    monkeypatch.setattr(relay, "LEAST_PAUSE", 0.05)
    with TurnDouble(lambda request, answer: answer if len(users(double)) < 2 else stun.encode(
            request.kind | turn.SUCCESS, request.transaction, [(turn.XOR_RELAYED_ADDRESS, stun.pack_address(double.relayed, request.transaction))],
            key_of(request))) as double:
        server = start_server(turn_url=f"turn:127.0.0.1:{double.server.address[1]}", turn_secret="the secret")
        client = p2pclient.RendezvousClient(url_of(server))
        with p2pclient.HostedGame(client, "castle", info={"map": "ice"}):
            text = addresses.text_of(double.relayed)
            wait_until(lambda: text in client.start_game("castle", "a guest", []).addresses)
            assert len(users(double)) == 2 and client.get_game("castle").info == {"map": "ice"}


def users(double):
    return list(dict.fromkeys(each.attributes[stun.USERNAME] for each in double.seen if stun.USERNAME in each.attributes))


def key_of(request):
    username = request.attributes[stun.USERNAME]
    password = base64.b64encode(hmac.digest(b"the secret", username, "sha1"))
    return hashlib.md5(b":".join((username, request.attributes[turn.REALM], password))).digest()


@pytest.mark.parametrize("values", [{"relay": False}, {}], ids=["one that does not want it", "one to whom none is offered"])
def test_no_relay_is_asked_for_by_a_host_that_is(values, start_server):
    offered = {"turn_url": "turn:127.0.0.1", "turn_secret": "s"} if values else {}
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(start_server(**offered))), "castle", **values):
        assert not [thread for thread in threading.enumerate() if thread.name == "relay"]


def test_first_candidates_do_not_wait_for_a_turn_server_that_does_not_answer_nor_does_the_end(start_server):
    client = p2pclient.RendezvousClient(url_of(start_server()))
    with TurnDouble(TURN_LIES["nothing"]) as double:
        with p2pclient.HostedGame(client, "castle", turn=double.server) as game:
            wait_until(lambda: double.seen)
            assert client.start_game("castle", "a guest", []).addresses
            assert len(double.seen) == 1
        wait_until(lambda: not game._relay._thread.is_alive())
        assert len(double.seen) == 1


@pytest.mark.parametrize("urls, address", [(["turns:t", "turn:t?transport=tcp", "turn:t", "turn:u"], ("t", 3478)), (["turns:t"], None), ([], None)])
def test_the_first_url_over_udp_is_the_relay_that_a_server_hands_out(urls, address):
    with Script(answering({**CALLS["register"][1], "turn": {**HANDED, "urls": urls}})) as server:
        found = p2pclient.RendezvousClient(server.url).register_game("castle", "ada").turn
    assert found == (address and turn.TurnServer(address, "u", "c"))


@pytest.mark.parametrize("change, said", [(lambda request, answer: answer, "ok      RELAY: a relay stands by at"), (
    TURN_LIES["a challenge without a nonce"], "FAILED  RELAY: no relay: the TURN server refuses (error 401)")])
def test_the_doctor_tells_whether_a_relay_works(change, said, start_server, monkeypatch):
    with TurnDouble(change) as double:
        monkeypatch.setattr(p2pclient.rendezvous, "turn_server", lambda answer: double.server)
        lines = []
        assert doctor.check_server(url_of(start_server()), report=lines.append) == said.startswith("ok")
    assert any(line.startswith(said) for line in lines), lines


# ---- simulators -----------------------------------------------------------------------------------------------------

class Process:
    """A program of ours; its lines as they come."""

    def __init__(self, *arguments, **environment):
        self.lines = []
        self.process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        encoding="utf-8", env={"PATH": "", "PYTHONUTF8": "1", **environment})
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True)
        self.reader.start()

    def has(self, pattern, count=1):
        return wait_until(lambda: len(re.findall(pattern, "".join(self.lines))) >= count)

    def end(self, number=None, seconds=30):
        """The exit status and all that was printed."""
        if number:
            self.process.send_signal(number)
        status = self.process.wait(seconds)
        self.reader.join(5)
        self.process.stdout.close()
        text = "".join(self.lines)
        assert "Traceback" not in text, text
        return status, text


@pytest.fixture
def program(tmp_path):
    started = []

    def start(*arguments, **environment):
        started.append(Process(*arguments, **{"XDG_STATE_HOME": str(tmp_path), **environment}))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        each.process.stdout.close()


def test_hosts_and_guest_find_each_other_and_talk(start_server, program):
    url = url_of(start_server())
    hosts = program("simulate_hosts.py", "--server", url, "--info", '{"map": "castle"}')
    hosts.has("3 games are on offer")
    hosts.has("registered; candidates 127.0.0.1:[0-9]+", 3)
    status, text = program("simulate_guest.py", "--server", url, "--all", "--messages", "2").end()
    assert status == 0 and text.count('{"map": "castle"}') == 3
    assert re.search("connected to 3 of 3 games, 6 of 6 messages came back, median round trip [0-9.]+ ms", text)
    hosts.has("the other player has left; 2 messages echoed", 3)
    status, _ = hosts.end(signal.SIGINT)
    assert status == 0 and p2pclient.RendezvousClient(url).list_games() == []


def test_a_guest_joins_the_game_that_it_is_told(start_server, program):
    url = url_of(start_server())
    hosts = program("simulate_hosts.py", "--server", url, "--hosts", "2", "--name", "Ärger", "--once")
    hosts.has("2 games are on offer")
    status, text = program("simulate_guest.py", "--server", url, "--game", "Ärger 2").end()
    assert status == 0 and "joining Ärger 2" in text and "connected to 1 of 1 games, 5 of 5" in text
    wait_until(lambda: [game.name for game in p2pclient.RendezvousClient(url).list_games()] == ["Ärger 1"])


def test_hosts_and_guests_find_each_other_again_after_a_restart_of_the_server(start_server, program):
    port = free_port()
    first = start_server(port=port)
    hosts = program("simulate_hosts.py", "--server", url_of(first))
    hosts.has("3 games are on offer")
    first.stop()
    second = start_server(port=port)
    wait_until(lambda: len(p2pclient.RendezvousClient(url_of(second)).list_games()) == 3)
    assert program("simulate_guest.py", "--server", url_of(second), "--all").end()[0] == 0
    assert hosts.end(signal.SIGTERM)[0] == 0


def test_hosts_end_after_their_time(start_server, program):
    url = url_of(start_server())
    status, text = program("simulate_hosts.py", "--server", url, "--duration", "0.5").end()
    assert status == 0 and "3 games are no longer on offer" in text and p2pclient.RendezvousClient(url).list_games() == []


def test_hosts_choose_another_name_where_one_is_taken(start_server, program):
    url = url_of(start_server())
    p2pclient.RendezvousClient(url).register_game("castle", "ada")
    _, text = program("simulate_hosts.py", "--server", url, "--hosts", "1", "--name", "castle", "--duration", "0.2").end()
    assert "[castle] this name is taken" in text and "[castle 2] registered" in text


def test_a_single_host_has_the_very_name_that_it_is_given(start_server, program):
    url = url_of(start_server())
    hosts = program("simulate_hosts.py", "--server", url, "--hosts", "1", "--name", "castle")
    hosts.has("1 game is on offer at .*; Ctrl-C ends it")
    assert [game.name for game in p2pclient.RendezvousClient(url).list_games()] == ["castle"]
    assert "1 game is no longer on offer" in hosts.end(signal.SIGINT)[1]


def test_hosts_gather_candidates_at_once_and_a_missing_stun_server_is_one_warning_with_its_consequence(start_server, program):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(WAIT)
        stun_server = f"127.0.0.1:{silent.getsockname()[1]}"
        hosts = program("simulate_hosts.py", "--server", url_of(start_server()), "--stun", stun_server)
        first = {silent.recvfrom(2048)[1] for _ in range(3)}
        assert len(first) == 3 and not hosts.lines, "all have asked before the first has given up"
        hosts.has("3 games are on offer")
        text = hosts.end(signal.SIGINT)[1]
    assert text.count("warning") == 1 and "warning: no STUN server answers, so players outside of this network may not get through" in text


def test_hosts_of_a_server_without_stun_say_how_to_name_one_and_wait_for_none(start_server, program):
    hosts = program("simulate_hosts.py", "--server", url_of(start_server(no_stun=True)))
    hosts.has("3 games are on offer")
    text = hosts.end(signal.SIGINT)[1]
    assert "no answer" not in text and text.count("warning") == 1
    assert "warning: there is no STUN server, so players outside of this network may not get through to this one; name one (--stun HOST:PORT)\n" in text


def test_a_guest_asks_stun_once_for_all_games(start_server, program):
    url = url_of(start_server())
    program("simulate_hosts.py", "--server", url).has("3 games are on offer")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        status, text = program("simulate_guest.py", "--server", url, "--all", "--messages", "1", "--stun", f"127.0.0.1:{silent.getsockname()[1]}").end()
    assert status == 0 and text.count("warning: no STUN server answers") == text.count("no STUN server has answered for 3 seconds") == 1


def test_stun_at_another_port_is_no_warning(start_server, program):
    status, text = program("simulate_hosts.py", "--server", url_of(start_server(stun_port=free_port())), "--duration", "0.1").end()
    assert status == 0 and "warning" not in text


def test_after_three_seconds_of_a_silent_server_a_line_says_so(program):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for waiting in [program(*arguments, "--server", url) for arguments in (("simulate_guest.py",), ("simulate_hosts.py", "--hosts", "1"))]:
            waiting.has(f"no answer for 3 seconds from {url}.*; still waiting")
            waiting.end(signal.SIGKILL)


def test_who_joins_a_host_without_addresses_is_told_what_the_waiting_is_for(start_server, monkeypatch):
    monkeypatch.setattr(games, "UNHEARD_TIME", 0.2)
    host, lines = p2pclient.RendezvousClient(url_of(start_server())), []
    host.register_game("castle", "ada")
    with pytest.raises(p2pclient.ConnectFailed, match="published no address"):
        p2pclient.join_game(p2pclient.RendezvousClient(host.base_url), "castle", timeout=1, report=lines.append)
    assert lines == ["no address of the host for 0.2 seconds: the host or the server is silent; still waiting"]


def test_hosts_keep_the_games_that_the_server_allows_and_say_which_limit_stopped_them(start_server, program):
    url = url_of(start_server(max_games_per_client=2))
    hosts = program("simulate_hosts.py", "--server", url, "--hosts", "4")
    hosts.has("2 games are on offer, not 4: your address has 2 games, which is all that one may have")
    hosts.has("2 games are on offer at")
    assert program("simulate_guest.py", "--server", url, "--all", "--messages", "1").end()[0] == 0
    assert hosts.end(signal.SIGINT)[0] == 0 and p2pclient.RendezvousClient(url).list_games() == []


def guest_has_come(server):
    """True. A guest has joined the second game, if there still is one and it is served."""
    client = p2pclient.RendezvousClient(url_of(server))
    with contextlib.suppress(p2pclient.ConnectFailed, p2pclient.RendezvousError, IndexError):
        p2pclient.join_game(client, client.list_games()[1].name, timeout=2).close()
    return True


@pytest.mark.parametrize("lines", [0, 1, 4])
@pytest.mark.parametrize("script", ["simulate_hosts.py", "simulate_guest.py"])
def test_a_program_whose_reader_is_gone_ends_quietly_and_leaves_nothing(start_server, script, lines, tmp_path):
    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle"), subprocess.Popen(
            [sys.executable, script, "--server", url_of(server)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": "", "XDG_STATE_HOME": str(tmp_path)}) as program:
        for _ in range(lines):
            assert program.stdout.readline()
        program.stdout.close()
        if script == "simulate_hosts.py" and lines == 4:        # it is silent until a guest comes
            wait_until(lambda: guest_has_come(server) and program.poll() is not None, 60)
        assert program.wait(WAIT) == 1 and program.stderr.read() == ""
        assert [game.name for game in p2pclient.RendezvousClient(url_of(server)).list_games()] == ["castle"]
        wait_until(lambda: server.registry.counts()["guests"] == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_programs_that_are_terminated_or_whose_terminal_closes_delete_their_games_and_leave(start_server, program, number):
    server = start_server()
    hosts = program("simulate_hosts.py", "--server", url_of(server))
    hosts.has("3 games are on offer")
    guest = program("simulate_guest.py", "--server", url_of(server), "--messages", "1000")
    guest.has("message 1 of 1000: round trip")
    assert guest.end(number)[0] == 1 and server.registry.counts()["guests"] == 0
    assert hosts.end(number)[0] == 0 and server.registry.counts()["games"] == 0


def test_programs_whose_terminal_is_gone_leave_nothing(start_server, program):
    """It may send SIGHUP several times, and nothing can be written to it."""
    server = start_server()
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url_of(server)), "castle"):
        for script, line in (("simulate_hosts.py", "3 games are on offer"), ("simulate_guest.py", "  connected: ")):
            terminal = program("-c", "import pty, sys; pty.spawn([sys.executable, *sys.argv[1:]])", script, "--server", url_of(server))
            terminal.has(line)
            terminal.end(signal.SIGKILL)
            wait_until(lambda: (server.registry.counts()["games"], server.registry.counts()["guests"]) == (1, 0))


def test_hosts_that_nohup_has_started_stay_when_the_terminal_closes(start_server, program):
    url = url_of(start_server())
    nohup = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    hosts = program("-c", nohup, "simulate_hosts.py", "--server", url, "--hosts", "1")
    hosts.has("1 game is on offer")
    hosts.process.send_signal(signal.SIGHUP)
    assert program("simulate_guest.py", "--server", url).end()[0] == 0 and hosts.end(signal.SIGTERM)[0] == 0


MANY_VOICES = """
import sys, threading
sys.setswitchinterval(1e-6)
from p2pclient import commandline
barrier = threading.Barrier(20)
def speak():
    barrier.wait()
    commandline.say("hello")
threads = [threading.Thread(target=speak) for _ in range(20)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_that_the_output_is_lost_is_told_once_by_however_many_threads():
    for _ in range(5):
        with open("/dev/full", "w") as full:
            found = subprocess.run([sys.executable, "-c", MANY_VOICES], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=WAIT)
        assert (found.returncode, found.stderr) == (0, "-c: the output is lost: No space left on device\n")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("script", ["simulate_hosts.py", "simulate_guest.py"])
def test_a_program_whose_disk_is_full_ends_with_one_line_and_leaves_nothing(start_server, script, tmp_path):
    url = url_of(start_server())
    with p2pclient.HostedGame(p2pclient.RendezvousClient(url), "castle"), open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, script, "--server", url], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=WAIT,
                               env={"PATH": "", "XDG_STATE_HOME": str(tmp_path)})
        assert (found.returncode, found.stderr) == (1, f"{script[:-3]}: the output is lost: No space left on device\n")
        assert [game.name for game in p2pclient.RendezvousClient(url).list_games()] == ["castle"]


@pytest.mark.parametrize("typed", ["https://{}", "http://{}/games", "http://{}/a/b/", "{}/games"])
def test_a_url_of_the_other_scheme_or_with_a_path_is_recognised(start_server, program, typed):
    place = url_of(start_server()).partition("://")[2]
    programs = [("simulate_guest.py",), ("simulate_guest.py", "--game", "castle"), ("simulate_hosts.py",), ("-m", "p2pclient", "check")]
    for each in [program(*arguments, "--server", typed.format(place)) for arguments in programs]:
        status, text = each.end()
        assert status == 1 and re.search(rf"(_guest|_hosts|HTTP|not connected): a p2pserver answers at http://{place}: use that as --server \(.*\)\n", text)


def test_http_on_https_is_recognised(start_server, program, certificate):  # noqa: F811
    server = start_server(tls_cert=str(certificate))
    for each in [program(script, "--server", url_of(server)) for script in ("simulate_guest.py", "simulate_hosts.py")]:
        status, text = each.end()
        assert status == 1 and "this port speaks TLS: use https://" in text


@pytest.mark.parametrize("bundle", [None, "/nowhere", __file__])
def test_a_certificate_or_bundle_that_cannot_be_used_is_told_with_what_to_do(start_server, program, certificate, bundle):  # noqa: F811
    url = url_of(start_server(tls_cert=str(certificate))).replace("http:", "https:")
    programs = [("simulate_guest.py",), ("simulate_hosts.py",), ("-m", "p2pclient", "check")]
    for each in [program(*arguments, "--server", url, **({"REQUESTS_CA_BUNDLE": bundle} if bundle else {})) for arguments in programs]:
        status, text = each.end()
        assert status == 1 and "if the server's certificate is self-signed, set REQUESTS_CA_BUNDLE to its file (PEM)\n" in text


def test_the_map_of_the_package_names_each_file_once():
    named = re.findall(r"^    (\w+\.py)  ", p2pclient.__doc__, re.MULTILINE)
    assert sorted([*named, "__init__.py"]) == sorted(path.name for path in (ROOT / "p2pclient").glob("*.py"))


def test_what_is_a_program_may_be_executed_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines() or ["simulate_hosts.py", "simulate_guest.py"]
    for path in map(ROOT.joinpath, listed):
        if path.is_file():
            assert path.read_bytes().startswith(b"#!") == bool(path.stat().st_mode & 0o100), path


def test_hosts_and_a_guest_that_were_killed_come_back_as_who_they_were(start_server, program, tmp_path):
    server = start_server()
    for _ in range(2):
        hosts = program("simulate_hosts.py", "--server", url_of(server), "--hosts", "1", "--name", "castle")
        hosts.has("castle. registered")
        guest = program("simulate_guest.py", "--server", url_of(server), "--messages", "1000")
        guest.has("message 1 of 1000: round trip")
        for each in (hosts, guest):
            each.process.kill()
            each.process.wait()
    assert server.registry.counts() == {**server.registry.counts(), "games": 1, "guests": 1}
    kept = list((tmp_path / "p2pclient").iterdir())
    assert sorted(file.name for file in kept) == ["guest", "host"] and all(file.stat().st_mode & 0o777 == 0o600 for file in kept)
    assert (tmp_path / "p2pclient").stat().st_mode & 0o777 == 0o700


def test_of_two_programs_with_one_file_of_a_peer_id_one_has_another(start_server, program):
    server = start_server()
    first = program("simulate_hosts.py", "--server", url_of(server), "--hosts", "1", "--name", "castle")
    first.has("castle. registered")
    _, text = program("simulate_hosts.py", "--server", url_of(server), "--hosts", "1", "--name", "castle", "--duration", "0.2").end()
    assert "[castle] this name is taken" in text and "[castle 2] registered" in text


def test_a_file_with_a_peer_id_that_others_may_read_is_closed_to_them(tmp_path):
    path = tmp_path / "host"
    path.write_text(32 * "x" + "\n")
    path.chmod(0o644)
    assert p2pclient.commandline.peer_id_in(str(path)) == 32 * "x" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("script", ["simulate_hosts.py", "simulate_guest.py"])
def test_a_file_that_can_keep_no_peer_id_is_one_line_and_left_as_it_is(program, tmp_path, script):
    letter = tmp_path / "letter"
    letter.write_text("Dear Ada,")
    for path in (letter, tmp_path):
        status, text = program(script, "--peer-id-file", path).end()
        assert status == 2 and text.count("\n") == 1
    assert letter.read_text() == "Dear Ada,"


def test_without_a_place_to_keep_a_peer_id_the_simulators_work_all_the_same(start_server, program, tmp_path):
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    hosts = program("simulate_hosts.py", "--server", url_of(start_server()), "--duration", "0.2", XDG_STATE_HOME=str(nowhere))
    assert hosts.end()[0] == 0


@pytest.mark.parametrize("arguments", [("simulate_hosts.py",), ("simulate_guest.py",), ("-m", "p2pclient", "check")])
def test_a_stun_server_that_does_not_exist_is_told_as_no_such_name(program, arguments):
    status, text = program(*arguments, "--stun", "nosuch.invalid").end()
    assert status == 2 and "no such name: 'nosuch.invalid'" in text


@pytest.mark.parametrize("path", ["simulate_hosts.py", "simulate_guest.py"])
def test_without_a_server_there_is_one_clear_line(program, path):
    status, text = program(path, "--server", f"http://127.0.0.1:{free_port()}").end()
    assert status == 1 and text.count("\n") == 1 and "Connection refused" in text


@pytest.mark.parametrize("arguments", [
    ("simulate_guest.py", "--nonsense"), ("simulate_guest.py", "--server", "ftp://x"), ("simulate_guest.py", "--messages", "0"),
    ("simulate_guest.py", "--all", "--game", "x"), ("simulate_guest.py", "--stun", "x:y"), ("simulate_hosts.py", "--hosts", "0"),
    ("simulate_hosts.py", "--info", "[]"), ("simulate_hosts.py", "--info", "{"), ("simulate_hosts.py", "--server", "ftp://x"), ("-m", "p2pclient"),
    ("-m", "p2pclient", "check", "--server", "ftp://x"),
])
def test_bad_usage_is_status_2(program, arguments):
    assert program(*arguments).end()[0] == 2


@pytest.mark.parametrize("arguments", [("-m", "p2pclient", "check"), ("simulate_hosts.py",), ("simulate_guest.py",)])
def test_without_the_library_requests_there_is_one_line_that_says_so(program, arguments):
    status, text = program("-S", *arguments).end()
    assert status == 1 and text == "the module requests is missing; python3 -m pip install requests installs it\n"


def test_a_guest_without_games_says_so(start_server, program):
    status, text = program("simulate_guest.py", "--server", url_of(start_server())).end()
    assert status == 1 and "there are no games" in text


def test_a_guest_of_a_game_that_has_vanished_says_so(start_server, program):
    status, text = program("simulate_guest.py", "--server", url_of(start_server()), "--game", "castle").end()
    assert status == 1 and "not connected: there is no game 'castle'" in text


def test_hostile_names_and_infos_are_printed_harmlessly(start_server, program):
    url = url_of(start_server())
    p2pclient.RendezvousClient(url).register_game("\ue000evil", "ada", info={"map": "\x1b[2J\n\u2028"})
    guest = program("simulate_guest.py", "--server", url)
    guest.has("joining")
    status, text = guest.end(signal.SIGINT)
    assert status == 1 and "\\ue000evil" in text and not re.search("[\x1b\ue000\u2028]", text)


def test_the_simulators_ask_for_requests_alone():
    for program in ("simulate_hosts.py", "simulate_guest.py"):
        metadata = re.search("# /// script\n(.*?)# ///", (ROOT / program).read_text(), re.DOTALL)[1]
        assert json.loads(re.search("dependencies = (.*)", metadata)[1]) == ["requests"]


# ---- docs/WIRE.md ---------------------------------------------------------------------------------------------------

WIRE = {title: bytes.fromhex(re.sub("#.*", "", lines)) for title, lines in
        re.findall(r"^# (.*)\n((?:[0-9a-f].*\n)+)", (ROOT / "docs" / "WIRE.md").read_text(encoding="utf-8"), re.MULTILINE)}
WIRE_ID, WIRE_KEY = "2ff0a04bb2347b1bbb174a2b0ef88c7a", "e0d7cbfa2cd6f0da3a04bc7ad7a8b8a8"
WIRE_GUEST, WIRE_HOST = ("198.51.100.9", 5000), ("203.0.113.7", 4000)


def test_two_sessions_send_each_other_what_the_page_shows(monkeypatch):
    """With its nonces, tie-breakers and transactions as random numbers."""
    numbers = iter(map(bytes.fromhex, ["a0a1a2a3a4a5a6a7", 8 * "11", "b0b1b2b3b4b5b6b7", 8 * "22", "000102030405060708090a0b",
                                       "101112131415161718191a1b", "202122232425262728292a2b"]))
    monkeypatch.setattr(checks.secrets, "token_bytes", lambda size: next(numbers))
    guest, host = (checks.Session(WIRE_ID, WIRE_KEY, controlling, 0.0) for controlling in (True, False))
    guest.add([WIRE_HOST], 0.0)
    assert guest.tick(0.0) == [(WIRE["Check of a guest with P2P, which nominates"], WIRE_HOST)]
    answers = host.receive(stun.decode(WIRE["Check of a guest with P2P, which nominates"]), WIRE_GUEST, 0.01)
    assert answers == [(WIRE["Answer of the host"], WIRE_GUEST), (WIRE["Check of the host"], WIRE_GUEST)]
    assert guest.receive(stun.decode(WIRE["Answer of the host"]), WIRE_HOST, 0.02) == []
    assert guest.receive(stun.decode(WIRE["Check of the host"]), WIRE_HOST, 0.02) == [(WIRE["Answer of the guest"], WIRE_HOST)]
    assert host.receive(stun.decode(WIRE["Answer of the guest"]), WIRE_GUEST, 0.03) == []
    assert (guest.selected, host.selected) == (WIRE_HOST, WIRE_GUEST)
    assert guest.channel.seal(b"hello") == WIRE["Datagram of the guest, of its hello"]
    assert host.channel.seal(b"hello") == WIRE["Datagram of the host, of its hello"]
    assert host.open(WIRE["Datagram of the guest, of its hello"], 0.04) == guest.open(WIRE["Datagram of the host, of its hello"], 0.04) == b"hello"
    assert guest.goodbye() == [(WIRE["Good-bye of the guest"], WIRE_HOST)]
    host.receive(stun.decode(WIRE["Good-bye of the guest"]), WIRE_GUEST, 0.05)
    assert host.over == checks.LEFT


def test_a_plain_check_is_answered_as_the_page_shows():
    check = WIRE["Check of a plain guest, which nominates"]
    host = checks.Session(WIRE_ID, WIRE_KEY, False, 0.0)
    assert host.receive(stun.decode(check), WIRE_GUEST, 0.0)[0] == (WIRE["Answer of the host to a plain check"], WIRE_GUEST)
    assert check == stun.encode(stun.REQUEST, check[8:20], [
        (stun.USERNAME, f"{WIRE_ID}:{WIRE_ID}".encode()), (stun.ICE_CONTROLLING, 8 * b"\x33"), (stun.PRIORITY, checks.PEER_REFLEXIVE),
        (stun.USE_CANDIDATE, b"")], WIRE_KEY)


def test_a_conflict_of_roles_is_answered_as_the_page_shows(monkeypatch):
    monkeypatch.setattr(checks.secrets, "token_bytes", lambda size: size * b"\x44")      # more than the peer's tie-breaker
    controls = checks.Session(WIRE_ID, WIRE_KEY, True, 0.0)
    answers = controls.receive(stun.decode(WIRE["Check of a plain guest, which nominates"]), WIRE_GUEST, 0.0)
    assert answers == [(WIRE["Answer of the host to a plain check, if it controls as well"], WIRE_GUEST)]


def test_our_question_to_a_stun_server_and_the_answer_of_ours_are_those_of_the_page():
    question = WIRE["Question to a STUN server"]
    assert stun.encode(stun.REQUEST, question[8:20]) == question
    assert p2pserver.stun_answer(question, WIRE_GUEST) == WIRE["Answer of the STUN server"]
    assert stun.mapped_address(stun.decode(WIRE["Answer of the STUN server"])) == WIRE_GUEST


def test_each_line_of_a_vector_is_the_header_or_the_attribute_that_it_says():
    page = (ROOT / "docs" / "WIRE.md").read_text(encoding="utf-8")
    told = re.findall(r"^([0-9a-f]{4}) [0-9a-f]{4}\b.*# ([A-Z0-9-]+)$", page, re.MULTILINE)
    assert len(told) == 40 and all(int(number, 16) == getattr(stun, name.replace("-", "_")) for number, name in told)
    assert len(WIRE) == 12


# ---- README ---------------------------------------------------------------------------------------------------------

def test_the_example_of_a_game_works(start_server, program):
    server = start_server()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search("```python\n(.*?)```", readme, re.DOTALL)[1].replace("http://localhost:8000", url_of(server))
    assert code.strip().count("\n") <= 30
    code += "import sys, time\nif sys.argv[1:]:\n    print(guest('castle'))\nelse:\n    host('castle')\n"
    program("-c", code)
    wait_until(lambda: b"castle" in server.registry.list_games()[1])
    assert program("-c", code, "as guest").end() == (0, "b'hello Ada'\n")
