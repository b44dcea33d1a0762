-- Times are microseconds since 1970. `spec` holds the prompt, so lists read the columns beside it and never `spec`.
CREATE TABLE jobs (
    id            TEXT PRIMARY KEY NOT NULL,
    status        TEXT NOT NULL
                  CHECK (status IN ('queued', 'dispatched', 'running', 'completed', 'failed', 'cancelled', 'expired')),
    model         TEXT NOT NULL,
    priority      TEXT NOT NULL CHECK (priority IN ('interactive', 'batch')),
    session_id    TEXT,
    placement     TEXT NOT NULL,
    labels        TEXT NOT NULL,
    max_attempts  INTEGER NOT NULL,
    spec          TEXT NOT NULL,
    created_us    INTEGER NOT NULL,
    not_before_us INTEGER,
    deadline_us   INTEGER,
    started_us    INTEGER,
    ended_us      INTEGER,
    -- Of the latest lease. Only ever grows, whatever happens to the attempts.
    fence         INTEGER NOT NULL DEFAULT 0,
    usage         TEXT,
    error         TEXT
) STRICT;

CREATE INDEX jobs_live ON jobs (id) WHERE status IN ('queued', 'dispatched', 'running');
CREATE INDEX jobs_by_status ON jobs (status, id);
CREATE INDEX jobs_by_model ON jobs (model, id);

-- A fence that goes back would let a stale worker write.
CREATE TRIGGER jobs_fence_grows BEFORE UPDATE OF fence ON jobs WHEN new.fence < old.fence
BEGIN
    SELECT RAISE(ABORT, 'a fence never goes back');
END;

CREATE TABLE attempts (
    job_id     TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number     INTEGER NOT NULL,
    fence      INTEGER NOT NULL,
    pool_id    TEXT NOT NULL,
    worker_id  TEXT NOT NULL,
    leased_us  INTEGER NOT NULL,
    started_us INTEGER,
    ended_us   INTEGER,
    outcome    TEXT,
    reason     TEXT,
    PRIMARY KEY (job_id, number)
) STRICT, WITHOUT ROWID;

-- The event log. A row holds the events FIRST_SEQ to LAST_SEQ of one attempt as a JSON array.
CREATE TABLE events (
    job_id    TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt   INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq  INTEGER NOT NULL,
    payload   TEXT NOT NULL,
    UNIQUE (job_id, first_seq)
) STRICT;

-- One job for each key of a caller. `fingerprint` is the SHA-256 of the validated request without drawn values.
CREATE TABLE idempotency (
    caller      TEXT NOT NULL,
    key         TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    job_id      TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_us  INTEGER NOT NULL,
    PRIMARY KEY (caller, key)
) STRICT, WITHOUT ROWID;
