"""What one hostile client cannot do to the others. Each test is a fault that an earlier version of the server had.

P2P_SERVER_FILE names another file than p2pserver.py to be tested. Where processor time is the point, the server's own is measured, and
compared with what it spends on something ordinary in the same run: how fast the machine is does not matter.
"""
import collections
import contextlib
import ctypes
import json
import re
import select
import socket
import ssl
import struct
import threading
import time

import pytest
from stage import (
    HERE,
    OTHER,
    THERE,
    WAIT,
    Connection,
    call,
    check_answer,
    listening,
    many,
    metric,
    open_files,
    pipeline,
    request,
    serving,
    tls_status,
    wait_until,
)

PROXY = ("--trusted-proxies", "127.0.0.1")
HEALTH = request("GET", "/healthz")
LITTLE = 8192           # bytes that an answer of an error has at the most


@pytest.fixture(autouse=True, scope="module")
def files():
    open_files(2000)


def through(address, method, path, body=None, **headers):
    """A request as a proxy hands it on for a client."""
    return request(method, path, body, X_Forwarded_For=address, **headers)


def ask_through(server, address, method, path, body=None, **headers):
    return call(server, method, path, body, X_Forwarded_For=address, **headers)


def start(name, peer, **headers):
    return request("POST", "/games/start", {"name": name, "peerId": peer, "addresses": THERE}, **headers)


def cpu_of(server, work):
    """Seconds of CPU time that the server spends while work() lasts, which must not end before the server has done its part."""
    before = server.cpu
    work()
    return server.cpu - before


def is_readable(connection, seconds=0.0):
    """Whether an answer, or the end, has come."""
    return bool(connection.buffer or select.select([connection.socket], [], [], seconds)[0])


def all_of(connection):
    """All that still comes until the other side ends."""
    data = bytearray(connection.buffer)
    with contextlib.suppress(ConnectionError):
        while piece := connection.socket.recv(65536):
            data += piece
    return bytes(data)


# ---- TLS ------------------------------------------------------------------------------------------------------------

