-- The identity of a pool's host, and when the pool stopped on purpose.
ALTER TABLE pools ADD COLUMN host_id TEXT;
ALTER TABLE pools ADD COLUMN stopped_us INTEGER;
