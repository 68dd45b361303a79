"""The real programs of this repository in the laboratory: a Stage is a Lab with the server, in which hosts and guests perform."""
import os
import re
import signal
import subprocess
import sys
import threading
import time

import natlab

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PORT = 8000
TURN_PORT, TURN_SECRET = 3478, "what the rendezvous server and the TURN server share"
sys.path.insert(0, ROOT)


class Program:
    """A Python script of this repository, running on a machine of the lab. lines: what it has said so far."""

    def __init__(self, machine, script, *arguments):
        self.script, self.lines = script, []
        self._said = threading.Condition()
        self._process = machine.popen([sys.executable, os.path.join(ROOT, script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_PROXY": "*"})
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            with self._said:
                self.lines.append(line.rstrip())
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    @property
    def text(self):
        return "\n".join(self.lines)

    def expect(self, pattern, seconds=30, after=0):
        """The match in the first line, after so many, in which the pattern is found; AssertionError if none comes in time."""
        end, position = time.monotonic() + seconds, after
        with self._said:
            while True:
                for line in self.lines[position:]:
                    found = re.search(pattern, line)
                    if found:
                        return found
                position = max(position, len(self.lines))
                left = end - time.monotonic()
                assert left > 0 and self._reader.is_alive(), f"{self.script} did not say {pattern!r} but:\n{self.text}"
                self._said.wait(min(left, 0.5))

    def say(self, line):
        """Write a line to its standard input."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def interrupt(self):
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def signal(self, number):
        """Send it a signal: SIGSTOP suspends it, SIGCONT has it go on."""
        self._process.send_signal(number)

    def wait(self, seconds=60):
        """Its exit status, once it has ended."""
        self._process.wait(seconds)
        self._reader.join()
        return self._process.returncode


class Stage(natlab.Lab):
    """A lab in which the real server runs. Its two public addresses serve as two STUN servers that the programs are given, unless it is to be without
    STUN, or they are to find the server's two ports by themselves ("found"). With turn a real TURN server, coturn, runs at the first of them, and
    hosts are told of it."""

    def __init__(self, stun=True, turn=False):
        super().__init__()
        try:
            self.url = f"http://{self.server.address}:{PORT}"
            self._stun_options = ["--stun", f"{self.server.addresses[0]}:{PORT}", "--stun", f"{self.server.addresses[1]}:{PORT}"] if stun is True else []
            self._server_options = [] if stun else ["--no-stun"]
            if turn:
                self.start_turn("--use-auth-secret", f"--static-auth-secret={TURN_SECRET}")
            self._turn_options = ["--turn-url", f"turn:{self.server.address}:{TURN_PORT}", "--turn-secret", TURN_SECRET] if turn else []
            self._serve()
        except BaseException:
            self.close()
            raise

    def _serve(self):
        self.rendezvous = Program(self.server, "p2pserver.py", "--host", "0.0.0.0", "--port", PORT, "--poll-after", "0.1",
                                  *self._server_options, *self._turn_options)
        self.rendezvous.expect("listens")

    def restart_server(self):
        """Kill the server, and start one that remembers nothing."""
        self.rendezvous.signal(signal.SIGKILL)
        self.rendezvous.wait()
        self._serve()

    def start_turn(self, *options):
        """Start coturn at the server's first address."""
        command = ["turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--realm=lab", f"--listening-ip={self.server.address}",
                   f"--listening-port={TURN_PORT}", "--log-file=stdout", "--pidfile=/dev/null", "-v", *options]
        self.turn = self.server.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.turn_said = []
        threading.Thread(target=self.turn_said.extend, args=(self.turn.stdout,), daemon=True).start()

    @property
    def _options(self):
        return ["--server", self.url, *self._stun_options]

    def host(self, machine, *options):
        """Offer "game 1" on a machine, and wait until it is registered."""
        host = Program(machine, "simulate_hosts.py", "--hosts", "1", "--name", "game 1", *self._options, *options)
        host.expect("registered")
        return host

    def guest(self, machine, *options):
        """Join "game 1" on a machine."""
        return Program(machine, "simulate_guest.py", "--game", "game 1", *self._options, *options)
