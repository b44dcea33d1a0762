Feature: Jobs
  An agent posts a task, may walk away, and comes back to the exact token.

  Background:
    Given the default model is on disk
    And a running orchestrator and a running pool

  # [BDD-010]
  Scenario: The model's words reach the client one by one
    When I submit a job of 100 tokens with the prompt "Once upon a time"
    And I follow its events to the end
    Then its events are queued, started, tokens and end, each id one higher than the one before
    And its token indices count from 0 without a gap
    And the first token came before half of the time to the end had passed
    And the text of the events is the text of the job

  # [BDD-011]
  Scenario: A reader that was cut off continues at the next event
    When I submit a job of 60 tokens with the prompt "Once upon a time"
    And I follow its events until "1.20"
    And I come back with the last event id "1.20"
    Then its events are queued, started, tokens and end, each id one higher than the one before
    And its token indices count from 0 without a gap
    And the text of the events is the text of the job

  # [BDD-012]
  Scenario: The model is used correctly
    When I run `llorch jobs submit --model smollm2-135m --raw --temperature 0 --max-tokens 8 --prompt "The capital of France is"`
    Then it exits with 0
    And standard output begins with " Paris."
    When I run `llorch jobs submit --model smollm2-135m --raw --temperature 0 --max-tokens 9 --prompt "1, 2, 3, 4, 5,"`
    Then standard output begins with " 6, 7, 8"
    When I run `llorch jobs submit --model smollm2-135m --temperature 0 --prompt "What is 2+2?"`
    Then standard output is "The answer to this classic math problem is 4."

  # [BDD-019]
  Scenario: A job is run again and gives the same tokens
    When I run `llorch-pool models verify smollm2-135m`
    And I submit a job at temperature 0.8 with the prompt "Write a haiku about rain."
    And I run `llorch jobs status JOB`
    Then standard output contains "receipt    llorch-candled"
    And standard output contains "model b179c9523d0e"
    When I run `llorch jobs replay JOB --verify`
    Then it exits with 0
    And standard output begins with "same "
    And standard error contains " replays JOB"
    When I run `llorch jobs replay JOB --verify --format json`
    Then it exits with 0
    And standard output contains '"compared": "tokens"'
    And standard output contains '"receipt_differences": []'

  # [BDD-018]
  Scenario: The speed of the service can be measured
    When I run `llorch dev bench --concurrency 1,2 --requests 3 --prompt-tokens 20 --output-tokens 4 --format json`
    Then it exits with 0
    And standard output contains '"concurrency": 2'
    And standard output contains '"errors": 0'
    And standard output contains '"tokens_out": 12'

  # [BDD-013]
  Scenario: A running job is cancelled
    When I submit a job of 2000 tokens with the prompt "Once upon a time"
    And it has produced 5 tokens
    And I run `llorch jobs cancel JOB`
    Then it exits with 0
    And the job ends as cancelled
    And its worker is idle again
    And a further job of 3 tokens completes

  # [BDD-014]
  Scenario: Invalid requests are refused with a reason and leave nothing behind
    When an agent posts each of these bodies to "/v2/tasks", it is refused with the error:
      | body                                                               | status | code              |
      | {"model": "smollm2-135m", "prompt": "a", "colour": "red"}          | 400    | INVALID_REQUEST   |
      | {"model": "smollm2-135m", "prompt": "a", "temperature": 3}         | 400    | INVALID_REQUEST   |
      | {"model": "smollm2-135m", "prompt": ""}                            | 400    | INVALID_REQUEST   |
      | {"model": "no-such-model", "prompt": "a"}                          | 404    | MODEL_NOT_FOUND   |
      | {"model": "file:/etc/passwd", "prompt": "a"}                       | 404    | MODEL_NOT_FOUND   |
      | {"model": "smollm2-135m", "prompt"                                 | 400    | BAD_JSON          |
      | (10 MB)                                                            | 413    | TOO_LARGE         |
    Then no job is stored
    When an agent gets "/v2/tasks/job-1"
    Then the answer is 404
    And its error code is "JOB_NOT_FOUND" with a hint

  # [BDD-015]
  Scenario: The command line says which model it does not know
    When I run `llorch jobs submit --model no-such-model --prompt hello`
    Then it exits with 3
    And standard error contains "no-such-model"
    And standard error contains "hint:"
