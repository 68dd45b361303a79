#!/usr/bin/env python3
"""A stock ICE agent that nobody here wrote: libnice, for test_p2pclient.py. It needs Debian's python3-gi and gir1.2-nice-0.1.

usage: nice_agent.py controlling|controlled UFRAG PASSWORD

It prints its addresses, [[ip, port], ...], hears those of its peer in the same form, sends "from stock" when it is connected, and prints what it
receives; each is a line of JSON. Ufrag and password are those of both sides.
"""
import ctypes
import json
import sys
import threading

import gi

gi.require_version("Nice", "0.1")
from gi.repository import GLib, Nice  # noqa: E402

context, loop = GLib.MainContext.default(), GLib.MainLoop()
agent = Nice.Agent.new(context, Nice.Compatibility.RFC5245)
agent.props.controlling_mode, agent.props.upnp, agent.props.ice_tcp = sys.argv[1] == "controlling", False, False
stream = agent.add_stream(1)
agent.set_local_credentials(stream, *sys.argv[2:4])


def say(value):
    print(json.dumps(value), flush=True)


def gathered(*_):
    found = agent.get_local_candidates(stream, 1)
    say([[each.addr.dup_string(), each.addr.get_port()] for each in found])


def hear():
    for line in sys.stdin:
        GLib.idle_add(learn, json.loads(line))


def learn(addresses):
    agent.set_remote_credentials(stream, *sys.argv[2:4])
    texts = [f"a=candidate:{i} 1 UDP {1000 - i} {ip} {port} typ host" for i, (ip, port) in enumerate(addresses)]
    candidates = [agent.parse_remote_candidate_sdp(stream, text) for text in texts]
    agent.set_remote_candidates(stream, 1, candidates)


def changed(agent, stream, component, state):
    if state == Nice.ComponentState.READY:
        agent.send(stream, 1, 10, "from stock")


agent.connect("candidate-gathering-done", gathered)
agent.connect("component-state-changed", changed)
RECEIVED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_char), ctypes.c_void_p)
callback = RECEIVED(lambda agent, stream, component, length, buffer, data: say(buffer[:length].decode()))
attach = ctypes.CDLL("libnice.so.10").nice_agent_attach_recv     # which has no binding
attach(ctypes.c_void_p(hash(agent)), stream, 1, None, callback, None)
agent.gather_candidates(stream)
threading.Thread(target=hear, daemon=True).start()
loop.run()
