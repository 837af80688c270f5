"""Render the rows of a generation batch as one teacher reads them.

Shape suffixes: B rows, L tokens, P prompt columns.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.rollouts.rows import Span, left_padded, require_prompts, row_spans
from kd_plugin.views.align import align_all, end_of_turn
from kd_plugin.views.aligned import Aligned
from kd_plugin.views.projection import Projection
from kd_plugin.views.tokens import TokenText
from kd_plugin.views.view import OWN, STUDENT, View

_WINDOW, _ENOUGH = 256, 32  # responses over which coverage is a share, and from how many on it decides


@dataclass(frozen=True)
class Reading:
    """Some rows as a teacher reads them.

    Attributes:
        input_ids: (B, L) prompts, padded on the left to P columns, then responses, padded on the right.
        attention_mask: (B, L) 1 for tokens.
        start: P, the column of the first response token.
        positions: for each row the offsets of those response tokens that the teacher is asked about.
        spans: the columns of each row that hold its tokens.
        prompts: what the teacher read before each response, as text; None where that is the student's prompt.
        aligned: of a teacher that reads tokens of its own, each response in them and in the student's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    start: int
    positions: Sequence[Sequence[int]]
    spans: Sequence[Span]
    prompts: tuple[str, ...] | None = None
    aligned: tuple[Aligned, ...] | None = None

    def select(self, rows: Sequence[int]) -> Reading:
        """Return some of the rows."""
        index = torch.tensor(rows, dtype=torch.int64).to(self.input_ids.device, non_blocking=True)
        return Reading(
            self.input_ids.index_select(0, index),
            self.attention_mask.index_select(0, index),
            self.start,
            [self.positions[row] for row in rows],
            [self.spans[row] for row in rows],
            None if self.prompts is None else tuple(self.prompts[row] for row in rows),
            None if self.aligned is None else tuple(self.aligned[row] for row in rows),
        )

    def response(self, row: int) -> list[int]:
        """Return the response of a row, as token ids; waits for the device."""
        return self.input_ids[row, self.start : self.spans[row].stop].tolist()  # type: ignore[no-any-return]


