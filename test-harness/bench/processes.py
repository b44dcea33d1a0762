"""Programs that a comparison runs: built, started on free ports, and always stopped."""

import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds until a server must be ready, and until it must be gone after SIGTERM.
START, STOP = 300, 15


class MeasureError(Exception):
    """A measurement failed."""


def build():
    """Builds the programs to measure, and returns their paths by name: `engine`, `kernels`, `llorch` and `llorch-candled`."""
    paths = {}
    for command in (
        ["bench", "--no-run", "--bench", "engine", "--bench", "kernels"],
        ["build", "--release", "--bin", "llorch-candled", "--bin", "llorch"],
    ):
        full = ["cargo", *command, "--locked", "--message-format=json-render-diagnostics"]
        done = subprocess.run(full, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise MeasureError(f"`cargo {shlex.join(command)}` failed")
        for message in map(json.loads, done.stdout.splitlines()):
            if message.get("executable"):
                paths[message["target"]["name"]] = message["executable"]
    return paths


def output(command, environment=None, accepted=(0,)):
    """Runs a program and returns its output. Fails if there is none, or if the exit code is not accepted."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode not in accepted or not done.stdout:
        raise MeasureError(f"{shlex.join(map(str, command))} failed (exit code {done.returncode}): {last_lines(done.stderr)}")
    return done.stdout


def last_lines(text, count=3):
    return " / ".join(text.strip().splitlines()[-count:])


def children_seconds():
    """Returns the processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server that runs for the duration of a `with` statement."""

    def __init__(self, command, environment=None):
        """`command` contains `{port}` in place of the port."""
        self.port = free_port()
        self.command = [str(part).replace("{port}", str(self.port)) for part in command]
        self.environment = {**os.environ, **(environment or {})}
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        # Some servers write files to their working directory.
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "output"
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            # In its own session, the server gets no Ctrl-C from the terminal: this program stops it.
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder.name,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    def wait(self):
        """Waits until the server is ready."""
        while not self.is_ready():
            self.check()
            time.sleep(0.05)

    def check(self):
        """Fails if the server has ended or takes too long to start."""
        ended = self.process.poll() is not None
        if ended or time.perf_counter() > self.started + START:
            reason = last_lines(self.log.read_text(errors="replace"))
            state = "ended" if ended else f"was not ready after {START} s"
            raise MeasureError(f"{shlex.join(self.command)} {state}: {reason}")

    def is_ready(self):
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                health = json.load(answer)
        except (OSError, ValueError):
            return False
        return health.get("state", health.get("status")) in ("ready", "ok")

    def resident_bytes(self):
        """Returns the server's current resident memory, including mapped files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024
