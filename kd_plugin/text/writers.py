"""What a writer is asked and what it answers, whichever way it is reached; its reasoning apart from its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from kd_plugin.cache.targets import Generation
from kd_plugin.errors import ServerError
from kd_plugin.lineage.sources import Source

if TYPE_CHECKING:
    from kd_plugin.text.spending import Prices

THINK, END_OF_THINKING = "<think>", "</think>"
FINISHED, TOO_LONG, REFUSED = "stop", "length", "refused"
Prompt = str | Sequence[Mapping[str, str]]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, as the writer counts them.

    Attributes:
        read: of the prompt.
        written: reasoning included.
        cached: those of ``read`` that the server had in its cache, where it says so.
    """

    read: int = 0
    written: int = 0
    cached: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.read + other.read, self.written + other.written, self.cached + other.cached)


@dataclass(frozen=True)
class Ask:
    """One text to write.

    Attributes:
        prompt: messages with ``role`` and ``content``, or a text, which a chat is given as the user's one message.
        generation: how to sample; its ``n`` is ignored, each text has a request of its own.
        seed: of the sampling, where the writer takes one.
        request: further fields of the request, for a server.
    """

    prompt: Prompt
    generation: Generation
    seed: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in self.prompt]


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        text: the answer, without its reasoning.
        reasoning: what was thought before; None where the writer shows none.
        ended: ``stop``: by itself; ``length``: cut off; ``refused``: the server refuses this prompt, and ``text`` is
            empty; or another word of the server, such as ``content_filter``.
        usage: None where the writer does not count.
        model: name by which the server says who wrote.
        says: why a prompt was refused.
    """

    text: str
    reasoning: str | None = None
    ended: str = FINISHED
    usage: Usage | None = None
    model: str | None = None
    says: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.ended == FINISHED


@runtime_checkable
class Writer(Protocol):
    """A model that writes. How it is reached never matters to what is done with the text."""

    @property
    def name(self) -> str:
        """How metrics, messages and lineage call it."""
        ...

    @property
    def prices(self) -> Prices:
        """Of its tokens."""
        ...

    @property
    def source(self) -> Source:
        """What it is and under which terms; known before anything is loaded or sent."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What two descriptions have in common when they write alike; plain values. A resumed run compares it."""
        ...

    def gate(self, admit: Callable[[Sequence[str]], None]) -> None:
        """Have every name that the writer turns out to have checked by ``admit``, which raises, before it is used."""
        ...

    def answers(self, asks: Iterable[tuple[Key, Ask] | None]) -> Iterator[tuple[Key, Answer]]:
        """Answer ``asks``, some at a time, each as soon as it is there, in any order.

        Args:
            asks: read only as far as there is room, so that it may be endless. None among them: nothing can be asked
                before one of those that are under way is answered.

        Raises:
            LicenseRefusedError: by the name that it turns out to have, it may not teach.
            ServerError: it is away for good.
        """
        ...


def in_order(writer: Writer, asks: Sequence[Ask]) -> list[Answer]:
    """Return the answers to ``asks``, in their order; raises as :meth:`Writer.answers`."""
    found: dict[int, Answer] = dict(writer.answers(enumerate(asks)))
    if len(found) != len(asks):
        raise ServerError(f"Writer {writer.name!r} gave {len(found)} answers to {len(asks)} prompts.")
    return [found[i] for i in range(len(asks))]


def split_reasoning(text: str) -> tuple[str, str | None]:
    """Return the answer in ``text`` and the reasoning before it, None if there is none.

    Reasoning stands before the first ``</think>``. Its ``<think>`` stands at the beginning, or in the prompt, as
    DeepSeek-R1's template has it. Reasoning that does not end leaves no answer. A tag later in an answer is part of it.
    """
    begun = text.lstrip().startswith(THINK)
    if begun:
        text = text.lstrip()[len(THINK) :]
    reasoning, end, answer = text.partition(END_OF_THINKING)
    if not begun and (not end or THINK in reasoning):
        return text, None
    return (answer.strip("\n") if end else ""), reasoning.strip("\n")
