"""The servers that are compared, as a table, and how one is started, watched and stopped."""

import contextlib
import functools
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from client import LOOPBACK, Client

HERE = pathlib.Path(__file__).resolve().parent
PEERS = HERE / "peers"
VENV_PYTHON = HERE / ".venv" / "bin" / "python"      # of all that is Python here: what is installed beside another can weigh on its start
TOOLS = HERE / ".tools"
NGINX = TOOLS / "usr" / "sbin" / "nginx"
P2PSERVER = HERE.parent / "p2pserver.py"
BASELINE, BASELINE_COMMIT = "0.1.0", "3fed7c9"       # the release that the p2pserver of today is compared with, and where git has it
BASELINE_P2PSERVER = TOOLS / f"p2pserver-{BASELINE}" / "p2pserver.py"

# The flags of p2pserver, each given if its --help knows it. The rest is as it comes.
ALWAYS = {"--rate": "0"}
FOR_MANY = {"--max-games": "20000", "--max-games-per-client": "20000", "--max-waiting": "20000", "--max-waiting-per-client": "20000",
            "--max-connections": "20000", "--max-connections-per-client": "20000",
            "--game-ttl": "3600"}      # games stay, though not all of them are polled in every round

START_LIMIT = 20.0      # seconds after which a server that does not answer has failed
STOP_LIMIT = 5.0        # seconds after which a server that does not stop is killed


class Failure(Exception):
    """Something that is to be measured could not be, in a sentence for the report."""


# ---- the table ------------------------------------------------------------------------------------------------------

class Server(NamedTuple):
    """A row: its key and what reports call it, its command for a port, the packages whose versions matter, what is set."""

    key: str
    label: str
    command: Callable[[int], List[str]]
    packages: tuple = ()
    settings: str = ""
    constant: bool = False      # it gives one answer to everything, so it cannot be checked
    file: Optional[pathlib.Path] = None     # of a p2pserver: only these have a long poll, and room for 10,000 games


def p2pserver(file: pathlib.Path, more: Optional[Dict[str, str]] = None) -> Callable[[int], List[str]]:
    return lambda port: [str(VENV_PYTHON), str(file), "--port", str(port), *p2pserver_flags(file, {**ALWAYS, **(more or {})})]


def p2pserver_flags(file: pathlib.Path, wanted: Dict[str, str]) -> List[str]:
    """Those of the flags that this p2pserver has, each followed by its value. Failure: it cannot tell."""
    known = p2pserver_help(file)
    return [text for flag, value in wanted.items() if re.search(rf"(?<![\w-]){flag}(?![\w-])", known) for text in (flag, value)]


