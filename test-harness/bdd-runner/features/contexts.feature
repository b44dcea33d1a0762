Feature: Contexts
  A prompt goes to a worker that has the room for it, whoever sent it and whichever worker is idle.

  Background:
    Given the default model is on disk
    And a running orchestrator and a running pool
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --context-length 512 --wait`

  # [BDD-080] [ORCHD-190]
  Scenario: A small and a large worker are idle
    When I run `llorch-pool worker spawn cpu --model smollm2-135m --context-length 4096 --wait`
    And I submit a job of 3 tokens with a prompt of 731 words
    Then it completes on a worker with a context of 4096 tokens, and no attempt was lost

  # [BDD-081] [ORCHD-190]
  Scenario: Only a small worker exists
    When I submit a job of 3 tokens with a prompt of 731 words
    Then it completes on a worker with a context of 8192 tokens, and no attempt was lost
    And a further job of 3 tokens completes

  # [BDD-082] [ORCHD-190]
  Scenario: The prompt is longer than the model's context
    When I submit a job of 3 tokens with a prompt of 9000 words
    Then the job ends as failed
    And its error is "CONTEXT_OVERFLOW" and names "8192"
