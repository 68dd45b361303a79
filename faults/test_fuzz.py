"""Random and mutated input: see fuzz.py. FUZZ_SEED in the environment repeats a run, FUZZ_INPUTS makes it longer."""
import os
import random

import pytest
from fuzz import Fuzz, run
from stage import Connection, Listener, check_answer, request, serving

# As one would write it who trusts what comes.
TRUSTING = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"name": body["name"], "first": body["addresses"][0]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"listens on http://localhost:{server.server_port}/", flush=True)
server.serve_forever()
"""


def test_a_server_that_trusts_what_comes_breaks_under_the_first_hundred_inputs():
    with Listener("-c", TRUSTING) as server:
        for seed in range(20):
            with pytest.raises(AssertionError):
                Fuzz(seed).send_framed(server, 100)
        assert "Traceback" in server.err


@pytest.fixture(scope="module")
def memory():
    """The server's memory over the time of all inputs. Had they broken anything, there would be none."""
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    print(f"FUZZ_SEED={seed}")      # pytest shows it where a test fails
    report, memory = run(int(os.environ.get("FUZZ_INPUTS") or 100_000), seed)
    print(report)
    return memory


def test_100_000_inputs_over_http_and_stun_break_nothing(memory):
    assert memory


def test_memory_is_flat_under_all_these_inputs(memory):
    """The first half is for warming up. 130 bytes that each of the other half's requests left behind would be noticed."""
    assert memory[-1] < 1.06 * memory[9] + 1, memory


# What was found by fuzzing and is mended, or was thought to be risky while the inputs were made: the statuses it gets.
KEPT = {
    "a body of brackets alone": ([400], request("POST", "/games/register", b"[" * 16384)),
    "an object of 2,700 levels": ([400], request("POST", "/games/register", b'{"a":' * 2700 + b"1" + b"}" * 2700)),
    "a number of 16,000 digits": ([400], request("POST", "/games/register", b'{"name":' + b"9" * 16000 + b"}")),
    "a lone surrogate": ([400], request("POST", "/games/register", b'{"name":"\\ud800","peerId":"p"}')),
    "a lone surrogate in a part that is ignored": ([400], request("POST", "/games/register", b'{"name":"n","peerId":"p","x":["\\udfff"]}')),
    "a name that NFC makes longer": ([400], request("POST", "/games/register", {"name": "\ufb2c" * 64, "peerId": "p"})),
    "a port in other digits, which is no address but text": ([201, 200], request("POST", "/games/register", {"name": "n", "peerId": "p"})
                                                             + request("POST", "/games/poll", {"name": "n", "peerId": "p", "addresses": ["1.2.3.4:\u0665"]})),
    "a length of 5,000 digits": ([413], b"POST /games/register HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    "a bearer who is not UTF-8": ([404], b"DELETE /games/x HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"),
    "a list of 9,000 commas as ETags": ([200], b"GET /games HTTP/1.1\r\nHost: h\r\nIf-None-Match: " + b"," * 9000 + b"\r\n\r\n"),
}


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize("statuses, data", [pytest.param(*row, id=name) for name, row in KEPT.items()])
def test_answered_as_documented_is(statuses, data, server):
    with Connection(server, data) as connection:
        assert [check_answer(connection.answer()).status for _ in statuses] == statuses
    assert server.answers() and "Traceback" not in server.err
