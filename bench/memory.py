"""What games and guests weigh in the server's memory, beside what they count against --max-memory.

Prints bytes of resident memory (VmRSS, so Linux only) for each, measured by filling a registry in a process of its own, and the
resident memory that a registry full to --max-memory takes. Takes the server's flags: python3 bench/memory.py --max-memory 64
"""

import gc
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import p2pserver  # noqa: E402

CASES = {
    "small": "with one address",
    "large": "as large as --max-body lets it be, of text",
    "nested": "as large as --max-body lets it be, of nested empty arrays",
}
COUNT = 2000    # of each that are measured
CASE = "MEMORY_CASE"


def resident():
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def addresses(case, i, size):
    """What validation makes of the addresses of a body of size bytes; fresh objects each time."""
    if case == "nested":
        value = [{"a": [[]] * (size // 16 // 3 - 4)}] * 16
    elif case == "large":
        value = [f"{i:08d}" + "x" * 500] * min(15, size // 1024) + [{"sdp": f"{i:08d}" + "x" * (size - 520 * min(15, size // 1024) - 100)}]
    else:
        value = [f"203.0.113.{i % 250}:{i % 60000 + 1024}"]
    text = json.dumps(value, separators=(",", ":"))
    assert len(text) <= size
    return p2pserver.check_addresses(json.loads(text), local=False)


def fill(case, what, size):
    """Bytes that each of COUNT games or guests takes, and what each counts."""
    registry = p2pserver.Registry(p2pserver.Settings(max_games=COUNT + 1, max_games_per_client=COUNT + 1, max_guests=COUNT))
    registry.register_game("the game", "the host")
    before, counted = resident(), registry.counts().stored
    for i in range(COUNT):
        if what == "guest":
            registry.start_game("the game", f"guest {i}", addresses(case, i, size))
        else:
            info = p2pserver.check_info({"text": f"{i:08d}" + "x" * (0 if case == "small" else 1000)}, local=False)
            registry.register_game(f"game {i}", f"host {i}", info)
            registry.poll_game(f"game {i}", f"host {i}", addresses(case, i, size))
    return (resident() - before) / COUNT, (registry.counts().stored - counted) / COUNT


def main():
    settings = p2pserver.parse_settings(None, {})
    if CASE in os.environ:
        print(*fill(*os.environ[CASE].split(), settings.max_body))
        return
    for case, meaning in CASES.items():
        for what in ("game", "guest"):
            environment = {**os.environ, CASE: f"{case} {what}"}
            printed = subprocess.run([sys.executable, *sys.argv], env=environment, stdout=subprocess.PIPE, check=True).stdout
            size, counted = map(float, printed.split())
            print(f"{size:10,.0f} bytes, counted as {counted:8,.0f}: a {what} {meaning}; {settings.max_memory} MB of them are "
                  f"{settings.max_memory * size / counted:,.0f} MB resident")


if __name__ == "__main__":
    main()
