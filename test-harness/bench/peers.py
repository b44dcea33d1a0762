"""Other engines: builds of llama-bench and llama-server."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from processes import MeasureError, Server, output

BENCH, SERVER = "llama-bench", "llama-server"
PREFILL, DECODE = 512, 128


@dataclass
class Peer:
    """An engine to compare with."""

    name: str
    # Paths of its programs; `None` if it has no such program.
    bench: Path | None = None
    server: Path | None = None
    bench_flags: list = field(default_factory=list)
    server_flags: list = field(default_factory=list)
    # Commit of its source, as reported with its measurements.
    commit: str | None = None

    def add(self, path):
        """Adds a program, or the programs of a folder. Fails with ValueError if there are none."""
        paths = [path / BENCH, path / SERVER] if path.is_dir() else [path]
        found = [path for path in paths if path.is_file()]
        for path in found:
            if BENCH in path.name:
                self.bench = path
            elif SERVER in path.name:
                self.server = path
            else:
                raise ValueError(f"`{path}` is neither a {BENCH} nor a {SERVER}")
        if not found:
            raise ValueError(f"`{path}` has neither {BENCH} nor {SERVER}")

    def prefill(self, model, threads):
        """Returns the tokens per second of a prompt, and no further figures."""
        return self.measure(model, threads, "-p", PREFILL, "-n", 0)

    def decode(self, model, threads, depth):
        """Returns the tokens per second of an answer after `depth` tokens, and no further figures."""
        if not depth:
            return self.measure(model, threads, "-p", 0, "-n", DECODE)
        if self.knows_depth:
            return self.measure(model, threads, "-p", 0, "-n", DECODE, "-d", depth)
        return self.measure(model, threads, "-p", 0, "-n", 0, "-gp", f"{depth},{DECODE}")

    @cached_property
    def knows_depth(self):
        """True if its llama-bench has the option for a depth. Older builds have another option with the same effect."""
        return "--n-depth" in output([self.bench, "--help"])

    def measure(self, model, threads, *work):
        command = [self.bench, "-m", model, "-t", threads, *work, "-r", 1, "-o", "json", *self.bench_flags]
        printed = output(command)
        try:
            [test] = json.loads(printed[printed.index("[") :])
        except ValueError as error:
            raise MeasureError(f"{self.name} printed no measurement: {error}") from error
        self.commit = test.get("build_commit")
        return test["avg_ts"], {}

    def serve(self, model, threads, slots, context):
        """Returns a server for `slots` concurrent requests."""
        command = [self.server, "-m", model, "-t", threads, "-np", slots, "-c", context, "--host", "127.0.0.1", "--port", "{port}"]
        return Server([*command, *self.server_flags])
