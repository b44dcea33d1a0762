Feature: Durable jobs
  A 202 means that the job survives the death of the orchestrator at any instant (P1).

  # [BDD-040] P1
  Scenario Outline: Acknowledged jobs survive
    Given the default model is on disk
    And a running orchestrator without a bound on its queue and a running pool
    When <agents> agents submit at once and the orchestrator is killed in between, <times> times
    Then every acknowledged job completes

    Examples:
      | agents | times |
      | 50     | 2     |

    @soak
    Examples:
      | agents | times |
      | 200    | 10    |
