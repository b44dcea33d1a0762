-- Which run of the daemon the database belongs to. Every write transaction compares `epoch`; every start raises it, so a
-- run that was frozen while another one started can't write. `clean`: whether the last run closed the database in order.
CREATE TABLE holder (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    epoch    INTEGER NOT NULL,
    clean    INTEGER NOT NULL
) STRICT;
INSERT INTO holder (only_row, epoch, clean) VALUES (1, 0, 1);

-- A raised epoch that goes back would let an old run write.
CREATE TRIGGER holder_epoch_grows BEFORE UPDATE OF epoch ON holder WHEN new.epoch < old.epoch
BEGIN
    SELECT RAISE(ABORT, 'an epoch never goes back');
END;

-- The prompts stand apart from what changes and what lists show: a job's change of state does not write its prompt again,
-- and a list does not read past it.
CREATE TABLE requests (
    job_id TEXT PRIMARY KEY NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    spec   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO requests (job_id, spec) SELECT id, spec FROM jobs ORDER BY id;

CREATE TABLE new_jobs (
    id            TEXT PRIMARY KEY NOT NULL,
    status        TEXT NOT NULL
                  CHECK (status IN ('queued', 'dispatched', 'running', 'completed', 'failed', 'cancelled', 'expired')),
    model         TEXT NOT NULL,
    priority      TEXT NOT NULL CHECK (priority IN ('interactive', 'batch')),
    session_id    TEXT,
    placement     TEXT NOT NULL,
    labels        TEXT NOT NULL,
    max_attempts  INTEGER NOT NULL,
    created_us    INTEGER NOT NULL,
    not_before_us INTEGER,
    deadline_us   INTEGER,
    started_us    INTEGER,
    ended_us      INTEGER,
    -- When its prompt, text and log were dropped.
    dropped_us    INTEGER,
    -- Of the latest lease. Only ever grows, whatever happens to the attempts.
    fence         INTEGER NOT NULL DEFAULT 0,
    usage         TEXT,
    error         TEXT
) STRICT, WITHOUT ROWID;
INSERT INTO new_jobs (id, status, model, priority, session_id, placement, labels, max_attempts, created_us,
                      not_before_us, deadline_us, started_us, ended_us, fence, usage, error)
    SELECT id, status, model, priority, session_id, placement, labels, max_attempts, created_us,
           not_before_us, deadline_us, started_us, ended_us, fence, usage, error FROM jobs ORDER BY id;
DROP TABLE jobs;
ALTER TABLE new_jobs RENAME TO jobs;

CREATE INDEX jobs_live ON jobs (id) WHERE status IN ('queued', 'dispatched', 'running');
-- Whatever a list filters by, it walks the ends of a few ranges of these two: see `queries::list`.
CREATE INDEX jobs_by_class ON jobs (status, priority, id);
CREATE INDEX jobs_by_model ON jobs (model, status, priority, id);
-- What is to be dropped next, and what is to be forgotten next.
CREATE INDEX jobs_kept ON jobs (ended_us) WHERE ended_us IS NOT NULL AND dropped_us IS NULL;
CREATE INDEX jobs_dropped ON jobs (ended_us) WHERE dropped_us IS NOT NULL;

CREATE TRIGGER jobs_fence_grows BEFORE UPDATE OF fence ON jobs WHEN new.fence < old.fence
BEGIN
    SELECT RAISE(ABORT, 'a fence never goes back');
END;

CREATE TABLE new_events (
    job_id    TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt   INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq  INTEGER NOT NULL,
    payload   TEXT NOT NULL,
    PRIMARY KEY (job_id, first_seq)
) STRICT, WITHOUT ROWID;
INSERT INTO new_events (job_id, attempt, first_seq, last_seq, payload)
    SELECT job_id, attempt, first_seq, last_seq, payload FROM events ORDER BY job_id, first_seq;
DROP TABLE events;
ALTER TABLE new_events RENAME TO events;

-- Jobs whose log is being dropped, a few rows at a time.
CREATE TABLE purges (
    job_id TEXT PRIMARY KEY NOT NULL REFERENCES jobs (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- For the cascade when a job is forgotten.
CREATE INDEX idempotency_by_job ON idempotency (job_id);

-- What the pools said when they registered, so that they are known after a restart before they speak.
CREATE TABLE pools (
    id                    TEXT PRIMARY KEY NOT NULL,
    instance_id           TEXT NOT NULL,
    url                   TEXT NOT NULL,
    heartbeat_interval_ms INTEGER NOT NULL,
    registered_us         INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
