"""What the benchmark needs beside Python: a venv for the peers, Express, wrk and nginx. Only what is missing is installed."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Dict, List, Sequence

from servers import BASELINE, BASELINE_COMMIT, BASELINE_P2PSERVER, HERE, NGINX, TOOLS, VENV_PYTHON, Failure, Server

PROGRAMS = {"wrk": "wrk", "node": "nodejs", "npm": "npm"}      # each with the package of Debian that has it
LIMIT = 900.0       # seconds that one step may take


def install(chosen: Sequence[Server]) -> Dict[str, str]:
    """Install what these servers need. The servers that a run can do without and that are missing: by key, why.

    Failure: something else is missing and could not be installed.
    """
    keys = {server.key for server in chosen}
    programs = PROGRAMS if "express" in keys else ("wrk",)
    packages = [PROGRAMS[program] for program in programs if not shutil.which(program)]
    if importlib.util.find_spec("ensurepip") is None:
        packages.append("python3-venv")
    if packages:
        apt_get("install", "-y", "-q", "--no-install-recommends", *packages)
    install_venv(peers=any(server.packages for server in chosen if server.key not in ("express", "nginx")))
    if "express" in keys:
        install_express()
    missing = {}
    for key, prepare in ((f"p2pserver-{BASELINE}", install_baseline), ("nginx", install_nginx)):
        if key in keys:
            try:
                prepare()
            except Failure as failure:
                missing[key] = str(failure)
    return missing


def install_venv(peers: bool) -> None:
    """A venv on the Python that runs this, with requirements.txt if there are peers. It is made anew when either has changed."""
    requirements = HERE / "requirements.txt"
    bare, full = f"{sys.version}\n", f"{sys.version}\n{requirements.read_text()}"
    ready = HERE / ".venv" / "ready"
    if ready.exists() and ready.read_text() in ((full,) if peers else (bare, full)):
        return
    run(sys.executable, "-m", "venv", "--clear", str(HERE / ".venv"))
    if peers:
        run(str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
    ready.write_text(full if peers else bare)


def install_baseline() -> None:
    """The p2pserver of the release that is compared with, from git's history, each time anew. Failure: it is not there."""
    command = ["git", "show", f"{BASELINE_COMMIT}:p2pserver.py"]
    try:
        done = subprocess.run(command, cwd=HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"git could not be asked for p2pserver {BASELINE}: {error}") from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["git does not say why"])[0]
        raise Failure(f"p2pserver {BASELINE} is commit {BASELINE_COMMIT}, which git does not have here ({reason}); "
                      "a shallow clone gets it by: git fetch --unshallow")
    BASELINE_P2PSERVER.parent.mkdir(parents=True, exist_ok=True)
    BASELINE_P2PSERVER.write_bytes(done.stdout)


def install_express() -> None:
    installed, locked = HERE / "node_modules" / ".package-lock.json", HERE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < locked.stat().st_mtime:
        run("npm", "ci", "--no-audit", "--no-fund")


def install_nginx() -> None:
    """Debian's nginx, unpacked here and not installed: a benchmark is not to leave a web server running."""
    if NGINX.exists():
        return
    TOOLS.mkdir(exist_ok=True)
    apt_get("download", "nginx", cwd=TOOLS)
    for package in TOOLS.glob("nginx_*.deb"):
        run("dpkg-deb", "-x", str(package), str(TOOLS))
    subprocess.run([str(NGINX), "-v"], capture_output=True, timeout=LIMIT, check=True)


def apt_get(*arguments: str, cwd: pathlib.Path = HERE) -> None:
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise Failure(f"please install by hand, for this is not root on Debian: {' '.join(arguments[1:])}")
    run("apt-get", "update", "-q")
    run("apt-get", *arguments, cwd=cwd)


def run(*command: str, cwd: pathlib.Path = HERE) -> None:
    print("+", *(os.path.relpath(word) if os.path.isabs(word) else word for word in command), file=sys.stderr)
    try:
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{command[0]} failed: {error}") from None
    if done.returncode:
        raise Failure(f"{' '.join(command[:4])} ... failed with {done.returncode}:\n{done.stdout[-2000:]}")


def versions() -> Dict[str, str]:
    """The version of everything that is measured or measures, by the name of its package."""
    # pip warns beside its list where it does not like a folder: that is not JSON.
    listed = said(str(VENV_PYTHON), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    found = {package["name"].lower(): package["version"] for package in json.loads(re.findall(r"^\[.*\]$", listed, re.MULTILINE)[-1])}
    found["python"] = sys.version.split()[0]
    found["node"] = said("node", "--version").strip().lstrip("v")
    express = HERE / "node_modules" / "express" / "package.json"
    found["express"] = json.loads(express.read_text())["version"] if express.exists() else ""
    found["wrk"] = number(said("wrk", "-v"))
    found["nginx"] = number(said(str(NGINX), "-v")) if NGINX.exists() else ""
    commit = said("git", "describe", "--always", "--dirty", "--match", "v*").strip()
    found["p2pserver"] = "" if commit.startswith("fatal") else commit
    return found


def number(text: str) -> str:
    match = re.search(r"\d+\.\d+\S*", text)
    return match[0] if match else "unknown"


def said(*command: str) -> str:
    """What a program prints, or nothing if there is no such program here; nginx and wrk tell their versions in their own ways."""
    try:
        return subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60).stdout
    except OSError:
        return ""


def machine() -> List[str]:
    """What this machine is, a fact in each string."""
    model = re.search(r"^model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    system = os.uname()
    memory = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) / 2 ** 20
    return [model[1] if model else system.machine, f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB", f"{system.sysname} {system.release}"]
