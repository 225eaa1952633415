"""The mark of a request in its slot: at how many bad ends of workers it was there (4 bits), and flags; see suspects.py.

Apart from suspects.py for the keeper's sake, which is small.
"""

COUNT_MASK, PASSED, ON_TRIAL, ENDED = 0x0F, 0x10, 0x20, 0x40
OVERDUE = 0x80  # alone: a worker did not answer it in time


def blamed(mark: int) -> int:
    """The mark of a request that was under way when a worker ended by somebody's fault."""
    if mark == OVERDUE:
        return mark
    flags = mark & (PASSED | ENDED) | (ENDED if mark & ON_TRIAL else 0)
    return min((mark & COUNT_MASK) + 1, COUNT_MASK) | flags


def absolved(mark: int) -> int:
    """The mark of one that was under way when a worker ended by no request's fault."""
    return mark & ~ON_TRIAL
