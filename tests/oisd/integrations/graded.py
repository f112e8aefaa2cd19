"""A process that is sent a reward: a module of its own, as the tests' imports take it seconds."""

import pickle

HALF = r"So it is $\boxed{\frac12}$."


def in_a_process(pickled: bytes) -> list[float | None]:
    return pickle.loads(pickled)([HALF, HALF], final_answer=["0.5", r"\int_0^1 x dx"])
