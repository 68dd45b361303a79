"""The tests of what is in this folder: webrtc.html in real browsers, with the real server, on this machine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import http.server
import re
import socket
import sys
import threading

import browsers
import pytest
import requests
from aiortc import RTCPeerConnection, RTCSessionDescription
from browsers import HERE, PAGE, ChromiumPage, run, run_chromium, run_firefox, run_server, wait_until
from playwright.sync_api import sync_playwright

from p2pclient import stun

NO_GOOD_BYE = "() => { window.fetch = () => new Promise(() => {}); }"      # what a page that crashes says on its way out
NO_WAY = 60     # seconds in which a browser notices that nothing gets through
# What has a page's connections use relays alone; and the kinds of the candidates of the first of them.
RELAYED_ALONE = """() => { const connections = window.connections = []; window.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(configuration) { super({ ...configuration, iceTransportPolicy: "relay" }); connections.push(this); } } }"""
KINDS_OF_CANDIDATES = """async () => [...(await connections[0].getStats()).values()]
    .filter(({ type }) => type === "local-candidate").map(({ candidateType }) => candidateType)"""
needs_coturn = pytest.mark.skipif(not browsers.TURNSERVER, reason="there is no turnserver (Debian's package coturn)")
needs_firefox = pytest.mark.skipif(not browsers.FIREFOX, reason="there is no firefox-esr")


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright, run_chromium(playwright) as browser:
        yield browser


@pytest.fixture
def server():
    """The URL of a server that has just been started."""
    with run_server() as url:
        yield url


@pytest.fixture
def context(chromium, server):
    """A window whose pages no other test has seen; it is closed before the server. No page that is open has an error that nobody catches."""
    context, errors = chromium.new_context(), []
    context.on("weberror", lambda error: errors.append(error.error.stack))
    yield context
    found = list(errors)
    context.close()
    assert not found


@pytest.fixture
def open_page(context, server):
    """Opens pages that know the server."""
    return functools.partial(ChromiumPage, context, server)


@pytest.fixture
def castle(open_page):
    """A page that hosts a game of this name."""
    host = open_page()
    host.host("castle")
    return host


def open_guest(open_page):
    """A page that is connected with the host of castle."""
    guest = open_page()
    guest.join("castle")
    guest.wait_for("connected with the host in .*")
    return guest


def call(server, method, path, **body):
    return requests.request(method, f"{server}{path}", json=body or None, timeout=browsers.WAIT).json()


def guests_of(server, name):
    return call(server, "GET", f"/games/{name}").get("guests")


def wait_for_rest(server):
    """Until a host's poll and a guest's start wait: none is under way that could overtake a good-bye."""
    wait_until(lambda: "\np2pserver_waiting 2\n" in requests.get(f"{server}/metrics", timeout=browsers.WAIT).text)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def run_web_server():
    """The URL of the page on a web server, which is another origin than that of the rendezvous server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=HERE)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}/webrtc.html"
        web.shutdown()
        thread.join()


# ---- the page as it is written --------------------------------------------------------------------------------------

def test_the_page_is_one_file_of_at_most_120_lines_that_loads_nothing():
    text = (HERE / "webrtc.html").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 150
    assert not re.search(r"\bsrc=|\bhref=|\bimport\b|https://", text)


# ---- two pages and more ---------------------------------------------------------------------------------------------

def meet_and_talk(host, guest):
    """Two pages of a game that one of them hosts."""
    guest.join("castle")
    guest.wait_for(r"connected with the host in \d+ ms")
    name = host.wait_for(r"connected with (guest \w+) in \d+ ms")[1]
    guest.say("hello <b>host</b>")
    host.wait_for(f"{name}: guest: hello <b>host</b>")
    host.say("hello guest")
    guest.wait_for("host: hello guest")


@pytest.mark.parametrize("origin", ["a file", "another origin"])
def test_two_pages_meet_and_talk(origin, context, server):
    with run_web_server() if origin == "another origin" else contextlib.nullcontext(PAGE) as address:
        host, guest = [ChromiumPage(context, server, address) for _ in range(2)]
        assert host.page.evaluate("origin") == (address.rpartition("/")[0] if address != PAGE else "null")
        host.host("castle")
        meet_and_talk(host, guest)
        host.close()
        guest.close()


def test_the_page_lists_the_games_that_are_on(castle, open_page):
    lobby, guest = open_page(), open_page()
    options = lobby.page.locator("#games option")
    wait_until(lambda: options.all_text_contents() == ["castle (0 guests)"])
    guest.join("castle")
    wait_until(lambda: options.all_text_contents() == ["castle (1 guests)"])
    castle.page.click("text=Leave")
    wait_until(lambda: options.all_text_contents() == [])


def test_four_guests_of_one_host_hear_each_other(castle, open_page, server):
    guests = [open_page() for _ in range(4)]
    for guest in guests:
        guest.join("castle")
    for guest in guests:
        guest.wait_for("connected with the host in .*")
    assert guests_of(server, "castle") == 4
    for number, guest in enumerate(guests):
        guest.say(f"I am number {number}")
    for number in range(4):
        for other in [castle, *guests[:number], *guests[number + 1:]]:
            other.wait_for(rf"guest \w+: guest: I am number {number}")


