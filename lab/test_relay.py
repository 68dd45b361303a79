"""Proves that a host with a relay is reached by everybody who has UDP, and directly where that works: with a real TURN server, coturn (Debian's package)."""
import json
import re
import shutil
import subprocess
import sys
import time

import natlab
import pytest
from stage import ROOT, TURN_PORT, TURN_SECRET, Stage
from test_nat_traversal import CONNECTABLE, HOPELESS, assert_game_goes_on, call

from p2pclient import addresses  # found by stage

_reason = natlab.check() or (None if shutil.which("turnserver") else "the command turnserver (Debian's package coturn) is not installed")
pytestmark = [pytest.mark.skipif(_reason is not None, reason=str(_reason)), pytest.mark.at_once()]

RELAYED = [pair for pair in HOPELESS if "blocked" not in pair]
WITH_SECRET = ("--use-auth-secret", f"--static-auth-secret={TURN_SECRET}")


def relayed_host(stage, nat, *options):
    """A host once guests are told of its relay; its machine, and the relay's address."""
    machine = stage.site("host", nat=nat).machine()
    host = stage.host(machine, *options)
    relay = host.expect(r"a relay stands by at (\S+)")[1]
    stranger = stage.site("stranger").machine()
    while relay not in call(stage, stranger, "/games/start", name="game 1", peerId="stranger", addresses=[])["addresses"]:
        time.sleep(0.1)
    return host, machine, relay


def joined(stage, nat):
    """A guest that has connected and ended, and the address to which it had connected."""
    joining = stage.guest(stage.site("guest", nat=nat).machine())
    assert joining.wait() == 0, joining.text
    return joining, joining.expect(r"connected: \S+ to (\S+) in")[1]


def turn_log(stage, pattern, seconds=10):
    """Waits until coturn has said something."""
    end = time.monotonic() + seconds
    while not re.search(pattern, "".join(stage.turn_said)):
        assert time.monotonic() < end, "".join(stage.turn_said)
        time.sleep(0.05)


@pytest.mark.parametrize("host,guest", RELAYED)
def test_pair_without_a_direct_way_connects_by_the_relay_which_is_given_back_at_the_end(host, guest):
    with Stage(turn=True) as stage:
        hosting, _, relay = relayed_host(stage, host)
        joining, address = joined(stage, guest)
        assert address == relay
        joining.expect("5 of 5 messages came back")
        hosting.expect("the other player has left; 5 messages echoed")
        hosting.interrupt()
        assert hosting.wait() == 0
        turn_log(stage, "refreshed, realm=<lab>, username=<[0-9]+:[0-9a-f]{8}>, lifetime=0")


@pytest.mark.parametrize("host,guest", CONNECTABLE)
def test_pair_with_a_direct_way_takes_it_though_there_is_a_relay(host, guest):
    with Stage(turn=True) as stage:
        _, _, relay = relayed_host(stage, host)
        assert joined(stage, guest)[1] != relay


@pytest.mark.parametrize("host,guest", (("blocked", "none"), ("none", "blocked")))
def test_pair_of_which_one_has_no_udp_does_not_connect_and_the_game_is_offered_all_the_same(host, guest):
    with Stage(turn=True) as stage:
        hosting = stage.host(stage.site("host", nat=host).machine())
        hosting.expect("no relay: the TURN server does not answer" if host == "blocked" else "a relay stands by")
        assert stage.guest(stage.site("guest", nat=guest).machine()).wait() == 1


@pytest.mark.parametrize("options,server", (
    (["--turn-user", "Ada:a: password"], ["--lt-cred-mech", "--user=Ada:a: password"]), (["--turn-secret", TURN_SECRET], WITH_SECRET)))
def test_relay_may_be_given_to_the_host_by_argument(options, server):
    with Stage() as stage:
        stage.start_turn(*server)
        _, _, relay = relayed_host(stage, "symmetric", "--turn", f"turn:{stage.server.address}:{TURN_PORT}", *options)
        assert joined(stage, "symmetric")[1] == relay


def test_host_that_wants_no_relay_asks_for_none():
    with Stage(turn=True) as stage:
        host = stage.host(stage.site("host", nat="symmetric").machine(), "--no-relay", "--duration", "3")
        assert host.wait() == 0 and "relay" not in host.text and "session" not in "".join(stage.turn_said)


def test_host_whom_the_relay_does_not_let_in_says_so_and_is_reached_directly():
    with Stage() as stage:
        stage.start_turn(*WITH_SECRET)
        hosting = stage.host(stage.site("host", nat="full-cone").machine(), "--turn", f"turn:{stage.server.address}", "--turn-secret", "a wrong one")
        hosting.expect(r"no relay: the TURN server refuses \(error 401\)")
        assert stage.guest(stage.site("guest", nat="symmetric").machine()).wait() == 0


def relayed_game(stage, *options):
    """Host and guest by name, who talk by the relay, one message each second; the guest's machine."""
    hosting, _, relay = relayed_host(stage, "symmetric", *options)
    machine = stage.site("guest", nat="symmetric").machine()
    joining = stage.guest(machine, "--messages", "100", "--interval", "1")
    assert joining.expect(r"connected: \S+ to (\S+) in")[1] == relay
    joining.expect("message 3 .*round trip")
    return {"host": hosting, "guest": joining}, machine


