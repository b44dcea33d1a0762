Feature: The front door
  One command shows a real model answering through all three daemons, and tells the truth when it did not.

  # [BDD-001]
  Scenario: A new user runs the demo
    Given the default model is on disk
    When I run `llorch dev demo`
    Then it exits with 0
    And standard output contains "4"
    And standard error contains all of:
      | job-      |
      | attempt 1 |
      | worker-   |
      | TTFT      |
      | tokens/s  |
    And nothing is left running

  # [BDD-002]
  Scenario Outline: The demo fails when a part of the chain dies during it
    Given the default model is on disk
    When I run `llorch dev demo --keep --max-tokens 400 --prompt "Write a long story about a lighthouse."` and kill the <part> after the first words
    Then it fails
    And the API still shows one job of one attempt on "worker-cpu-0" whose text is what was printed

    Examples:
      | part   |
      | worker |
      | pool   |

  # [BDD-003]
  Scenario Outline: A demo that failed leaves nothing running
    Given the default model is on disk
    When I run `llorch dev demo --max-tokens 400 --prompt "Write a long story about a lighthouse."` and kill the <part> after the first words
    Then it fails
    And nothing is left running

    Examples:
      | part   |
      | worker |
      | pool   |

  # [BDD-004]
  Scenario: What a kept demo prints can be pasted
    Given the default model is on disk
    When I run `llorch dev demo --keep --max-tokens 4` where the variables name other daemons
    Then the commands that it prints work when pasted there
    And nothing is left running
