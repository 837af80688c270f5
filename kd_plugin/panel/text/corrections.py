"""Corrections by text in the on-policy step: what is asked of a generation batch, and the rows that come of it.

A correction becomes a row of its own behind the student's rollouts, with the prompt before it. Its scored positions
begin where it departs from the response, and its signal is a :class:`~kd_plugin.signals.TextSignal`. For a preference,
the response stands beside it as a second row.

Shape suffixes: R rows of corrections.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kd_plugin.errors import DataError, ServerError
from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.panel.scoring import RowScores
from kd_plugin.panel.text.economics import Economics
from kd_plugin.rollouts.rows import Response, Rollouts, assembled, row_spans, until_end
from kd_plugin.signals import TextSignal
from kd_plugin.text.correcting import CorrectingPanel
from kd_plugin.text.correction import Outcome
from kd_plugin.text.rounds import RoundWriter
from kd_plugin.text.teaching import Case
from kd_plugin.text.writers import Usage
from kd_plugin.vocab import Vocabulary

if TYPE_CHECKING:
    from kd_plugin.panel.batches import Host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corrections:
    """Rows that text teachers added to a generation batch.

    Attributes:
        rollouts: prompts with R corrections or, of pairs, responses that fell short.
        scores: one a row.
        of: for each row the row of the generation batch that it belongs to.
        pairs: rows that are compared: the correction's, and the response's.
        anchor: what the student's start said, one a row; empty where nothing asks it.
    """

    rollouts: Rollouts
    scores: tuple[RowScores, ...]
    of: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    anchor: tuple[RowScores, ...] = ()

    def anchored(self, anchor: Any, rows_at_once: int) -> Corrections:
        """Return the same with what an :class:`~kd_plugin.panel.anchor.Anchor` says of the rows."""
        made, positions = self.rollouts, [list(one.positions) for one in self.scores]
        given = made.input_ids, made.attention_mask, made.completion_start, positions, rows_at_once
        return replace(self, anchor=tuple(anchor.score(*given)))

    def rows_of(self, row: int) -> list[int]:
        """Return the rows that belong to a row of the generation batch."""
        return [number for number, one in enumerate(self.of) if one == row]


@dataclass(frozen=True)
class Departure:
    """An accepted correction as tokens.

    Attributes:
        row: of the generation batch.
        teacher: who wrote it.
        tokens: of the correction, up to and with an end token.
        at: how many of them the response begins with too; all of a response that is kept as it is.
    """

    row: int
    teacher: str
    tokens: tuple[int, ...]
    at: int

    @property
    def is_kept(self) -> bool:
        """Whether it is the response itself."""
        return self.at == len(self.tokens)


def departure(
    tokenizer: Any, text: str, response: Sequence[int], *, end_tokens: Sequence[int]
) -> tuple[list[int], int] | None:
    """Return a correction as the student's tokens, and how many of them the response begins with too.

    Args:
        tokenizer: the student's.
        text: the correction.
        response: the student's tokens; the correction ends as they do, or with the first of ``end_tokens``.
        end_tokens: ids that end a response.

    Returns:
        None where the correction is the response.
    """
    end = response[-1] if response and response[-1] in end_tokens else end_tokens[0]
    tokens = until_end([*tokenizer(text, add_special_tokens=False)["input_ids"], end], end_tokens)
    same = 0
    while same < min(len(tokens), len(response)) and tokens[same] == response[same]:
        same += 1
    return None if same == len(tokens) else (tokens, same)


def recorded_responses(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the responses of rows of a round that was kept, as the student's tokens.

    Raises:
        DataError: a row has none.
    """
    for row in rows:
        if not row.get("response_ids"):
            raise DataError(
                "text: {recorded: true} trains on a round that was kept, and a row has no `response_ids`. Name the "
                f"directory of a round as the dataset; the row has {', '.join(map(repr, row))}."
            )
    return [list(row["response_ids"]) for row in rows]


