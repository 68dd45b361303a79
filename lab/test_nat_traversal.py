"""Proves that hosts and guests find each other through real NATs: the real server and the real simulators in the laboratory."""
import itertools

import natlab
import pytest
from stage import Stage

_reason = natlab.check()
pytestmark = [pytest.mark.skipif(_reason is not None, reason=str(_reason)), pytest.mark.at_once()]

PAIRS = list(itertools.product(natlab.KINDS, repeat=2))     # host's, guest's


def why_not(host, guest):
    """What a guest is to be told of a pair that cannot connect; nothing of one that can."""
    if guest == "blocked":
        return "no UDP datagram comes back to you, not even from the STUN server"
    if host == "blocked":
        return "the host never answered .*its network may block UDP"
    if host == guest == "symmetric":
        return r"both routers give each destination another port \(symmetric NAT\)"
    if (host, guest) == ("symmetric", "port-restricted"):
        return r"the host’s router gives each destination another port \(symmetric NAT\), and your router lets in only ports it knows"
    if (host, guest) == ("port-restricted", "symmetric"):
        return r"your router gives each destination another port \(symmetric NAT\), and the host’s router lets in only ports it knows"
    return ""


CONNECTABLE = [pair for pair in PAIRS if not why_not(*pair)]
HOPELESS = [pair for pair in PAIRS if why_not(*pair)]


@pytest.mark.parametrize("host,guest", CONNECTABLE)
def test_pair_connects_and_talks(host, guest):
    with Stage() as stage:
        hosting = stage.host(stage.site("host", nat=host).machine())
        joining = stage.guest(stage.site("guest", nat=guest).machine())
        assert joining.wait() == 0, joining.text
        joining.expect("5 of 5 messages came back")
        hosting.expect("connected: .*round trip")
        hosting.expect("the other player has left; 5 messages echoed")


@pytest.mark.at_once(seconds=20)
@pytest.mark.parametrize("host,guest", HOPELESS)
def test_pair_that_cannot_connect_is_told_why(host, guest):
    with Stage() as stage:
        hosting = stage.host(stage.site("host", nat=host).machine())
        joining = stage.guest(stage.site("guest", nat=guest).machine())
        assert joining.wait() == 1, joining.text
        joining.expect(f"not connected: {why_not(host, guest)}")
        joining.expect("What would help: a port forwarded|try another network, or a relay")
        hosting.expect("a guest could not be reached")
