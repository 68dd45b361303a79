"""Proves that symmetric routers are crossed by prediction and by probing, and what becomes of pairs for which neither helps: the real simulators."""
import signal
import sys
import time

import natlab
import pytest
from stage import ROOT, Stage
from test_nat_traversal import call

_reason = natlab.check()
pytestmark = [pytest.mark.skipif(_reason is not None, reason=str(_reason)), pytest.mark.at_once()]

EASY = "port-restricted"
PREDICTABLE = [("sequential", EASY), ("step", EASY), ("sequential", "sequential"), ("sequential", "step"), ("first-twice", EASY), ("first-twice", "sequential")]
PROBED = [("big-block", EASY), ("block", "sequential"), ("block", "step"), ("block", "block")]
BY_CHANCE = [(("block", EASY), []), (("symmetric", EASY), ["--probing"])]       # 24 guesses at 24 of 128 ports miss in 4 of 1,000 tries, probes in 17
HOPELESS = [("symmetric", EASY), ("symmetric", "symmetric"), ("symmetric", "sequential"), ("symmetric", "block"), ("block", "sequential"),
            ("block", "block")]


def both_ways(pairs):
    return list(dict.fromkeys(pair for both in ((each, each[::-1]) for each in pairs) for pair in both))


@pytest.mark.parametrize("host,guest", both_ways(PREDICTABLE))
def test_pair_connects_by_prediction_and_talks(host, guest):
    with Stage() as stage:
        hosting = stage.host(stage.site("host", nat=host).machine())
        joining = stage.guest(stage.site("guest", nat=guest).machine())
        assert joining.wait() == 0, joining.text + hosting.text
        joining.expect("5 of 5 messages came back")
        hosting.expect("the other player has left; 5 messages echoed")


@pytest.mark.at_once(seconds=30)
@pytest.mark.parametrize("nats,options", [(nats, options) for pair, options in BY_CHANCE for nats in both_ways([pair])])
def test_pair_whose_ports_meet_by_chance_connects_in_one_of_two_tries_at_the_latest(nats, options):
    found = []
    for _ in range(2):
        with Stage() as stage:
            hosting = stage.host(stage.site("host", nat=nats[0]).machine(), *options)
            joining = stage.guest(stage.site("guest", nat=nats[1]).machine(), *options)
            if joining.wait() == 0:
                joining.expect("5 of 5 messages came back")
                return
            found.append(joining.text + hosting.text)
    raise AssertionError("".join(found))


@pytest.mark.parametrize("host,guest", both_ways([("sequential", EASY), ("sequential", "sequential")]))
def test_pair_connects_by_prediction_if_the_programs_are_told_of_no_stun_server(host, guest):
    """They ask the server's own two ports."""
    with Stage(stun="found") as stage:
        hosting = stage.host(stage.site("host", nat=host).machine())
        joining = stage.guest(stage.site("guest", nat=guest).machine())
        assert joining.wait() == 0, joining.text + hosting.text
        joining.expect("5 of 5 messages came back")


@pytest.mark.parametrize("host,guest", both_ways(PROBED))
def test_pair_connects_by_probing_if_both_want_it(host, guest):
    with Stage() as stage:
        hosting = stage.host(stage.site("host", nat=host).machine(), "--probing")
        joining = stage.guest(stage.site("guest", nat=guest).machine(), "--probing")
        assert joining.wait() == 0, joining.text + hosting.text
        joining.expect("5 of 5 messages came back")


@pytest.mark.parametrize("host,guest,who", [(*pair, who) for pair in both_ways([("symmetric", EASY)]) for who in ("host", "guest", "nobody")])
def test_where_not_both_want_to_probe_nobody_sends_more_than_usual(host, guest, who):
    with Stage() as stage:
        sites = stage.site("host", nat=host), stage.site("guest", nat=guest)
        stage.host(sites[0].machine(), *(["--probing"] if who == "host" else []))
        joining = stage.guest(sites[1].machine(), *(["--probing"] if who == "guest" else []))
        assert joining.wait() == 1, joining.text
        joining.expect("What would help: probing on both sides")
        assert max(site.router.counters()["out"] for site in sites) < 150


def told_within_three_seconds(stage, host, guest, reason):
    """The guest of such a pair, which has been told the reason in time."""
    stage.host(stage.site("host", nat=host).machine())
    joining = stage.guest(stage.site("guest", nat=guest).machine())
    joining.expect("joining game 1")
    began = time.monotonic()
    joining.expect(f"not connected: {reason}")
    passed = time.monotonic() - began
    assert passed < 4, f"{passed:.1f} s"        # three, and what a machine with little time to spare adds
    return joining


@pytest.mark.parametrize("host,guest", both_ways(HOPELESS))
def test_hopeless_pair_is_told_why_within_three_seconds(host, guest):
    with Stage() as stage:
        joining = told_within_three_seconds(stage, host, guest, ".*gives? each destination another port")
        joining.expect("(random|sequential) ports")
        assert joining.wait() == 1


