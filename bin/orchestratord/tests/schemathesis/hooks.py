"""Leads the schema tester to where the daemon's work is: to the jobs, pools and models that exist.

What schemathesis draws is valid or invalid as it chose; a valid name is replaced by another valid one, so that is kept.
"""

import atexit
import collections
import itertools
import json
import os
import random
import re
import threading

import schemathesis

# What the test has set up: a model and a pool's address, a pool that lives, and one whose heartbeats are drawn.
HOUSE = json.loads(os.environ["LLORCH_SCHEMA_HOUSE"])
MODEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}|hf:\w+/\w+|file:/\w+")
NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")

lock = threading.Lock()
calls = collections.defaultdict(collections.Counter)
jobs = collections.deque(maxlen=20)
choices = random.Random(1)
beats = itertools.count(1)


@schemathesis.hook
def before_call(context, case, kwargs):
    label = case.operation.label
    with lock:
        dice = choices.random()
        known = list(jobs)
    path, body = case.path_parameters, case.body
    if not case.meta or case.meta.generation.mode.is_negative:
        known = []
    if label == "POST /v2/tasks" and isinstance(body, dict):
        if isinstance(body.get("model"), str) and MODEL.fullmatch(body["model"]):
            body["model"] = HOUSE["model"]
        if dice < 0.2:
            case.headers["Accept"] = "text/event-stream"
    elif label == "POST /v2/pools/register" and isinstance(body, dict):
        # No stranger's address is ever called.
        if isinstance(body.get("url"), str) and body["url"].startswith("http"):
            body["url"] = HOUSE["pool_url"]
    elif label == "POST /v2/pools/{id}/heartbeat" and isinstance(body, dict):
        aim_heartbeat(path, body, case.meta and case.meta.generation.mode.is_positive, dice < 0.7)
    elif label == "GET /v2/scheduler/trace" and isinstance(case.query, dict):
        # A recording lasts as long as it is asked to; for ever where it is not.
        if case.query.get("for_ms") in (None, "") or str(case.query["for_ms"]).isdigit():
            aim_recording(case.query)
    elif label.startswith(("POST /v2/pools/{id}/", "GET /v2/pools/{id}")) and dice < 0.6:
        path["id"] = HOUSE["pool"]
    elif known and "/v2/tasks/{id}" in label and dice < 0.7:
        path["id"] = known[int(dice * 1000) % len(known)]


def aim_heartbeat(path, body, valid, house):
    """Makes a valid heartbeat speak of the pool that it is sent for, mostly of the one that the test registered for it."""
    status = body.get("snapshot", {})
    status = status.get("status", {}) if isinstance(status, dict) else {}
    names = [path.get("id"), body.get("instance_id")]
    if not isinstance(status, dict) or not all(isinstance(name, str) for name in names):
        return
    # A whole number is one however it is written.
    seq = body.get("seq")
    if not isinstance(status.get("pool_id"), str) or not isinstance(seq, (int, float)):
        return
    if valid:
        status["pool_id"] = path["id"]
    if house:
        path["id"] = status["pool_id"] = HOUSE["drawn_pool"]
        body["instance_id"] = HOUSE["drawn_instance"]
        if 0 <= seq < 2**64 and seq == int(seq):
            body["seq"] = next(beats)


def aim_recording(query):
    """Makes a recording that would be long a short one; one that is refused stays so."""
    span = query.get("for_ms")
    if span in (None, "") or 1 <= int(span) <= 86_400_000:
        query["for_ms"] = 5


@schemathesis.hook
def after_call(context, case, response):
    with lock:
        calls[case.operation.label][response.status_code] += 1
        if case.operation.label == "POST /v2/tasks" and "location" in response.headers:
            jobs.append(response.headers["location"][0].rsplit("/", 1)[1])


@atexit.register
def report():
    with open(os.environ["LLORCH_SCHEMA_CALLS"], "w") as out:
        json.dump(calls, out)
