"""What a run has taken so far: tokens that the student generated, and that each teacher read and wrote, with prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import RowScores
from kd_plugin.rollouts.rows import Response
from kd_plugin.text.spending import Budget, Spent
from kd_plugin.text.writers import Usage

GONE = "(gone)"  # stands for teachers that a resumed run no longer has


class Economics:
    """Counts tokens of a run. A process that resumes one is told what was taken before, where that was written down.

    A teacher that gives distributions reads each row that it scores once, and writes nothing. A text teacher reads and
    writes what its server says.

    Args:
        panel: the teachers, and what their tokens cost.

    Attributes:
        budget: what text teachers read, wrote and cost, on this rank.
    """

    def __init__(self, panel: TeacherPanel) -> None:
        self.panel, self.budget = panel, Budget(panel.text.ceiling)
        self.generated = 0
        self._read = dict.fromkeys(panel.teachers, 0)

    def resume(self, before: Spent) -> None:
        """Count what the run took before this process began; call it on one rank."""
        self.generated += before.generated
        for name, usage in before.usage.items():
            if name in self._read:
                self._read[name] += usage.read
            else:
                known = name if name in self.panel.text_teachers else GONE
                self.budget.resume(known, usage, before.costs.get(name, 0.0))

    def add(self, responses: Sequence[Response], scores: Sequence[RowScores]) -> None:
        """Count a generation batch: what the student generated, and which rows were scored."""
        if not self.panel.text.recorded:
            self.generated += sum(len(one.tokens) for one in responses)
        for one in scores:
            for name in one.signals:
                self._read[name] += one.span.length

    def totals(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> Spent:
        """Return what all ranks together took; a collective call.

        Args:
            reduce: sums a tensor over all ranks.
            device: where it does.
        """
        names = [*self.panel.names, GONE]
        local = [float(self.generated)]
        for name in names:
            usage = self.budget.usage.get(name) or Usage(self._read.get(name, 0))
            scored = self.panel.prices[name].cost(usage) if name in self._read else 0.0
            local += [usage.read, usage.written, usage.cached, self.budget.costs.get(name, scored)]
        generated, *sums = reduce(torch.tensor(local, dtype=torch.float64, device=device)).tolist()
        rows = {name: sums[4 * i : 4 * i + 4] for i, name in enumerate(names)}
        if not any(rows[GONE]):
            del rows[GONE]
        usages = {name: Usage(*map(int, row[:3])) for name, row in rows.items()}
        return Spent(usages, {name: row[3] for name, row in rows.items()}, int(generated))

    def cost_of_text(self, spent: Spent) -> float:
        """Return what the text teachers cost of all that was spent."""
        return sum(cost for name, cost in spent.costs.items() if name not in self._read)

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the metrics; as :meth:`totals`."""
        spent = self.totals(reduce, device)
        found = {"economics/student_generated": float(spent.generated)}
        for name, usage in spent.usage.items():
            found |= {f"economics/read/{name}": float(usage.read), f"economics/written/{name}": float(usage.written)}
            cost = spent.costs[name]
            found |= {f"economics/cost/{name}": cost} if cost else {}
        return found | ({"economics/cost": spent.spent} if spent.spent else {})
