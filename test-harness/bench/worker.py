"""Requests to a worker, and the measurements that only a worker has."""

import http.client
import itertools
import json
import re
import statistics
import time

from processes import MeasureError, Server

SECRET = "bench"
# Words that most vocabularies have as one token each.
WORDS = "time year people way day man thing woman life child world school state family student group".split()
# Tokens of a prompt, tokens of it in the cache, and number of requests whose median counts.
PROMPT, CACHED, REQUESTS = 528, 512, 9
NUMBERS = itertools.count(1)


def server(program, model, threads, *options):
    command = [program, "--worker-id", "bench", "--model", model, "--backend", "cpu", "--port", "{port}"]
    environment = {"LLORCH_WORKER_SECRET": SECRET, "LLORCH_LOG": "off"}
    return Server([*command, "--threads", threads, *options], environment)


def request(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection.getresponse()


def first_token(port, prompt):
    """Requests one token. Returns the seconds until it came and the number of prompt tokens; `None` while the model loads."""
    number = next(NUMBERS)
    job = {"job_id": f"bench-{number}", "attempt": 1, "fence": 1, "prompt": prompt, "raw": True, "seed": 1, "max_tokens": 1}
    start = time.perf_counter()
    with request(port, "POST", "/execute", job) as answer:
        if answer.status == 503:
            return None
        if answer.status != 200:
            raise MeasureError(f"the worker refused a prompt: {answer.read().decode(errors='replace')}")
        took, event = None, ""
        for line in answer:
            name, _, data = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                event = data
            elif name == "data" and event == "token":
                took = took or time.perf_counter() - start
            elif name == "data" and event == "end":
                return took or time.perf_counter() - start, json.loads(data)["tokens_in"]
            elif name == "data" and event == "error":
                raise MeasureError(f"the worker failed: {data}")
    raise MeasureError("the worker's answer ended without an `end` event")


def cached_tokens(port):
    with request(port, "GET", "/metrics") as answer:
        figures = answer.read().decode()
    return int(re.search(r"^candled_cached_tokens_total (\d+)", figures, re.MULTILINE).group(1))


def words(number, count):
    """Returns words that differ from those of other numbers."""
    return [WORDS[(number * 7 + index * (1 + number % 5)) % len(WORDS)] for index in range(count)]


def time_to_first_token(program, model, threads):
    """Returns the milliseconds to the first token of a prompt whose tokens are in the cache, except for the last few."""
    with server(program, model, threads, "--context-length", 2 * PROMPT, "--cache-tokens", 4 * PROMPT) as worker:
        worker.wait()
        _, extra = first_token(worker.port, " ".join(words(0, PROMPT)))
        # The vocabulary may add a token at the start.
        extra -= PROMPT
        common = words(1, CACHED - extra)

        def prompt(number):
            return " ".join(common + [WORDS[number % len(WORDS)]] + words(number, PROMPT - CACHED - 1))

        _, tokens = first_token(worker.port, prompt(0))
        if tokens != PROMPT:
            raise MeasureError(f"the prompt has {tokens} tokens instead of {PROMPT}")
        times = []
        for number in range(1, REQUESTS + 1):
            before = cached_tokens(worker.port)
            times.append(first_token(worker.port, prompt(number))[0])
            found = cached_tokens(worker.port) - before
            if found != CACHED:
                raise MeasureError(f"the cache had {found} tokens of the prompt instead of {CACHED}")
    return 1000 * statistics.median(times), {}


def start_to_first_token(program, model, threads):
    """Returns the seconds from the start of the process to its first token. Reads the file first, so that it is in memory."""
    with open(model, "rb") as file:
        while file.read(1 << 24):
            pass
    with server(program, model, threads) as worker:
        while True:
            try:
                if first_token(worker.port, "Once upon a time"):
                    return time.perf_counter() - worker.started, {}
            except OSError:
                pass  # The server does not listen yet.
            worker.check()
            time.sleep(0.002)


def resident(program, model, threads):
    """Returns the resident bytes of a worker with default sizes after loading, and its `context` in tokens."""
    with server(program, model, threads) as worker:
        worker.wait()
        with request(worker.port, "GET", "/health") as answer:
            context = json.load(answer)["context_length"]
        return worker.resident_bytes(), {"context": context}
