"""The panel's vote: of the answers to one prompt, those on which the teachers agree.

Each teacher has one vote, for the answer that it gave most often. With one teacher its texts vote (self-consistency,
Wang et al., ICLR 2023).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.verifying.verifiers import make_verifier, same_mathematics, same_text

OUTVOTED, UNDECIDED = "outvoted", "no majority"


@dataclass(frozen=True)
class Vote:
    """How a vote is counted.

    Attributes:
        same: whether two answers are one.
        find: returns what of a text is the answer that votes, or None.
        share: part of the votes that the winner needs; a half or more of those that were cast.
    """

    same: Callable[[str, str], bool]
    find: Callable[[str], str | None]
    share: float = 0.5

    @classmethod
    def of(cls, given: Mapping[str, Any] | bool | None) -> Vote | None:
        """Read ``{by: math | text | regular expression, share: 0.5}``, or true for the defaults.

        Raises:
            ConfigError: no regular expression with a group, or a share out of range.
            MissingDependencyError: ``math`` without math-verify.
        """
        if given is None or given is False:
            return None
        options = {} if given is True else dict(given)  # type: ignore[arg-type]
        by, share = str(options.get("by", "math")), options.get("share", 0.5)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"vote: share is {share!r}; expected above 0 and at most 1.")
        if by == "math":
            make_verifier("math_verify")  # refuses where it is not installed
            return cls(lambda a, b: same_mathematics(a, b) is True, lambda text: text, share)
        if by == "text":
            return cls(lambda a, b: same_text(a.casefold(), b.casefold()), lambda text: text, share)
        make_verifier({"kind": "regex", "pattern": by, "column": "answer"})
        pattern = re.compile(by)
        return cls(same_text, lambda text: next((m.group(1) for m in reversed([*pattern.finditer(text)])), None), share)

    def outcome(self, answers: Sequence[tuple[str, str]]) -> list[str | None]:
        """Return for each answer, (who wrote it, the text), None where it won, else why not."""
        groups: list[str] = []  # one text for each answer that differs from those before
        group_of: list[int | None] = []
        for _, text in answers:
            found = self.find(text)
            number = None
            if found is not None:
                number = next((i for i, other in enumerate(groups) if self.same(found, other)), len(groups))
                if number == len(groups):
                    groups.append(found)
            group_of.append(number)
        writers = dict.fromkeys(writer for writer, _ in answers)
        votes: Counter[int] = Counter()
        for writer in writers:
            given = Counter(g for (w, _), g in zip(answers, group_of, strict=True) if w == writer and g is not None)
            if len(writers) == 1:
                votes.update(given)
            elif given:
                votes[given.most_common(1)[0][0]] += 1
        cast = len(answers) if len(writers) == 1 else len(writers)
        (first, count), (_, second) = [*votes.most_common(2), (-1, 0), (-1, 0)][:2]
        if count == second or count < self.share * cast or (count * 2 < cast and self.share >= 0.5):
            return [UNDECIDED] * len(answers)
        return [None if group == first else OUTVOTED for group in group_of]
