"""README and the pages of docs/ say what the programs do: their commands are executed, their figures and samples held against the sources."""

import contextlib
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pictures
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import p2pserver  # noqa: E402
from p2pclient import prediction, probing  # noqa: E402

README, OPERATING, PERFORMANCE, CLIENT = [(ROOT / page).read_text(encoding="utf-8") for page in (
    "README.md", "docs/OPERATING.md", "docs/PERFORMANCE.md", "docs/CLIENT.md")]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
WAIT = 60       # seconds for a program to say something, or to end
SETTINGS = p2pserver.Settings()
DEFAULTS = {option.flag: option.default for option in p2pserver.OPTIONS}


# ---- the programs, in a clean clone and a network of their own -------------------------------------------------------

# Has a network namespace with loopback alone, until its standard input ends. SIOCSIFFLAGS and IFF_UP: linux/sockios.h, linux/if.h.
NAMESPACE = """
import fcntl, socket, struct, sys
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sH14x", b"lo", 1))
print("is up", flush=True)
sys.stdin.read()
"""


class Program:
    """A command of the shell in the clone; its lines as they come."""

    def __init__(self, words, clone, home):
        self.lines = []
        self.process = subprocess.Popen(words, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                                        env={**{name: os.environ[name] for name in os.environ if not name.startswith(("VIRTUAL_ENV", "P2P_"))},
                                             "XDG_STATE_HOME": str(home), "PYTHONUNBUFFERED": "1"})
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True)
        self.reader.start()

    @property
    def text(self):
        return "".join(self.lines)

    def says(self, pattern):
        end = time.monotonic() + WAIT
        while not re.search(pattern, self.text, re.MULTILINE):
            assert time.monotonic() < end and self.process.poll() is None, f"{pattern!r} is not in {self.text!r}"
            time.sleep(0.02)

    def end(self, number=None):
        """The exit status and all that was printed."""
        if number:
            self.process.send_signal(number)
        status = self.process.wait(WAIT)
        self.reader.join(5)
        return status, self.text


