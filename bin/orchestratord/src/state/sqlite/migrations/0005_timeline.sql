-- The wall clock may step, so durations are reckoned by points of a timeline that does not: the columns `..._steady_us`,
-- `deadline_us` and `not_before_us`. The other times are shown to people and follow the wall clock.
CREATE TABLE timeline (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    -- The latest point that was noted, NULL before the first one; the boot at that moment, and the time since it.
    at_us    INTEGER,
    boot_id  TEXT NOT NULL,
    boot_us  INTEGER NOT NULL
) STRICT;
-- Earlier builds know the wall clock only, which may have been wrong. Their jobs count as ended at this migration, and a
-- waiting job gets its whole time again: nothing is dropped or expired too early.
INSERT INTO timeline (only_row, at_us, boot_id, boot_us)
    SELECT 1, MAX(MAX(created_us, COALESCE(ended_us, 0))), '', 0 FROM jobs;

ALTER TABLE jobs ADD COLUMN created_steady_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN ended_steady_us INTEGER;
UPDATE jobs SET created_steady_us = created_us,
                ended_steady_us = iif(ended_us IS NULL, NULL, (SELECT at_us FROM timeline)),
                deadline_us = (SELECT at_us FROM timeline) + deadline_us - created_us,
                not_before_us = NULL;
DROP INDEX jobs_kept;
DROP INDEX jobs_dropped;
CREATE INDEX jobs_kept ON jobs (ended_steady_us) WHERE ended_steady_us IS NOT NULL AND dropped_us IS NULL;
CREATE INDEX jobs_dropped ON jobs (ended_steady_us) WHERE dropped_us IS NOT NULL;

ALTER TABLE attempts ADD COLUMN ended_steady_us INTEGER;
UPDATE attempts SET ended_steady_us = (SELECT at_us FROM timeline) WHERE ended_us IS NOT NULL;
DROP INDEX attempts_given_up;
CREATE INDEX attempts_given_up ON attempts (ended_steady_us)
    WHERE outcome IN ('worker_lost', 'orchestrator_restarted', 'cancelled', 'expired');
