"""Chat templates that render a conversation the same way tomorrow: the time is pinned, chance is refused.

A template may print today's date (``strftime_now`` of transformers). Rows are joined by their tokens, so the time that
a capture printed is kept in its manifest and given to the template again, at each resume and in training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kd_plugin.errors import ConfigError

MESSAGE_COLUMNS = ("prompt", "completion", "messages", "conversations")
_CLOCK = "strftime_now"
_MARKER = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_OPENING = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as TRL and transformers look for it
# Of Jinja's functions those that give the same answer each time
_STEADY_GLOBALS = {"dict", "namespace", "range", "joiner", "cycler"}
_UNSTEADY_FILTERS = {"random"}  # of Jinja's filters; the others depend on their input alone


@dataclass(frozen=True)
class TemplateNeeds:
    """What a template asks of the world around it.

    Attributes:
        formats: in which it prints the time.
        unsteady: what it calls that gives another answer each time.
    """

    formats: frozenset[str] = frozenset()
    unsteady: frozenset[str] = frozenset()


def read_template(template: str) -> TemplateNeeds:
    """Look through the calls of a chat template.

    Raises:
        ConfigError: it is no Jinja, or prints the time in a format that it makes up as it runs, which cannot be pinned.
    """
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_MARKER.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The chat template is not valid Jinja: {error}.") from error
    free = meta.find_undeclared_variables(tree)
    calls = [(node.node.name, node) for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name)]
    # A name that nobody knows is an error when the template runs
    unsteady = {name for name, _ in calls if name in environment.globals} - _STEADY_GLOBALS
    unsteady |= {f"|{node.name}" for node in tree.find_all(nodes.Filter) if node.name in _UNSTEADY_FILTERS}
    formats: set[str] = set()
    if _CLOCK in free:
        given = [call.args[0] for name, call in calls if name == _CLOCK and len(call.args) == 1 and not call.kwargs]
        texts = [str(node.value) for node in given if isinstance(node, nodes.Const)]
        tested = [test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)]
        named = [node.name for node in tree.find_all(nodes.Name)]
        if named.count(_CLOCK) > len(texts) + tested.count(_CLOCK):
            raise ConfigError(
                f"The chat template calls {_CLOCK} with a format that it makes up, or hands it on, so the time that it "
                "prints cannot be pinned and no row would join another day. Write the format as text into the call."
            )
        formats.update(texts)
    return TemplateNeeds(frozenset(formats), frozenset(unsteady))


def pinned(template: str, at: str) -> str:
    """Return ``template`` so that it prints the time ``at`` (ISO 8601) whenever it runs; else nothing changes."""
    if _CLOCK not in template:
        return template
    formats = read_template(template).formats
    if not formats:
        return template
    moment = datetime.fromisoformat(at)
    texts = json.dumps({form: moment.strftime(form) for form in sorted(formats)})
    # Jinja drops the newline after a block, so the template still begins at the start of a line
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ {texts}[format] }}}}{{%- endmacro %}}\n{template}"


def pinned_tokenizer(tokenizer: Any, at: str | None) -> Any:
    """Return a tokenizer whose templates print the time ``at``; the same one where none prints any, or without it."""
    templates = tokenizer.chat_template
    if at is None or templates is None:
        return tokenizer
    fixed = {n: pinned(t, at) for n, t in templates.items()} if isinstance(templates, dict) else pinned(templates, at)
    return tokenizer if fixed == templates else with_template(tokenizer, fixed)


def with_template(tokenizer: Any, template: Any) -> Any:
    """Return a copy of ``tokenizer`` that renders with ``template``; the original, which is saved, is left alone."""
    own = copy.copy(tokenizer)
    own.chat_template = template
    return own


def prints_time(tokenizer: Any) -> bool:
    """Whether conversations are rendered with the time of day or the date.

    Raises:
        ConfigError: the template's output depends on chance, or on a time that cannot be pinned.
    """
    templates = tokenizer.chat_template
    found = [read_template(t) for t in (templates.values() if isinstance(templates, dict) else [templates]) if t]
    unsteady = sorted({name for template in found for name in template.unsteady})
    if unsteady:
        raise ConfigError(
            f"The chat template uses {', '.join(unsteady)}, which gives another text each time. Rows are joined by "
            "their tokens, so nothing that is captured with it could be found again. Take that out of the template, "
            "or give another one as chat_template."
        )
    return any(template.formats for template in found)


def pinned_time(date: str | None) -> str:
    """Return the time that templates are to print: ``date`` (ISO 8601), or now, by this machine's clock.

    Raises:
        ConfigError: ``date`` is none.
    """
    if date is None:
        return datetime.now().isoformat(timespec="seconds")  # local time, as transformers prints it
    try:
        return datetime.fromisoformat(str(date)).isoformat(timespec="seconds")
    except ValueError as error:
        raise ConfigError(f"date={date!r}: expected a day such as 2026-11-29, or a time, as ISO 8601.") from error


def marks_assistant(template: Any) -> bool:
    """Whether a template, of named ones the default, tells which tokens are the assistant's."""
    text = template.get("default", "") if isinstance(template, dict) else template
    return bool(text) and _OPENING.search(text) is not None


def fingerprint(template: str | None) -> str | None:
    """Return the sha256 of a template's text."""
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a chat template renders ``row``."""
    given = [row[name] for name in MESSAGE_COLUMNS if row.get(name) is not None]
    return "input_ids" not in row and any(not isinstance(value, str) for value in given)