class KeyUpdater:
    """A client of TLS 1.3 that can change its keys as often as it likes: OpenSSL has a call for it, and Python has none."""

    def __init__(self, server):
        try:
            import _ssl
            self._openssl = openssl = ctypes.CDLL(_ssl.__file__)
            for name in ("SSL_key_update", "TLS_client_method", "SSL_CTX_new", "SSL_new", "BIO_new", "BIO_s_mem", "SSL_set0_wbio"):
                getattr(openssl, name)
                getattr(openssl, name).restype = ctypes.c_int if name == "SSL_key_update" else ctypes.c_void_p
        except (ImportError, OSError, AttributeError) as reason:
            pytest.skip(f"OpenSSL cannot be called from here: {reason}")
        # The socket blocks, as OpenSSL wants it here, but not for ever.
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", WAIT, 0))
        self._context = ctypes.c_void_p(openssl.SSL_CTX_new(ctypes.c_void_p(openssl.TLS_client_method())))
        openssl.SSL_CTX_ctrl(self._context, 123, ctypes.c_long(0x0304), None)       # the least version is TLS 1.3
        self._tls = ctypes.c_void_p(openssl.SSL_new(self._context))
        openssl.SSL_set_fd(self._tls, self.socket.fileno())
        assert openssl.SSL_connect(self._tls) == 1
        # From now on what it writes stays in memory until a test sends it.
        self._written = ctypes.c_void_p(openssl.BIO_new(ctypes.c_void_p(openssl.BIO_s_mem())))
        openssl.SSL_set0_wbio(self._tls, self._written)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._openssl.SSL_free(self._tls)
        self._openssl.SSL_CTX_free(self._context)
        self.socket.close()

    def records(self, updates, request=b""):
        """The ciphertext of so many updates of the key, and of a request after them."""
        update, write = self._openssl.SSL_key_update, self._openssl.SSL_do_handshake
        for _ in range(updates):
            assert update(self._tls, 0) == 1 and write(self._tls) == 1
        assert not request or self._openssl.SSL_write(self._tls, request, len(request)) == len(request)
        size = self._openssl.BIO_ctrl(self._written, 10, ctypes.c_long(0), None)        # how much there is
        data = ctypes.create_string_buffer(size)
        assert self._openssl.BIO_read(self._written, data, size) == size
        return data.raw

    def send(self, data):
        """False if the server has ended the connection."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)
            return True
        return False

    def answer(self):
        """What comes as plaintext, or nothing where the connection has ended."""
        data = ctypes.create_string_buffer(65536)
        size = self._openssl.SSL_read(self._tls, data, len(data))
        return data.raw[:max(0, size)]


def tls_connection(stack, server):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT))
    return stack.enter_context(context.wrap_socket(plain))


def test_a_client_that_floods_the_server_with_updates_of_its_key_keeps_no_other_client_waiting(certificate):
    """OpenSSL handles any number of them within one read, so a loop that lets it read on serves nobody else meanwhile."""
    with listening(certificate) as server, KeyUpdater(server) as hostile, contextlib.ExitStack() as stack:
        began = time.monotonic()
        flood = hostile.records(200_000)
        making = time.monotonic() - began       # about what it takes the server to read them, for the work is the same
        client = tls_connection(stack, server)
        flooding = threading.Thread(target=hostile.send, args=(flood,), daemon=True)
        flooding.start()
        times = []
        while flooding.is_alive() or len(times) < 20:
            began = time.monotonic()
            client.sendall(HEALTH)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            times.append(time.monotonic() - began)
        flooding.join()
        assert max(times) < max(1, making / 3), (max(times), making)


def test_a_connection_that_sends_a_megabyte_of_tls_without_a_byte_of_plaintext_is_cut(certificate):
    """What is no request costs the processor as much as one, and the limit of requests never sees it."""
    with listening(certificate) as server:
        with KeyUpdater(server) as modest:
            assert modest.send(modest.records(10, HEALTH)) and modest.answer().startswith(b"HTTP/1.1 200")
        with KeyUpdater(server) as hostile:
            data = hostile.records(42_000, HEALTH)
            assert len(data) > 1_100_000
            assert not hostile.send(data) or hostile.answer() == b""
        assert tls_status(server) == 200


def test_a_request_that_comes_byte_by_byte_under_tls_is_told_429(certificate):
    """Each piece is work for a thread, though it brings no plaintext."""
    with listening((*certificate, "--rate", "1", "--burst", "20")) as server, KeyUpdater(server) as hostile:
        assert hostile.send(hostile.records(0, HEALTH)) and hostile.answer().startswith(b"HTTP/1.1 200")
        for byte in hostile.records(0, request("GET", "/games", A="a" * 200)):
            if select.select([hostile.socket], [], [], 0.01)[0]:
                break
            assert hostile.send(bytes([byte]))
        assert hostile.answer().startswith(b"HTTP/1.1 429")


def test_a_handshake_that_dribbles_a_byte_a_second_ends_after_ten_seconds(certificate):
    """Each byte is a sign of life, and so would a connection be kept for ever that never becomes one."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    hello = outgoing.read()
    with listening(certificate) as server:
        began = time.monotonic()
        with Connection(server) as dribbling, Connection(server) as silent:
            for byte in hello[:25]:
                with contextlib.suppress(ConnectionError):
                    dribbling.send(bytes([byte]))
                if is_readable(dribbling, 1):
                    break
            assert 8 < time.monotonic() - began < 20 and dribbling.is_closed() and silent.is_closed()


# ---- heads that come in pieces --------------------------------------------------------------------------------------

def rounds(server, connections, each, count):
    """Have each(connection) done so often for all. A witness, always another client, sees to it that the server has taken what came in one
    round before the next one begins."""
    for i in range(count):
        for connection in connections:
            each(connection)
        with Connection(server, HEALTH, source=f"127.0.9.{i + 1}") as witness:
            assert witness.answer().status == 200


def cpu_of_single_bytes(server, head, count):
    """What it costs the server that a head goes on byte by byte, on 50 connections."""
    with many(server, 50, head) as connections:
        rounds(server, [], None, 3)
        return cpu_of(server, lambda: rounds(server, connections, lambda connection: connection.send(b"a"), count))


