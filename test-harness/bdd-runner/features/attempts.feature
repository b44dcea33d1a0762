Feature: Attempts
  A text continues where it stopped, whichever process dies.

  Background:
    Given the default model is on disk
    And a running orchestrator that keeps its port and a running pool
    And an undisturbed job of 60 tokens at temperature 0.8

  # [BDD-070] P4, P5
  Scenario Outline: A worker that is killed takes no text with it
    When the same job is submitted again and its worker is killed after <tokens> tokens
    And I follow the rest of its events
    Then its text equals that of the undisturbed job, token by token
    And its receipt equals that of the undisturbed job
    And it took two attempts, the second of which continued
    And a late call for the first attempt is refused

    Examples:
      | tokens |
      | 1      |
      | 7      |
      | 50     |

  # [BDD-071] P8, P11
  Scenario Outline: A restart of the orchestrator interrupts nothing
    When the same job is submitted again and the orchestrator gets SIG<signal> after 10 tokens
    And I follow the rest of its events
    Then its text equals that of the undisturbed job, token by token
    And its receipt equals that of the undisturbed job
    And it took one attempt
    And its stream can be resumed from every event with the same rest

    Examples:
      | signal |
      | KILL   |
      | TERM   |
