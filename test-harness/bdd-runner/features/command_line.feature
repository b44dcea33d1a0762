Feature: Command lines
  The programs control and automate; they never start a conversation (RULE-001).

  # [BDD-030]
  Scenario Outline: Without a subcommand there is help
    When I run `<program>`
    Then it exits with 2
    And standard error contains "Usage: <program>"

    Examples:
      | program     |
      | llorch      |
      | llorch-pool |

  # [BDD-031]
  Scenario Outline: There is no conversation
    When I run `<program> <word>`
    Then it exits with 2

    Examples:
      | program     | word        |
      | llorch      | chat        |
      | llorch      | repl        |
      | llorch      | interactive |
      | llorch-pool | chat        |
      | llorch-pool | repl        |
      | llorch-pool | interactive |

  # [BDD-032]
  Scenario: Daemons start once and stop
    When I run `llorch orchestrator start`
    Then it exits with 0
    When I run `llorch orchestrator start`
    Then it exits with 0
    And standard output contains "is already running"
    When I run `llorch orchestrator status`
    Then it exits with 0
    When I run `llorch orchestrator stop`
    Then it exits with 0
    And nothing is left running

  # [BDD-033]
  Scenario: An orchestrator continues from a copy of its jobs
    Given a running orchestrator with a job that waits
    When I run `llorch orchestrator backup HOME/copy`
    Then it exits with 0
    When I run `llorch orchestrator backup HOME/copy`
    Then it exits with 4
    And standard error contains "--force"
    When I run `llorch orchestrator stop`
    And I run `llorch orchestrator backup --force HOME/copy`
    Then it exits with 0
    When its jobs are lost and replaced by "copy"
    And I run `llorch orchestrator start`
    Then it exits with 0
    When I run `llorch jobs status JOB`
    Then it exits with 0
    And standard output contains "queued"

  # [BDD-034]
  Scenario: An orchestrator takes over from a frozen one
    Given a running orchestrator with a job that waits
    When I run `llorch orchestrator start --take-over`
    Then it exits with 1
    And standard error contains "is running and answers"
    When the orchestrator is frozen
    And I run `llorch orchestrator start --take-over`
    Then it exits with 0
    When I run `llorch jobs status JOB`
    Then it exits with 0
    And standard output contains "queued"
    When the frozen orchestrator wakes up
    Then it ends by itself
    When I run `llorch orchestrator status`
    Then it exits with 0
