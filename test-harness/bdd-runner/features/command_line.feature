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
    And standard output contains "runs already"
    When I run `llorch orchestrator status`
    Then it exits with 0
    When I run `llorch orchestrator stop`
    Then it exits with 0
    And nothing is left running
