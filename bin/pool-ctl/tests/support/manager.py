#!/usr/bin/env python3
import http.server, json, os, signal, sys
state = os.path.join(os.environ["LLORCH_HOME"], "state", "pool")
if sys.argv[1:2] == ["--config"] and "fail" in open(sys.argv[2]).read():
    print("error: the settings are not to my liking", flush=True)
    sys.exit(1)
status = "ready"
drain = None
def worker():
    over = {"reason": {"kind": "stopped"}, "message": "", "during_start": False, "at": "2026-01-01T00:00:00Z", "log_tail": []}
    return {
        "id": "worker-cpu-4", "model_ref": "smollm2-135m", "model_file": {"size_bytes": 1, "modified_ns": 1, "sha256": None},
        "device": "cpu", "status": status, "pid": 7, "port": 8001, "context_length": 512, "slots": 1, "active": 0,
        "load_percent": 100, "memory": {"predicted_bytes": 1, "measured_bytes": 2}, "created_at": "2026-01-01T00:00:00Z",
        "ready_at": None, "exit": over if status == "stopped" else None,
    }
def registration():
    # How the pool stands with its orchestrator, as the test says.
    try:
        return json.load(open(os.path.join(state, "registration.json")))
    except FileNotFoundError:
        return {"state": "off", "since": "2026-01-01T00:00:00Z"}
class Api(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        body = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        global status, drain
        if self.path == "/version":
            self.answer({"name": "pool-managerd", "version": "0", "api_version": 1})
        elif self.path == "/status":
            if drain and drain["remaining"]:
                # The worker ends while the drain is watched.
                drain = {**drain, "remaining": drain["left"].pop() if drain["left"] else []}
            self.answer({
                "pool_id": "fake", "instance_id": "1", "version": "9.9", "started_at": "2026-01-01T00:00:00Z", "draining": drain is not None, "drain": drain,
                "backends": [], "devices": [], "workers": [worker()], "models": [], "disk": {"total_bytes": 2, "free_bytes": 1},
                "registration": registration(),
            })
        else:
            self.answer({"workers": [worker()]} if self.path == "/workers" else {})
    def do_POST(self):
        global status, drain
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"
        if self.path == "/heartbeat":
            print("told to report", flush=True)
            return self.answer(registration())
        if self.path == "/drain":
            print("told to drain", json.dumps(json.loads(body), sort_keys=True), flush=True)
            drain = {"since": "2026-01-01T00:00:00Z", "deadline": "2026-01-01T00:01:00Z", "stop_workers": True,
                     "remaining": ["worker-cpu-4"], "left": [["worker-cpu-4"]]}
            return self.do_GET_status()
        if self.path == "/resume":
            drain = None
            return self.do_GET_status()
        assert self.path == "/workers/worker-cpu-4/stop"
        if os.path.exists(os.path.join(state, "die")):
            os._exit(9)
        status = "stopped"
        print("told to stop the worker", flush=True)
        self.answer(worker())
    def do_GET_status(self):
        self.path = "/status"
        self.do_GET()
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Api)
stat = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
boot = open("/proc/sys/kernel/random/boot_id").read().strip()
with open(os.path.join(state, "pid.json"), "w") as file:
    json.dump({"pid": os.getpid(), "start_time": int(stat[19]), "boot_id": boot, "version": "9.9"}, file)
with open(os.path.join(state, "addr"), "w") as file:
    file.write(f"http://127.0.0.1:{server.server_port}")
def end(*_):
    print("told to end", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
server.serve_forever()
