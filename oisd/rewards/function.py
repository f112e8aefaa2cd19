"""What every reward is: a function of completions and gold answers."""

from collections.abc import Sequence


class RewardError(RuntimeError):
    """A reward function failed; `index` is that of the first wrong value, if there is one."""

    def __init__(self, function: str, problem: str, index: int | None = None) -> None:
        super().__init__(f"reward {function}: {problem}")
        self.function = function
        self.index = index
        self._given = function, problem, index

    def __reduce__(self) -> tuple[type, tuple[str, str, int | None]]:
        return type(self), self._given  # for another process


def check_batch(name: str, completions: Sequence[str], answers: Sequence[str]) -> None:
    for argument, strings in (("completions", completions), ("answers", answers)):
        if isinstance(strings, str) or not isinstance(strings, Sequence):
            raise ValueError(
                f"{name}: {argument} must be a list of strings, got "
                f"{'one string' if isinstance(strings, str) else type(strings).__name__}; for one "
                f'completion pass lists of one: {name}(["..."], ["..."])'
            )
    if len(completions) != len(answers):
        raise ValueError(
            f"{name}: wanted one answer per completion, got {len(completions)} completions "
            f"and {len(answers)} answers"
        )
    for argument, strings in (("completions", completions), ("answers", answers)):
        for i, string in enumerate(strings):
            if not isinstance(string, str):
                got = type(string).__name__
                raise ValueError(f"{name}: {argument}[{i}] must be a string, got {got}")


class RewardFunction:
    """Maps completions and gold answers to rewards.

    name: as given to `load_reward`.
    timeouts: completions that earned 0.0 because grading them took too long or ended their worker
        (for a user's function: batches, which raised).
    """

    name: str

    def __init__(self) -> None:
        self.timeouts = 0

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        raise NotImplementedError

    def start(self) -> None:
        """Start what grading needs, without waiting for it: call it before the first rollout."""

    def close(self) -> None:
        """Stop the workers, if any; may be called twice. Grading again starts new ones."""
