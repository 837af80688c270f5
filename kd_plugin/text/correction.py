"""What a correction is: the settings under which it is asked for, what each teacher wrote, and what was accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.settings import option, require_known, settings
from kd_plugin.text.teaching import Case, Correction, Evaluation
from kd_plugin.verifying import Verifier, make_verifier

Accept = Literal["verifier", "majority", "teacher"]
Evaluate = Literal["rubric", "verifier"]
Correct = Literal["rewrite", "continue"]


@settings
class CorrectionSettings:
    """How a panel's text teachers evaluate a response, correct it, and what the student learns of the correction.

    Raises:
        ConfigError: an unknown name, a value out of range, or two that contradict each other.
    """

    evaluate: str = option(
        default="rubric",
        help="Who says that a response falls short: 'rubric', each teacher's score, or 'verifier', which asks no "
        "teacher.",
    )
    threshold: float = option(
        default=0.7, help="Score in [0, 1] from which a response, and a correction that is voted on, is good."
    )
    correct: str = option(
        default="rewrite",
        help="'rewrite' has a teacher write the response anew, 'continue' has it go on from the first step that it "
        "marks wrong.",
    )
    accept: str | None = option(
        default=None,
        help="Who accepts a correction: 'verifier', 'majority' (more than half of the other text teachers of the row "
        "score it `threshold` or higher; at an even split the writer's own word decides, where nothing speaks "
        "against it), or 'teacher' (whoever wrote it). Left out, the verifier where there is one, else the majority.",
    )
    verifier: Any = option(
        default=None,
        help="'exact', 'contains', 'math_verify', a mapping such as {kind: regex, pattern: ...}, or a function as "
        "`package.module:function` that takes the response and the row.",
    )
    answer_column: str = option(default="answer", help="Column of the reference answer.")
    earlier_weight: float = option(
        default=0.0, help="Weight of the tokens before the correction departs from the response; those after it have 1."
    )
    keep_weight: float = option(
        default=0.0,
        help="Weight of the tokens of responses that are good as they are: a student that trains on its mistakes alone "
        "can unlearn what it got right.",
    )
    preference: str | None = option(
        default=None,
        help="'dpo' trains on the pair of correction and response, against the student's start. Left out, on the "
        "correction's cross-entropy.",
    )
    preference_beta: float = option(default=0.1, help="Of DPO: how far the student may go from its start.")
    templates: str | None = option(
        default=None, help="Directory with your own evaluate.txt, rewrite.txt or continue.txt."
    )
    min_teachers: int | None = option(
        default=None, help="Go on while at least so many text teachers can be reached. Left out, all must be."
    )
    recorded: bool = option(
        default=False,
        help="Train on a round that was kept: responses, and corrections where there are any, are those of the rows, "
        "and no teacher is asked.",
    )
    ceiling: float | None = option(
        default=None, help="Stop cleanly, with what was learned saved, when the text teachers have cost this much."
    )

    def __post_init__(self) -> None:
        require_known("evaluate", self.evaluate, get_args(Evaluate))
        require_known("correct", self.correct, get_args(Correct))
        if self.accept is not None:
            require_known("accept", self.accept, get_args(Accept))
        if self.preference is not None:
            require_known("preference", self.preference, ("dpo",))
        for name, least, most in (
            ("threshold", 0.0, 1.0),
            ("earlier_weight", 0.0, math.inf),
            ("keep_weight", 0.0, math.inf),
        ):
            if not least <= getattr(self, name) <= most or math.isinf(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number from {least} to {most}.")
        if not 0.0 < self.preference_beta < math.inf:
            raise ConfigError(f"preference_beta is {self.preference_beta}; expected a positive number.")
        if self.ceiling is not None and self.ceiling <= 0.0:
            raise ConfigError(f"ceiling is {self.ceiling}; expected a positive amount, or nothing for no limit.")
        if self.min_teachers is not None and self.min_teachers < 1:
            raise ConfigError(f"min_teachers is {self.min_teachers}; expected at least 1.")
        if self.verifier is None and "verifier" in (self.evaluate, self.accept):
            raise ConfigError(
                "evaluate or accept is 'verifier', and no verifier is named. Set verifier: math_verify, exact, or "
                "package.module:function."
            )

    @property
    def accepts(self) -> str:
        """Who accepts a correction."""
        return self.accept or ("majority" if self.verifier is None else "verifier")

    def check(self) -> Verifier | None:
        """Return the verifier, if one is named.

        Raises:
            ConfigError: it cannot be found.
        """
        return make_verifier(self.verifier, self.answer_column)


def correction_settings(
    given: Mapping[str, Any] | CorrectionSettings | None, where: str = "text"
) -> CorrectionSettings:
    """Read the settings of text teachers from a configuration.

    Raises:
        ConfigError: an unknown key, naming the nearest, or what the settings refuse.
    """
    if given is None:
        return CorrectionSettings()
    if isinstance(given, CorrectionSettings):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a mapping.")
    require_known_keys(given, [field.name for field in fields(CorrectionSettings)], where)
    return CorrectionSettings(**given)


@dataclass(frozen=True)
class Candidate:
    """A correction that one teacher wrote.

    Attributes:
        teacher: its name.
        correction: what it wrote.
        votes: other teacher's name to its evaluation, where a majority accepts.
        right: the verifier's verdict, where it accepts.
        accepted: whether it may be trained on.
    """

    teacher: str
    correction: Correction
    votes: Mapping[str, Evaluation] = field(default_factory=dict)
    right: bool | None = None
    accepted: bool = False


@dataclass(frozen=True)
class Outcome:
    """All that was said of one response.

    Attributes:
        case: the response.
        right: the verifier's verdict on it; None without one.
        evaluations: teacher's name to what it thinks of it.
        candidates: the corrections.
        chosen: the one that is trained on; None where none was accepted.
    """

    case: Case
    right: bool | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None

    def is_good(self, threshold: float) -> bool:
        """Whether the response needs no correction: the verifier says so, or without one all teachers that say it."""
        if self.right is not None:
            return self.right
        scores = [one.score for one in self.evaluations.values() if one.score is not None]
        return bool(scores) and min(scores) >= threshold

    @property
    def text(self) -> str | None:
        """The accepted correction."""
        return None if self.chosen is None else self.chosen.correction.text

    @classmethod
    def recorded(cls, case: Case) -> Outcome:
        """Return what a row of a round that was kept says of its response: its ``completion`` is the correction."""
        written, teacher = case.row.get("completion"), case.row.get("corrected_by")
        if not written or teacher is None:
            return cls(case, case.row.get("right"))
        text = written if isinstance(written, str) else written[0]["content"]
        chosen = Candidate(str(teacher), Correction(str(text)), accepted=True)
        return cls(case, case.row.get("right"), {}, (chosen,), chosen)
