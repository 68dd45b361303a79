"""Proves that players with IPv6 alone play with others by a real NAT64 (tayga, Debian's package), whose prefix they find themselves (RFC 7050)."""
import shutil
import sys

import natlab
import pytest
from stage import PORT, ROOT, Stage

_reason = natlab.check() or (None if shutil.which("tayga") else "the command tayga is not installed")
pytestmark = [pytest.mark.skipif(_reason is not None, reason=str(_reason)), pytest.mark.at_once()]

BY_NAME = ("--server", f"http://server:{PORT}")     # there is no way to its IPv4 address as such


def player(stage, name, nat, ipv6_only=True):
    """A site and a machine in it."""
    site = stage.site(name, nat=nat, ipv6=ipv6_only)
    machine = site.machine()
    if ipv6_only:
        site.take_ipv4(machine)
    return site, machine


@pytest.mark.parametrize("who", ("host", "guest"))
@pytest.mark.parametrize("nat", ("full-cone", "port-restricted"))
def test_player_with_ipv6_alone_connects_with_one_who_has_ipv4_alone(nat, who):
    with Stage() as stage:
        host_site, host = player(stage, "host", nat, who == "host")
        guest_site, guest = player(stage, "guest", "port-restricted", who == "guest")
        hosting = stage.host(host, *(BY_NAME if who == "host" else ()))
        joining = stage.guest(guest, *(BY_NAME if who == "guest" else ()))
        assert joining.wait() == 0, joining.text
        ours, theirs = joining.expect(r"connected: (\S+):\d+ to (\S+):\d+ in").groups()
        assert (ours, theirs) == (guest_site.public_address, host_site.public_address)
        joining.expect("5 of 5 messages came back")
        hosting.expect("the other player has left; 5 messages echoed")


def test_doctor_finds_all_well_behind_a_nat64():
    with Stage() as stage:
        site, machine = player(stage, "home", "port-restricted")
        found = machine.run([sys.executable, "-m", "p2pclient", "check", *BY_NAME], timeout=60, cwd=ROOT)
        assert site.public_address in found.stdout and found.returncode == 0, found.stdout + found.stderr
