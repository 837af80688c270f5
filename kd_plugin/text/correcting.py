"""A panel of text teachers over a batch of responses: each evaluates and corrects, and a correction is accepted.

Teachers are asked side by side, each about all of its cases at once, in at most three turns: evaluate the responses,
correct those that fall short, vote on the corrections.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from kd_plugin.errors import ServerError
from kd_plugin.text.correction import Candidate, CorrectionSettings, Outcome
from kd_plugin.text.spending import Budget, Prices
from kd_plugin.text.teaching import Case, Evaluation, TextTeacher
from kd_plugin.text.writers import split_reasoning

logger = logging.getLogger(__name__)
Said = TypeVar("Said")


class CorrectingPanel:
    """Several text teachers, and what they have read and written.

    Args:
        teachers: name to teacher.
        settings: how they evaluate and correct.
        prices: name to what its tokens cost.
        budget: counts what they take; None for one of its own.

    Attributes:
        budget: what each read, wrote and cost so far, on this rank.
        unparsed: replies that counted as none so far.
        missing: names of teachers that could not be reached, and are not asked any more.
    """

    def __init__(
        self,
        teachers: Mapping[str, TextTeacher],
        settings: CorrectionSettings,
        prices: Mapping[str, Prices] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.teachers, self.settings = dict(teachers), settings
        self.prices = dict.fromkeys(self.teachers, Prices()) | dict(prices or {})
        self.check = settings.check()
        self.budget = Budget(settings.ceiling) if budget is None else budget
        self.unparsed = dict.fromkeys(self.teachers, 0)
        self.missing: list[str] = []

    def correct(self, cases: Sequence[Case]) -> list[Outcome]:
        """Have responses evaluated and corrected.

        Args:
            cases: the responses.

        Returns:
            One outcome a case, in order.

        Raises:
            ServerError: fewer teachers than ``min_teachers`` can be reached.
            DataError: the verifier failed.
        """
        settings = self.settings
        if settings.recorded:
            return [Outcome.recorded(case) for case in cases]
        rights = [self._right(case.response, case, f"Response {n}") for n, case in enumerate(cases)]
        by_verifier = settings.evaluate == "verifier"
        open_cases = [n for n, right in enumerate(rights) if not (by_verifier and right)]
        evaluations: list[dict[str, Evaluation]] = [{} for _ in cases]
        if not by_verifier or settings.correct == "continue":
            asked = {name: [n for n in open_cases if name in cases[n].teachers] for name in self._alive()}
            found = self._ask(asked, lambda teacher, rows: teacher.evaluate([cases[n] for n in rows]), "evaluation")
            for name, said in found.items():
                for n, evaluation in zip(asked[name], said, strict=True):
                    evaluations[n][name] = evaluation
        short = {
            name: [
                n
                for n in open_cases
                if name in cases[n].teachers and (by_verifier or self._falls_short(evaluations[n].get(name)))
            ]
            for name in self._alive()
        }
        candidates = self._candidates(cases, short, evaluations)
        candidates = self._judged(cases, candidates, evaluations)
        return [
            Outcome(case, right, evaluated, tuple(written), _best(written, case.teachers))
            for case, right, evaluated, written in zip(cases, rights, evaluations, candidates, strict=True)
        ]

    def _candidates(
        self, cases: Sequence[Case], short: Mapping[str, list[int]], evaluations: Sequence[Mapping[str, Evaluation]]
    ) -> list[list[Candidate]]:
        """Have each teacher correct what it finds too short of good."""

        def steps(name: str, rows: Sequence[int]) -> list[int | None]:
            if self.settings.correct == "rewrite":
                return [None] * len(rows)
            found = [evaluations[n].get(name) for n in rows]
            return [None if one is None else one.first_wrong for one in found]

        written = self._ask(
            short,
            lambda teacher, rows: teacher.correct([cases[n] for n in rows], steps(self._name(teacher), rows)),
            "correction",
        )
        candidates: list[list[Candidate]] = [[] for _ in cases]
        for name, corrections in written.items():
            for n, correction in zip(short[name], corrections, strict=True):
                if correction.text is not None:
                    text = _in_form_of(cases[n].response, correction.text)
                    candidates[n].append(Candidate(name, replace(correction, text=text)))
        return candidates

    def _judged(
        self,
        cases: Sequence[Case],
        candidates: Sequence[list[Candidate]],
        evaluations: Sequence[Mapping[str, Evaluation]],
    ) -> list[list[Candidate]]:
        """Say of each correction whether it is accepted."""
        how = self.settings.accepts
        if how == "teacher":
            return [[replace(one, accepted=True) for one in written] for written in candidates]
        if how == "verifier":
            found = []
            for n, written in enumerate(candidates):
                where = f"The correction of response {n}"
                rights = [self._right(str(one.correction.text), cases[n], where) for one in written]
                found.append(
                    [replace(one, right=r, accepted=r is True) for one, r in zip(written, rights, strict=True)]
                )
            return found
        voted = self._voted(cases, candidates)
        threshold = self.settings.threshold
        return [elected(written, own, threshold) for written, own in zip(voted, evaluations, strict=True)]

    def _voted(self, cases: Sequence[Case], candidates: Sequence[list[Candidate]]) -> list[list[Candidate]]:
        """Have the other teachers of a row evaluate each correction."""
        places = [(n, k) for n, written in enumerate(candidates) for k in range(len(written))]
        asked = {
            name: [
                i for i, (n, k) in enumerate(places) if name in cases[n].teachers and candidates[n][k].teacher != name
            ]
            for name in self._alive()
        }
        as_cases = [replace(cases[n], response=str(candidates[n][k].correction.text)) for n, k in places]
        found = self._ask(asked, lambda teacher, rows: teacher.evaluate([as_cases[i] for i in rows]), "vote")
        votes: list[dict[str, Evaluation]] = [{} for _ in places]
        for name, said in found.items():
            for i, vote in zip(asked[name], said, strict=True):
                votes[i][name] = vote
        judged: list[list[Candidate]] = [[] for _ in cases]
        for (n, k), own in zip(places, votes, strict=True):
            judged[n].append(replace(candidates[n][k], votes=own))
        return judged

    def _right(self, response: str, case: Case, where: str) -> bool | None:
        """Whether the verifier accepts a response; None without one."""
        return None if self.check is None else self.check.verify(split_reasoning(response)[0], case.row, where).passed

    def _falls_short(self, evaluation: Evaluation | None) -> bool:
        """Whether a teacher said that a response is not good; a reply that says nothing does not say that."""
        return evaluation is not None and evaluation.score is not None and evaluation.score < self.settings.threshold

    def _alive(self) -> list[str]:
        return [name for name in self.teachers if name not in self.missing]

    def _name(self, teacher: TextTeacher) -> str:
        return next(name for name, one in self.teachers.items() if one is teacher)

    def _ask(
        self, asked: Mapping[str, Sequence[int]], call: Callable[[TextTeacher, Sequence[int]], list[Said]], what: str
    ) -> dict[str, list[Said]]:
        """Ask each teacher about its rows, side by side; leave out one that cannot be reached, where that is allowed.

        Raises:
            ServerError: too few can be reached.
        """
        busy = {name: rows for name, rows in asked.items() if rows}
        if not busy:
            return {}
        found: dict[str, list[Said]] = {}
        with ThreadPoolExecutor(len(busy), thread_name_prefix="text-teacher") as pool:
            futures = {name: pool.submit(call, self.teachers[name], rows) for name, rows in busy.items()}
            for name, future in futures.items():
                try:
                    found[name] = future.result()
                except ServerError as error:
                    self._lose(name, error)
        for name, said in found.items():
            self._count(name, said, what)
        return found

    def _lose(self, name: str, error: ServerError) -> None:
        """Go on without a teacher, and say so.

        Raises:
            ServerError: that is not allowed, or too few are left.
        """
        self.missing.append(name)
        needed = len(self.teachers) if self.settings.min_teachers is None else self.settings.min_teachers
        left = self._alive()
        if len(left) < needed:
            raise ServerError(
                f"Text teacher {name!r} cannot be reached, and {len(left)} of {len(self.teachers)} are left where "
                f"{needed} must be. Set min_teachers to go on with fewer. It said: {error}"
            ) from error
        logger.warning(
            "Text teacher %r cannot be reached (%s). The run goes on with %s.", name, error, ", ".join(map(repr, left))
        )

    def _count(self, name: str, said: Sequence[Any], what: str) -> None:
        """Add up tokens, and log what could not be parsed."""
        for one in said:
            self.budget.count(name, self.prices[name], one.usage)
        problems = [one.problem for one in said if one.problem]
        self.unparsed[name] += len(problems)
        if problems:
            logger.warning(
                "%d of %d replies of text teacher %r count as none (asked for: %s); the first: %s.",
                *(len(problems), len(said), name, what, problems[0]),
            )


def elected(written: Sequence[Candidate], evaluations: Mapping[str, Evaluation], threshold: float) -> list[Candidate]:
    """Return a response's corrections, those accepted that the row's other teachers find good.

    A correction with more than half of the others is accepted. Where none has that, one that splits them evenly is
    accepted by its writer's own word, if nothing speaks against it: fewer teachers find the response itself good, and
    any other correction that splits them evenly has the same teachers behind it.

    Args:
        written: with their votes.
        evaluations: teacher's name to what it thinks of the response.
        threshold: score from which a text is good.
    """
    behind = [{one.teacher} | _finding_good(one.votes, threshold) for one in written]
    majority = [2 * (len(names) - 1) > len(one.votes) for one, names in zip(written, behind, strict=True)]
    if any(majority):
        return [replace(one, accepted=accepted) for one, accepted in zip(written, majority, strict=True)]
    even = [
        bool(one.votes) and 2 * (len(names) - 1) == len(one.votes) for one, names in zip(written, behind, strict=True)
    ]
    tied = {frozenset(names) for names, is_even in zip(behind, even, strict=True) if is_even}
    of_one_mind = len(tied) == 1 and len(next(iter(tied))) > len(_finding_good(evaluations, threshold))
    return [replace(one, accepted=is_even and of_one_mind) for one, is_even in zip(written, even, strict=True)]


def _finding_good(said: Mapping[str, Evaluation], threshold: float) -> set[str]:
    """Return who finds a text good; a reply that says nothing does not."""
    return {name for name, one in said.items() if one.score is not None and one.score >= threshold}


def _best(written: Sequence[Candidate], order: Sequence[str]) -> Candidate | None:
    """Return the accepted correction with the highest mean vote; among equals the first by the row's teachers."""

    def rank(one: Candidate) -> tuple[float, int]:
        scores = [vote.score or 0.0 for vote in one.votes.values()]
        return (-sum(scores) / len(scores) if scores else 0.0, order.index(one.teacher))

    return min((one for one in written if one.accepted), key=rank, default=None)


def _in_form_of(response: str, correction: str) -> str:
    """Return a correction with the white space with which the response begins: a student does not unlearn that."""
    begin = response[: len(response) - len(response.lstrip())]
    return begin + correction.strip() if response.strip() else correction.strip()
