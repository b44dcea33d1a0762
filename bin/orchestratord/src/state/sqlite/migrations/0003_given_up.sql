-- What every start looks for: attempts that were given up lately, of which their workers may not have heard.
CREATE INDEX attempts_given_up ON attempts (ended_us)
    WHERE outcome IN ('worker_lost', 'orchestrator_restarted', 'cancelled', 'expired');
