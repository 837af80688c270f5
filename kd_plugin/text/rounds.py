"""What a round of on-policy correction leaves: its rollouts, evaluations and corrections, as a dataset of text.

Each generation batch becomes a Parquet file as soon as its teachers have answered, so that a killed run loses no answer
that it has used. When a round ends, the record of who wrote it is placed beside the files, and the directory is a
dataset like that of a capture: ``datasets`` reads it, ``prompt`` and ``completion`` (the accepted correction, null
where none was) train offline, and a panel with ``text: {recorded: true}`` trains on it as if its teachers answered
anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_plugin.cache.files import explained, publish, temporary_name
from kd_plugin.lineage.data import TEXT_RECORD
from kd_plugin.text.correction import Outcome
from kd_plugin.text.dataset import seal_dataset
from kd_plugin.text.spending import Spent
from kd_plugin.text.teaching import Evaluation

ROUNDS = "rounds"  # directory below output_dir
_ROUND = "round-{:04d}"
# Columns from which a recorded panel takes what its teachers said
RECORDED = ("response_ids", "completion", "corrected_by", "right")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_EVALUATION = pa.struct(
    [
        *(("teacher", pa.string()), ("score", pa.float64()), ("first_wrong", pa.int64())),
        *(("reply", pa.string()), ("problem", pa.string())),
    ]
)
_CORRECTION = pa.struct(
    [
        *(("teacher", pa.string()), ("text", pa.string()), ("accepted", pa.bool_()), ("right", pa.bool_())),
        *(("votes", pa.list_(_EVALUATION)), ("reply", pa.string()), ("problem", pa.string())),
    ]
)
_FACTS = [
    *(("response", pa.string()), ("response_ids", pa.list_(pa.int64())), ("right", pa.bool_())),
    *(("corrected_by", pa.string()), ("answer", pa.string())),
    *(("teacher_id", pa.list_(pa.string())), ("domain", pa.string())),
    *(("evaluations", pa.list_(_EVALUATION)), ("corrections", pa.list_(_CORRECTION))),
    *(("step", pa.int64()), ("rank", pa.int64())),
]


class RoundWriter:
    """Keeps what was said in one round.

    Args:
        home: directory of the rounds; made when there is something to keep.
        lineage: returns nodes and edges of who writes; called when the round ends.
        rank: of this process.
        answer_column: column of the reference answer.

    Attributes:
        directory: of the round; None until :meth:`begin` has chosen it.
    """

    def __init__(
        self,
        home: str | Path,
        lineage: Callable[[], Mapping[str, Any]],
        *,
        rank: int = 0,
        answer_column: str = "answer",
    ) -> None:
        self.home, self.rank, self.answer_column = Path(home), rank, answer_column
        self.directory: Path | None = None
        self._lineage = lineage
        self._before: Path | None = None

    def take(self, number: int) -> None:
        """Keep a round under its number, as one of several of a run: what those before have cost counts too."""
        self.directory, self._before = self.home / _ROUND.format(number), self.home / _ROUND.format(number - 1)

    def begin(self, step: int) -> Spent:
        """Choose the round's directory, before any rank writes, and return what the run has spent so far.

        A run that goes on from a checkpoint goes on in the last directory. Another one has a directory of its own.

        Args:
            step: optimizer steps that are done.

        Raises:
            ConfigError: the file that says what was spent is damaged.
        """
        if self.directory is None:
            numbers = [int(path.name[-4:]) for path in self.home.glob("round-[0-9][0-9][0-9][0-9]") if path.is_dir()]
            last = max(numbers, default=-1)
            self.directory = self.home / _ROUND.format(max(last, 0) if step else last + 1)
        kept = _ledger(self.directory)
        if not kept.is_file() and self._before is not None:
            kept = _ledger(self._before)
        return Spent.read(kept)

    def note(self, spent: Spent) -> None:
        """Write down what the run has spent so far; call it on one process.

        Raises:
            CacheError: the directory cannot be written.
        """
        assert self.directory is not None
        with explained(f"Writing what was spent beside {self.directory}", "Make room, and resume."):
            self.home.mkdir(parents=True, exist_ok=True)
            made = temporary_name(self.home, "spent")
            made.write_bytes(spent.as_bytes())
            publish(made, _ledger(self.directory))

    def keep(self, step: int, outcomes: Sequence[Outcome]) -> None:
        """Write down a generation batch.

        Args:
            step: optimizer steps that are done.
            outcomes: one a response.

        Raises:
            CacheError: the directory cannot be written.
        """
        assert self.directory is not None
        rows = [self._row(step, outcome) for outcome in outcomes]
        prompt = pa.string() if all(isinstance(row["prompt"], str) for row in rows) else _MESSAGES
        schema = pa.schema([("prompt", prompt), ("completion", prompt), *_FACTS])
        with explained(f"Writing a round in {self.directory}", "Make room, and resume from the last checkpoint."):
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / TEXT_RECORD).unlink(missing_ok=True)
            made = temporary_name(self.directory, "part")
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), made, compression="zstd")
            publish(made, self._free_name(step))

    def close(self, spent: Spent) -> None:
        """Say that the round is whole, and who wrote it; call it on one process, when all have written.

        Args:
            spent: what the run took so far.
        """
        if self.directory is None:
            return
        names = sorted(path.name for path in self.directory.glob("*.parquet")) if self.directory.is_dir() else []
        if not names or (self.directory / TEXT_RECORD).is_file():
            return
        rows = sum(pq.read_metadata(self.directory / name).num_rows for name in names)
        with explained(f"Writing the record of {self.directory}", "Make room, and resume from the last checkpoint."):
            seal_dataset(
                self.directory,
                names,
                lineage=self._lineage(),
                outputs={"rows": rows, "sampling": {}},
                budget=spent,
                dropped={},
                complete=True,
            )

    def _free_name(self, step: int) -> Path:
        """Return the name of a new file; a resumed run may come by a step again."""
        assert self.directory is not None
        for number in itertools.count():
            path = self.directory / f"train-{step:08d}-rank-{self.rank}-{number}.parquet"
            if not path.exists():
                return path
        raise AssertionError

    def _row(self, step: int, outcome: Outcome) -> dict[str, Any]:
        case, text = outcome.case, outcome.text
        is_text = isinstance(case.prompt, str)
        prompt = case.prompt if is_text else [{k: str(turn[k]) for k in ("role", "content")} for turn in case.prompt]
        completion: Any = text if is_text or text is None else [{"role": "assistant", "content": text}]
        asked, answer = case.row.get("teacher_id"), case.row.get(self.answer_column)
        return {
            "prompt": prompt,
            "completion": completion,
            "response": case.response,
            "response_ids": list(case.tokens),
            "right": outcome.right,
            "corrected_by": None if outcome.chosen is None else outcome.chosen.teacher,
            "answer": None if answer is None else str(answer),
            "teacher_id": [asked] if isinstance(asked, str) else asked,
            "domain": case.row.get("domain"),
            "evaluations": [_evaluation(name, one) for name, one in outcome.evaluations.items()],
            "corrections": [
                {
                    "teacher": one.teacher,
                    "text": one.correction.text,
                    "accepted": one.accepted,
                    "right": one.right,
                    "votes": [_evaluation(name, vote) for name, vote in one.votes.items()],
                    "reply": one.correction.reply,
                    "problem": one.correction.problem,
                }
                for one in outcome.candidates
            ],
            "step": step,
            "rank": self.rank,
        }


def _ledger(directory: Path) -> Path:
    """Return the file beside a round that says what the run had spent by its last batch."""
    return directory.with_name(f"{directory.name}.spent.json")


def _evaluation(name: str, one: Evaluation) -> dict[str, Any]:
    return {
        "teacher": name,
        "score": one.score,
        "first_wrong": one.first_wrong,
        "reply": one.reply,
        "problem": one.problem,
    }
