"""Proves that a host behind a router that maps ports is reached through it: the real simulators, and a real miniupnpd (Debian's package)."""
import contextlib
import shutil
import sys
import time

import natlab
import pytest
from stage import ROOT, Stage
from test_nat_traversal import call

_reason = natlab.check() or (None if shutil.which("miniupnpd") else "the command miniupnpd is not installed")
pytestmark = [pytest.mark.skipif(_reason is not None, reason=str(_reason)), pytest.mark.at_once()]

# miniupnpd takes documentation addresses for private ones, and refuses to work. Nothing leaves the lab.
PUBLIC = "11.0.0.1"


def mapped_host(stage, nat, *protocols):
    """A host whose router has mapped a port, once the server tells guests of it; its site, and the public port."""
    site = stage.site("host", nat=nat, public_address=PUBLIC)
    site.router.map_ports(*protocols)
    machine, said = site.machine(), rf"the router forwards {PUBLIC}:(\d+) to this game"
    host = stage.host(machine)
    # A host gives the router two seconds, and asks again after ten minutes: where this machine is too busy, it begins anew.
    for _ in range(2):
        with contextlib.suppress(AssertionError):
            host.expect(said, 10)
            break
        host.interrupt()
        host.wait()
        host = stage.host(machine)
    port = int(host.expect(said)[1])
    stranger = stage.site("stranger").machine()
    while f"{PUBLIC}:{port}" not in call(stage, stranger, "/games/start", name="game 1", peerId="stranger", addresses=[])["addresses"]:
        time.sleep(0.3)
    return host, site, port


@pytest.mark.parametrize("guest", ("symmetric", "port-restricted"))
@pytest.mark.parametrize("protocol, name", (("pcp", "PCP"), ("upnp", "UPnP"), ("upnp1", "UPnP")))
def test_host_behind_a_symmetric_router_that_maps_ports_is_reached_by_a_guest(protocol, name, guest):
    with Stage() as stage:
        host, site, port = mapped_host(stage, "symmetric", protocol)
        host.expect(rf"\({name}\)")
        assert site.router.mapped_ports() == [port]
        joining = stage.guest(stage.site("guest", nat=guest).machine())
        assert joining.wait() == 0, joining.text
        assert joining.expect(r"connected: \S+ to ([\d.:]+)")[1] == f"{PUBLIC}:{port}"
        joining.expect("5 of 5 messages came back")


@pytest.mark.parametrize("protocol", ("pcp", "upnp", "upnp1"))
def test_port_is_given_back_at_the_end(protocol):
    with Stage() as stage:
        host, site, port = mapped_host(stage, "port-restricted", protocol)
        host.interrupt()
        assert host.wait() == 0 and site.router.mapped_ports() == []


def test_router_that_maps_ports_is_not_asked_by_a_host_that_does_not_want_it():
    with Stage() as stage:
        site = stage.site("host", nat="symmetric", public_address=PUBLIC)
        site.router.map_ports("pcp", "upnp")
        host = stage.host(site.machine(), "--no-port-mapping", "--duration", "3")
        assert host.wait() == 0 and "router" not in host.text and site.router.mapped_ports() == []


@pytest.mark.parametrize("protocols, said", ((["pcp", "upnp"], "PCP"), (["upnp"], "UPnP"), ([], "")))
def test_doctor_tells_whether_the_router_maps_ports(protocols, said):
    with Stage() as stage:
        site = stage.site("host", nat="port-restricted", public_address=PUBLIC)
        if protocols:
            site.router.map_ports(*protocols)
        found = site.machine().run([sys.executable, "-m", "p2pclient", "check", "--server", stage.url], timeout=60, cwd=ROOT)
        assert (f"by {said}" if said else "no router here forwards ports") in found.stdout, found.stdout + found.stderr
        assert not protocols or site.router.mapped_ports() == []
