#!/usr/bin/env python3
"""A fake worker: it speaks `/health` as llorch-candled does and computes nothing.

The model file's first word says how it behaves: `serve`, `load` (stays loading for ever), `refuse` (refuses the file),
`crash` (ends soon after it began to load), `deaf` (serves, and ignores SIGTERM), `stuck` (says that it works, and never
gets on), `mule` (is stuck and deaf), `greedy` (serves, and takes far more memory than anybody has).
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
for name in ("worker-id", "model", "model-ref", "sha256", "backend", "gpu", "bind", "pool-url", "context-length", "threads"):
    parser.add_argument(f"--{name}")
parser.add_argument("--port", type=int)
parser.add_argument("--slots", type=int, default=1)
parser.add_argument("--stop-grace-s", type=int)
args = parser.parse_args()
behaviour = open(args.model).read().split()[0]


def give_up(code, message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        loading = behaviour == "load"
        body = json.dumps({
            "worker_id": args.worker_id,
            "nonce": os.environ["LLORCH_WORKER_NONCE"],
            "state": "loading" if loading else "ready",
            "load_percent": 40 if loading else 100,
            "slots": args.slots,
            "active": int(behaviour in ("stuck", "mule")),
            "context_length": None if loading else 2048,
            "measured_bytes": None if loading else 1 << 60 if behaviour == "greedy" else 1000000,
            "progress": 1,
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = False


signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour in ("deaf", "mule") else lambda *_: os._exit(0))
# What the pool must not have passed on, and must.
print("variables:", " ".join(sorted(name for name in os.environ if name.startswith("LLORCH"))), file=sys.stderr, flush=True)
try:
    server = Server((args.bind, args.port), Handler)
except OSError:
    give_up(75, f"port {args.port} is taken")
if behaviour == "refuse":
    give_up(65, "tensor 3 lies outside the file")
if behaviour == "crash":
    threading.Thread(target=lambda: (time.sleep(0.1), give_up(3, "the engine fell over"))).start()
server.serve_forever()
