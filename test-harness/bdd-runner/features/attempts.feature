Feature: Attempts
  A text goes on where it stopped, whichever process dies.

  Background:
    Given the default model is on disk
    And a running orchestrator that keeps its port and a running pool
    And an undisturbed job of 60 tokens at temperature 0.8

  # [BDD-070] P4, P5
  Scenario Outline: A worker that is killed takes no text with it
    When the same job is submitted again and its worker is killed after <tokens> tokens
    And I follow the rest of its events
    Then its text is the one of the undisturbed job, token by token
    And its receipt is the one of the undisturbed job
    And it took two attempts, the second of which continued
    And a late word of the first attempt is refused

    Examples:
      | tokens |
      | 1      |
      | 7      |
      | 50     |

  # [BDD-071] P8, P11
  Scenario Outline: A restart of the orchestrator interrupts nothing
    When the same job is submitted again and the orchestrator gets SIG<signal> after 10 tokens
    And I follow the rest of its events
    Then its text is the one of the undisturbed job, token by token
    And its receipt is the one of the undisturbed job
    And it took one attempt
    And every place of its stream leads to the same rest

    Examples:
      | signal |
      | KILL   |
      | TERM   |
