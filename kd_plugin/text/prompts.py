"""What a teacher is asked: templates in files, filled in with text that stays data.

A template has three parts: a line ``version: N``, the instructions (the system message), and behind a line ``---`` the
request. ``{{name}}`` stands for what is filled in. What others wrote is filled in as data, see
:mod:`kd_plugin.text.quoting`, and the reply must carry a key that the student could not know.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kd_plugin.errors import ConfigError
from kd_plugin.text.quoting import quoted, reply_words

Purpose = Literal["evaluate", "rewrite", "continue"]
Message = dict[str, str]
# What each template must fill in, so that none asks without the data or takes a reply without the key
FIELDS: Mapping[Purpose, tuple[str, ...]] = {
    "evaluate": ("task", "steps", "key"),
    "rewrite": ("task", "response", "key"),
    "continue": ("task", "kept", "rest", "key"),
}
_FIELD = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Template:
    """One request to a teacher, with holes.

    Attributes:
        purpose: what it asks for.
        version: as its file says.
        digest: sha256 of the file's bytes.
        instructions: the system message.
        request: the user's message, with ``{{name}}`` where something is filled in.
    """

    purpose: Purpose
    version: str
    digest: str
    instructions: str
    request: str

    @classmethod
    def parsed(cls, purpose: Purpose, content: bytes, where: str) -> Template:
        """Read a template's file.

        Raises:
            ConfigError: no version, no ``---``, a hole that is missing or unknown, or bytes that are no UTF-8.
        """
        try:
            head, _, rest = content.decode("utf-8").replace("\r\n", "\n").partition("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"The template {where} is no UTF-8 ({error}). Save it as UTF-8.") from error
        instructions, rule, request = rest.partition("\n---\n")
        if not head.startswith("version: ") or not rule:
            raise ConfigError(
                f"The template {where} has the wrong form. Expected a first line 'version: 1', the instructions, a "
                "line '---', and the request."
            )
        holes = set(_FIELD.findall(request))
        for name in FIELDS[purpose]:
            if name not in holes:
                raise ConfigError(
                    f"The template {where} lacks {{{{{name}}}}} in its request; a template of {purpose!r} fills in "
                    f"{', '.join(FIELDS[purpose])}."
                )
        stray = sorted(holes - set(FIELDS[purpose])) + sorted(set(_FIELD.findall(instructions)))
        if stray:
            raise ConfigError(
                f"The template {where} has the hole {{{{{stray[0]}}}}} where nothing is filled in; its request may use "
                f"{', '.join(FIELDS[purpose])}, its instructions none."
            )
        version = head.removeprefix("version: ").strip()
        return cls(purpose, version, hashlib.sha256(content).hexdigest(), instructions.strip(), request.strip())

    def messages(self, values: Mapping[str, str]) -> list[Message]:
        """Fill in the holes; what is filled in is not looked at for holes."""
        request = _FIELD.sub(lambda hole: values[hole.group(1)], self.request)
        return [{"role": "system", "content": self.instructions}, {"role": "user", "content": request}]


@dataclass(frozen=True)
class Templates:
    """The three templates of a run."""

    evaluate: Template
    rewrite: Template
    go_on: Template

    @classmethod
    def load(cls, directory: str | Path | None = None) -> Templates:
        """Read ``evaluate.txt``, ``rewrite.txt`` and ``continue.txt``; the package's own where the directory lacks one.

        Raises:
            ConfigError: the directory is missing or holds none of the three; or see :meth:`Template.parsed`.
        """
        own = None if directory is None else Path(directory)
        names = [f"{purpose}.txt" for purpose in FIELDS]
        if own is not None and not any((own / name).is_file() for name in names):
            raise ConfigError(f"templates: {str(own)!r} holds none of {', '.join(names)}.")
        found = []
        for purpose in FIELDS:
            name = f"{purpose}.txt"
            if own is not None and (own / name).is_file():
                content, where = (own / name).read_bytes(), str(own / name)
            else:
                content = resources.files("kd_plugin.text").joinpath("templates", name).read_bytes()
                where = f"kd_plugin/text/templates/{name}"
            found.append(Template.parsed(purpose, content, where))
        return cls(*found)

    @property
    def identity(self) -> dict[str, str]:
        """Purpose to version and sha256: what the lineage keeps, and what a resumed run compares."""
        return {
            one.purpose: f"version {one.version}, sha256 {one.digest}"
            for one in (self.evaluate, self.rewrite, self.go_on)
        }


def key_of(*parts: str) -> str:
    """Return 12 hexadecimal digits that the parts decide: no part can hold them on purpose.

    A reply counts only with the key of its request. A student cannot write the key of a request that quotes what it
    writes, since the key is a digest of that.
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def steps_of(response: str) -> list[str]:
    """Cut a response into its lines that are not blank; joined they are the response, white space included."""
    cuts = [found.end() for found in re.finditer(r"\n\s*", response)]
    edges = [0, *cuts, len(response)]
    pieces = [response[a:b] for a, b in itertools.pairwise(edges) if b > a]
    if len(pieces) > 1 and not pieces[0].strip():
        pieces[:2] = [pieces[0] + pieces[1]]
    return pieces or [""]


def imitating_steps(steps: Sequence[str], prompt: Any) -> set[int]:
    """Return the numbers, from 1, of the steps that hold words of a reply, but for words that the task has itself.

    Args:
        steps: as :func:`steps_of` cuts them.
        prompt: the task, text or messages. An assistant's turns in it are no task: a student may have written them.
    """
    turns = [] if isinstance(prompt, str) else [turn for turn in prompt if turn.get("role") != "assistant"]
    task = prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content")) for turn in turns)
    known = {word for word, _, _ in reply_words(task)}
    ends = list(itertools.accumulate(map(len, steps)))
    found: set[int] = set()
    for word, begin, end in reply_words("".join(steps)):
        if word not in known:
            found.update(range(bisect.bisect_right(ends, begin) + 1, bisect.bisect_left(ends, end) + 2))
    return found


def task_of(prompt: Any) -> str:
    """Return a prompt, text or messages, as JSON for a template."""
    if isinstance(prompt, str):
        return quoted(prompt)
    turns: Sequence[Mapping[str, Any]] = prompt
    if len(turns) == 1 and turns[0].get("role") == "user" and isinstance(turns[0].get("content"), str):
        return quoted(turns[0]["content"])
    return quoted([{"role": turn.get("role"), "content": turn.get("content")} for turn in turns])
