-- Receipts of completed jobs: hashes and settings, no text. A table of its own: in a row of `jobs`, which lists read, it would
-- need a second page.
CREATE TABLE receipts (
    job_id  TEXT PRIMARY KEY NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    receipt TEXT NOT NULL
) STRICT, WITHOUT ROWID;
