"""What a run has taken so far: tokens that the student generated, and that each teacher read and wrote, with prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import RowScores
from kd_plugin.rollouts.rows import Response
from kd_plugin.text.correcting import CorrectingPanel
from kd_plugin.text.writers import Usage


class Economics:
    """Counts tokens from the start of a process; of a resumed run, from there.

    A teacher that gives distributions reads each row that it scores once, and writes nothing. A text teacher reads and
    writes what its server says.

    Args:
        panel: the teachers, and what their tokens cost.
        asked: its text teachers; None without.
    """

    def __init__(self, panel: TeacherPanel, asked: CorrectingPanel | None) -> None:
        self.panel, self.asked = panel, asked
        self.generated = 0
        self._read = dict.fromkeys(panel.teachers, 0)

    def add(self, responses: Sequence[Response], scores: Sequence[RowScores]) -> None:
        """Count a generation batch: what the student wrote, and which rows were scored."""
        self.generated += sum(len(one.tokens) for one in responses)
        for one in scores:
            for name in one.signals:
                self._read[name] += one.span.length

    def usage(self) -> dict[str, Usage]:
        """Return what each teacher has read and written so far, on this rank."""
        by_text = {} if self.asked is None else self.asked.budget.usage
        return {name: by_text.get(name) or Usage(self._read.get(name, 0)) for name in self.panel.names}

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the metrics, sums over all ranks; a collective call.

        Args:
            reduce: sums a tensor over all ranks.
            device: where it does.
        """
        usage = self.usage()
        costs = [self.panel.prices[name].cost(one) for name, one in usage.items()]
        local = [float(self.generated), *(float(n) for one in usage.values() for n in (one.read, one.written)), *costs]
        generated, *sums = reduce(torch.tensor(local, dtype=torch.float64, device=device)).tolist()
        found = {"economics/student_generated": generated}
        for i, name in enumerate(usage):
            cost = sums[2 * len(usage) + i]
            found |= {f"economics/read/{name}": sums[2 * i], f"economics/written/{name}": sums[2 * i + 1]}
            found |= {f"economics/cost/{name}": cost} if cost else {}
        total = sum(sums[2 * len(usage) :])
        return found | ({"economics/cost": total} if total else {})