@pytest.mark.at_once(seconds=40)
def test_relayed_game_goes_on_when_the_turn_server_begins_anew():
    with Stage(turn=True) as stage:
        programs, _ = relayed_game(stage)
        stage.turn.kill()
        stage.turn.wait()
        programs["guest"].expect("no echo")
        stage.start_turn(*WITH_SECRET)
        assert_game_goes_on(programs, 30)


@pytest.mark.at_once(seconds=40)
def test_relayed_game_goes_on_past_a_stale_nonce_as_the_relay_is_refreshed_at_half_its_life():
    with Stage() as stage:
        stage.start_turn(*WITH_SECRET, "--stale-nonce=3", "--max-allocate-lifetime=12")
        programs, _ = relayed_game(stage, "--turn", f"turn:{stage.server.address}", "--turn-secret", TURN_SECRET)
        turn_log(stage, "(?s)error 438: Stale nonce.*refreshed, realm=<lab>, username=<[^>]*>, lifetime=600", 40)
        assert_game_goes_on(programs, 5)


@pytest.mark.at_once(seconds=40)
def test_direct_way_takes_over_from_the_relay_once_there_is_one():
    with Stage(turn=True) as stage:
        programs, machine = relayed_game(stage)
        stage.site("elsewhere", nat="none").connect(machine)
        programs["guest"].expect("no echo")
        programs["guest"].expect("round trip", 20, after=len(programs["guest"].lines))
        time.sleep(6)       # in which the direct ways are checked again
        stage.turn.kill()
        said = len(programs["guest"].lines)
        for number in range(10):
            programs["guest"].expect("round trip", after=said + number)
        assert "no echo" not in "\n".join(programs["guest"].lines[said:])


@pytest.mark.parametrize("host,guest", (("sequential", "port-restricted"), ("port-restricted", "step")))
@pytest.mark.at_once(seconds=30)
def test_pair_whose_ports_can_be_predicted_soon_does_without_the_relay(host, guest):
    with Stage(turn=True) as stage:
        relayed_host(stage, host)
        joining = stage.guest(stage.site("guest", nat=guest).machine(), "--messages", "30", "--interval", "0.5")
        joining.expect("connected")
        time.sleep(6)       # in which the direct way is found, though the relay may have been first
        stage.turn.kill()
        assert joining.wait() == 0, joining.text
        joining.expect("30 of 30 messages came back")


def test_guest_cannot_have_the_relay_send_anything_to_a_third_party():
    with Stage(turn=True) as stage:
        hosting, _, relay = relayed_host(stage, "full-cone")
        hostile, victim = (stage.site(name).machine() for name in ("hostile", "victim"))
        call(stage, hostile, "/games/start", name="game 1", peerId="hostile", addresses=[f"{victim.address}:{port}" for port in range(40000, 40008)])
        turn_log(stage, f"peer {victim.address} lifetime updated")       # it may send to us, that is
        hosting.expect("a guest could not be reached", 30)
        assert 1 <= victim.count_udp() <= 5 and victim.count_udp(source=stage.server.address) == 0


STOCK_GUEST = """
import aioice, asyncio, json, sys
async def main():
    found = json.loads(sys.stdin.readline())
    name, key = found["sessionId"], found["sessionKey"]
    agent = aioice.Connection(ice_controlling=True, use_ipv6=False, local_username=name, local_password=key)
    agent.remote_username, agent.remote_password = name, key
    await agent.gather_candidates()
    for number, text in enumerate(each for each in found["addresses"] if isinstance(each, str)):
        host, port = text.split(":")
        await agent.add_remote_candidate(aioice.Candidate(str(number), 1, "udp", 1000 - number, host, int(port), "host"))
    await agent.add_remote_candidate(None)
    await agent.connect()
    await agent.send(b"hello")
    print(await asyncio.wait_for(agent.recv(), 5), agent._nominated[1].remote_addr, flush=True)
asyncio.run(main())
"""


def test_stock_agent_as_guest_connects_by_the_relay():
    pytest.importorskip("aioice")
    with Stage(turn=True) as stage:
        _, _, relay = relayed_host(stage, "symmetric")
        guest = stage.site("guest", nat="symmetric").machine()
        with guest.popen([sys.executable, "-c", STOCK_GUEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
            # The address that it tells is its router's, with a port that leads nowhere.
            told = call(stage, guest, "/games/start", name="game 1", peerId="stock", addresses=["198.51.100.3:9"])
            print(json.dumps(told), file=agent.stdin, flush=True)
            assert agent.stdout.readline() == f"b'hello' {addresses.parse_candidate(relay)}\n"


@pytest.mark.parametrize("secret,said", (
    (TURN_SECRET, r"ok      RELAY: a relay stands by at \S+ and works"), ("another", r"FAILED  RELAY: no relay: the TURN server refuses \(error 401\)"),
    (None, "ok      RELAY: none is offered")))
def test_doctor_tells_whether_a_relay_is_offered_and_works(secret, said):
    with Stage(turn=secret is not None) as stage:
        if secret == "another":
            stage.turn.kill()
            stage.turn.wait()
            stage.start_turn("--use-auth-secret", "--static-auth-secret=another")
        machine = stage.site("player", nat="port-restricted").machine()
        found = machine.run([sys.executable, "-m", "p2pclient", "check", "--server", stage.url], timeout=60, cwd=ROOT)
        assert re.search(said, found.stdout), found.stdout + found.stderr
        assert found.returncode == (secret == "another")