@pytest.mark.parametrize("host,guest", both_ways([("blocked", nat) for nat in ("none", EASY, "symmetric", "blocked")]))
def test_who_has_no_udp_or_joins_such_a_host_is_told_so_within_three_seconds(host, guest):
    with Stage() as stage:
        reason = "(no UDP datagram comes back to you|the host never answered, nor does any STUN server answer it)"
        assert told_within_three_seconds(stage, host, guest, reason).wait() == 1


@pytest.mark.at_once(seconds=20)
@pytest.mark.parametrize("host,guest", [("none", EASY), (EASY, "none"), (EASY, EASY)])
def test_host_that_is_late_is_waited_for_where_nobody_has_an_answer_of_stun_as_its_port_is_closed(host, guest):
    with Stage() as stage:
        stage.server.run(["nft", "add table ip closed; add chain ip closed arriving { type filter hook input priority 0; meta l4proto udp drop; }"])
        sites = [stage.site("host", nat=host)]
        sites += [stage.site("guest", nat=guest)] if host != guest else sites      # neighbours
        hosting = stage.host(sites[0].machine())
        hosting.expect("on offer")
        hosting.signal(signal.SIGSTOP)
        joining = stage.guest(sites[-1].machine())
        joining.expect("the host has not answered for 3 seconds")
        hosting.signal(signal.SIGCONT)
        assert joining.wait() == 0, joining.text


@pytest.mark.parametrize("host,guest", [("sequential", EASY), (EASY, "sequential")])
def test_without_prediction_on_the_guests_side_a_predictable_pair_does_not_connect(host, guest):
    with Stage() as stage:
        stage.host(stage.site("host", nat=host).machine(), "--no-prediction")
        joining = stage.guest(stage.site("guest", nat=guest).machine(), "--no-prediction")
        assert joining.wait() == 1, joining.text


def test_host_with_a_forwarded_port_is_not_given_up_for_its_symmetric_router():
    with Stage() as stage:
        site = stage.site("host", nat="symmetric", public_address="11.0.0.1")
        site.router.map_ports("pcp")
        hosting = stage.host(site.machine())
        hosting.expect("the router forwards")
        joining = stage.guest(stage.site("guest", nat="symmetric").machine())
        assert joining.wait() == 0, joining.text


@pytest.mark.parametrize("nat, words", (("sequential", "sequential ports: they can be predicted"),
                                        ("first-twice", "sequential ports: they can be predicted"), ("step", "ports in steps of 8: they can be predicted"),
                                        ("block", "random ports of a block of about"), ("symmetric", "random ports: prediction cannot help")))
def test_doctor_tells_how_the_router_allocates_ports(nat, words):
    with Stage() as stage:
        found = stage.site("host", nat=nat).machine().run([sys.executable, "-m", "p2pclient", "check", "--server", stage.url], timeout=60, cwd=ROOT)
        assert f"PREDICTION: the router gives new destinations {words}" in found.stdout, found.stdout + found.stderr


@pytest.mark.at_once(seconds=20)
@pytest.mark.parametrize("ports", ({"last": 39999, "step": 1}, {"low": 40000, "high": 40023}, {}), ids=("sequential", "block", "random"))
@pytest.mark.parametrize("liar", ("host", "guest"))
@pytest.mark.parametrize("nat", ("full-cone", "block"))
def test_third_party_whom_a_peer_gives_out_for_its_own_router_gets_no_more_than_any_other(nat, liar, ports):
    """With everything on: a host sends it five datagrams, a guest a hundred."""
    with Stage() as stage:
        honest, hostile, victim = (stage.site(name, nat=nat).machine() for name, nat in (("honest", nat), ("hostile", "none"), ("victim", "none")))

        def lies(number):
            about = {"pacing": 5, "nat": "symmetric", "ports": {**ports, "round": number}, "probing": True}
            return {"name": "game 1", "peerId": "hostile", "addresses": [f"{victim.address}:39000", {"p2p": about}]}

        if liar == "guest":
            hosting = stage.host(honest, "--probing")
            call(stage, hostile, "/games/start", **lies(1))
            hosting.expect("a guest could not be reached")
        else:
            call(stage, hostile, "/games/register", name="game 1", peerId="hostile")
            call(stage, hostile, "/games/poll", **lies(0))
            joining = stage.guest(honest, "--probing")
            joining.expect("still trying|not connected")      # at random with a block is hopeless
            call(stage, hostile, "/games/poll", **lies(1))
            assert joining.wait() == 1
        least, most = (1, 5) if liar == "guest" else (8, 100)
        assert least <= victim.count_udp() <= most
        # A guest has asked for what it does, so it has tried what was predicted.
        assert (nat, liar) != ("full-cone", "host") or "last" not in ports or victim.count_udp(port=40001) > 0
