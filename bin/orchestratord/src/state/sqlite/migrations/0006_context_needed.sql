-- Smallest context that runs the job, in tokens, once a worker whose context is too small has counted them.
ALTER TABLE jobs ADD COLUMN context_needed INTEGER;
