#!/usr/bin/env python3
"""Compares the worker's speed with that of other engines on this machine, in turns.

    test-harness/bench/compare.py SmolLM2.gguf gemma3.gguf --peer llama=~/llama.cpp/build/bin --peer ik=~/ik_llama.cpp/build/bin

Each round measures everything once, and within it the engines take turns, another one first in each round: a machine that
gets slower or faster meanwhile does so for all. Shown are medians of the rounds, with the least and the largest; ratios are
taken within a round. Peers are builds of llama-bench and llama-server for this very machine, with the flags that suit them
best. The worker is built here, in release mode. Nothing else should run meanwhile.

Parts:
  machine   bytes read a second, of as many as a token needs, and byte products: the limits of decode and prefill (measured
            with these)
  decode    128 tokens after 0 and after 512: one sequence, the model alone (llama-bench -n 128 -d 0,512)
  prefill   512 tokens: the same (llama-bench -p 512)
  streams   8 requests at once over HTTP, prompts of 128 tokens, answers of up to 128: `llorch dev bench`
  ttft      first token of a prompt of 528 tokens of which the cache has 512, over HTTP; worker only
  start     from the start of the process, with the file in the page cache, to the first token; worker only
  resident  memory after loading with default sizes, against file and KV cache; worker only

Exit codes: 0 done, 1 a measurement failed, 130 interrupted; what was measured until then is shown in all cases.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.dont_write_bytecode = True

import worker
from model_file import ModelFile, ModelFileError
from peers import DECODE, PREFILL, Peer
from processes import ROOT, MeasureError, build, children_seconds, output
from table import aligned, best, digits_for, quotients, spread

PARTS = ["decode", "prefill", "streams", "ttft", "start", "resident"]
DEPTHS = [0, 512]
OURS = "llorch"
# Concurrent requests, all requests of a measurement, tokens of a prompt and of an answer, and context of each request.
STREAMS, REQUESTS, PROMPT, ANSWER, CONTEXT = 8, 24, 128, 128, 1024
# Mean number of runnable processes above which a measurement is useless.
BUSY = 0.5
START = time.monotonic()


@dataclass
class Cell:
    """A measurement, the engines that can do it, and the results of each round."""

    part: str
    threads: int
    depth: int | None = None
    # Function that measures once, by engine.
    engines: dict = field(default_factory=dict)
    # Values of all rounds, and further figures, by engine; `None` where the measurement failed.
    values: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)

    def name(self):
        depth = "" if self.depth is None else f" after {self.depth}"
        return f"{self.part}{depth}, {self.threads} thread{'s'[: self.threads != 1]}"

    def measure(self, turn, failures):
        """Measures all engines once, starting with a different engine in each turn."""
        names = list(self.engines)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            say(f"  {self.name()}: {name}")
            try:
                value, details = self.engines[name]()
            except (MeasureError, OSError) as error:
                failures.append(f"{self.name()}, {name}: {error}")
                say(f"error: {failures[-1]}")
                value, details = None, None
            self.values.setdefault(name, []).append(value)
            self.details.setdefault(name, []).append(details)

    def drop_incomplete(self):
        """Drops a round in which not every engine was measured."""
        rounds = min(len(self.values.get(name, [])) for name in self.engines)
        for figures in (self.values, self.details):
            for name in list(figures):
                del figures[name][rounds:]
                if not rounds:
                    del figures[name]

    def peers(self):
        return [name for name in self.engines if name != OURS]

    def detail(self, name, key, factor=1):
        return [details and details[key] * factor for details in self.details[name]]


def say(text):
    minutes, seconds = divmod(int(time.monotonic() - START), 60)
    print(f"{minutes:3}:{seconds:02} {text}", file=sys.stderr, flush=True)


@dataclass
class Programs:
    """Our programs, and how each is measured."""

    paths: dict

    def machine(self, threads, size):
        """Returns the rate at which the threads read `size` bytes, in GB/s, and as `products` that of byte products, in GMAC/s."""
        text = output([self.paths["kernels"], "machine", threads, max(1, size // 1_000_000)])
        return figure(text, r"read with .*?: ([\d.]+)"), {"products": figure(text, r"products with .*?: ([\d.]+)")}

    def decode(self, model, threads, depth):
        text = output([self.paths["engine"], model, f"threads={threads}", "runs=1", f"depth={depth}"])
        return figure(text, rf"decode {DECODE} at {depth} +([\d.]+) tokens/s"), {}

    def prefill(self, model, threads):
        text = output([self.paths["engine"], model, f"threads={threads}", "runs=1", "prefill"])
        return figure(text, rf"prefill {PREFILL} +([\d.]+) tokens/s"), {}

    def worker_streams(self, model, threads, context):
        options = ["--slots", STREAMS, "--context-length", context, "--cache-tokens", STREAMS * CONTEXT]
        return self.streams(worker.server(self.worker, model, threads, *options), "worker")

    def streams(self, server, api):
        """Returns the tokens per second of all requests to a server together."""
        bench = [self.paths["llorch"], "dev", "bench", "--url", "{url}", "--api", api, "--concurrency", STREAMS]
        bench += ["--requests", REQUESTS, "--prompt-tokens", PROMPT, "--output-tokens", ANSWER, "--format", "json"]
        bench += ["--model", "any"] if api == "openai" else []
        with server as running:
            running.wait()
            before = children_seconds()
            command = [running.url if part == "{url}" else part for part in bench]
            # Exit code 1 means that some requests failed; the report counts them.
            report = json.loads(output(command, {"LLORCH_WORKER_SECRET": worker.SECRET}, accepted=(0, 1)))
            used = children_seconds() - before
            resident = running.resident_bytes()
        [level] = report["levels"]
        if level["errors"] == level["requests"]:
            raise MeasureError("all requests failed")
        details = {
            "errors": level["errors"],
            "load_generator_cpu": used / level["seconds"],
            "tokens_per_answer": level["tokens_out"] / (level["requests"] - level["errors"]),
            "ttft_ms_p50": level["ttft_ms"]["p50"],
            "resident_bytes": resident,
        }
        return level["output_tokens_per_s"], details

    @property
    def worker(self):
        return self.paths["llorch-candled"]


def figure(text, pattern):
    found = re.search(pattern, text)
    if not found:
        raise MeasureError(f"found no figure in {text!r}")
    return float(found.group(1))


def cells_of(parts, threads, header, programs, peers):
    """Returns the measurements of a model."""
    model, most = header.path, max(threads)
    context, size = min(CONTEXT, header.context()), header.decode_bytes(0)
    cells = []
    if {"decode", "prefill"} & set(parts):
        cells += [Cell("machine", count, engines={OURS: lambda count=count: programs.machine(count, size)}) for count in threads]
    if "decode" in parts:
        for count in threads:
            for depth in DEPTHS:
                work = (model, count, depth)
                cells.append(Cell("decode", count, depth, engines_of(programs, peers, "bench", "decode", work)))
    if "prefill" in parts:
        for count in threads:
            cells.append(Cell("prefill", count, None, engines_of(programs, peers, "bench", "prefill", (model, count))))
    if "streams" in parts:
        engines = {OURS: lambda: programs.worker_streams(model, most, context)}
        for peer in peers:
            if peer.server:
                engines[peer.name] = lambda peer=peer: programs.streams(
                    peer.serve(model, most, STREAMS, STREAMS * CONTEXT), "openai"
                )
        cells.append(Cell("streams", most, None, engines))
    alone = {"ttft": worker.time_to_first_token, "start": worker.start_to_first_token, "resident": worker.resident}
    for part, measure in alone.items():
        if part in parts:
            cells.append(Cell(part, most, None, {OURS: lambda measure=measure: measure(programs.worker, model, most)}))
    return cells


def engines_of(programs, peers, program, work, arguments):
    """Returns the function that measures each engine, for all engines that have the program."""
    engines = {OURS: lambda: getattr(programs, work)(*arguments)}
    for peer in peers:
        if getattr(peer, program):
            engines[peer.name] = lambda peer=peer: getattr(peer, work)(*arguments)
    return engines


def show(model, cells):
    """Returns the lines that show a model's figures."""
    rounds = max((len(values) for cell in cells for values in cell.values.values()), default=0)
    counted = f"{rounds} round{'s'[: rounds != 1]}"
    lines = ["", f"{model.path.name}: {model.size / 1e6:.0f} MB; {counted}, median [least..largest]"]
    machine = {cell.threads: cell for cell in cells if cell.part == "machine"}
    for title, part, show_part in (
        ("decode 128, tokens/s", "decode", show_decode),
        ("prefill 512, tokens/s", "prefill", show_prefill),
        (f"{STREAMS} streams over HTTP, tokens/s", "streams", show_streams),
    ):
        shown = [cell for cell in cells if cell.part == part and cell.values]
        if shown:
            lines += ["", f"{title}", *aligned(show_part(shown, model, machine))]
    alone = [cell for cell in cells if cell.part in ("ttft", "start", "resident") and cell.values]
    if alone:
        lines += ["", "worker", *aligned([row for cell in alone for row in show_alone(cell, model)])]
    if machine:
        lines += ["", "machine", *aligned([row for cell in machine.values() for row in show_machine(cell)])]
    return lines


