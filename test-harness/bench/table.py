"""Tables of medians and spreads."""

import statistics


def spread(values, digits):
    """Returns the median with the least and the largest value. Missing values don't count."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    least, median, most = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{median} [{least}..{most}]"


def digits_for(values):
    """Returns the digits after the point that show about three places of the values."""
    largest = max((abs(value) for value in values if value is not None), default=0)
    return 0 if largest >= 100 else 1 if largest >= 10 else 2


def quotients(values, others):
    """Returns a / b of each round; `None` if a or b is missing."""
    return [a / b if a is not None and b else None for a, b in zip(values, others)]


def best(lists):
    """Returns the largest value of each round; `None` if all are missing."""
    rounds = zip(*lists)
    return [max((value for value in values if value is not None), default=None) for values in rounds]


def aligned(rows):
    """Returns the rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
