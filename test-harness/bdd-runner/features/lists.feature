Feature: Lists of jobs
  A list is complete, so that a script can rely on it.

  # [BDD-016] RULE-001
  Scenario: The script of the specification cancels everything
    Given the default model is on disk
    And a running orchestrator without a bound on its queue and a running pool
    When 300 agents submit a job each
    And 25 of the jobs are cancelled
    And this script runs:
      """
      for job in $(llorch jobs list --format json | jq -r '.[].id'); do llorch jobs cancel $job; done
      """
    Then it exits with 0
    And standard output has a line for each of the jobs
    And none of the jobs waits or runs
    When I run `llorch jobs list`
    Then it exits with 0
    And standard output contains "… 280 more"