class Reader:
    """Reads responses for one teacher, under its view.

    Args:
        name: of the teacher.
        view: its view.
        student: the student's tokenizer.
        teacher: the teacher's; None where it has none of its own, which a view by the student's template allows.
        pad_token_id: fills up short rows.
        chat_options: further arguments of ``apply_chat_template``, as the student's prompts are rendered with.
        limit: tokens that the teacher reads at most; None for no limit that is known.
        own_tokens: whether the teacher reads tokens of its own.
        end_tokens: the student's, by which its responses end.
        size: of the run's vocabulary, where a head has fewer rows than the student's tokenizer has tokens.

    Raises:
        ConfigError: the view needs a tokenizer or a chat template that the teacher does not have.
    """

    def __init__(
        self,
        name: str,
        view: View,
        student: Any,
        teacher: Any,
        *,
        pad_token_id: int,
        chat_options: Mapping[str, Any] | None = None,
        limit: int | None = None,
        own_tokens: bool = False,
        end_tokens: Sequence[int] = (),
        size: int | None = None,
    ) -> None:
        self.name = name
        self.view = view
        self.student = student
        self.pad_token_id = pad_token_id
        self.limit = limit
        self.own_tokens = own_tokens
        self.end_tokens = frozenset(end_tokens)
        self.size = size
        self._renderer = teacher if view.chat_template == OWN else student
        self._options = {"add_generation_prompt": True, **(chat_options or {}), "tokenize": False}
        if view.chat_template == OWN:
            if teacher is None or getattr(teacher, "chat_template", None) is None:
                raise ConfigError(
                    f"The view of teacher {name!r} says chat_template: own, and the teacher has no "
                    f"{'tokenizer' if teacher is None else 'chat template'} of its own. Use chat_template: student, or "
                    "name a file that holds a template."
                )
            self._options["chat_template"] = teacher.chat_template
        elif view.chat_template != STUDENT:
            self._options["chat_template"] = view.file_text
        self._tokenizer = self._renderer
        if own_tokens:
            if teacher is None:
                raise ConfigError(
                    f"Teacher {name!r} is to read tokens of its own, and has no tokenizer. Give it one, or set "
                    "tokenizer: student in its view."
                )
            self._tokenizer = teacher
            self._texts = TokenText(student, "the student"), TokenText(teacher, f"teacher {name!r}")
            self._projections: dict[bool, Projection] = {}
            self._seen: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # comparable and scored tokens of responses

    def read(self, rows: Sequence[Mapping[str, Any]], student: Reading) -> Reading:
        """Return some rows of a generation batch as this teacher reads them, with the same responses.

        Args:
            rows: the rows' columns, with ``prompt``.
            student: the same rows as the student read them.

        Raises:
            DataError: a row cannot be rendered, or is longer than the teacher reads; too little of the last
                responses can be compared.
        """
        texts = [self.prompt_text(row) for row in rows]
        is_text = [self._is_text(row) for row in rows]
        if len(set(is_text)) == 1:
            prompts = [list(ids) for ids in self._tokenizer(text=texts, add_special_tokens=is_text[0])["input_ids"]]
        else:
            prompts = [
                list(self._tokenizer(text=text, add_special_tokens=plain)["input_ids"])
                for text, plain in zip(texts, is_text, strict=True)
            ]
        require_prompts(prompts)
        responses: list[Sequence[int]] = [student.response(row) for row in range(len(rows))]
        positions, aligned = student.positions, None
        if self.own_tokens:
            aligned = self._aligned(responses, positions, [self._projection(self._is_text(row)) for row in rows])
            self._require_coverage(aligned)
            responses = [one.alignment.tokens for one in aligned]
            positions = [one.asked.tolist() for one in aligned]
        self._require_fitting(prompts, responses)
        reading = laid_out(prompts, responses, positions, self.pad_token_id, student.input_ids.device, texts)
        return replace(reading, aligned=aligned)

    def _projection(self, is_text: bool) -> Projection:
        """Return the way from the teacher's vocabulary; a turn ends otherwise in a chat than behind a plain text."""
        if is_text not in self._projections:
            options = {k: v for k, v in self._options.items() if k != "add_generation_prompt"}
            if self.view.chat_template == STUDENT:
                options.pop("chat_template", None)
            end = end_of_turn(self._tokenizer, chat=not is_text, options=options)
            own = getattr(self.student, "eos_token_id", None)
            mine = own if own in self.end_tokens else min(self.end_tokens, default=None)
            self._projections[is_text] = Projection(*self._texts, (end, mine), self.size)
        return self._projections[is_text]

    def _aligned(
        self, responses: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], projections: Sequence[Projection]
    ) -> tuple[Aligned, ...]:
        ended = [bool(response) and response[-1] in self.end_tokens for response in responses]
        found = align_all(responses, *self._texts, ended=ended, teacher_ends=[one.ends[0] for one in projections])
        rows = zip(found, positions, projections, strict=True)
        return tuple(Aligned.of(*row, min_coverage=self.view.min_coverage) for row in rows)

    def _require_coverage(self, aligned: Sequence[Aligned]) -> None:
        """Refuse to go on where too little of the last responses can be compared; one alone is left out."""
        self._seen.extend((one.comparable, len(one.positions)) for one in aligned)
        comparable, scored = (sum(column) for column in zip(*self._seen, strict=True))
        if len(self._seen) < _ENOUGH or comparable >= self.view.min_coverage * scored:
            return
        example = next((one for one in reversed(aligned) if not one.is_compared), aligned[-1])
        text = example.alignment.raw.decode("utf-8", "replace")
        raise DataError(
            f"Teacher {self.name!r} can be compared at {comparable / scored:.0%} of the tokens of the last "
            f"{len(self._seen)} responses, and its view asks for {self.view.min_coverage:.0%} (min_coverage). One of "
            f"them: {text[:60]!r}. Its tokenizer and the student's seldom end a token in the same place there, or the "
            "student writes bytes that are no text. Train the student on text first, lower min_coverage, or take a "
            "teacher with a closer tokenizer."
        )

    def with_template(self, change: Callable[[str], str]) -> Reader:
        """Return a reader that renders by what ``change`` makes of its chat template; texts are rendered by none."""
        own, template = copy.copy(self), self.template
        if template is not None:
            own._options = {**self._options, "chat_template": change(template)}
        return own

    @property
    def template(self) -> str | None:
        """The chat template that renders conversations, where there is one of a single name."""
        found = self._options.get("chat_template") or getattr(self._renderer, "chat_template", None)
        return found if isinstance(found, str) else None

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """Return the text that the teacher reads before a response.

        Raises:
            DataError: the row cannot be rendered under this view.
        """
        try:
            prompt, context = row["prompt"], self.view.context_of(row)
            if self._is_text(row):
                return self._plain(prompt, context)
            text = self._renderer.apply_chat_template(
                viewed_messages(prompt, self.view.system, context), **self._options
            )
        except DataError as error:
            raise DataError(f"Teacher {self.name!r}: {error}") from error
        return str(text)

    def _plain(self, prompt: str, context: str) -> str:
        if self.view.system is not None or self.view.chat_template != STUDENT:
            raise DataError(
                "a row's prompt is text, which no chat template renders, and the view has a system message or a chat "
                "template. Give prompts as messages, or leave both out of the view."
            )
        return f"{context}\n\n{prompt}" if context else prompt

    @staticmethod
    def _is_text(row: Mapping[str, Any]) -> bool:
        return isinstance(row["prompt"], str)

    def _require_fitting(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
        if self.limit is not None and longest > self.limit:
            raise DataError(
                f"Under its view teacher {self.name!r} would read a row of {longest} tokens, and it reads "
                f"{self.limit} at most. Shorten the view's context, or max_completion_length."
            )


def viewed_messages(messages: Sequence[Mapping[str, Any]], system: str | None, context: str) -> list[dict[str, Any]]:
    """Return messages with another system message, and with a context at the end of the user's last one.

    Raises:
        DataError: there is a context, and no message of the user.
    """
    found = [dict(message) for message in messages]
    if system is not None:
        found = [message for message in found if message.get("role") != "system"]
        found.insert(0, {"role": "system", "content": system})
    if not context:
        return found
    asked = [message for message in found if message.get("role") == "user"]
    if not asked:
        raise DataError("the view adds a context to the last message of the user, and a prompt has none.")
    content = asked[-1]["content"]
    if isinstance(content, str):
        asked[-1]["content"] = f"{content}\n\n{context}"
    else:
        asked[-1]["content"] = [*content, {"type": "text", "text": f"\n\n{context}"}]
    return found


def laid_out(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    texts: Sequence[str] | None = None,
) -> Reading:
    """Put B responses behind their prompts, as the student's rollouts are laid out."""
    start, width = max(map(len, prompts)), max(map(len, responses), default=0)
    ids, mask = left_padded(prompts, pad_token_id)
    ids, mask = (torch.nn.functional.pad(t, (0, width), value=v) for t, v in ((ids, pad_token_id), (mask, 0)))
    for own, flags, response in zip(ids.numpy(), mask.numpy(), responses, strict=True):
        own[start : start + len(response)] = response
        flags[start : start + len(response)] = 1
    spans = row_spans(mask)
    prompts_read = None if texts is None else tuple(texts)
    return Reading(ids.to(device), mask.to(device), start, positions, spans, prompts_read)
