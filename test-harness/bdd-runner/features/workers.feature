Feature: Workers
  The owner of a pool host starts and stops workers, with or without the daemon.

  # [BDD-020]
  Scenario: A worker is started and stopped through the daemon
    Given the default model is on disk
    And a running pool
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --wait`
    Then it exits with 0
    And the first worker is ready
    When I run `llorch-pool worker stop worker-cpu-0`
    Then it exits with 0
    And the first worker is stopped
    And no process of the worker program is left

  # [BDD-021]
  Scenario: A worker is started and stopped without a daemon
    Given the default model is on disk
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --wait`
    Then it exits with 0
    And the first worker is ready
    When I run `llorch-pool worker stop --all`
    Then it exits with 0
    And no process of the worker program is left

  # [BDD-025] [POOLCTL-036]
  Scenario: A pool is stopped with its workers while jobs wait
    Given the default model is on disk
    And a running orchestrator and a running pool
    When I submit a job of 150 tokens with the prompt "Once upon a time"
    And it has produced 5 tokens
    And I submit a job of 150 tokens with the prompt "Once upon a time"
    And I run `llorch-pool daemon stop --workers`
    Then it exits with 0
    And no process of the worker program is left

  # [BDD-022]
  Scenario: A model that is not on disk
    Given a running pool
    When I run `llorch-pool worker spawn cpu --model smollm2-135m`
    Then it exits with 3
    And standard error contains "llorch-pool models download smollm2-135m"

  # [BDD-023]
  Scenario: A file that is cut off takes nothing down
    Given the default model is on disk
    And a model "broken" whose file is cut off after 1000000 bytes
    And a running orchestrator and a running pool
    When an agent posts to "/v2/tasks":
      """
      {"model": "broken", "prompt": "hello"}
      """
    Then the answer is 202
    And the job ends as failed
    And its error is "MODEL_FAILED" and names "truncated"
    And the first worker is failed
    And a further job of 3 tokens completes