def test_the_page_asks_the_stun_of_the_rendezvous_server(castle, open_page, server):
    open_guest(open_page)
    metrics = requests.get(f"{server}/metrics", timeout=browsers.WAIT).text
    assert int(re.search(r'^p2pserver_stun_total{result="answer"} (\d+)$', metrics, re.MULTILINE)[1]) >= 2


def test_the_page_of_a_host_asks_the_relay_that_the_server_hands_it(context):
    """A TURN server's port that hears and says nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
        relay.bind(("127.0.0.1", 0))
        relay.settimeout(browsers.WAIT)
        with run_server("--turn-url", f"turn:127.0.0.1:{relay.getsockname()[1]}", "--turn-secret", "a secret") as server:
            open_page = functools.partial(ChromiumPage, context, server)
            open_page().host("castle")
            open_guest(open_page)
            assert stun.decode(relay.recv(2048)).kind == stun.REQUEST       # a browser asks a TURN server where it is seen, too


@needs_coturn
def test_a_page_that_may_use_nothing_but_a_relay_hosts_by_the_one_that_the_server_hands_it(context):
    with browsers.run_turn("a secret") as turn, run_server("--turn-url", turn, "--turn-secret", "a secret") as server:
        host, guest = [ChromiumPage(context, server) for _ in range(2)]
        host.page.evaluate(RELAYED_ALONE)
        host.host("castle")
        meet_and_talk(host, guest)
        assert host.page.evaluate(KINDS_OF_CANDIDATES) == ["relay"]
        host.close()
        guest.close()


# ---- leaving and coming back ----------------------------------------------------------------------------------------

def test_a_guest_whose_page_is_closed_leaves_at_once(castle, open_page, server):
    guest = open_page()
    guest.join("castle")
    name = castle.wait_for(r"connected with (guest \w+) in .*")[1]
    wait_for_rest(server)
    guest.close()
    castle.wait_for(f"{name} is gone")
    wait_until(lambda: guests_of(server, "castle") == 0)


@pytest.mark.parametrize("origin", ["a file", "another origin"])
def test_a_host_whose_page_is_closed_takes_its_game_along(origin, context, server):
    with run_web_server() if origin == "another origin" else contextlib.nullcontext(PAGE) as address:
        host, guest = [ChromiumPage(context, server, address) for _ in range(2)]
        host.host("castle")
        guest.join("castle")
        guest.wait_for("connected with the host in .*")
        host.close()
        wait_until(lambda: call(server, "GET", "/games") == {"games": []})
        guest.wait_for("the host is gone")
        guest.wait_for("it ends here: there is no game 'castle'")
        guest.close()


def test_a_guest_that_is_reloaded_keeps_its_peer_id_and_is_in_the_game_again(castle, open_page, server):
    guest = open_guest(open_page)
    before = guest.tab()
    guest.page.reload()
    guest.wait_for("connected with the host in .*")
    assert guest.tab() == before
    assert before["role"] == "guest"
    guest.say("back again")
    castle.wait_for(r"guest \w+: guest: back again")
    assert guests_of(server, "castle") == 1


def test_a_host_that_is_reloaded_keeps_its_peer_id_and_has_its_game_again(castle, open_page):
    guest = open_guest(open_page)
    before = castle.tab()
    castle.page.reload()
    castle.wait_for("hosting castle")
    assert castle.tab() == before
    guest.wait_for("the host is gone")
    meet_and_talk(castle, guest)


def test_a_guest_that_could_not_say_good_bye_gets_its_session_back(castle, open_page, server):
    guest = open_guest(open_page)
    guest.page.evaluate(NO_GOOD_BYE)
    guest.page.reload()
    connected = functools.partial(re.findall, r"^connected with (guest \w+)", flags=re.MULTILINE)     # who is named by the session
    wait_until(lambda: len(connected(castle.log())) == 2)
    assert len(set(connected(castle.log()))) == 1
    assert guests_of(server, "castle") == 1


def test_a_host_that_could_not_say_good_bye_gets_its_game_back(castle, open_page, server):
    guest = open_guest(open_page)
    castle.page.evaluate(NO_GOOD_BYE)
    castle.page.reload()
    guest.wait_for("the host is gone")
    meet_and_talk(castle, guest)


def test_a_connection_outlives_a_restart_of_the_server(context):
    port = free_port()
    with run_server("--port", str(port)) as url:
        host, guest = ChromiumPage(context, url), ChromiumPage(context, url)
        host.host("castle")
        guest.join("castle")
        guest.wait_for("connected with the host in .*")
    host.wait_for(r"http://localhost:\d+: no answer; .*; trying again")
    guest.say("nobody there but us")
    host.wait_for(r"guest \w+: guest: nobody there but us")
    with run_server("--port", str(port)) as url:
        wait_until(lambda: guests_of(url, "castle") == 1)
        guest.say("and all is as it was")
        host.wait_for(r"guest \w+: guest: and all is as it was")
        for page in (host, guest):
            assert "gone" not in page.log()
            assert page.log().count("connected") == 1
        host.close()
        guest.close()


# ---- with others ----------------------------------------------------------------------------------------------------

def test_a_page_joins_a_host_in_python(open_page, server):
    with run(sys.executable, HERE / "webrtc_peer.py", "host", "castle", "--server", server):
        guest = open_guest(open_page)
        guest.say("hello")
        guest.wait_for("echo of guest: hello")


def test_a_guest_in_python_joins_a_page(castle):
    with run(sys.executable, HERE / "webrtc_peer.py", "join", "castle", "--server", castle.page.input_value("#server")):
        castle.wait_for(r"guest \w+: hello from Python")


@needs_firefox
def test_a_page_in_firefox_joins_one_in_chromium(castle, server):
    with run_firefox(server) as guest:
        meet_and_talk(castle, guest)


@needs_firefox
def test_a_page_in_chromium_joins_one_in_firefox(open_page, server):
    with run_firefox(server) as host:
        host.host("castle")
        meet_and_talk(host, open_page())


@needs_firefox
def test_a_guest_in_firefox_that_is_reloaded_is_in_the_game_again(castle, server):
    with run_firefox(server) as guest:
        guest.join("castle")
        guest.wait_for("connected with the host in .*")
        guest.reload()
        guest.wait_for("connected with the host in .*")
        guest.say("back again")
        castle.wait_for(r"guest \w+: guest: back again")
        assert guests_of(server, "castle") == 1


# ---- why it does not work -------------------------------------------------------------------------------------------

def test_the_page_says_that_the_server_cannot_be_reached(context):
    url = f"http://127.0.0.1:{free_port()}"
    ChromiumPage(context, url).wait_for(rf"{url}: no answer; does it run, and allow this page\?")


def test_the_page_says_that_the_server_does_not_allow_it(context):
    with run_server("--cors-origin", "https://game.example") as url:
        page = ChromiumPage(context, url)
        page.wait_for(rf"{url}: no answer; does it run, and allow this page\?")
        page.close()


def test_the_page_says_that_a_name_is_taken(castle, open_page):
    page = open_page()
    page.host("castle")
    page.wait_for("it ends here: the name 'castle' is taken")


def test_the_page_says_which_rule_a_name_breaks(open_page):
    page = open_page()
    page.host("a/b")
    page.wait_for("it ends here: name must be a string of 1 to 64 characters, .*")


def test_the_page_says_that_a_game_is_over(castle, open_page):
    page = open_page()
    page.page.select_option("#games", "castle")
    castle.close()
    page.page.click("text=Join")
    page.wait_for("it ends here: there is no game 'castle'")


def test_the_page_says_that_a_host_speaks_another_language(context):
    with run_server("--max-wait", "1", "--poll-after", "0.1") as url:
        call(url, "POST", "/games/register", name="castle", peerId="ada")
        call(url, "POST", "/games/poll", name="castle", peerId="ada", addresses=["203.0.113.1:5000"])
        page = ChromiumPage(context, url)
        page.join("castle")
        page.wait_for("no answer from the host yet: it may not speak WebRTC")
        page.close()


def test_the_page_says_that_its_host_has_sent_it_away(context, server):
    call(server, "POST", "/games/register", name="castle", peerId="ada")
    call(server, "POST", "/games/poll", name="castle", peerId="ada", addresses=[], replies={})
    page = ChromiumPage(context, server)
    page.join("castle")
    guest = wait_until(lambda: call(server, "POST", "/games/poll", name="castle", peerId="ada", addresses=[])["guests"])[0]
    call(server, "POST", "/games/poll", name="castle", peerId="ada", addresses=[], dismiss=[guest["sessionId"]])
    page.wait_for("it ends here: the host of the game 'castle' has sent you away")


async def answer_and_go(offer):
    """The answer of a host that is there no more when the guest gets it."""
    peer = RTCPeerConnection()
    await peer.setRemoteDescription(RTCSessionDescription(offer["sdp"], "offer"))
    await peer.setLocalDescription(await peer.createAnswer())
    answer = {"type": "answer", "sdp": peer.localDescription.sdp}
    await peer.close()
    return answer


def test_the_page_says_that_nothing_gets_through(context, server):
    poll = functools.partial(call, server, "POST", "/games/poll", name="castle", peerId="ada", addresses=[])
    call(server, "POST", "/games/register", name="castle", peerId="ada")
    page = ChromiumPage(context, server)
    page.join("castle")
    guest = wait_until(lambda: [each for each in poll()["guests"] if each["addresses"]])[0]
    with concurrent.futures.ThreadPoolExecutor() as pool:       # Playwright has the event loop of this thread
        answer = pool.submit(asyncio.run, answer_and_go(guest["addresses"][0])).result()
    poll(replies={guest["sessionId"]: [answer]}, after=poll()["cursor"])
    page.wait_for(r"the host is gone: no way through the networks without a relay \(TURN\)", NO_WAY)
