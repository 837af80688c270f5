"""Windows of rows that a trainer fetches before their optimizer step, to have responses generated meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kd_plugin.rollouts.rows import mixed_seed
from kd_plugin.rollouts.vllm.engine import ServerEngine


class Lookahead:
    """Fetches the rows of coming optimizer steps.

    Where a run goes on from a checkpoint nothing was fetched: its loader begins with the rows of the present step, and
    responses that were waiting when the checkpoint was written are generated anew, by the weights of the checkpoint.

    Args:
        windows: optimizer steps whose rows are fetched beside the present one's.
    """

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._waiting: deque[Any] = deque()
        self._iterator: Any = None

    def next(self, iterator: Any, fetch: Callable[[], Any]) -> tuple[Any, list[tuple[int, Any]]]:
        """Return the rows of the present step, and those that were fetched for it and later ones.

        Args:
            iterator: of the epoch; with another one what waits is dropped.
            fetch: returns the rows of one more step, something empty at the epoch's end.

        Returns:
            The rows, empty at the epoch's end, and what was fetched now: how many steps it is ahead, and the rows.
        """
        if iterator is not self._iterator:
            self._waiting.clear()
            self._iterator = iterator
        fetched = []
        while len(self._waiting) <= self._windows:
            more = fetch()
            if not more:
                break
            fetched.append((len(self._waiting), more))
            self._waiting.append(more)
        return (self._waiting.popleft() if self._waiting else []), fetched


def begin_windows(
    engine: ServerEngine,
    fetched: Iterable[tuple[int, Any]],
    prompts_of: Callable[[Any], Sequence[Sequence[int]]],
    *,
    steps: range,
    seed: int,
) -> None:
    """Have the responses to windows that were fetched generated, by the weights of the present step from now on.

    A collective call, since the weights are brought there first.

    Args:
        engine: generates.
        fetched: how many steps each window is ahead, and its rows; see :meth:`Lookahead.next`.
        prompts_of: returns token ids of each row's prompt.
        steps: optimizer steps that will be made and whose rows the student responds to; of others nothing is begun.
        seed: of the run.
    """
    host = engine.host
    if host.step in steps:
        engine.sync()
    for ahead, rows in fetched:
        number = host.step + ahead
        if number in steps:
            engine.begin(prompts_of(rows), mixed_seed(seed, number, host.rank))
