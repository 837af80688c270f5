"""From what was written to the dataset: which answers are kept, in what form, and a count of all others by reason.

The answers are gone through a unit at a time, so that memory grows by some tens of bytes an answer: which of them may
stay, which of those are chosen, and once more to write them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kd_plugin.text.contamination import Contamination, EvaluationItems
from kd_plugin.text.settings import PASS_RATE, TextSettings
from kd_plugin.text.writers import END_OF_THINKING, FINISHED, REFUSED, THINK, TOO_LONG

UNFINISHED, EMPTY, SHORT, LONG, THOUGHT_LONG = "unfinished", "empty", "too short", "too long", "reasoning too long"
CONTAMINATED, SAME_PROMPT, SAME_ANSWER, NOT_CHOSEN, NOT_BALANCED = (
    "contaminated", "same prompt", "same answer", "beyond keep", "beyond balance",
)  # fmt: skip
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_THOUGHT_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string())])


@dataclass
class Selection:
    """What was decided.

    Attributes:
        kept: answers that stay, in all.
        dropped: how many do not, by reason.
        found: items of evaluation sets, each with the row of the dataset whose prompt or answer holds it.
        chosen: for each unit, which of its answers stay.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    found: list[tuple[int, Contamination]] = field(default_factory=list)
    chosen: list[list[bool]] = field(default_factory=list)


Tables = Callable[[], Iterable[pa.Table]]


def select(tables: Tables, settings: TextSettings, items: EvaluationItems | None) -> Selection:
    """Decide which answers stay.

    Args:
        tables: gives the units' tables, in order, as often as it is called.
        settings: the rules.
        items: of evaluation sets, or None.
    """
    found, prompts = Selection(), dict[bytes, int]()
    groups: dict[str, list[bytes]] = {}
    places: list[list[tuple[str, bytes] | None]] = []
    for table in tables():
        unit: list[tuple[str, bytes] | None] = []
        for answers in _by_row(table):
            reasons = _of_one_prompt(answers, settings, items, prompts, found)
            rate = _quarter(sum(bool(a["passed"]) for a in answers) / len(answers))
            for answer, reason in zip(answers, reasons, strict=True):
                if reason is not None:
                    found.dropped[reason] += 1
                    unit.append(None)
                    continue
                group, rank = _group(answer, rate, settings), _rank(answer, settings.seed)
                groups.setdefault(group, []).append(rank)
                unit.append((group, rank))
        places.append(unit)
    last = _last_ranks(groups, settings)
    for unit in places:
        stays = [place is not None and place[1] <= last.get(place[0], b"") for place in unit]
        found.dropped[NOT_BALANCED] += sum(place is not None for place in unit) - sum(stays)
        found.kept += sum(stays)
        found.chosen.append(stays)
    found.dropped = +found.dropped
    return found


def training_rows(
    tables: Tables, selection: Selection, settings: TextSettings, conversation: bool, models: Mapping[str, str]
) -> Iterator[pa.Table]:
    """Yield the chosen answers as rows that TRL trains on, a table a unit.

    Args:
        tables: as for :func:`select`.
        selection: what it returned.
        settings: where reasoning goes.
        conversation: messages; else texts, where the teacher was asked by texts.
        models: the model behind each teacher's name: a column that stays with the rows wherever they are copied.
    """
    message = _THOUGHT_MESSAGE if settings.reasoning == "field" else _MESSAGE
    prompt, completion = (pa.list_(_MESSAGE), pa.list_(message)) if conversation else (pa.string(), pa.string())
    for table, stays in zip(tables(), selection.chosen, strict=True):
        rows = [row for row, stay in zip(table.to_pylist(), stays, strict=True) if stay]
        facts = [json.loads(row["facts"]) for row in rows]
        columns = {
            "prompt": pa.array([_prompt(row, settings, conversation) for row in rows], prompt),
            "completion": pa.array([_completion(row, settings, conversation) for row in rows], completion),
            "response": pa.array([row["response"] for row in rows], pa.string()),
            "reasoning": pa.array([row["reasoning"] for row in rows], pa.string()),
            "teacher_name": pa.array([row["teacher_name"] for row in rows], pa.string()),
            "generated_by": pa.array([models[row["teacher_name"]] for row in rows], pa.string()),
            "score": pa.array([row["score"] for row in rows], pa.float64()),
            "row": pa.array([row["row"] for row in rows], pa.int64()),
            "sample": pa.array([row["sample"] for row in rows], pa.int32()),
        }
        for name in sorted({key for fact in facts for key in fact}):
            columns[name] = pa.array([fact.get(name) for fact in facts], pa.string())
        yield pa.table(columns)