def test_a_byte_more_of_a_long_head_costs_no_more_than_one_of_a_short_head():
    """If each piece that comes has the whole head looked through again, 50 connections that send single bytes take the whole processor."""
    short = b"GET /healthz HTTP/1.1\r\nHost: h\r\nA: "
    long = short + b"\r\n".join(b"A%d: " % i + b"a" * 330 for i in range(88)) + b"\r\nB: "
    assert 29_000 < len(long) < 31_000
    with serving() as server, many(server, 50) as connections:
        ordinary = cpu_of(server, lambda: rounds(server, connections, lambda connection: connection.ask("GET", "/healthz"), 80))
        early, late = (cpu_of_single_bytes(server, head, 80) for head in (short, long))
        assert late < 3 * early and late < 2 * ordinary, (early, late, ordinary)


def test_an_address_whose_requests_come_byte_by_byte_is_told_429_and_cut_off():
    """A request that needs many reads is as much work as many requests, and must not count as one that has not even come."""
    with serving("--rate", "1", "--burst", "10") as server, many(server, 50, b"GET /healthz HTTP/1.1\r\nHost: h\r\nA: ") as connections:
        told = []

        def send_a_byte(connection):
            if connection in told:
                return
            if is_readable(connection):
                assert check_answer(connection.answer()).status == 429 and connection.is_closed()
                told.append(connection)
            else:
                connection.send(b"a")

        rounds(server, connections, send_a_byte, 120)
        assert len(told) >= 30, f"{len(told)} of 50"


# ---- replies, and what an error tells -------------------------------------------------------------------------------

def replying(replies, peer="host"):
    return "POST", "/games/poll", {"name": "castle", "peerId": peer, "addresses": HERE, "replies": replies}


@contextlib.contextmanager
def castle(*flags):
    with serving(*flags) as server:
        assert call(server, "POST", "/games/register", {"name": "castle", "peerId": "host"}).status == 201
        yield server


@pytest.mark.parametrize("most, more", [
    ({f"session {i}": HERE for i in range(8)}, {f"session {i}": HERE for i in range(9)}),
    ({f"session {i}": HERE * 16 for i in range(4)}, {f"session {i}": HERE * 13 for i in range(5)}),
], ids=["guests of a game", "64 addresses in all"])
def test_a_poll_takes_replies_to_no_more_than(most, more):
    """Replies beyond these reach nobody, and are work before it is known whether who sends them may."""
    with castle("--max-guests", "8") as server:
        assert call(server, *replying(most)).status == 200
        answer = check_answer(call(server, *replying(more)))
        assert answer.status == 400 and set(answer.json["errors"]) == {"replies"}


FAULTY = {
    "too many replies that are faulty": {"replies": {f"{i:x}": [7] * 16 for i in range(270)}},
    "64 replies that are faulty": {"replies": {f"{i:x}": [7] for i in range(64)}},
    "replies to sessions whose names must be escaped": {"replies": {"\U000e0041" * 32 + str(i): [7] for i in range(64)}},
    "addresses that are faulty": {"addresses": [7] * 16},
    "everything": {"name": "\u202e" * 999, "peerId": "\u202e" * 999, "addresses": ["0.0.0.0:0"] * 16, "after": -1, "wait": [],
                   "replies": {"a": [7] * 16, "b": [8] * 16}},
}


@pytest.mark.parametrize("kind", FAULTY)
def test_an_answer_names_at_most_ten_faults_and_is_small_where_there_are(kind):
    """An answer that names all faults can be thirty times as large as its request, and as much work."""
    with castle() as server:
        body = json.dumps({"name": "castle", "peerId": "host", "addresses": HERE, **FAULTY[kind]}, ensure_ascii=False, separators=(",", ":"))
        answer = check_answer(call(server, "POST", "/games/poll", body.encode()))
        assert answer.status == 400 and len(answer.body) < LITTLE
        for text in (answer.json["detail"], "; ".join(answer.json["errors"].values())):
            assert text.count(" must ") <= 10, text


