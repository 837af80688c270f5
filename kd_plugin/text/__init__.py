"""Teachers that only write: they are asked for text, and the student learns from what they wrote.

writers.py says what a writer is and what it answers; server.py asks any OpenAI-compatible server, local.py a model in
this process; spending.py counts tokens and money, up to a ceiling.

Offline: capture.py has the whole of a capture. collecting.py asks, store.py keeps every answer, voting.py is the
panel's vote, selecting.py decides what stays, contamination.py compares with evaluation sets, dataset.py is what
comes out and how it is read.

On a panel: prompts.py renders what a teacher is asked, from templates/ or the user's own, with what others wrote shown
as data by quoting.py, and parsing.py reads its replies, strictly; teacher.py is the teacher that does both, and
correcting.py lets several evaluate, correct and accept.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kd_plugin.text.capture import CapturedText, capture_text
from kd_plugin.text.dataset import load_text, text_source
from kd_plugin.text.local import LocalWriter
from kd_plugin.text.server import ServerWriter
from kd_plugin.text.settings import TextSettings
from kd_plugin.text.spending import Budget, Prices
from kd_plugin.text.teacher import TextLocalTeacher, TextServerTeacher
from kd_plugin.text.writers import Answer, Ask, Usage, Writer, in_order

# What `kind:` may be beside `signal: text` in a panel's block; its other keys are the arguments of the class
TEXT_KINDS: Mapping[str, Callable[..., Any]] = {"server": TextServerTeacher, "local": TextLocalTeacher}

__all__ = [
    "TEXT_KINDS",
    "Answer",
    "Ask",
    "Budget",
    "CapturedText",
    "LocalWriter",
    "Prices",
    "ServerWriter",
    "TextLocalTeacher",
    "TextServerTeacher",
    "TextSettings",
    "Usage",
    "Writer",
    "capture_text",
    "in_order",
    "load_text",
    "text_source",
]