def _by_row(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    answers: list[dict[str, Any]] = []
    for answer in table.to_pylist():
        if answers and answers[0]["row"] != answer["row"]:
            yield answers
            answers = []
        answers.append(answer)
    if answers:
        yield answers


def _of_one_prompt(
    answers: list[dict[str, Any]],
    settings: TextSettings,
    items: EvaluationItems | None,
    prompts: dict[bytes, int],
    found: Selection,
) -> list[str | None]:
    """Return why each answer to one prompt goes, None where it stays."""
    row, prompt = answers[0]["row"], answers[0]["prompt"]
    digest_of_prompt = _digest(_words(json.loads(prompt)))
    first = prompts.get(digest_of_prompt, row)
    in_prompt = items.find(_words(json.loads(prompt))) if items is not None else None
    if in_prompt is not None:
        found.found.append((row, in_prompt))
    reasons: list[str | None] = []
    seen: set[bytes] = set()
    for answer in answers:
        reason = _by_itself(answer, settings)
        if reason is None and in_prompt is not None:
            reason = CONTAMINATED
        if reason is None and settings.deduplicate and first != row:
            reason = SAME_PROMPT
        if reason is None and items is not None:
            inside = items.find(f"{answer['reasoning'] or ''}\n{answer['response']}")
            if inside is not None:
                found.found.append((row, inside))
                reason = CONTAMINATED
        if reason is None and settings.deduplicate:
            digest = _digest(f"{answer['reasoning'] or ''}\0{answer['response']}")
            reason = SAME_ANSWER if digest in seen else None
            seen.add(digest)
        reasons.append(reason)
    if None in reasons:
        prompts[digest_of_prompt] = row
    if settings.keep is not None:
        stay = [i for i, reason in enumerate(reasons) if reason is None]
        stay.sort(key=lambda i: (len(answers[i]["reasoning"] or ""), len(answers[i]["response"]), i))
        for i in stay[settings.keep :]:
            reasons[i] = NOT_CHOSEN
    return reasons


def _by_itself(answer: Mapping[str, Any], settings: TextSettings) -> str | None:
    ended, text = answer["ended"], answer["response"]
    if ended == REFUSED:
        return "refused by the server"
    if ended != FINISHED and not (ended == TOO_LONG and settings.keep_unfinished):
        return UNFINISHED if ended == TOO_LONG else f"ended by {ended}"
    if not text.strip():
        return EMPTY
    if answer["why_not"] is not None:
        return str(answer["why_not"])
    if len(text) < settings.min_characters:
        return SHORT
    if settings.max_characters is not None and len(text) > settings.max_characters:
        return LONG
    most = settings.max_reasoning_characters
    return THOUGHT_LONG if most is not None and len(answer["reasoning"] or "") > most else None


def _group(answer: Mapping[str, Any], rate: str, settings: TextSettings) -> str:
    facts = {**json.loads(answer["facts"]), PASS_RATE: rate}
    return json.dumps([facts.get(name) for name in settings.balance or ()])


def _last_ranks(groups: Mapping[str, list[bytes]], settings: TextSettings) -> dict[str, bytes]:
    """Return the rank of the last answer of each group that stays."""
    sizes = [len(ranks) for ranks in groups.values()]
    most = max(sizes, default=0)
    if settings.balance:
        most = min(sizes, default=0) if settings.per_group is None else settings.per_group
    return {group: sorted(ranks)[min(most, len(ranks)) - 1] for group, ranks in groups.items()}


def _rank(answer: Mapping[str, Any], seed: int) -> bytes:
    """Return a number that orders answers by chance, the same in every run."""
    return _digest(f"{seed}/{answer['row']}/{answer['teacher_name']}/{answer['sample']}")


def _quarter(rate: float) -> str:
    low = min(math.floor(rate * 4), 3) / 4
    return f"{low:g}-{low + 0.25:g}"


def _prompt(row: Mapping[str, Any], settings: TextSettings, conversation: bool) -> Any:
    prompt = json.loads(row["prompt"])
    if not conversation:
        return prompt
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _completion(row: Mapping[str, Any], settings: TextSettings, conversation: bool) -> Any:
    content, reasoning = row["response"], row["reasoning"]
    if settings.reasoning == "think" and reasoning is not None:
        content = f"{THINK}\n{reasoning}\n{END_OF_THINKING}\n\n{content}"
    if not conversation:
        return content
    message = {"role": "assistant", "content": content}
    return [{**message, "reasoning_content": reasoning} if settings.reasoning == "field" else message]


def _words(prompt: Any) -> str:
    """Return what the user says in a prompt."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt if message["role"] != "system")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(re.sub(r"\s+", " ", text).strip().casefold().encode(), digest_size=12).digest()