def rates(cell, name):
    values = cell.values.get(name, [])
    return spread(values, digits_for(values))


def ratio(cell, others):
    return spread(quotients(cell.values[OURS], others), 2)


def show_decode(cells, model, machine):
    peers = cells[0].peers()
    rows = [["threads", "after", OURS, *peers, *(["ours / best"] if peers else []), "ours / bandwidth"]]
    for cell in cells:
        to_best = [ratio(cell, best([cell.values[name] for name in peers]))] if peers else []
        # The middle position represents all positions.
        size = model.decode_bytes(cell.depth + DECODE // 2) / 1e9
        limit = [read and read / size for read in machine[cell.threads].values[OURS]]
        names = [OURS, *peers]
        rows.append([str(cell.threads), str(cell.depth), *(rates(cell, name) for name in names), *to_best, ratio(cell, limit)])
    return rows


def show_prefill(cells, model, machine):
    peers = cells[0].peers()
    rows = [["threads", OURS, *peers, *(f"ours / {name}" for name in peers), "ours / int8 peak"]]
    for cell in cells:
        products = model.prefill_products() / 1e9
        peak = machine[cell.threads].detail(OURS, "products", 1 / products)
        to_peers = [ratio(cell, cell.values[name]) for name in peers]
        rows.append([str(cell.threads), *(rates(cell, name) for name in [OURS, *peers]), *to_peers, ratio(cell, peak)])
    return rows


def show_streams(cells, model, machine):
    [cell] = cells
    rows = [["threads", "engine", "rate", "ours / it", "TTFT p50 ms", "tokens an answer", "failed", "load generator, % of a CPU", "resident MB"]]
    for name in [OURS, *cell.peers()]:
        of = lambda key, factor, digits: spread(cell.detail(name, key, factor), digits)
        rows.append(
            [
                str(cell.threads),
                name,
                rates(cell, name),
                "" if name == OURS else ratio(cell, cell.values[name]),
                of("ttft_ms_p50", 1, 0),
                of("tokens_per_answer", 1, 0),
                f"{sum(filter(None, cell.detail(name, 'errors')))} of {REQUESTS * len(cell.values[name])}",
                of("load_generator_cpu", 100, 1),
                of("resident_bytes", 1e-6, 0),
            ]
        )
    if cell.peers():
        everyone = best([cell.values[name] for name in cell.peers()])
        rows.append(["", "best peer", "", ratio(cell, everyone), *[""] * 5])
    return rows


def show_alone(cell, model):
    values = cell.values[OURS]
    threads = f"{cell.threads} threads"
    if cell.part == "ttft":
        return [[f"first token, {worker.CACHED} of {worker.PROMPT} prompt tokens cached, {threads}", f"{spread(values, 1)} ms"]]
    if cell.part == "start":
        return [[f"start of the process to the first token, {threads}", f"{spread(values, 2)} s"]]
    contexts = [context for context in cell.detail(OURS, "context") if context]
    cache = max(contexts, default=0) * model.cache_bytes_per_token()
    whole = model.size + cache
    share = spread([value and value / whole for value in values], 2)
    resident = spread([value and value / 1e6 for value in values], 0)
    label = f"resident after loading; file and KV cache of {max(contexts, default=0)} tokens have {whole / 1e6:.0f} MB"
    return [[label, f"{resident} MB, ratio {share}"]]


def show_machine(cell):
    threads = f"{cell.threads} thread{'s'[: cell.threads != 1]}"
    products = cell.detail(OURS, "products")
    return [
        [f"read, {threads}", f"{spread(cell.values[OURS], 1)} GB/s"],
        [f"byte products, {threads}", f"{spread(products, 0)} GMAC/s"],
    ]


def describe_machine():
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return {
        "processor": cpu.group(1) if cpu else platform.machine(),
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "commit": commit.stdout.strip(),
    }


def record(machine, peers, results):
    """Returns all results, in the form in which a file stores them."""
    return {
        "machine": machine,
        "peers": [
            {
                "name": peer.name,
                "bench": peer.bench and str(peer.bench),
                "server": peer.server and str(peer.server),
                "bench_flags": peer.bench_flags,
                "server_flags": peer.server_flags,
                "commit": peer.commit,
            }
            for peer in peers
        ],
        "models": [
            {
                "file": model.path.name,
                "bytes": model.size,
                "decode_bytes": {depth: model.decode_bytes(depth + DECODE // 2) for depth in DEPTHS},
                "prefill_products": model.prefill_products(),
                "cells": [
                    {
                        "part": cell.part,
                        "threads": cell.threads,
                        "depth": cell.depth,
                        "values": cell.values,
                        "details": cell.details,
                    }
                    for cell in cells
                ],
            }
            for model, cells in results
        ],
    }


def named(text):
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def list_of(kind):
    def parse(text):
        return [kind(part) for part in text.split(",")]

    return parse


def part(text):
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"`{text}` is unknown: use some of {', '.join(PARTS)}")
    return text


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="+", help="GGUF files")
    add("--peer", type=named, action="append", default=[], metavar="NAME=PATH", help="an engine: a folder with llama-bench and llama-server, or one of these programs (then once for each)")
    add("--flags", type=named, action="append", default=[], metavar="NAME=FLAGS", help="a peer's flags of llama-bench: --flags 'ik=-rtr 1'")
    add("--server-flags", type=named, action="append", default=[], metavar="NAME=FLAGS", help="a peer's flags of llama-server")
    add("--rounds", type=positive, default=5, help="[default: 5]")
    add("--threads", type=list_of(positive), default=[1, 2], metavar="N,...", help="numbers of threads; servers have the largest [default: 1,2]")
    add("--only", type=list_of(part), default=PARTS, metavar="PART,...", help=f"parts to measure [default: {','.join(PARTS)}]")
    add("--json", type=Path, metavar="FILE", help="write every round's figures to this file")
    args = parser.parse_args()
    try:
        return args, peers_of(args)
    except ValueError as error:
        parser.error(str(error))


def peers_of(args):
    """Returns the peers that the arguments name. Fails with ValueError if one of them is invalid."""
    peers = {}
    for name, path in args.peer:
        if name == OURS:
            raise ValueError(f"`{OURS}` is the worker itself: give the peer another name")
        peers.setdefault(name, Peer(name)).add(Path(path).expanduser().resolve())
    for attribute, pairs in (("bench_flags", args.flags), ("server_flags", args.server_flags)):
        for name, flags in pairs:
            if name not in peers:
                raise ValueError(f"flags are given for `{name}`, which no --peer names")
            getattr(peers[name], attribute).extend(shlex.split(flags))
    return list(peers.values())


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    args, peers = parse_arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        models = [ModelFile(Path(path).resolve()) for path in args.model]
        say("building the worker and its benchmarks")
        programs = Programs(build())
    except (OSError, ModelFileError, MeasureError) as error:
        sys.exit(f"error: {error}")
    machine = describe_machine()
    if os.getloadavg()[0] > BUSY:
        say(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}): the figures will be those of a busy machine")
    results, failures = [], []
    code = 0
    try:
        for model in models:
            cells = cells_of(args.only, args.threads, model, programs, peers)
            results.append((model, cells))
            for turn in range(args.rounds):
                say(f"{model.path.name}: round {turn + 1} of {args.rounds}")
                for cell in cells:
                    cell.measure(turn, failures)
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
        for _, cells in results:
            for cell in cells:
                cell.drop_incomplete()
    print(f"{machine['processor']}, {machine['processors']} processors; llorch {machine['commit']}", end="")
    print("".join(f"; {peer.name} {peer.commit}" for peer in peers if peer.commit not in (None, "unknown")))
    for model, cells in results:
        measured = [cell for cell in cells if cell.values]
        if measured:
            print("\n".join(show(model, measured)))
    if failures:
        print("\nfailed:", *failures, sep="\n  ")
    if args.json:
        args.json.write_text(json.dumps(record(machine, peers, results), indent=1) + "\n")
    sys.exit(code or bool(failures))


if __name__ == "__main__":
    main()
