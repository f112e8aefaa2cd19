"""A module of rewards that raises when it is imported."""

LIMITS = {}


def limit():
    return LIMITS["most"]


MOST = limit()
