"""Proves by datagrams on real sockets that the laboratory's NATs are what they claim to be."""
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import natlab
import pytest

_reason = natlab.check()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

CONES = ("full-cone", "restricted", "port-restricted")
NATS = CONES + ("symmetric",)
_texts = itertools.count()


def receive(receiver, text, seconds=2):
    """Returns the source of the datagram with this text, skipping others, or None if it does not come in time."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        receiver.settimeout(left)
        try:
            data, source = receiver.recvfrom(2000)
        except TimeoutError:
            return None
        if data == text:
            return source
    return None


def pass_on(sender, receiver, destination=None, seconds=2):
    """Sends a datagram to the receiver's own address or the destination; returns the source it is received from."""
    text = b"%d" % next(_texts)
    sender.sendto(text, destination or receiver.getsockname())
    return receive(receiver, text, seconds)


def wait_until(condition, seconds=5):
    """Waits for condition() to become true; returns whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def public_sockets(lab):
    """Returns three sockets of the server: on address 1, on another port of address 1, and on address 2."""
    return [lab.server.socket(address=lab.server.address), lab.server.socket(address=lab.server.address),
            lab.server.socket(address=lab.server.address2)]


@pytest.fixture(scope="module")
def lab():
    with natlab.Lab() as made:
        yield made


@pytest.fixture(scope="module")
def sites(lab):
    return {kind: lab.site(kind, nat=kind) for kind in natlab.KINDS}


@pytest.fixture(scope="module")
def machines(sites):
    return {kind: site.machine() for kind, site in sites.items()}


@pytest.mark.parametrize("kind", ("none",) + NATS)
def test_mapping(lab, sites, machines, kind):
    mine = machines[kind].socket()
    port = mine.getsockname()[1]
    seen = [pass_on(mine, remote) for remote in public_sockets(lab)]
    assert {address for address, _ in seen} == {sites[kind].public_address}
    ports = [number for _, number in seen]
    if kind == "none":
        assert ports == [port] * 3
    elif kind == "symmetric":
        assert len(set(ports)) == 3
    else:
        assert len(set(ports)) == 1 and ports[0] != port


@pytest.mark.parametrize("kind", natlab.ALLOCATIONS)
def test_allocation(lab, kind):
    site = lab.site(kind, nat=kind)
    machine, (one, other, third) = site.machine(), public_sockets(lab)
    seen = [pass_on(mine, remote) for mine in [machine.socket() for _ in range(4)] for remote in (one, other)]
    assert {address for address, _ in seen} == {site.public_address}
    ports = [port for _, port in seen]
    steps = [later - earlier for earlier, later in zip(ports, ports[1:])]
    if kind in natlab.BLOCKS:
        assert len(set(steps)) > 2 and min(ports) >= natlab.FIRST_PORT and max(ports) < natlab.FIRST_PORT + natlab.BLOCKS[kind]
    elif kind == "first-twice":
        assert steps[0] == 0 and set(steps[1:]) == {1}
    else:
        assert set(steps) == {natlab.STEP if kind == "step" else 1}
    mine = machine.socket()
    outside = pass_on(mine, one)
    assert pass_on(one, mine, outside) and not pass_on(third, mine, outside, seconds=0.2)


@pytest.mark.parametrize("kind", ("none",) + NATS)
def test_filtering_and_mapping_towards_who_was_refused(lab, sites, machines, kind):
    mine = machines[kind].socket()
    known, other_port, other_address = public_sockets(lab)
    outside = pass_on(mine, known)
    refused = sites[kind].router.counters()["refused"]
    # The path keeps the order, so what has not arrived before the known peer's datagram has been refused.
    other_port.sendto(b"other port", outside)
    other_address.sendto(b"other address", outside)
    known.sendto(b"known", outside)
    arrived = []
    mine.settimeout(2)
    while b"known" not in arrived:
        arrived.append(mine.recv(100))
    expected = {"none": [b"other port", b"other address"], "full-cone": [b"other port", b"other address"],
                "restricted": [b"other port"]}.get(kind, [])
    assert arrived == expected + [b"known"]
    assert sites[kind].router.counters()["refused"] - refused == 2 - len(expected)
    # Neither a refused datagram nor one that was let in changes how the machine is mapped towards its sender.
    for remote in (other_port, other_address):
        seen = pass_on(mine, remote)
        assert kind == "symmetric" or seen == outside
        assert pass_on(remote, mine, seen) == remote.getsockname()


def test_a_flow_opened_from_outside_does_not_change_the_mapping(lab, machines):
    mine = machines["full-cone"].socket()
    known, stranger, another = public_sockets(lab)
    outside = pass_on(mine, known)
    assert pass_on(stranger, mine, outside) == stranger.getsockname()
    assert pass_on(mine, stranger) == outside
    assert pass_on(mine, another) == outside


@pytest.mark.parametrize("kind", CONES)
def test_two_machines_with_the_same_port_have_mappings_of_their_own(lab, sites, machines, kind):
    mine = machines[kind].socket()
    neighbour = sites[kind].machine().socket(port=mine.getsockname()[1])
    remotes = public_sockets(lab)
    first = {pass_on(mine, remote) for remote in remotes}
    second = {pass_on(neighbour, remote) for remote in remotes}
    assert len(first) == len(second) == 1 and first != second
    assert pass_on(remotes[0], mine, first.pop()) and pass_on(remotes[0], neighbour, second.pop())


@pytest.mark.parametrize("kind", natlab.KINDS)
def test_tcp(lab, sites, machines, kind):
    listener = lab.server.socket(socket.SOCK_STREAM, address=lab.server.address)
    listener.listen()
    with machines[kind].socket(socket.SOCK_STREAM) as mine:
        mine.settimeout(2)
        mine.connect(listener.getsockname())
        accepted, source = listener.accept()
        with accepted:
            assert source[0] == sites[kind].public_address
            mine.sendall(b"hello")
            assert accepted.recv(100) == b"hello"


def test_blocked(lab, sites, machines):
    mine = machines["blocked"].socket()
    remote = public_sockets(lab)[0]
    assert pass_on(mine, remote, seconds=0.3) is None
    assert sites["blocked"].router.counters() == {"out": 0, "in": 0, "refused": 1}
    assert lab.server.count_udp(source=sites["blocked"].public_address) == 0


def test_datagrams_are_counted_by_port_and_source(lab, machines):
    remote = public_sockets(lab)[0]
    port = remote.getsockname()[1]
    unused = remote.getsockname()[1] ^ 1
    mine = machines["none"].socket()
    for _ in range(5):
        mine.sendto(b"nobody listens", (lab.server.address, unused))
        assert pass_on(mine, remote)
    assert lab.server.count_udp(port) == lab.server.count_udp(port, machines["none"].address) == 5
    assert lab.server.count_udp(port, "198.51.100.254") == 0
    assert lab.server.count_udp(unused) >= 5
    assert lab.server.count_udp() >= 10


def send_at(cpu, start, interval, sends):
    """In a child process, performs one of the sends (socket, destination) per interval; returns its pid."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {cpu})
        for number, (sender, destination) in enumerate(sends):
            # Two sleeping processes would not wake up within microseconds of each other, two spinning ones do.
            while time.monotonic() < start + number * interval:
                pass
            sender.sendto(b"first", destination)
        os._exit(0)
    return pid


