Feature: Everything dies, and nothing is lost
  Every part of the chain is killed and frozen again and again while clients stream, disconnect, come back and cancel; then
  everything ends, and one checker compares what clients were told, what the database holds and what the hosts hold.

  # [BDD-061] P1 P2 P3 P4 P5 P8 P9 P11 P14
  Scenario Outline: Kills over the whole chain
    When <kills> processes of the whole chain are killed, drawn from the seed <seed>, in at most <minutes> minutes
    Then nothing is lost, doubled or spliced

    Examples:
      | kills | seed | minutes |
      | 25    | 4    | 1       |

    @soak
    Examples:
      | kills | seed | minutes |
      | 500   | 5    | 60      |