def test_a_wrong_peer_id_with_heavy_replies_costs_little_more_than_one_without():
    """Who may not poll must not be able to have the server do the work of a poll."""
    heavy = {f"{i:03}": [{}] * 16 for i in range(260)}

    def cost(field):
        data = json.dumps({"name": "castle", "peerId": "wrong", "addresses": HERE, field: heavy}, separators=(",", ":")).encode()
        answers = []
        spent = cpu_of(server, lambda: answers.extend(pipeline(server, [request("POST", "/games/poll", data)] * 200, at_once=20)))
        assert {answer.status for answer in answers} <= {400, 403} and max(len(answer.body) for answer in answers) < LITTLE
        return spent

    with castle() as server:
        usual = cost("unknown")     # it is read as JSON, too, and ignored
        replies = cost("replies")
        assert replies < 3 * usual, (replies, usual)


# ---- many who wait --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def holding(server, requests):
    """Connections with these requests, all of which are held."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(server, data)) for data in requests]
        wait_until(lambda: metric(server, "waiting") == len(requests))
        yield connections


def statuses(connections):
    """How often each status came as the next answer; None where none did. They all have the same time."""
    counts, deadline = collections.Counter(), time.monotonic() + WAIT
    for connection in connections:
        connection.socket.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            counts[connection.answer().status] += 1
        except (socket.timeout, EOFError):
            counts[None] += 1
            deadline = 0
    return counts


def test_300_guests_who_wait_at_a_game_are_all_told_404_when_it_is_deleted():
    """If each who is woken wakes the next one, the last ones are beyond what Python can nest, and are told 500 or nothing."""
    requests = [start("castle", f"guest {i}", Prefer="wait=25") for i in range(300)]
    with castle("--max-guests", "300", "--max-guests-per-client", "300") as server, holding(server, requests) as guests:
        assert call(server, "DELETE", "/games/castle", {"peerId": "host"}).status == 204
        assert statuses(guests) == {404: 300}
        assert "Traceback" not in server.err


def test_guests_who_wait_at_300_games_are_all_told_404_when_these_expire_together():
    """If each who is woken wakes the next one, the last ones are beyond what Python can nest, and are told 500 or nothing."""
    names = [f"game {i}" for i in range(300)]
    with serving("--game-ttl", "3", "--poll-after", "1") as server, many(server, 300) as guests:
        answers = pipeline(server, [request("POST", "/games/register", {"name": name, "peerId": "host"}) for name in names], at_once=300)
        assert {answer.status for answer in answers} == {201}
        for guest, name in zip(guests, names):
            guest.send(start(name, "guest", Prefer="wait=25"))
        assert statuses(guests) == {404: 300}
        assert "Traceback" not in server.err


# ---- requests, answers and refusals cost ----------------------------------------------------------------------------

GARBAGE = b"\x01garbage\r\n\r\n"


def test_a_malformed_request_costs_its_client_as_much_as_a_good_one():
    """If refusals are free, who sends garbage is never told to stop."""
    with serving("--rate", "0.01", "--burst", "20") as server:
        for _ in range(20):
            with Connection(server, GARBAGE) as connection:
                assert connection.answer().status in (400, 429) and connection.is_closed()
        assert call(server, "GET", "/games").status == 429
        with Connection(server, source=OTHER) as other:
            assert other.ask("GET", "/games").status == 200


def outcome(server, data=GARBAGE):
    """What becomes of a new connection: the status that it is told, or 0 for no byte at all."""
    with contextlib.suppress(ConnectionError), Connection(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.send(data)
        return int(all_of(connection)[9:12] or 0)
    return 0


def outcomes_until_silent(server):
    """What becomes of connections up to the first that is closed without a word, or of 1,000."""
    outcomes = []
    while 0 not in outcomes and len(outcomes) < 1000:
        outcomes.append(outcome(server))
    return outcomes


def test_who_goes_on_connecting_over_its_rate_is_told_429_a_hundred_times_and_then_closed_without_a_word():
    """To tell it again and again is work, by which one address that always connects anew takes most of the processor."""
    with serving("--rate", "0.01", "--burst", "10") as server:
        outcomes = outcomes_until_silent(server)
        counts = collections.Counter(outcomes)
        assert counts[0] == 1 and counts[400] <= 10 and 80 <= counts[429] <= 120, counts
        assert [outcome(server) for _ in range(20)] == [0] * 20
        with Connection(server, source=OTHER) as other:
            assert other.ask("GET", "/games").status == 200


def test_who_was_closed_without_a_word_is_served_again_when_it_has_waited():
    """Several may share an address, and one of them shall not shut the others out for long."""
    with serving("--rate", "2", "--burst", "10") as server:
        assert 0 in outcomes_until_silent(server), "it is closed without a word"
        began = time.monotonic()
        while (status := outcome(server, request("GET", "/games", Connection="close"))) != 200 and time.monotonic() < began + 60:
            time.sleep(1)       # so long that two requests more are allowed
        assert status == 200


def test_health_is_told_to_a_client_that_is_over_its_rate():
    """Who watches the server must not be told that it is ill because others at the same address ask too much."""
    with serving("--rate", "0.01", "--burst", "10") as server:
        assert [call(server, "GET", "/games").status for _ in range(12)][-1] == 429
        assert [call(server, "GET", "/healthz").status for _ in range(3)] == [200] * 3
        assert call(server, "GET", "/games").status == 429


def test_a_list_costs_its_client_a_request_for_each_16_kilobytes_and_one_that_is_known_costs_one():
    """To send ten megabytes is not the work of one request."""
    with serving(*PROXY, "--rate", "0.1", "--burst", "200") as server:
        bodies = [{"name": f"game {i}", "peerId": "host", "info": {"about": "x" * 1000}} for i in range(1600)]
        # Each by a client of its own, who has a request for it.
        answers = pipeline(server, [through(f"198.18.{i // 250}.{i % 250 + 1}", "POST", "/games/register", body) for i, body in enumerate(bodies)])
        assert {answer.status for answer in answers} == {201}
        first, *others = [ask_through(server, "203.0.113.1", "GET", "/games") for _ in range(4)]
        assert first.status == 200 and 1_600_000 < len(first.body) < 2_000_000
        assert others[-1].status == 429, [answer.status for answer in others]
        tag = first.headers["etag"]
        assert [ask_through(server, "203.0.113.2", "GET", "/games", If_None_Match=tag).status for _ in range(100)] == [304] * 100
        assert ask_through(server, "203.0.113.2", "GET", "/games").status == 200


# ---- who is one client ----------------------------------------------------------------------------------------------

def test_ipv6_addresses_count_as_one_client_by_56_bits():
    """A customer gets a /56 as a rule, which has 256 of the /64 that would each have the limits of one client."""
    with castle(*PROXY, "--max-guests-per-client", "16") as server:
        def join(address):
            return ask_through(server, address, "POST", "/games/start", {"name": "castle", "peerId": f"guest {address}", "addresses": THERE}).status

        assert [join(f"2001:db8:0:12{i:02x}::1") for i in range(0, 200, 10)] == [202] * 16 + [429] * 4
        assert [join(f"2001:db8:0:{subnet}::1") for subnet in ("1300", "11ff")] == [202, 202]


# ---- STUN -----------------------------------------------------------------------------------------------------------

def stun_request(attributes, mark=b"123456789012"):
    """A request with so many attributes, which mean nothing and may be ignored."""
    return struct.pack(">HHI", 1, 4 * attributes, 0x2112A442) + mark + struct.pack(">HH", 0x8022, 0) * attributes


def udp(server, source="127.0.0.1"):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", server.port))
    sock.settimeout(WAIT)
    return sock


def test_stun_is_silent_to_more_than_16_attributes():
    """No client sends so many, and each is work."""
    with serving() as server, udp(server) as sock:
        sock.send(stun_request(17, b"seventeen..."))
        sock.send(stun_request(16, b"sixteen....."))
        assert sock.recv(2048)[8:20] == b"sixteen.....", "who is served first is answered first"


def test_stun_spends_no_more_on_heavy_requests_over_the_limit_than_on_junk():
    """If a request is read before the limit is asked, the limit saves the answer alone: 5,000 a second take most of the processor."""
    with serving() as server, udp(server) as sock:
        sources = iter([f"127.0.{i}.{j}" for i in range(1, 9) for j in range(1, 250)])

        def is_done():
            """Whether the server has come to the end of what was sent: a client who has asked nothing yet is answered."""
            with udp(server, next(sources)) as other:
                other.settimeout(2)
                with contextlib.suppress(socket.timeout):
                    other.send(stun_request(0))
                    return other.recv(2048)

        def cost(datagram, count=20_000):
            def flood():
                for _ in range(count // 50):        # so few at once that none is lost before the server reads it
                    for _ in range(50):
                        sock.send(datagram)
                    wait_until(is_done)

            return cpu_of(server, flood)

        heavy = stun_request(314)
        assert len(heavy) == 1276
        for _ in range(11):         # then it is over the limit
            for _ in range(50):
                sock.send(stun_request(0))
            wait_until(is_done)
        junk = cost(b"\xff" * len(heavy))
        requests = cost(heavy)
        assert requests < 3 * junk, (requests, junk)


# ---- behind a proxy -------------------------------------------------------------------------------------------------

def test_a_client_behind_a_proxy_has_no_more_requests_held_than_it_may_have_connections():
    """Its connections are the proxy's, which has no limit, so one client could have all that can be held."""
    with castle(*PROXY, "--max-connections-per-client", "4") as server:
        def waiting(guest, address):
            return start("castle", guest, X_Forwarded_For=address, Prefer="wait=25")

        with holding(server, [waiting(f"guest {i}", "203.0.113.1") for i in range(4)]), \
                Connection(server, waiting("guest 4", "203.0.113.1")) as fifth, Connection(server, waiting("guest 5", "203.0.113.2")):
            assert is_readable(fifth, 5), "it is held, or nothing is said of it"
            answer = check_answer(fifth.answer())
            assert answer.status == 429 or answer.status == 202 and "preference-applied" not in answer.headers
            wait_until(lambda: metric(server, "waiting") == 5)


