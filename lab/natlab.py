#!/usr/bin/env python3
"""A laboratory of real Linux NATs in network namespaces.

    with Lab() as lab:
        host = lab.site("host", nat="port-restricted").machine()
        guest = lab.site("guest", nat="symmetric", loss=5, delay_ms=20).machine()
        lab.server.popen(["python3", "server.py"])
        print(host.run(["python3", "client.py", lab.server.address]).stdout)

The network is a star.  In the middle stands the `core` router, the public Internet of the lab.  Attached to it are
one server with two public addresses and any number of sites.  A site is a router and the machines in its LAN, each of
which may be in other LANs as well, and may move:

    server ---- core ---- (uplink: loss, delay) ---- router ---- LAN switch ---- machine, machine ...

Kinds of routers, in the terms of RFC 4787 (EIM: endpoint-independent mapping; APDM: address and port-dependent
mapping; EIF, ADF, APDF: endpoint-independent, address-dependent, address and port-dependent filtering):

    none             no NAT and no firewall: each machine has a public address of its own
    full-cone        EIM + EIF
    restricted       EIM + ADF
    port-restricted  EIM + APDF
    symmetric        APDM + APDF, a random port for every destination
    blocked          all UDP dropped; TCP works, translated

and five more kinds of symmetric ones, by how they allocate ports (ALLOCATIONS):

    sequential       each destination gets the next port
    step             each gets the port eight above the one before
    block            a random port of a block of 128
    big-block        a random port of a block of 512
    first-twice      the next port, but the first one twice, as a block may do by chance

The translation is done by Linux connection tracking.  Conntrack by itself only tends to keep a mapping
endpoint-independent, so the EIM kinds keep their mappings in nftables maps, from which conntrack takes its port: each
new internal endpoint gets a new external port, never its own one (no port preservation), and keeps it for every
destination.  Every datagram forwarded either way refreshes the mapping.

A site may have IPv6 beside, whatever its kind: a /64, behind a firewall that lets in only what answers something from
inside (RFC 6092).  A machine of it may have IPv6 alone, and a NAT64.

What the lab does not have: a server with IPv6, port preservation, and hairpinning in the symmetric kind.
Public addresses are of the documentation ranges 203.0.113.0/24 (server), 198.51.100.0/24 and 2001:db8::/32 (sites),
which Python's `ipaddress` reports as private.

Nothing is visible outside the lab's own namespaces.  Their names are natlab-PID-START-NUMBER-..., with the process
id and start time of the owner.  A guard process removes them, and kills all that runs in them, as soon as the owner
is gone, however it ended; every new lab and `natlab.py clean` remove what a killed guard has left.

Needs: Linux, root, the commands ip, nft and conntrack, and /dev/net/tun for delay_ms; tayga for a NAT64,
miniupnpd for a router that maps ports.

Command line:  natlab.py check   says in one line whether a lab can run here (exit status 0) or why not (1)
               natlab.py clean   removes the namespaces of dead owners
"""
import collections
import concurrent.futures
import contextlib
import ctypes
import fcntl
import ipaddress
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

KINDS = ("none", "full-cone", "restricted", "port-restricted", "symmetric", "blocked")
ALLOCATIONS = ("sequential", "step", "block", "big-block", "first-twice")  # kinds too: symmetric, but not at random
STEP, BLOCKS = 8, {"block": 128, "big-block": 512}
FIRST_PORT = 40000  # of what a router with an allocation gives out
UDP_TIMEOUT = 120  # seconds; the least that RFC 4787 (REQ-5) allows

_RUN_NETNS = "/run/netns"
_CORE_ADDRESS = "169.254.0.1"  # the core's end of every link, and so everybody's default gateway towards it
_PLAIN_GATEWAY = "169.254.0.2"  # the LAN end of a router of the kind "none", whose LAN has no subnet of its own
# Counts every datagram that arrives at a machine, whether or not a socket waits for it.
_ARRIVALS = """table ip arrivals {
  set seen { type ipv4_addr . inet_service; flags dynamic; size 65535; counter; }
  chain arriving { type filter hook prerouting priority raw;
    meta l4proto udp update @seen { ip saddr . udp dport }
  }
}"""
# RFC 6092: what answers something from inside comes in, and all goes out.
_FIREWALL = """table ip6 firewall {
  chain forwarding { type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
}"""
_MASQUERADE = 'iifname "lan" masquerade random,fully-random'
# What miniupnpd fills with rules, under its own names.
_MINIUPNPD_CHAINS = """table inet filter {
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
  chain forward { type filter hook forward priority 0; jump miniupnpd; }
  chain prerouting { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
  chain postrouting { type nat hook postrouting priority srcnat; jump postrouting_miniupnpd; }
}"""
_NAT64, _NAT64_POOL = "2001:db8:64::/96", "192.168.255.0/24"
_TAYGA = f"tun-device nat64\nipv4-addr 192.168.255.1\nprefix {_NAT64}\ndynamic-pool {_NAT64_POOL}\n"
_lab_numbers = itertools.count(1)


