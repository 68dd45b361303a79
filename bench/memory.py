"""What games and guests weigh in the server's memory, and from that the worst case that its limits allow.

Prints bytes of resident memory (VmRSS, so Linux only) for each, measured by filling a registry in a process of its own.
"""

import gc
import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import p2pserver  # noqa: E402

CASES = {
    "a game that has one address": 10_000,
    "a guest that has one address": 20_000,
    "a game as large as can be (16 KiB of addresses, 1 KiB of info)": 1_000,
    "a guest as large as can be (16 KiB of addresses as text)": 1_000,
    "a guest as large as can be (16 KiB of nested empty arrays)": 500,
}


def resident():
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def addresses(case, i):
    """What validation makes of a body's addresses, fresh objects each time."""
    if "nested" in case:
        value = [{"a": [[]] * 330}] * 16
    elif "large" in case:
        value = [f"{i:08d}{j:02d}" + "x" * 502 for j in range(15)] + [{"sdp": "x" * 8300}]
    else:
        value = [f"203.0.113.{i % 250}:{i % 60000 + 1024}"]
    return p2pserver.check_addresses(json.loads(json.dumps(value)), local=False)


def fill(case, count):
    settings = p2pserver.Settings(max_games=count + 1, max_guests=count + 1)
    registry = p2pserver.Registry(settings)
    registry.register_game("the game", "the host")
    before = resident()
    for i in range(count):
        if "guest" in case:
            registry.start_game("the game", f"guest {i}", addresses(case, i))
        else:
            info = {"text": f"{i:08d}" + "x" * 1000 if "large" in case else "castle"}
            registry.register_game(f"game {i}", f"host {i}", p2pserver.check_info(info, local=False))
            registry.poll_game(f"game {i}", f"host {i}", addresses(case, i))
    return (resident() - before) / count


def main():
    if len(sys.argv) > 1:
        case = list(CASES)[int(sys.argv[1])]
        print(fill(case, CASES[case]))
        return
    sizes = []
    for i, case in enumerate(CASES):
        out = subprocess.run([sys.executable, __file__, str(i)], capture_output=True, text=True, check=True).stdout
        sizes.append(float(out))
        print(f"{sizes[-1]:10,.0f} bytes  {case}")
    small_game, small_guest, large_game, large_guest, worst_guest = sizes
    settings = p2pserver.Settings()
    guests = settings.max_games * settings.max_guests
    for what, game, guest in (("small", small_game, small_guest), ("large", large_game, large_guest), ("nested", large_game, worst_guest)):
        print(f"{(settings.max_games * game + guests * guest) / 2 ** 20:10,.0f} MiB    {settings.max_games} games with {settings.max_guests} guests each, all {what}")


if __name__ == "__main__":
    main()