class Clone:
    """A clean clone, made ready in the plain way of README, and a network namespace in which port 8000 is free."""

    def __init__(self, folder, stack):
        self.folder, self._stack = folder / "p2pserver", stack
        self._home = folder / "state"
        subprocess.run(["git", "clone", "--quiet", ROOT, self.folder], check=True)
        self.page = (self.folder / "README.md").read_text(encoding="utf-8")
        holder = stack.enter_context(subprocess.Popen(["unshare", "--net", sys.executable, "-c", NAMESPACE],
                                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(holder.stdin.close)
        assert holder.stdout.readline() == "is up\n"
        self._enter = ["nsenter", "--target", str(holder.pid), "--net"]
        self.set_up, self.run_hosts, self.run_guest = self._commands()

    def _commands(self):
        """What README says to type: what sets up, as one command, then the hosts and the guest."""
        block = next(block for block in blocks(self.page, "sh") if "activate" in block)
        *set_up, hosts, guest = [line.partition("  #")[0].strip() for line in block.splitlines()]
        return " && ".join(set_up), hosts, guest

    def outside(self, command):
        subprocess.run(command, shell=True, cwd=self.folder, check=True)

    def start(self, command, activate=False):
        """Run a command in the namespace, until the tests end."""
        program = Program([*self._enter, "sh", "-c", (". .venv/bin/activate && " if activate else "") + "exec " + command], self.folder, self._home)
        self._stack.callback(stop, program.process)
        return program


def stop(process):
    if process.poll() is None:
        process.kill()
        process.wait()


def blocks(page, language):
    return re.findall(f"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def form(line):
    """A line of output with what differs from run to run made alike."""
    address, name = r"(127\.0\.0\.1|\[::1\]):\d+", r"(\w+'s [a-z]+|^NAME\b) *"
    for pattern, constant in (address, "ADDRESS"), (name, "NAME "), (r"[\d.]+ ms", "TIME"):
        line = re.sub(pattern, constant, line)
    return line


def samples(page):
    """The lines of output that a page shows, but for what it leaves out."""
    return [line for block in blocks(page, "text") for line in block.splitlines() if line.strip() != "..."]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace takes root")
    with contextlib.ExitStack() as stack:
        clone = Clone(tmp_path_factory.mktemp("clean"), stack)
        clone.outside(clone.set_up)
        yield clone


@pytest.fixture
def server(clone):
    """As README starts it."""
    command = next(line.partition("  #")[0].strip() for block in blocks(clone.page, "sh") for line in block.splitlines() if "p2pserver.py" in line)
    server = clone.start(command)
    server.says("Ctrl-C ends it")
    yield server
    assert server.end(signal.SIGINT)[0] == 0


def test_the_plain_way_of_the_readme_prints_what_it_shows(clone, server):
    hosts = clone.start(clone.run_hosts, activate=True)
    hosts.says("3 games are on offer")
    status, text = clone.start(clone.run_guest, activate=True).end()
    printed = [form(line) for line in (server.text + hosts.text + text).splitlines()]
    assert status == 0 and [line for line in samples(clone.page) if form(line) not in printed] == []
    assert hosts.end(signal.SIGINT)[0] == 0
    [sample] = samples((clone.folder / "docs" / "OPERATING.md").read_text(encoding="utf-8"))
    logged = [re.sub(r'^[\d:.T+-]+|".*"', "", line) for line in server.text.splitlines()]
    assert re.sub(r'^[\d:.T+-]+|".*"', "", sample) in logged


def test_the_demo_works(clone):
    status = subprocess.run(["make", "demo"], cwd=clone.folder, capture_output=True, text=True, timeout=5 * WAIT)
    assert status.returncode == 0 and "connected to 3 of 3 games, 15 of 15 messages came back" in status.stdout, status.stdout + status.stderr


def test_the_example_of_a_game_runs_by_the_commands_of_its_page(clone, server):
    (clone.folder / "game.py").write_text(blocks(clone.page, "python")[0], encoding="utf-8")
    host, guest = re.findall(r"`(\.venv/bin/python -c '[^`]*')`", CLIENT)
    clone.start(host)
    server.says("first addresses")
    assert clone.start(guest).end() == (0, "b'hello Ada'\n")


def test_the_doctor_runs_by_the_command_of_its_page(clone, server):
    command = re.search(r"`(\.venv/bin/python -m p2pclient check --server )URL`", OPERATING)[1]
    status, text = clone.start(command + "http://localhost:8000").end()
    assert status == 0 and re.findall(r"^ok +(\w+):", text, re.MULTILINE) == ["HTTP", "STUN", "NAT", "CONNECTION"]


TROUBLES = [     # a command, what it says, and where the page says so
    ("python3 p2pserver.py", "TCP port 8000 of :: cannot be used: Address already in use", "`{}`"),
    (".venv/bin/python simulate_guest.py --server http://localhost:8001", "cannot reach http://localhost:8001: Connection refused", "`{}`"),
    ("curl -s -d '{}' http://localhost:8000/games/register", "set Content-Type: application/json", "`415`: {}"),
    ("curl -s --json '{\"name\": \"x\", \"peerId\": \"x\", \"addresses\": []}' http://localhost:8000/games/poll", '"status":404', "`404` on a poll"),
    ("curl -s -H 'X-Forwarded-For: 192.0.2.1' http://localhost:8000/metrics", "metrics are for this machine and for --metrics-from", "`{}`"),
    (".venv/bin/python -m p2pclient check --server http://localhost:8000 --stun localhost:8009", "FAILED  STUN", "`{}` from the doctor"),
]


@pytest.mark.parametrize("command, message, row", TROUBLES, ids=[row for _, _, row in TROUBLES])
def test_the_messages_of_the_troubleshooting_are_those_of_the_programs(clone, server, command, message, row):
    table = OPERATING.partition("## Troubleshooting")[2].replace("http://...", "http://localhost:8001")
    assert f"| {row.format(message)}" in table and message in clone.start(command).end()[1]


def test_tls_can_be_tried_by_the_commands_of_its_page(clone):
    told = " ".join(OPERATING.split())
    openssl, serve, curl, environment = (re.search(pattern, told)[1] for pattern in (
        "`(openssl req [^`]*)`", "`(python3 p2pserver.py --tls-cert [^`]*)`", "`(curl --cacert [^`]*)`", "`(REQUESTS_CA_BUNDLE=[^`]*)`"))
    assert clone.start(openssl).end()[0] == 0
    server = clone.start(serve)
    server.says("listens on https://localhost:8000/")
    assert clone.start(curl + " -s").end() == (0, '{"games":[]}\n')
    program = ".venv/bin/python {} --server https://localhost:8000"
    hosts = clone.start(f"env {environment} {program.format('simulate_hosts.py')}")
    hosts.says("3 games are on offer")
    assert clone.start(f"env {environment} {program.format('simulate_guest.py')}").end()[0] == 0
    assert "CERTIFICATE_VERIFY_FAILED" in clone.start(program.format("simulate_guest.py")).end()[1] and "`CERTIFICATE_VERIFY_FAILED`" in OPERATING
    server.process.send_signal(signal.SIGHUP)
    server.says("certificate")
    assert server.end(signal.SIGINT)[0] == 0


# ---- commands and their flags ----------------------------------------------------------------------------------------

def help_of(*words):
    return subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}).stdout


def test_every_target_of_make_that_a_page_names_is_there_and_listed_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split())
    named = {target for page in PAGES for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert named <= targets and len(named) >= 8
    head = makefile.partition("\nPYTHON")[0]
    assert {target for target in targets if f"make {target} " not in head} == {"clean"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_of_a_program_that_a_page_names_is_one_of_its_own(page):
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in re.findall("^```.*?^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()]
    spans = re.findall("`([^`]+)`", re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for command in fenced + spans:
        found = re.search(r"((?:p2pserver|simulate_hosts|simulate_guest)\.py|-m p2pclient check)( .*|$)", command, re.DOTALL)
        if found:
            assert set(re.findall(r"--[a-z-]+", found[2])) <= set(re.findall(r"--[a-z-]+", help_of(*found[1].split()))), command


@pytest.mark.parametrize("program", ["simulate_hosts.py", "simulate_guest.py", "python -m p2pclient check"])
def test_the_page_of_the_client_lists_every_flag_with_its_default(program):
    usage = " ".join(re.search(rf"`{re.escape(program)} ([^`]*)`", CLIENT)[1].split())
    text = help_of(*program.replace("python ", "").split())
    assert set(re.findall(r"--[a-z-]+", usage)) == set(re.findall(r"--[a-z-]+", text)) - {"--help"}
    for flag, default in re.findall(r"(--[a-z-]+) (\d+)", usage):
        assert re.search(rf"{flag} [A-Z]+ .*\(default: {default}\)", text), flag


def test_each_file_that_a_page_names_is_there():
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.(?:py|html|yaml|cfg|service|txt)|/))`", page.read_text(encoding="utf-8")):
            assert name == "game.py" or (ROOT / name).exists() or (page.parent / name).exists(), f"{name} in {page.name}"


# ---- figures -----------------------------------------------------------------------------------------------------------

def number(text):
    return float(text.replace(",", ""))


def near(said, measured):
    """Whether a figure of a page is the measured one, to as many digits as it has."""
    return abs(number(said) - measured) <= 0.5 * 10 ** -len(said.partition(".")[2]) + 1e-9


UNITS = {"KiB": 1024, "KB": 1024}


def test_every_default_that_the_operators_page_tells_is_the_servers():
    told = re.findall(r"`(--[a-z-]+)` ([\d,]+)(?: (KiB|KB))?", OPERATING)
    assert len(told) > 10
    assert [(flag, told) for flag, told, unit in told if number(told) * UNITS.get(unit, 1) != DEFAULTS[flag]] == []


@pytest.mark.parametrize("phrase", [
    f"and {p2pserver.STUN_BURST} at once",
    f"in that of a poll, with its `replies`, {('four', '')[p2pserver.POLL_FACTOR != 4]} times as many",
    f"a wrong `peerId` counts as {('ten', '')[p2pserver.FORBIDDEN_COST != 10]}",
    f"a body of an answer as one for each {p2pserver.BYTES_PER_TOKEN // 1024} KB",
    f"in many small chunks as one for each {p2pserver.BYTES_PER_READ} bytes of their framing",
    f"closed, {('a hundred', '')[p2pserver.MAX_REFUSALS != 100]} times; then closed without a word",
    f"with {p2pserver.MAX_REPLY_ADDRESSES} addresses in all",
    f"| {p2pserver.REQUEST_TIME:g} s; head {p2pserver.MAX_HEAD // 1024} KiB, {p2pserver.MAX_HEADER_FIELDS} fields; body",
    f"{re.search(r'0,(256)', p2pserver.CHUNK.pattern.decode())[1]} bytes of a chunk's extension, {p2pserver.MAX_TRAILER // 1024} KiB of trailers",
    f"| {p2pserver.SEND_TIME:g} s; `--idle-timeout` {SETTINGS.idle_timeout:g} s | closed |",
    f"at most {(p2pserver.POLL_FACTOR * SETTINGS.max_body + p2pserver.READ_SIZE) // 1024} KiB (the body of a poll",
    f"one read of {p2pserver.READ_SIZE // 1024} KiB",
    f"So {SETTINGS.max_connections:,} connections",
    f"hold {SETTINGS.max_connections * (p2pserver.POLL_FACTOR * SETTINGS.max_body + p2pserver.READ_SIZE) / 1e9:.1f} GB at the most",
    f"one client address holds {SETTINGS.max_connections_per_client * (p2pserver.POLL_FACTOR * SETTINGS.max_body + p2pserver.READ_SIZE) / 1e6:.0f} MB",
    f"The log has a line {('a minute', '')[p2pserver.REPORT_EVERY != 60]} for each limit",
    f"free again {SETTINGS.game_ttl:g} seconds later",
])
def test_what_the_operators_page_tells_of_a_limit_is_the_servers(phrase):
    assert phrase in " ".join(OPERATING.split())


WEIGHTS = {what: (number(resident), number(counted)) for what, resident, counted in re.findall(
    r"^\| a (g[a-z]+ .*?) \| ([\d,]+) \| ([\d,]+) \|", OPERATING, re.MULTILINE)}


@pytest.mark.parametrize("what", WEIGHTS)
def test_what_a_game_or_guest_counts_is_what_the_operators_page_tells(what, monkeypatch):
    sys.path.insert(0, str(ROOT / "bench"))
    import memory
    monkeypatch.setattr(memory, "COUNT", 100)
    kind, case = what.split()[0], "small" if "one address" in what else "large"
    assert memory.measure(ROOT / "p2pserver.py", case, kind, SETTINGS.max_body)[1] == pytest.approx(WEIGHTS[what][1], rel=0.02)


def test_what_is_counted_is_at_least_what_is_resident():
    assert len(WEIGHTS) == 4 and all(resident <= counted for resident, counted in WEIGHTS.values())
    assert "So the default of 256 MB is no more than that resident" in OPERATING and SETTINGS.max_memory == 256


def test_the_ratios_of_the_page_on_performance_are_those_of_the_benchmark():
    by_load = [{row[0].replace(".web", ""): number(row[2]) for row in pictures.table(pictures.RESULTS, head)[1:]} for head in pictures.LOADS]
    head, *rows = pictures.table(ROOT / "docs" / "PERFORMANCE.md", "polls a second, p2pserver is")
    assert [name in load for name, load in zip(head[1:], pictures.LOADS)] == [True, True] and len(rows) == 5
    for server, *told in rows:
        assert all(near(each.split()[0], measured[server]) for each, measured in zip(told, by_load)), server


def test_the_times_and_sizes_of_the_page_on_performance_are_those_of_the_benchmark():
    told, results = " ".join(PERFORMANCE.split()), pictures.RESULTS.read_text(encoding="utf-8")
    start = pictures.table(pictures.RESULTS, "milliseconds")[1]
    assert start[0] == "p2pserver: start over an open connection" and "1,000 hosts wait" in results
    figures = {r"median ([\d.]+) ms": pictures.spread(start[1])[0], r"99th percentile ([\d.]+) ms": pictures.spread(start[2])[0]}
    first = pictures.table(pictures.RESULTS, "server", "ms to the first answer", "MB resident")[1]
    assert first[0] == "p2pserver"
    figures[r"Start to first answer ([\d.]+) s"], figures[r"; idle ([\d.]+) MB"] = pictures.spread(first[1])[0] / 1000, pictures.spread(first[2])[0]
    resident = {row[0]: pictures.spread(row[1])[0] for row in pictures.table(pictures.RESULTS, "resident memory")[1:]}
    figures[r"with 10,000 waiting hosts ([\d.]+) MB"] = resident["MB with 10,000 hosts waiting"]
    figures[r"memory less ([\d.]+) MB"] = resident["MB idle, after the first answer"]
    figures[r"by ([\d.]+) KB of the process"] = number(re.search("by ([0-9,]+) bytes for each waiting host", results)[1]) / 1000
    figures[r"and ([\d.]+) KB of the kernel"] = resident["bytes of the kernel's for each waiting host, about"] / 1000
    assert {pattern: re.search(pattern, told)[1] for pattern, measured in figures.items() if not near(re.search(pattern, told)[1], measured)} == {}


def test_what_a_machine_holds_is_what_the_benchmark_says():
    rows = {row[0]: row[-1] for row in pictures.table(pictures.RESULTS, "machine")[1:]}
    for machine, told in pictures.table(ROOT / "docs" / "PERFORMANCE.md", "machine")[1:]:
        size = machine.partition(" and more")[0]
        larger = [hosts for name, hosts in rows.items() if number(name.split()[2]) >= number(size.split()[2])] if size != machine else [rows[size]]
        assert set(larger) == {told.partition(":")[0]}, machine


def test_which_routers_can_be_crossed_is_what_the_laboratory_measured():
    plain = {"full cone": "full-cone", "UDP blocked": "blocked"}
    head, *rows = pictures.table(ROOT / "docs" / "NAT.md", "")
    kinds = [plain.get(kind, kind) for kind in head[1:]]
    told = {(plain.get(row[0], row[0]), kind): cell == "yes" for row in rows for kind, cell in zip(kinds, row[1:])}
    measured = {tuple(pair.split(" – ")): seconds is not None for pair, seconds in pictures.connect_times()["ours"].items()}
    assert len(told) == len(kinds) ** 2 and told == {pair: measured.get(pair, measured.get(pair[::-1])) for pair in told}


def test_the_chances_that_the_page_on_nats_tells_follow_from_what_both_sides_send():
    told = " ".join((ROOT / "docs" / "NAT.md").read_text(encoding="utf-8").split())
    assert f"sends {probing.MOST_PREDICTED} datagrams a side" in told
    assert f"up to {probing.PROBING_SOCKETS} mappings" in told and f"up to {probing.PROBES:,} datagrams" in told
    assert f"Of {len(prediction.PORTS):,} ports" in told

    def chance(opened, sent, ports):
        """That of sent ports, each once, at least one is among the opened."""
        return 1 - math.comb(ports - opened, sent) / math.comb(ports, sent)

    predicted = [chance(probing.MOST_PREDICTED, probing.MOST_PREDICTED, ports) for ports in (190, 512)]
    assert predicted[0] >= 0.95 and "up to about 190 ports" in told and round(3 * predicted[1]) == 2 and "one in two of three tries" in told
    assert chance(37, 37, 512) < 0.95 <= chance(38, 38, 512) and "95 of 100 tries would take 38 a side" in told
    smaller, larger = (100 * chance(probing.MOST_PREDICTED, probing.MOST_PREDICTED, ports) for ports in (128, 1000))
    assert smaller > 99 and "find one in 99 of 100;" in told and round(larger) == 45 and "in an example of Nokia's, in 45." in told
    used_up = [1000 * chance(opened, 1, len(prediction.PORTS)) for opened in (probing.PROBING_SOCKETS, probing.PROBES)]
    assert [round(each) for each in used_up] == [4, 16] and "in 4 of 1,000 tries, 1,024 in 16." in told
    assert 2 * probing.PROBING_SOCKETS == 512
    assert "In a block of 512 ports, 256 mappings take half: a guess hits in 1 of 2 tries, with two such blocks in 1 of 4" in told
    assert round(100 * chance(probing.PROBING_SOCKETS, probing.PROBES, len(prediction.PORTS))) == 98 and "in 98 of 100 tries" in told


# ---- pictures ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_of_the_present_figures(name):
    assert pictures.shown(name) == pictures.PICTURES[name][0](), f"docs/{name} is of older figures: make pictures draws it anew"
    assert any(f"{name})" in page.read_text(encoding="utf-8") for page in PAGES)
