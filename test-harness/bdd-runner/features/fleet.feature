Feature: The fleet
  What a program says about a pool is true at that moment.

  Background:
    Given the default model is on disk
    And a running orchestrator that keeps its port and a pool that reports every 10 minutes

  # [BDD-120] P24
  Scenario Outline: A restarted orchestrator has its workers back at once
    Given the pool has an idle worker
    When the orchestrator gets SIG<signal> and starts again
    Then a job that is submitted now goes to that worker within 5 seconds

    Examples:
      | signal |
      | KILL   |
      | TERM   |

  # [BDD-121] P24
  Scenario: A pool that stops on purpose is shown as stopped, and at once as online when it is back
    When I run `llorch-pool daemon stop`
    And I run `llorch pool list`
    Then standard output contains "stopped"
    When I run `llorch-pool daemon start`
    Then standard output contains "the pool has been registered with http://"
    When I run `llorch pool list`
    Then standard output contains "online"
    When I run `llorch-pool daemon drain`
    And I run `llorch pool list`
    Then standard output contains "drained"
    When I run `llorch-pool daemon resume`
    And I run `llorch pool list`
    Then standard output contains "online"

  # [BDD-122] P24
  Scenario: Tasks can name a model that was just imported
    Given a copy of the default model at "HOME/own.gguf"
    When I run `llorch-pool models import HOME/own.gguf --as own`
    Then standard output contains "tasks can now name it `own`"
    When an agent posts to "/v2/tasks":
      """
      {"model": "own", "prompt": "hi", "max_tokens": 1}
      """
    Then the answer is 202