class Corrector:
    """Asks the text teachers of a panel about each generation batch, and makes rows of what is accepted.

    Args:
        panel: with text teachers.
        host: the trainer.
        economics: counts what the run takes.
        tokenizer: the student's.
        end_tokens: ids that end a response.
        pad_token_id: fills up short rows.
        vocabulary: of the run; a correction with another token is left out.
        max_length: tokens of a correction at most; None for no limit.
        rounds: keeps all that is said; None where nobody says anything new.

    Attributes:
        stopped: whether the ceiling is reached, and nobody is asked any more.
    """

    def __init__(
        self,
        panel: TeacherPanel,
        host: Host,
        economics: Economics,
        tokenizer: Any,
        end_tokens: Sequence[int],
        pad_token_id: int,
        *,
        vocabulary: Vocabulary,
        max_length: int | None,
        rounds: RoundWriter | None = None,
    ) -> None:
        self.panel, self.host, self.tokenizer = panel, host, tokenizer
        self.economics = economics
        self.asked = CorrectingPanel(panel.text_teachers, panel.text, panel.prices, economics.budget)
        self.vocabulary, self.end_tokens, self.pad_token_id = vocabulary, tuple(end_tokens), pad_token_id
        self.max_length, self.rounds = max_length, rounds
        self.stopped, self._begun, self._warned = False, False, False

    def correct(
        self,
        assignments: Sequence[Assignment],
        rows: Sequence[Mapping[str, Any]],
        rollouts: Rollouts,
        wanted: Sequence[bool],
    ) -> Corrections | None:
        """Have responses evaluated and corrected; a collective call.

        Args:
            assignments: for each row who teaches it.
            rows: of the dataset, with ``prompt``.
            rollouts: the responses to them.
            wanted: rows that may be trained on.

        Returns:
            None where no correction is trained on.

        Raises:
            ServerError: too few teachers can be reached, on this rank or on another.
            DataError: the verifier failed.
        """
        if not self._begun:
            self._begin()
        cases, numbers = [], []
        for number, (assignment, row, is_wanted) in enumerate(zip(assignments, rows, wanted, strict=True)):
            teachers = tuple(name for name in assignment.teachers if name in self.panel.text_teachers)
            if teachers and is_wanted and not self.stopped:
                tokens = rollouts.responses[number].tokens
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                cases.append(Case(row.get("prompt"), text, row, teachers, tokens))
                numbers.append(number)
        failure: ServerError | None = None
        outcomes: list[Outcome] = []
        try:
            outcomes = self.asked.correct(cases)
        except ServerError as error:
            failure = error
        departures, unusable = ([], 0) if failure else self._departures(outcomes, numbers, rollouts)
        self._hold_ceiling()
        self._agree(outcomes, sum(not one.is_kept for one in departures), unusable, failure)
        if self.rounds is not None and outcomes:
            self.rounds.keep(self.host.step, outcomes)
        return self._rows(departures, assignments, rollouts) if departures else None

    def finish(self) -> None:
        """Make a dataset of what was kept; a collective call: all ranks have written before one says so."""
        spent = self.economics.totals(self.host.sum_over_ranks, self.host.device)
        if self.rounds is not None and self.host.rank == 0:
            self.rounds.close(spent)

    def _begin(self) -> None:
        """Take up what the run has spent before this process; a collective call: all know where before one writes."""
        self._begun = True
        if self.rounds is not None:
            before = self.rounds.begin(self.host.step)
            if self.host.rank == 0:
                self.economics.resume(before)
        self._hold_ceiling()

    def _hold_ceiling(self) -> None:
        """Write down what was spent, and stop where that is all that may be; a collective call."""
        spent = self.economics.totals(self.host.sum_over_ranks, self.host.device)
        cost, ceiling = self.economics.cost_of_text(spent), self.panel.text.ceiling
        said = any(spent.usage[name] != Usage() for name in self.panel.text_teachers)
        if said and self.rounds is not None and self.host.rank == 0:
            self.rounds.note(spent)
        if ceiling is not None and cost >= ceiling and not self.stopped:
            self.stopped = True
            logger.warning(
                "The text teachers have cost %.4f, and the ceiling is %s. Training stops, and what was learned is "
                "saved. With a higher ceiling it goes on from the last checkpoint.",
                *(cost, ceiling),
            )
            self.host.stop()

    def _departures(
        self, outcomes: Sequence[Outcome], numbers: Sequence[int], rollouts: Rollouts
    ) -> tuple[list[Departure], int]:
        """Return the accepted corrections as tokens, and the number of those that are too long or have no tokens."""
        found, unusable = [], 0
        for outcome, number in zip(outcomes, numbers, strict=True):
            response = rollouts.responses[number].tokens
            if self._keeps(outcome, rollouts.responses[number]):
                found.append(Departure(number, outcome.case.teachers[0], response, len(response)))
            if outcome.chosen is None or outcome.text is None:
                continue
            departs = departure(self.tokenizer, outcome.text, response, end_tokens=self.end_tokens)
            if departs is None:
                continue
            tokens, same = departs
            too_long = self.max_length is not None and len(tokens) > self.max_length
            if too_long or max(tokens) >= self.vocabulary.size:
                unusable += 1
                continue
            found.append(Departure(number, outcome.chosen.teacher, tuple(tokens), same))
        return found, unusable

    def _keeps(self, outcome: Outcome, response: Response) -> bool:
        """Whether a response is trained on as it is: it is good, and came to its end."""
        settings = self.panel.text
        wanted = settings.keep_weight > 0.0 and settings.preference is None and bool(response.tokens)
        return wanted and not response.truncated and outcome.chosen is None and outcome.is_good(settings.threshold)

    def _agree(self, outcomes: Sequence[Outcome], accepted: int, unusable: int, failure: ServerError | None) -> None:
        """Add up over all ranks what came of a generation batch, log it, and stop together; a collective call.

        Raises:
            ServerError: on this rank, or on another.
        """
        known = [outcome.right for outcome in outcomes if outcome.right is not None]
        scores = [e.score for o in outcomes for e in o.evaluations.values() if e.score is not None]
        local = [
            *(len(outcomes), sum(bool(o.candidates) for o in outcomes), accepted, unusable),
            *(len(known), sum(known), len(scores), sum(scores)),
            *(sum(self.asked.unparsed.values()), len(self.asked.missing), failure is not None),
        ]
        sums = self.host.sum_over_ranks(torch.tensor(local, dtype=torch.float64, device=self.host.device)).tolist()
        asked, written, accepted_all, unusable_all, judged, right, scored, total, unparsed, missing, failed = sums
        if failure is not None:
            raise failure
        if failed:
            raise ServerError(f"Too few text teachers can be reached on {int(failed)} other rank(s); see their log.")
        if unusable_all and not accepted_all and not self._warned and self.host.rank == 0:
            self._warned = True
            logger.warning(
                "None of the %d corrections of this batch can be trained on: each has more tokens than "
                "max_completion_length (%s), or a token that the student lacks. Raise max_completion_length.",
                *(unusable_all, self.max_length),
            )
        noted = {
            "text/corrected": written / max(asked, 1),
            "text/accepted": accepted_all / max(asked, 1),
            "text/unusable": unusable_all / max(asked, 1),
            "text/unparsed": unparsed,
            "text/missing_teachers": missing,
        }
        if judged:
            noted["text/right"] = right / judged
        if scored:
            noted["text/score"] = total / scored
        self.host.note(noted)

    def _rows(
        self, departures: Sequence[Departure], assignments: Sequence[Assignment], rollouts: Rollouts
    ) -> Corrections:
        """Put corrections, and responses where they are compared, behind their prompts."""
        settings = self.panel.text
        start = rollouts.completion_start
        spans = row_spans(rollouts.attention_mask)
        prompts: list[list[int]] = []
        responses: list[list[int]] = []
        of: list[Departure] = []
        first: list[int] = []
        for one in departures:
            prompt = rollouts.input_ids[one.row, spans[one.row].first : start].tolist()
            sides: list[tuple[int, ...]] = (
                [one.tokens] if settings.preference is None else [one.tokens, rollouts.responses[one.row].tokens]
            )
            for tokens in sides:
                prompts.append(prompt)
                responses.append(list(tokens))
                of.append(one)
                earlier = settings.keep_weight if one.is_kept else settings.earlier_weight
                first.append(one.at if settings.preference or not earlier else 0)
        made = assembled(
            prompts, responses, end_tokens=self.end_tokens, pad_token_id=self.pad_token_id, device=self.host.device
        )
        scores = []
        spans = row_spans(made.attention_mask)
        for one, row, begin, span in zip(of, responses, first, spans, strict=True):
            positions = tuple(range(begin, len(row)))
            signals = {}
            if settings.preference is None:
                earlier = settings.keep_weight if one.is_kept else settings.earlier_weight
                weights = [earlier if c < one.at else 1.0 for c in positions]
                device = self.host.device
                signals[one.teacher] = TextSignal(
                    torch.tensor(row[begin:], dtype=torch.int64).to(device), torch.tensor(weights).to(device)
                )
            scores.append(RowScores(positions, signals, assignments[one.row], span))
        pairs = () if settings.preference is None else tuple((2 * k, 2 * k + 1) for k in range(len(departures)))
        numbered = [
            replace(response, number=rollouts.responses[one.row].number)
            for response, one in zip(made.responses, of, strict=True)
        ]
        made = replace(made, responses=tuple(numbered))
        return Corrections(made, tuple(scores), tuple(one.row for one in of), pairs)