@pytest.mark.parametrize("kind", CONES)
def test_punched_holes_keep_their_ports_when_the_first_datagrams_cross(lab, kind):
    remote = public_sockets(lab)[0]
    pair = [lab.site(f"crossing-{kind}-{number}", nat=kind).machine() for number in range(2)]
    flows = []
    for _ in range(200):
        mine, other = (machine.socket() for machine in pair)
        flows.append([(mine, pass_on(other, remote)), (other, pass_on(mine, remote))])
    cpus = sorted(os.sched_getaffinity(0))
    start = time.monotonic() + 0.1
    children = [send_at(cpus[side % len(cpus)], start, 0.003, [ends[side] for ends in flows]) for side in range(2)]
    for child in children:
        os.waitpid(child, 0)
    arrived = 0
    for ends in flows:
        for mine, peer in ends:
            mine.sendto(b"second", peer)
        for mine, peer in ends:
            mine.settimeout(2)
            received = [mine.recvfrom(100)]
            while received[-1][0] != b"second":
                received.append(mine.recvfrom(100))
            assert {source for _, source in received} == {peer}
            arrived += len(received) - 1
            mine.close()
    # A filter may refuse the datagram that comes before its own has gone out, but never both of a pair.
    assert arrived == 400 if kind == "full-cone" else arrived >= 200


