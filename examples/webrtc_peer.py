#!/usr/bin/env python3
"""The other side of webrtc.html in Python, with aiortc: a host that sends back what its guests say, or a guest that says one line.

usage: webrtc_peer.py host|join NAME [--server URL]

Both print what they hear, a line each, until they are stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import sys

from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import p2pclient

WAIT = 25       # seconds that a poll or start may wait at the server


def open_peer(client, label):
    """A connection that is to be, with the data channel that both sides open under id 0."""
    host, port = client.stun_server
    peer = RTCPeerConnection(RTCConfiguration([RTCIceServer(f"stun:{host}:{port}")]))
    channel = peer.createDataChannel("game", negotiated=True, id=0)
    channel.on("open", lambda: print(f"connected with {label}", flush=True))
    channel.on("message", lambda line: print(line, flush=True))
    return peer, channel


async def describe(peer, description):
    """This side's offer or answer as {type, sdp}; aiortc has gathered all candidates by then."""
    await peer.setLocalDescription(description)
    return {"type": peer.localDescription.type, "sdp": peer.localDescription.sdp}


def find(kind, addresses):
    """The offer or answer among what the other side has published, if there is one."""
    found = [each for each in addresses if isinstance(each, dict) and each.get("type") == kind]
    return RTCSessionDescription(found[0]["sdp"], kind) if found else None


async def host(client, name, peer_id):
    await asyncio.to_thread(client.register_game, name, peer_id)
    after, replies, peers = None, {}, {}
    while True:
        news = await asyncio.to_thread(client.poll_game, name, peer_id, [], after, replies, WAIT)
        after, replies = news.cursor, {}
        for guest in news.guests:
            offer = find("offer", guest.addresses)
            if offer is None:
                continue
            if guest.session_id in peers:
                await peers.pop(guest.session_id).close()
            peer, channel = open_peer(client, "a guest")
            peers[guest.session_id] = peer
            channel.on("message", lambda line, channel=channel: channel.send(f"echo of {line}"))
            await peer.setRemoteDescription(offer)
            replies[guest.session_id] = [await describe(peer, await peer.createAnswer())]
        if not news.waited:
            await asyncio.sleep(news.poll_after)


async def join(client, name, peer_id):
    peer, channel = open_peer(client, "the host")
    channel.on("open", lambda: channel.send("hello from Python"))
    offer = await describe(peer, await peer.createOffer())
    while True:
        news = await asyncio.to_thread(client.start_game, name, peer_id, [offer], WAIT)
        answer = find("answer", news.addresses)
        if answer and peer.remoteDescription is None:
            await peer.setRemoteDescription(answer)
        await asyncio.sleep(news.poll_after)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["host", "join"])
    parser.add_argument("name")
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL")
    arguments = parser.parse_args()
    play = host if arguments.role == "host" else join
    try:
        asyncio.run(play(p2pclient.RendezvousClient(arguments.server), arguments.name, p2pclient.new_peer_id()))
    except KeyboardInterrupt:
        pass
    except p2pclient.RendezvousError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