@functools.cache
def p2pserver_help(file: pathlib.Path) -> str:
    try:
        done = subprocess.run([str(VENV_PYTHON), str(file), "--help"], capture_output=True, text=True, timeout=START_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{file} --help failed: {error}") from None
    if done.returncode:
        raise Failure(f"{file} --help failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def gunicorn(port: int) -> List[str]:
    return [str(VENV_PYTHON), "-m", "gunicorn", "--bind", f"{LOOPBACK}:{port}", "--workers", "1", "--worker-class", "gthread", "--threads", "8",
            "--keep-alive", "75", "--log-level", "warning", "flask_app:app"]


def waitress(port: int) -> List[str]:
    return [str(VENV_PYTHON), "-m", "waitress", "--listen", f"{LOOPBACK}:{port}", "--threads", "8", "--channel-timeout", "75", "flask_app:app"]


def uvicorn(app: str) -> Callable[[int], List[str]]:
    return lambda port: [str(VENV_PYTHON), "-m", "uvicorn", "--host", LOOPBACK, "--port", str(port), "--loop", "uvloop", "--http", "httptools",
                         "--no-access-log", "--log-level", "warning", app]


def nginx(port: int) -> List[str]:
    """nginx wants its port in a file, and a folder to write to."""
    folder = TOOLS / "run"
    folder.mkdir(exist_ok=True)
    (folder / "nginx.conf").write_text((PEERS / "nginx.conf").read_text().replace("PORT", str(port)))
    return [str(NGINX), "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"]


SERVERS = (
    Server("p2pserver", "p2pserver", p2pserver(P2PSERVER), (), "default settings, no limit on the rate of requests", file=P2PSERVER),
    Server(f"p2pserver-{BASELINE}", f"p2pserver {BASELINE}", p2pserver(BASELINE_P2PSERVER), (), "the same", file=BASELINE_P2PSERVER),
    Server("gunicorn", "Flask on gunicorn gthread", gunicorn, ("flask", "werkzeug", "gunicorn"), "1 worker, 8 threads, keep-alive 75 s"),
    Server("waitress", "Flask on waitress", waitress, ("flask", "werkzeug", "waitress"), "8 threads, keep-alive 75 s"),
    Server("fastapi", "FastAPI on uvicorn", uvicorn("fastapi_app:app"), ("fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "httptools"),
           "1 process, uvloop, httptools, pydantic models in and out"),
    Server("express", "Express", lambda port: ["node", str(PEERS / "express_app.mjs"), str(port)], ("node", "express"), "NODE_ENV=production, no ETag"),
    Server("aiohttp", "aiohttp.web on uvloop", lambda port: [str(VENV_PYTHON), "aiohttp_app.py", str(port)], ("aiohttp", "uvloop"), "1 process"),
    Server("asgi", "bare ASGI on uvicorn", uvicorn("asgi_app:app"), ("uvicorn", "uvloop", "httptools"), "1 process, uvloop, httptools"),
    Server("stdlib", "ThreadingHTTPServer", lambda port: [str(VENV_PYTHON), "stdlib_app.py", str(port)], (), "as it comes; HTTP/1.1, one write per answer"),
    Server("nginx", "nginx, a constant answer", nginx, ("nginx",), "1 worker; the ceiling", constant=True),
)
BY_KEY = {server.key: server for server in SERVERS}


def large(server: Server) -> Server:
    """A p2pserver with room for more than 10,000 games, hosts and connections."""
    assert server.file
    return server._replace(command=p2pserver(server.file, FOR_MANY))


# ---- running one ----------------------------------------------------------------------------------------------------

class Running:
    """A server that has answered. started: seconds from the start of its process to its first answer."""

    def __init__(self, server: Server, process: "subprocess.Popen[bytes]", port: int, started: float) -> None:
        self.server, self.port, self.pid, self.started = server, port, process.pid, started
        self._process = process

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def resident(self) -> float:
        """Resident memory in MB (10**6 bytes), of all its processes together."""
        return sum(resident(pid) for pid in group(self.pid)) / 1e6

    def cpu(self) -> float:
        """Seconds of processor time used so far by all its processes."""
        return sum(cpu(pid) for pid in group(self.pid))


def free_port() -> int:
    """A port that nobody has, outside the range that the kernel gives to connections.

    Within it a connection that is tried before the server listens can get the very port as its own, and then talks to itself.
    """
    lowest = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10000, max(lowest, 12000)), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((LOOPBACK, port))
            return port
    raise Failure("there is no free port")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Running]:
    """Start a server on a free port and stop it afterwards. Failure: it does not answer, or died meanwhile; says what it printed."""
    port = free_port()
    environment = {**os.environ, "NODE_ENV": "production"}
    command = server.command(port)
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(command, cwd=PEERS, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        except OSError as error:
            raise Failure(f"{server.label} could not be started: {error}") from None
        try:
            first_answer(process, port, server, begin + START_LIMIT)
            yield Running(server, process, port, time.perf_counter() - begin)
            if process.poll() is not None:
                raise Failure(f"{server.label} ended by itself")
        except (Failure, OSError) as error:
            log.seek(0)
            said = log.read()[-2000:].decode(errors="replace").strip()
            # What a server says that is well tells nothing of a wrong measurement.
            matters = said and (process.poll() is not None or "Traceback" in said)
            raise Failure(f"{error or type(error).__name__}" + (f"; the server printed:\n{said}" if matters else "")) from error
        finally:
            stop(process)


def first_answer(process: Any, port: int, server: Server, deadline: float) -> None:
    """Wait until the list is answered, asking every millisecond."""
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise Failure(f"{server.label} did not start: it ended with {process.returncode}")
        try:
            with Client(port, timeout=max(0.1, deadline - time.perf_counter())) as client:
                answer = client.request("GET", "/games")
        except OSError:
            time.sleep(0.001)
            continue
        if answer.status != 200:
            raise Failure(f"{server.label} answers GET /games with {answer.status}")
        return
    raise Failure(f"{server.label} did not answer within {START_LIMIT:g} s")


def stop(process: Any) -> None:
    """End a server and what it started: they are one process group, which is ours."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- /proc ----------------------------------------------------------------------------------------------------------

def stat(pid: int) -> List[str]:
    """The fields of /proc/PID/stat from the third on (proc(5))."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def group(leader: int) -> List[int]:
    """The processes of a process group."""
    members = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):      # it is no process, or has ended meanwhile
            if int(stat(int(entry.name))[2]) == leader:
                members.append(int(entry.name))
    return members


def resident(pid: int) -> int:
    """VmRSS in bytes."""
    return 1024 * int(pathlib.Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def cpu(pid: int) -> float:
    """Seconds of processor time, in steps of a clock tick (10 ms)."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def threads(pid: int) -> int:
    return int(stat(pid)[17])


def kernel_memory() -> Dict[str, int]:
    """Bytes that the kernel uses for everybody: slab (sockets, files), stacks of threads, page tables."""
    lines = (line.split() for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    sizes = {fields[0].rstrip(":"): 1024 * int(fields[1]) for fields in lines}
    return {name: sizes[name] for name in ("Slab", "KernelStack", "PageTables")}
