Feature: Memory
  A pool host never runs more workers than its memory holds, however and whenever they are started.

  # [BDD-050] P14
  Scenario: Fifty spawns at once where three workers fit
    Given the default model is on disk
    And memory for 3 workers
    And a running pool
    When 50 workers are requested over HTTP at once
    Then 3 of them were started, and 47 refused with the numbers and what to stop
    And 3 workers become ready
    And neither the memory reserved for workers nor the memory that they hold ever exceeded the limit
    And one more worker is still refused
    And the predicted memory is not below the measured, and at most 30 % above it

  # [BDD-051] P14
  Scenario: Fifty spawns at once over HTTP and by command line while the daemon starts
    Given the default model is on disk
    And memory for 3 workers
    When 25 workers are requested over HTTP and 25 by command line while the pool manager starts
    Then 3 of them were started, and 47 refused with the numbers and what to stop
    And 3 workers become ready
    And neither the memory reserved for workers nor the memory that they hold ever exceeded the limit
    And the pool manager has all of them

  # [BDD-052]
  Scenario: A worker's memory is predicted well before it runs
    Given the default model is on disk
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --context-length 64 --wait`
    Then it exits with 0
    And standard output contains "predicted "
    And standard output contains " MiB, measured "
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --context-length 1000 --wait`
    And I run `llorch-pool worker spawn cpu --model smollm2-135m --context-length 8192 --wait`
    Then the predicted memory is not below the measured, and at most 30 % above it