def test_neighbours_reach_each_other_in_their_lan_only(lab):
    site = lab.site("plain-lan", nat="full-cone")
    machine, neighbour = site.machine(), site.machine()
    mine, theirs = machine.socket(address=machine.address), neighbour.socket(address=neighbour.address)
    outside = pass_on(theirs, public_sockets(lab)[0])
    assert pass_on(mine, theirs) == mine.getsockname()
    assert pass_on(mine, theirs, outside, seconds=0.3) is None
    assert site.router.counters()["out"] == 1


@pytest.mark.parametrize("kind", CONES)
def test_hairpinning(lab, kind):
    site = lab.site("hairpin-" + kind, nat=kind, hairpin=True)
    mine, neighbour = site.machine().socket(), site.machine().socket()
    remote = public_sockets(lab)[0]
    my_outside, outside = pass_on(mine, remote), pass_on(neighbour, remote)
    assert pass_on(mine, neighbour, outside) == my_outside
    assert pass_on(neighbour, mine, my_outside) == outside


def test_neighbours_with_public_addresses(lab, sites, machines):
    neighbour = sites["none"].machine()
    remote = public_sockets(lab)[0]
    assert neighbour.address != machines["none"].address
    mine = neighbour.socket()
    assert pass_on(mine, remote)[0] == neighbour.address
    theirs = machines["none"].socket(address=machines["none"].address)
    assert pass_on(mine, theirs)[0] == neighbour.address


def test_two_sites_may_have_the_same_private_network(lab):
    remote = public_sockets(lab)[0]
    both = [lab.site(name, nat="port-restricted", lan="10.0.0.0/24") for name in ("twin1", "twin2")]
    twins = [site.machine() for site in both]
    assert twins[0].address == twins[1].address == "10.0.0.10"
    assert [pass_on(twin.socket(), remote)[0] for twin in twins] == [site.public_address for site in both]


def test_loss(lab):
    site = lab.site("lossy", nat="port-restricted", loss=20)
    machine = site.machine()
    mine, remote = machine.socket(), public_sockets(lab)[0]
    port = remote.getsockname()[1]
    outside = None
    while outside is None:
        outside = pass_on(mine, remote, seconds=0.1)
    sent = 3000

    def lost(sender, destination, counter):
        before = counter()
        for _ in range(sent):
            sender.sendto(b"x", destination)
        last = None
        # Everything has arrived when the count stands still; the loss leaves no other sign.
        while last != (last := counter()):
            time.sleep(0.05)
        return 100 * (1 - (last - before) / sent)
    assert 16 < lost(mine, remote.getsockname(), lambda: lab.server.count_udp(port)) < 24  # five standard deviations
    assert 16 < lost(remote, outside, machine.count_udp) < 24
    site.set_loss(100)
    assert pass_on(mine, remote, seconds=0.1) is None
    site.set_loss(0)
    assert lost(mine, remote.getsockname(), lambda: lab.server.count_udp(port)) == 0
    assert lost(remote, outside, machine.count_udp) == 0


def test_delay(lab):
    mine, remote = lab.site("far", nat="symmetric", delay_ms=40).machine().socket(), public_sockets(lab)[0]
    one_way, back = [], []
    for _ in range(10):
        start = time.monotonic()
        outside = pass_on(mine, remote)
        middle = time.monotonic()
        assert pass_on(remote, mine, outside)
        one_way.append(middle - start)
        back.append(time.monotonic() - middle)
    print("milliseconds out", [round(1000 * seconds, 1) for seconds in one_way])
    print("milliseconds back", [round(1000 * seconds, 1) for seconds in back])
    for times in (one_way, back):
        assert 0.0395 <= min(times) < 0.045       # what a busy machine adds is not the uplink's