class LabError(Exception):
    """The lab could not be built or changed; the text is what the failed command said."""


class Machine:
    """A network namespace in which commands run and sockets are opened.

    address: its IPv4 address, as text (private behind a NAT); addresses: all of them; ipv6: its IPv6 address, or None;
    public_address: the address under which others see it.  All are those of the network through which its way to the
    world leads.  netns: the name of its namespace; names: addresses by name, which its commands have as /etc/hosts.
    """

    def __init__(self, lab, name):
        self._lab = lab
        self.name = name
        self.netns = lab._namespace(name)
        self.interface_count = 0  # so far: eth0, eth1 ...
        self.names = {}
        lab._sh(self.netns, f"nft -f - <<'END'\n{_ARRIVALS}\nEND")

    def _is_at(self, addresses, public_address, ipv6=None):
        self.addresses, self.public_address, self.ipv6 = tuple(addresses), public_address, ipv6
        self.address = self.addresses[0]

    def _connect(self, interface, addresses, prefix_length, gateway):
        """Configures an interface, which exists, with IPv4 addresses and the default gateway (an address, or None)."""
        added = "".join(f"ip addr add {address}/{prefix_length} dev {interface}\n" for address in addresses)
        default = f"ip route replace default via {gateway} dev {interface} onlink" if gateway else ""
        self._lab._sh(self.netns, f"{added}ip link set {interface} up\n{default}")
        self.interface_count += 1

    def popen(self, command, **kw):
        """Starts the command (a list) here and returns its subprocess.Popen; its pid is the command's own.

        Keyword arguments are Popen's.  The end of the lab kills the process and all its descendants in the lab.
        """
        process = subprocess.Popen(self._here(command), **kw)
        self._lab._children.append(process)
        return process

    def run(self, command, timeout=60, **kw):
        """Runs the command (a list) here and returns a subprocess.CompletedProcess with its output as text.

        Raises subprocess.TimeoutExpired after `timeout` seconds, the command being killed.
        """
        kw = {"capture_output": True, "text": True, **kw}
        return subprocess.run(self._here(command), timeout=timeout, **kw)

    def _here(self, command):
        """Returns the command that runs a command in this namespace, with the machine's names if it has any."""
        lines = "".join(f"{address} {name}\\n" for name, address in self.names.items())
        # `ip netns exec` gives a command a mount namespace of its own.
        mounts = f"mount -t tmpfs names /mnt; printf '{lines}' > /mnt/hosts; mount --bind /mnt/hosts /etc/hosts"
        named = ["sh", "-ec", f'{mounts}; exec "$@"', "sh"] if self.names else []
        return ["ip", "netns", "exec", self.netns, *named, *map(str, command)]

    def socket(self, kind=socket.SOCK_DGRAM, port=0, address="0.0.0.0"):
        """Returns a socket of the calling process which is bound to the address and port in this namespace."""
        opened = _socket(self.netns, socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        opened.bind((address, port))
        return opened

    def count_udp(self, port=None, source=None):
        """Returns how many datagrams have reached this machine since it was made.

        port: count those to this port of the machine only; source: those from this IP address only.
        """
        found = self._lab._sh(self.netns, "nft -jn list set ip arrivals seen")
        total = 0
        for part in json.loads(found)["nftables"]:
            for element in part.get("set", {}).get("elem", ()):
                address, number = element["elem"]["val"]["concat"]
                if port in (None, number) and source in (None, address):
                    total += element["elem"]["counter"]["packets"]
        return total


class Server(Machine):
    """The machine on the public network; address2 is its second public address."""

    @property
    def address2(self):
        return self.addresses[1]


class Router:
    """The router of a site.  netns: the name of its namespace; udp_timeout: of its UDP mappings, in seconds."""

    def __init__(self, lab, name, nat, public_address, udp_timeout, hairpin):
        self._lab = lab
        self.nat = nat
        self.public_address = public_address
        self.udp_timeout = udp_timeout
        self._hairpin = hairpin
        self._maps_ports = False
        self.netns = lab._namespace(name)

    def forget(self, same_ports=False):
        """Restarts the router: every mapping, filter state and TCP translation is lost, and counters are zero again.

        Whatever arrives during the few milliseconds that this takes is dropped.  All kinds of NAT give new external
        ports afterwards, unless same_ports (EIM kinds only): then a machine gets the one that it had before.
        """
        anew = "flush set ip router contacted" if same_ports else self._rules()
        # Without the pause, a datagram of an old flow could put its old mapping back between the two flushes.
        self._lab._sh(self.netns, f"""
nft -f - <<'END'
table inet pause {{
  chain everything {{ type filter hook prerouting priority raw; policy drop; }}
}}
END
conntrack -F 2>&1
nft -f - <<'END'
{anew}
delete table inet pause
END
""")

    def map_ports(self, *protocols):
        """Lets the machines of the LAN ask this router for public ports: starts a miniupnpd, and returns its Popen.

        protocols: "pcp" (with NAT-PMP), "upnp" (Internet Gateway Device version 2), "upnp1" (version 1).
        miniupnpd refuses to work on a public address of a documentation range: see Lab.site().
        """
        self._maps_ports = True
        self._lab._sh(self.netns, f"nft -f - <<'END'\n{self._rules()}\n{_MINIUPNPD_CHAINS}\nEND")
        answers = {True: "yes", False: "no"}
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(f"""ext_ifname=wan
listening_ip=lan
ipv6_disable=yes
secure_mode=yes
enable_natpmp={answers["pcp" in protocols]}
enable_upnp={answers["upnp" in protocols or "upnp1" in protocols]}
force_igd_desc_v1={answers["upnp1" in protocols]}
uuid=3f0a1c52-7d0e-4b38-9a55-2f1e6f0f7a11
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
""")
            file.flush()
            command = ["ip", "netns", "exec", self.netns, "miniupnpd", "-d", "-f", file.name, "-P", "/dev/null"]
            daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self._lab._children.append(daemon)
            said = ""
            while "isten" not in said:      # "HTTP listening" or "Listening for NAT-PMP"
                line = daemon.stdout.readline()
                said += line
                if not line or "Port forwarding is impossible" in line:
                    raise LabError(f"miniupnpd cannot work here: {said}")
        threading.Thread(target=daemon.stdout.read, daemon=True).start()
        return daemon

    def mapped_ports(self):
        """Returns the public UDP ports that miniupnpd forwards now."""
        rules = self._lab._sh(self.netns, "nft list chain inet filter prerouting_miniupnpd")
        return sorted(map(int, re.findall(r"dport (\d+) .*dnat", rules)))

    def counters(self):
        """Returns a dict of numbers of UDP datagrams: "out": forwarded from the LAN, "in": forwarded to the LAN,
        "refused": arrived from outside without a mapping or against the filter, or dropped by the kind "blocked".
        """
        found = json.loads(self._lab._sh(self.netns, "nft -j list counters table ip router"))["nftables"]
        return {part["counter"]["name"][4:]: part["counter"]["packets"] for part in found if "counter" in part}

    def _pin(self):
        """Lets one CPU receive for all interfaces of this router.

        When the two datagrams that open one flow from both sides cross inside a router on two CPUs, conntrack makes
        two entries which clash, and loses a datagram or changes a source port.
        """
        self._lab._sh(self.netns, "for cpus in /sys/class/net/*/queues/rx-0/rps_cpus; do echo 1 > $cpus; done")

    def _rules(self):
        """Returns the nftables script which makes this router one of its kind, in place of what was there."""
        blocked = "meta l4proto udp counter name udp_refused drop" if self.nat == "blocked" else ""
        if self.nat == "none":
            translation = ""
        elif self.nat in ("symmetric", "blocked", *ALLOCATIONS):
            translation = f"chain translating {{ type nat hook postrouting priority srcnat; {self._allocation()} {_MASQUERADE}; }}"
        else:
            translation = self._endpoint_independent()
        # The input chain drops without an answer.  If it accepted an unsolicited datagram, conntrack would keep an
        # entry for it, and when the machine inside then sends to the same peer, the two entries would clash.
        return f"""table ip router {{ }}
delete table ip router
table ip router {{
  counter udp_out {{ }}
  counter udp_in {{ }}
  counter udp_refused {{ }}
  chain forwarding {{ type filter hook forward priority filter;
    {blocked}
    iifname "lan" meta l4proto udp counter name udp_out
    iifname "wan" meta l4proto udp counter name udp_in
  }}
  chain to_router {{ type filter hook input priority filter; policy drop;
    iifname "wan" meta l4proto udp counter name udp_refused
    iifname "lan" meta l4proto != udp accept
    {'iifname "lan" udp dport { 1900, 5351 } accept' if self._maps_ports else ''}
  }}
  {translation}
}}"""

    def _allocation(self):
        """Returns the rule by which each new UDP flow gets its port, where that is not any at random."""
        if self.nat in BLOCKS:
            ports = f"{FIRST_PORT}-{FIRST_PORT + BLOCKS[self.nat] - 1} random,fully-random"
        elif self.nat in ("sequential", "step", "first-twice"):
            step = STEP if self.nat == "step" else 1
            offsets = [0, *range(2047)] if self.nat == "first-twice" else range(2048)
            ports = f"numgen inc mod 2048 map {{ {', '.join(f'{i}: {FIRST_PORT + step * offset}' for i, offset in enumerate(offsets))} }}"
        else:
            return ""
        return f'iifname "lan" meta l4proto udp snat ip to {self.public_address} : {ports};'

    def _endpoint_independent(self):
        """Returns the maps and chains of an EIM kind.

        out_port gives the external port of an internal endpoint, in_host the reverse, and contacted says to which
        addresses an external port has sent.  An endpoint's first datagram takes the random port that masquerading
        chooses, and the maps learn it.  An unsolicited datagram which passes the filter is let in by DNAT.
        APDF needs no rule: conntrack lets in what answers one of its entries, and nothing else.
        """
        let_in = {
            "full-cone": 'iifname "wan" dnat ip to udp dport map @in_host',
            "restricted": 'iifname "wan" udp dport . ip saddr @contacted dnat ip to udp dport map @in_host',
            "port-restricted": "",
        }[self.nat]
        if self._hairpin:
            let_in += f'\n    iifname "lan" ip daddr {self.public_address} dnat ip to udp dport map @in_host'
        # What conntrack calls original is outbound in a flow opened from inside, inbound in one opened from outside.
        ways = ("original", "reply")
        refresh_outbound = "\n    ".join(
            f'iifname "lan" meta l4proto udp ct direction {way} update @contacted {{ udp sport . ip daddr }} '
            f"update @out_port {{ ct {way} ip saddr . ct {way} proto-src : udp sport }} "
            f"update @in_host {{ udp sport : ct {way} ip saddr . ct {way} proto-src }}" for way in ways)
        refresh_inbound = "\n    ".join(
            f'iifname "wan" meta l4proto udp ct direction {way} update @contacted {{ ct {way} proto-dst . ip saddr }} '
            f"update @out_port {{ ip daddr . udp dport : ct {way} proto-dst }} "
            f"update @in_host {{ ct {way} proto-dst : ip daddr . udp dport }}" for way in ways)
        keep = f"flags dynamic,timeout; timeout {self.udp_timeout}s; size 65535;"
        return f"""map out_port {{ type ipv4_addr . inet_service : inet_service; {keep} }}
  map in_host {{ type inet_service : ipv4_addr . inet_service; {keep} }}
  set contacted {{ type inet_service . ipv4_addr; {keep} }}
  chain letting_in {{ type nat hook prerouting priority dstnat;
    {let_in}
  }}
  chain refreshing_inbound {{ type filter hook forward priority filter + 1;
    {refresh_inbound}
  }}
  chain translating {{ type nat hook postrouting priority srcnat;
    iifname "lan" meta l4proto udp snat ip to {self.public_address} : ip saddr . udp sport map @out_port
    {_MASQUERADE}
  }}
  chain refreshing_outbound {{ type filter hook postrouting priority srcnat + 10;
    {refresh_outbound}
  }}"""


class Site:
    """A router and the machines in its LAN.

    router: its Router; public_address: the router's, as text, or that of the first machine in the kind "none";
    ipv6: its /64, an IPv6Network, or None.
    """

    def __init__(self, lab, name, nat, loss, delay_ms, udp_timeout, hairpin, lan, public_address, ipv6):
        self._lab = lab
        self.name = name
        self.public_address = public_address or next(lab._public_addresses)
        self._unused_public_address = self.public_address
        self._lan = ipaddress.ip_network(lan)
        self._hosts = itertools.islice(self._lan.hosts(), 9, None)
        self._numbers = itertools.count(1)
        self._ports = {}  # of the LAN's switch, by machine
        self.ipv6 = next(lab._ipv6_networks) if ipv6 else None
        self._core_end = next(lab._uplink_names)
        self.router = Router(lab, name + "-router", nat, self.public_address, udp_timeout, hairpin)
        lab._link(self._core_end, self.router.netns, "wan", delay_ms)
        if nat == "none":
            addresses = f"ip addr add {_PLAIN_GATEWAY}/32 dev lan"
        else:
            self._gateway = str(next(self._lan.hosts()))
            addresses = (f"ip addr add {self.public_address}/32 dev wan\n"
                         f"ip addr add {self._gateway}/{self._lan.prefixlen} dev lan")
            lab._route(self.public_address, f"dev {self._core_end}")
        # A bridge otherwise takes the lowest address of its ports and so may change it when a machine is added.
        lab._sh(self.router.netns, f"""
ip link add lan address 02:00:00:00:00:01 type bridge
{addresses}
ip link set lan up
ip link set wan up
ip route add default via {_CORE_ADDRESS} dev wan onlink
nft -f - <<'END'
{self.router._rules()}
END
for kind in udp_timeout udp_timeout_stream; do
  echo {udp_timeout} > /proc/sys/net/netfilter/nf_conntrack_$kind
done
""")
        if ipv6:
            self._connect_ipv6()
        self.set_loss(loss)

    def _connect_ipv6(self):
        """Leads the /64 to the LAN, through a firewall in the router."""
        self._lab._sh(self._lab._core, f"""
{_ipv6_on(self._core_end)}
ip addr add fe80::1/64 dev {self._core_end} nodad
ip route add {self.ipv6} via fe80::2 dev {self._core_end} onlink
""")
        self._lab._sh(self.router.netns, f"""
{_ipv6_on("wan")}
{_ipv6_on("lan")}
ip addr add fe80::2/64 dev wan nodad
ip addr add {self.ipv6[1]}/64 dev lan nodad
ip route add default via fe80::1 dev wan onlink
nft -f - <<'END'
{_FIREWALL}
END
""")

    def machine(self, name=None):
        """Adds a machine to the LAN and returns it.  All machines of a site see each other directly."""
        machine = Machine(self._lab, name or f"{self.name}-{len(self._ports) + 1}")
        self.connect(machine)
        return machine

    def connect(self, machine, default=True):
        """Plugs a machine into this LAN too; default: whether its way to the world leads through here from now on.

        Returns its IPv4 address here.
        """
        number = next(self._numbers)
        self._ports[machine], interface = f"m{number}", f"eth{machine.interface_count}"
        if self.router.nat == "none":
            address = public_address = self._unused_public_address or next(self._lab._public_addresses)
            self._unused_public_address = None
            gateway, prefix_length = _PLAIN_GATEWAY, 32
        else:
            address, public_address = str(next(self._hosts)), self.public_address
            gateway, prefix_length = self._gateway, self._lan.prefixlen
        self._lab._sh(self.router.netns, f"ip link add m{number} type veth peer name {interface} netns {machine.netns}\n"
                                         f"ip link set m{number} master lan up")
        if self.router.nat == "none":
            self._lab._sh(self.router.netns, f"ip route add {address}/32 dev lan")
            self._lab._route(address, f"via {_PLAIN_GATEWAY} dev {self._core_end} onlink")
        self.router._pin()
        machine._connect(interface, [address], prefix_length, gateway if default else None)
        ipv6 = str(self.ipv6[9 + number]) if self.ipv6 else None
        if ipv6:
            route = f"ip route replace default via {self.ipv6[1]} dev {interface}" if default else ""
            self._lab._sh(machine.netns, f"{_ipv6_on(interface)}\nip addr add {ipv6}/64 dev {interface} nodad\n{route}")
        if default:
            machine._is_at([address], public_address, ipv6)
        return address

    def take_ipv4(self, machine):
        """Leaves a machine IPv6 alone, and a NAT64 (RFC 6146) to reach IPv4: a box of this LAN with tayga, whose own addresses the router translates.

        The machine knows ipv4only.arpa (RFC 7050) and "server" by name, as a DNS64 would tell them.
        """
        box = self.machine(f"{machine.name}-nat64")
        self._lab._sh(box.netns, f"tayga --mktun -c /dev/stdin <<'END'\n{_TAYGA}END\nip link set nat64 up\n"
                                 f"{_ipv6_on('nat64')}\nip route add {_NAT64_POOL} dev nat64\nip route add {_NAT64} dev nat64")
        daemon = box.popen(["tayga", "-n", "-c", "/dev/stdin"], stdin=subprocess.PIPE, text=True)
        with daemon.stdin:
            daemon.stdin.write(_TAYGA)
        self._lab._sh(box.netns, "timeout 5 sh -c 'until grep -q 1 /sys/class/net/nat64/carrier; do sleep 0.01; done'")
        self._lab._sh(self.router.netns, f"ip route add {_NAT64_POOL} via {box.address}")
        self._lab._sh(machine.netns, f"ip -4 addr flush dev eth0\nip route add {_NAT64} via {box.ipv6} dev eth0")
        machine.names = {name: str(ipaddress.ip_network(_NAT64)[int(ipaddress.IPv4Address(address))])
                         for name, address in (("ipv4only.arpa", "192.0.0.170"), ("server", self._lab.server.address))}

    def disconnect(self, machine):
        """Unplugs a machine for good: it loses what it had here, address and routes."""
        self._lab._sh(self.router.netns, f"ip link del {self._ports.pop(machine)}")

    def set_carrier(self, machine, present):
        """Pulls the cable between a machine and the switch, or puts it back.  The machine keeps its address and routes."""
        self._lab._sh(self.router.netns, f"ip link set {self._ports[machine]} {'up' if present else 'down'}")

    def renumber(self):
        """Gives the router another public address (not in the kind "none"), and has it forget all, as after a new dial-in."""
        before, self.public_address = self.public_address, next(self._lab._public_addresses)
        self.router.public_address = self.public_address
        for machine in self._ports:
            machine.public_address = self.public_address
        self._lab._sh(self.router.netns, f"ip addr del {before}/32 dev wan\nip addr add {self.public_address}/32 dev wan")
        self._lab._sh(self._lab._core, f"ip route del {before}/32")
        self._lab._route(self.public_address, f"dev {self._core_end}")
        self._lab._sh(self.router.netns, f"ip route replace default via {_CORE_ADDRESS} dev wan onlink")
        self.router.forget()

    def set_loss(self, percent):
        """Lets the uplink lose this percentage of all packets, in each direction, from now on."""
        # The loss is on the core's side of the uplink: a lost outbound datagram has opened its mapping all the same.
        some = f"numgen random mod 10000 < {round(percent * 100)} drop"
        lose = {0: "continue", 100: "drop"}.get(percent, some)
        self._lab._sh(self._lab._core, f"""nft -f - <<'END'
add table inet loss
add chain inet loss {self._core_end} {{ type filter hook forward priority filter; }}
flush chain inet loss {self._core_end}
add rule inet loss {self._core_end} iifname "{self._core_end}" {lose}
add rule inet loss {self._core_end} oifname "{self._core_end}" {lose}
END""")


class Lab:
    """A public network with a server, and the sites added to it.  Use it in a `with` statement, or call close()."""

    def __init__(self):
        clean()
        self._prefix = f"natlab-{os.getpid()}-{_start_time(os.getpid())}-{next(_lab_numbers)}-"
        self._children = []
        self._uplink_names = (f"uplink{number}" for number in itertools.count())
        self._public_addresses = map(str, ipaddress.ip_network("198.51.100.0/24").hosts())
        self._ipv6_networks = ipaddress.ip_network("2001:db8::/48").subnets(new_prefix=64)
        self._lans = map(str, ipaddress.ip_network("192.168.0.0/16").subnets(new_prefix=24))
        # The guard's standard input ends with this process, even when that is killed.
        self._guard = subprocess.Popen([sys.executable, "-I", "-S", os.path.abspath(__file__), "guard", self._prefix],
                                       stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._core = self._namespace("core")
            self.server = Server(self, "server")
            self.server._is_at(["203.0.113.10", "203.0.113.20"], "203.0.113.10")
            core_end = next(self._uplink_names)
            self._link(core_end, self.server.netns, "eth0", 0)
            self.server._connect("eth0", self.server.addresses, 32, _CORE_ADDRESS)
            for address in self.server.addresses:
                self._route(address, f"dev {core_end}")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Kills everything that runs in the lab and removes the lab."""
        _remove(lambda owner, start, netns: netns.startswith(self._prefix))
        self._guard.stdin.close()
        self._guard.wait()
        for child in self._children:
            child.wait()

    def site(self, name, nat="none", loss=0, delay_ms=0, udp_timeout=None, hairpin=False, lan=None, public_address=None,
             ipv6=False):
        """Adds a site and returns it.

        name: unique in the lab; nat: one of KINDS or ALLOCATIONS; loss: percentage of the packets lost on the uplink, in each
        direction; delay_ms: milliseconds that the uplink takes, in each direction; udp_timeout: whole seconds after
        which the router forgets an unused UDP mapping (None: UDP_TIMEOUT); hairpin: whether a machine reaches its
        neighbour by the neighbour's external address and port (EIM kinds only; such datagrams are not filtered);
        lan: the private network, such as "192.168.1.0/24" (several sites may have the same), by default one of its
         own; public_address: the router's, by default one of 198.51.100.0/24; ipv6: whether it has a /64 too, behind a
         firewall.
        """
        if nat not in KINDS + ALLOCATIONS:
            raise ValueError(f"unknown kind of NAT: {nat}")
        if hairpin and nat not in ("full-cone", "restricted", "port-restricted"):
            raise ValueError(f"no hairpinning in the kind {nat}")
        return Site(self, name, nat, loss, delay_ms, udp_timeout or UDP_TIMEOUT, hairpin, lan or next(self._lans), public_address, ipv6)

    def sniffer(self):
        """Returns a packet socket on the core, which gets whatever crosses the public network, beginning with the IP header.

        It gets packets twice: on their way in, and on their way out, when the packet type in their address is PACKET_OUTGOING.
        """
        return _socket(self._core, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL

    def _namespace(self, name):
        """Makes a namespace and returns its full name."""
        netns = self._prefix + name
        _command(["ip", "netns", "add", netns])
        # Where the kernel has br_netfilter, it would otherwise lead a LAN's inner traffic through the router's NAT.
        self._sh(netns, """
ip link set lo up
cd /proc/sys/net
echo 1 > ipv4/ip_forward
echo 1 > ipv6/conf/all/forwarding
echo 0 > ipv6/conf/default/accept_dad
for redirects in ipv4/conf/*/send_redirects; do echo 0 > $redirects; done
echo 1 > ipv6/conf/default/disable_ipv6
for calls in bridge/bridge-nf-call-ip*tables; do if [ -e $calls ]; then echo 0 > $calls; fi; done
""")
        return netns

    def _sh(self, netns, script):
        """Runs a shell script in a namespace up to the first command that fails; returns its output."""
        return _command(["ip", "netns", "exec", netns, "sh", "-e"], script)

    def _link(self, core_end, netns, name, delay_ms):
        """Connects the core to the namespace: one interface there, of the given name, and one, core_end, here."""
        if delay_ms:
            relay = subprocess.Popen([sys.executable, "-I", "-S", os.path.abspath(__file__), "relay", str(delay_ms),
                                      self._core, core_end, netns, name], stdout=subprocess.PIPE)
            self._children.append(relay)
            with relay.stdout:
                if not relay.stdout.readline():
                    raise LabError("the relay which delays an uplink did not start")
        else:
            self._sh(self._core, f"ip link add {core_end} type veth peer name {name} netns {netns}")
        self._sh(self._core, f"ip addr add {_CORE_ADDRESS}/32 dev {core_end}\nip link set {core_end} up")

    def _route(self, address, way):
        self._sh(self._core, f"ip route add {address}/32 {way}")


def check():
    """Returns None if a lab can run here, or else a line that says why not."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are a feature of Linux"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    for command in ("ip", "nft", "conntrack"):
        if not shutil.which(command):
            return f"the command {command} is not installed"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun, which uplinks with a delay need"
    try:
        with Lab() as lab:
            lab.site("trial", nat="restricted", delay_ms=1, loss=1).machine()
    except (LabError, OSError) as error:
        return " ".join(str(error).split())
    return None


def clean():
    """Kills what runs in labs whose owner is dead, and removes their namespaces; returns the namespaces' names."""
    return _remove(lambda owner, start, netns: _start_time(owner) != start)


def _remove(wanted):
    """Does what clean() says, to the namespaces for which wanted(owner's pid, owner's start time, name) is true."""
    names = []
    for name in os.listdir(_RUN_NETNS) if os.path.isdir(_RUN_NETNS) else ():
        parts = re.match(r"natlab-(\d+)-(\d+)-\d+-", name)
        if parts and wanted(int(parts[1]), int(parts[2]), name):
            names.append(name)
    namespaces = {_identity(f"{_RUN_NETNS}/{name}") for name in names} - {None}
    deadline = time.monotonic() + 5
    while namespaces and time.monotonic() < deadline:
        pids = [int(pid) for pid in os.listdir("/proc")
                if pid.isdigit() and _identity(f"/proc/{pid}/ns/net") in namespaces]
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    for name in names:
        # Two cleaners at once may both try; the one that finds nothing left is content too.
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
    return names


def _identity(path):
    """Returns what two files of one namespace have in common, or None if there is no such file (any more)."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _start_time(pid):
    """Returns when the process started, in clock ticks since the boot, or None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _command(command, script=""):
    """Runs a command with the script as its input; returns its output or raises LabError."""
    result = subprocess.run(command, input=script, capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def _ipv6_on(interface):
    """Returns the command which switches IPv6 on for an interface."""
    return f"echo 0 > /proc/sys/net/ipv6/conf/{interface}/disable_ipv6"


def _enter(netns):
    """Moves the calling thread into the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"{_RUN_NETNS}/{netns}") as file:
        if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")


def _socket(netns, *kind):
    """Returns a socket of the calling process in the namespace."""
    def open_socket():
        _enter(netns)
        return socket.socket(*kind)
    # A namespace is entered by a thread, so by one which is of no use for anything else afterwards.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(open_socket).result()


def _guard(prefix):
    """Waits for the end of standard input, that is, of the owner, and removes the owner's lab."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    _remove(lambda owner, start, netns: netns.startswith(prefix))


def _relay(delay_ms, *ends):
    """Makes a tunnel interface at both ends, (namespace, name) each, and passes packets on after the delay.

    So the kernel need not have netem.  A tunnel has no ARP, which on an Ethernet would be delayed too.
    """
    tunnels = []
    for netns, name in zip(ends[::2], ends[1::2]):
        _enter(netns)
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tunnel, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF; IFF_TUN, IFF_NO_PI
        tunnels.append(tunnel)
    other_end = dict(zip(tunnels, reversed(tunnels)))
    os.nice(-20)
    print("ready", flush=True)
    delay = float(delay_ms) / 1000
    waiting = collections.deque()  # (when to pass it on, to which tunnel, packet)
    while True:
        pause = max(0, waiting[0][0] - time.monotonic()) if waiting else None
        for tunnel in select.select(tunnels, [], [], pause)[0]:
            with contextlib.suppress(OSError):  # the interface is down
                waiting.append((time.monotonic() + delay, other_end[tunnel], os.read(tunnel, 65536)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, tunnel, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # the interface is down: the packet is lost
                os.write(tunnel, packet)


def main(arguments):
    """Runs the command line; returns the exit status."""
    if arguments[:1] == ["guard"]:
        _guard(*arguments[1:])
    elif arguments[:1] == ["relay"]:
        _relay(*arguments[1:])
    elif arguments == ["clean"]:
        names = clean()
        print(f"removed {len(names)} namespaces")
    elif arguments == ["check"]:
        reason = check()
        print(f"the lab cannot run here: {reason}" if reason else "the lab can run here")
        return 1 if reason else 0
    else:
        print("usage: natlab.py check | clean", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
