#!/usr/bin/env python3
"""A fake worker that executes: its API as llorch-candled has it, its tokens numbers that somebody else lets out.

It says that it is at work as long as a job has not ended. A job has `max_tokens` tokens; the one with index I comes as
soon as the file `go` beside the program holds a number above I. A prompt of `die` makes it end in the middle of an event,
one of `flood` makes each token a megabyte.
"""

import argparse
import http.server
import json
import os
import signal
import sys
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("--worker-id")
parser.add_argument("--bind")
parser.add_argument("--port", type=int)
args, _ = parser.parse_known_args()
go = os.path.join(os.path.dirname(os.path.abspath(__file__)), "go")
secret = os.environ["LLORCH_WORKER_SECRET"]
jobs = {}
changed = threading.Condition()


def allowed():
    try:
        return int(open(go).read() or 0)
    except (OSError, ValueError):
        return 0


class Job:
    def __init__(self, request):
        self.fence, self.count, self.prompt = request["fence"], request["max_tokens"], request.get("prompt")
        started = {"job_id": request["job_id"], "attempt": request["attempt"], "fence": self.fence, "tokens_in": 3}
        self.events, self.over = [("started", started)], False
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        for index in range(self.count):
            while allowed() <= index and not self.over:
                time.sleep(0.01)
            if self.over:
                return
            text = "x" * (1 << 20) if self.prompt == "flood" else f"t{index} "
            self.put("token", {"i": index, "t": text, "ids": [index]})
        self.put("end", {"tokens_in": 3, "tokens_out": self.count, "stop_reason": "MAX_TOKENS", "seed": 1, "ttft_ms": 1, "decode_time_ms": 1})

    def put(self, name, data):
        with changed:
            self.events.append((name, data))
            self.over = name == "end"
            changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=None):
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status, code):
        self.answer(status, {"error": {"code": code, "message": f"refused: {code}", "retriable": status == 429,
                                       "correlation_id": self.headers.get("X-Correlation-Id", "")}})

    def known(self):
        if self.headers.get("Authorization") != f"Bearer {secret}":
            self.refuse(401, "UNAUTHORIZED")
            return False
        return True

    def stream(self, job):
        position = int(self.headers.get("Last-Event-ID", 0))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        with changed:
            self.send_header("X-Newest-Event", str(len(job.events)))
        self.end_headers()

        def chunk(data):
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        while True:
            with changed:
                while len(job.events) <= position and not job.over:
                    changed.wait(0.05)
            if len(job.events) <= position:
                break
            name, data = job.events[position]
            position += 1
            event = f"event: {name}\ndata: {json.dumps(data)}\nid: {position}\n\n".encode()
            if job.prompt == "die" and name == "token":
                chunk(event[:20])
                os._exit(3)
            # By halves, as a network may bring them.
            middle = len(event) // 2
            chunk(event[:middle])
            chunk(event[middle:])
            if name == "end":
                break
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self):
        if self.path == "/health":
            active = sum(not job.over for job in jobs.values())
            return self.answer(200, {
                "worker_id": args.worker_id, "nonce": os.environ["LLORCH_WORKER_NONCE"], "state": "ready", "load_percent": 100,
                "slots": 1, "active": active, "context_length": 2048, "measured_bytes": 1000000, "progress": 1,
            })
        if self.known():
            job = jobs.get(self.path.removeprefix("/executions/").removesuffix("/events").replace("%2D", "-"))
            return self.stream(job) if job else self.refuse(404, "NOT_FOUND")

    def do_DELETE(self):
        if self.known():
            found = jobs.pop(self.path.removeprefix("/executions/").replace("%2D", "-"), None)
            return self.answer(204) if found else self.refuse(404, "NOT_FOUND")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.known():
            return None
        job = jobs.get(request["job_id"])
        if job and request["fence"] < job.fence:
            return self.refuse(409, "STALE_FENCE")
        if self.path == "/cancel":
            if job:
                job.over = True
            return self.answer(200, {"cancelled": job is not None})
        if not job and any(not other.over for other in jobs.values()):
            return self.refuse(429, "BUSY")
        if not job:
            job = jobs[request["job_id"]] = Job(request)
        return self.stream(job)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = False
    daemon_threads = True


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
try:
    server = Server((args.bind, args.port), Handler)
except OSError:
    print(f"error: port {args.port} is taken", file=sys.stderr, flush=True)
    os._exit(75)
server.serve_forever()