def test_mapping_timeout(lab):
    remote = public_sockets(lab)[0]
    pairs = []
    for kind in NATS:
        machine = lab.site("short-" + kind, nat=kind, udp_timeout=4).machine()     # a busy machine may be late by three seconds and more
        pairs.append((machine.socket(), machine.socket()))
    before = [[pass_on(mine, remote) for mine in pair] for pair in pairs]
    start = time.monotonic()
    while time.monotonic() < start + 5:
        for kept, _ in pairs:
            assert pass_on(kept, remote)
        time.sleep(0.3)
    for (kept, idle), (kept_outside, idle_outside) in zip(pairs, before):
        assert pass_on(kept, remote) == kept_outside
        assert pass_on(remote, kept, kept_outside)
        assert pass_on(remote, idle, idle_outside, seconds=0.1) is None
        assert pass_on(idle, remote) != idle_outside


def test_inbound_datagrams_keep_a_mapping_too(lab):
    near, far = public_sockets(lab)[::2]
    mines = [lab.site("fed-" + kind, nat=kind, udp_timeout=4).machine().socket() for kind in CONES]
    outside = [pass_on(mine, near) for mine in mines]
    start = time.monotonic()
    while time.monotonic() < start + 5:
        for mine, address in zip(mines, outside):
            assert pass_on(near, mine, address)
        time.sleep(0.3)
    assert [pass_on(mine, far) for mine in mines] == outside


@pytest.mark.parametrize("kind", NATS)
def test_forget(lab, sites, machines, kind):
    mine, remote = machines[kind].socket(), public_sockets(lab)[0]
    before = pass_on(mine, remote)
    assert pass_on(remote, mine, before)
    sites[kind].router.forget()
    assert pass_on(remote, mine, before, seconds=0.1) is None
    after = pass_on(mine, remote)
    assert after != before
    assert pass_on(remote, mine, after)
    assert pass_on(remote, mine, before, seconds=0.1) is None


@pytest.mark.parametrize("kind", CONES)
def test_forget_but_the_ports(lab, sites, machines, kind):
    mine, remote = machines[kind].socket(), public_sockets(lab)[0]
    before = pass_on(mine, remote)
    sites[kind].router.forget(same_ports=True)
    let_in = pass_on(remote, mine, before, seconds=2 if kind == "full-cone" else 0.1)
    assert (let_in is not None) == (kind == "full-cone")
    assert pass_on(mine, remote) == before
    assert pass_on(remote, mine, before)


@pytest.mark.parametrize("kind", NATS)
def test_renumber(lab, kind):
    site = lab.site("renumbered-" + kind, nat=kind)
    machine = site.machine()
    mine, remote = machine.socket(), public_sockets(lab)[0]
    before = pass_on(mine, remote)
    site.renumber()
    after = pass_on(mine, remote)
    assert after[0] == site.public_address == machine.public_address != before[0]
    assert pass_on(remote, mine, after)
    assert pass_on(remote, mine, before, seconds=0.1) is None


def test_a_machine_in_two_networks_and_its_way_to_the_world(lab):
    home, other = lab.site("home", nat="port-restricted"), lab.site("other", nat="port-restricted")
    machine, neighbour = home.machine(), other.machine()
    remote = public_sockets(lab)[0]
    here = machine.address
    there = other.connect(machine, default=False)
    assert (machine.address, there) == (here, machine.socket(address=there).getsockname()[0])
    assert pass_on(machine.socket(), remote)[0] == home.public_address
    assert pass_on(neighbour.socket(), machine.socket(address=there))[0] == neighbour.address
    third = lab.site("third", nat="port-restricted")
    assert third.connect(machine) == machine.address
    assert pass_on(machine.socket(), remote)[0] == third.public_address == machine.public_address
    assert pass_on(neighbour.socket(), machine.socket(address=there))


def test_a_machine_moves(lab):
    home, mobile = lab.site("before", nat="port-restricted"), lab.site("after", nat="port-restricted")
    machine, remote = home.machine(), public_sockets(lab)[0]
    mine = machine.socket()
    before = pass_on(mine, remote)
    home.disconnect(machine)
    with pytest.raises(OSError):
        mine.sendto(b"nowhere", remote.getsockname())
    mobile.connect(machine)
    after = pass_on(mine, remote)
    assert after[0] == mobile.public_address
    assert pass_on(remote, mine, after) and pass_on(remote, mine, before, seconds=0.1) is None