def test_a_client_behind_a_proxy_has_no_more_unfinished_requests_than_it_may_have_connections():
    """Its connections are the proxy's, which has no limit, so one client could fill the memory for what has not come whole."""
    body = json.dumps({"name": "castle", "peerId": "host"}).encode()

    def unfinished(address):
        return request("POST", "/games/register", body, X_Forwarded_For=address)[:-1]

    with serving(*PROXY, "--max-connections-per-client", "4") as server, many(server, 5, unfinished("203.0.113.1")) as connections:
        readable = select.select([connection.socket for connection in connections], [], [], 5)[0]
        assert len(readable) == 1, "one of the five is refused"
        refused = next(connection for connection in connections if connection.socket is readable[0])
        assert check_answer(refused.answer()).status == 429
        with Connection(server, unfinished("203.0.113.2")) as other:
            other.send(body[-1:])
            assert other.answer().status == 201
        for connection in connections:
            if connection is not refused:
                connection.send(body[-1:])
                assert connection.answer().status == 200


@pytest.mark.parametrize("data, status", [
    (b"garbage\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nbroken\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"POST /games/poll HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\n", 413),
    (b"GET /" + b"x" * 9000, 414),
], ids=["no HTTP", "no field", "no Host", "a body too large", "a line too long"])
def test_the_log_names_a_proxy_itself_where_what_comes_on_its_connection_is(data, status):
    """The connection is for many clients: whose request it is cannot be read, and it need not be the same as before."""
    with serving(*PROXY, "--access-log") as server, Connection(server) as connection:
        connection.send(through("203.0.113.9", "GET", "/healthz"))
        assert connection.answer().status == 200
        connection.send(data)
        assert connection.answer().status == status
        line = wait_until(lambda: re.search(rf"^.* {status} \d+$", server.err, re.MULTILINE))[0]
        assert " 127.0.0.1 " in line and "203.0.113.9" not in line
