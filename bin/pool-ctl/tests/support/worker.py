#!/usr/bin/env python3
import http.server, json, os, signal, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
kind = open(args["--model"], "rb").read().decode("latin-1")
if "broken" in kind:
    print("error: the model is broken", flush=True)
    sys.exit(65)
asked = 0
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        ready = asked > 2 and not "slow" in kind
        body = json.dumps({
            "worker_id": args["--worker-id"], "nonce": os.environ["LLORCH_WORKER_NONCE"],
            "state": "ready" if ready else "loading", "load_percent": 100 if ready else 40,
            "context_length": 512 if ready else None, "slots": int(args["--slots"]), "active": 0,
            "measured_bytes": 5000000, "progress": asked,
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
try:
    server = http.server.HTTPServer((args["--bind"], int(args["--port"])), Health)
except OSError:
    sys.exit(75)
print("the worker listens", flush=True)
server.serve_forever()