def test_a_cable_is_pulled_and_put_back(lab):
    site = lab.site("cabled", nat="port-restricted", ipv6=True)
    machine, remote = site.machine(), public_sockets(lab)[0]
    mine, neighbour = machine.socket(), site.machine()
    assert pass_on(mine, remote)
    site.set_carrier(machine, False)
    assert pass_on(mine, remote, seconds=0.1) is None
    site.set_carrier(machine, True)
    assert pass_on(mine, remote)
    assert pass_on(machine.socket(address=machine.ipv6), neighbour.socket(address=neighbour.ipv6))


@pytest.mark.parametrize("delay_ms", (0, 10))
def test_ipv6_goes_out_and_only_what_answers_comes_in(lab, delay_ms):
    near, far = (lab.site(f"ipv6-{side}-{delay_ms}", nat=nat, delay_ms=delay_ms, ipv6=True) for side, nat in (("near", "symmetric"), ("far", "blocked")))
    mine, other = (machine.socket(address=machine.ipv6) for machine in (near.machine(), far.machine()))
    assert pass_on(mine, other, seconds=0.2) is None
    assert pass_on(other, mine)[:2] == other.getsockname()[:2]
    assert pass_on(mine, other)
    far.router.forget()
    assert pass_on(mine, other, seconds=0.2) is None


def test_neighbours_reach_each_other_over_ipv6(lab):
    site = lab.site("neighbours", nat="blocked", ipv6=True)
    mine, other = (machine.socket(address=machine.ipv6) for machine in (site.machine(), site.machine()))
    assert pass_on(mine, other) and pass_on(other, mine)


def test_who_was_not_given_ipv6_has_none(machines):
    assert machines["none"].ipv6 is None
    assert "inet6" not in machines["none"].run(["ip", "addr", "show", "eth0"]).stdout


def test_a_process_has_its_own_pid_and_ends_with_the_lab():
    with natlab.Lab() as lab:
        machine = lab.site("a").machine()
        process = machine.popen([sys.executable, "-c", "import os; print(os.getpid(), flush=True); input()"],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert int(process.stdout.readline()) == process.pid
        assert machine.address in machine.run(["ip", "addr"]).stdout
        with pytest.raises(subprocess.TimeoutExpired):
            machine.run(["sleep", "100"], timeout=0.1)
    assert process.returncode == -signal.SIGKILL


def test_two_labs_at_once_and_how_long_one_takes():
    start = time.monotonic()
    with natlab.Lab() as one:
        for kind in ("port-restricted", "symmetric"):
            one.site(kind, nat=kind).machine()
        took = time.monotonic() - start
        print(f"a lab with two sites took {took:.2f} s")
        with natlab.Lab() as two:
            machine = two.site("symmetric", nat="symmetric").machine()
            assert pass_on(machine.socket(), public_sockets(two)[0])
        assert one.server.run(["true"]).returncode == 0
    assert took < 3


OWNER = """
import sys, natlab
lab = natlab.Lab()
process = lab.site("a", nat="full-cone", delay_ms=5).machine().popen(["sh", "-c", "sleep 1000 & wait"])
print(lab._guard.pid, process.pid, lab.server.netns, flush=True)
input()
"""


@pytest.mark.parametrize("guard_too", (False, True))
def test_nothing_is_left_of_a_killed_lab(guard_too):
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=os.path.dirname(os.path.abspath(natlab.__file__)))
    guard, process, server = owner.stdout.readline().split()
    prefix = server.removesuffix("server")
    assert len([name for name in os.listdir("/run/netns") if name.startswith(prefix)]) == 4
    if guard_too:
        os.kill(int(guard), signal.SIGKILL)
    owner.kill()
    owner.wait()
    if guard_too:
        subprocess.run([sys.executable, natlab.__file__, "clean"], check=True)
    assert wait_until(lambda: not any(name.startswith(prefix) for name in os.listdir("/run/netns")))
    assert wait_until(lambda: not os.path.exists(f"/proc/{process}"))


def test_check_says_one_line():
    result = subprocess.run([sys.executable, natlab.__file__, "check"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "the lab can run here\n")
