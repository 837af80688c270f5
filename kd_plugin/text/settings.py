"""Settings of a capture of text that Python, the command and its YAML share."""

from __future__ import annotations

from typing import Any

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.settings import option, require_known, settings

REASONING = ("think", "field", "drop")
PASS_RATE = "pass_rate"  # the difficulty of a prompt, as its answers show it


@settings
class AskingSettings:
    """How each prompt is asked."""

    completions: int = option(default=1, help="Texts that each teacher writes for a prompt.")
    max_new_tokens: int = option(default=4096, help="Tokens of a text at most, reasoning included.")
    sampling_temperature: float = option(default=0.6, help="Temperature; 0 takes the likeliest token.")
    sampling_top_p: float = option(default=0.95, help="Sample from the likeliest tokens that reach this mass.")
    sampling_top_k: int = option(default=0, help="Sample from the k likeliest tokens; 0 from all.")
    system: str | None = option(default=None, help="System message before prompts that have none.")
    seed: int = option(default=0, help="Of the sampling, and of the choice where groups are balanced.")
    ceiling: float | None = option(
        default=None,
        help="What all answers together may cost, in the currency of the teachers' prices. What is asked for is held "
        "against it at its most expensive, so it is never passed; the capture then ends cleanly with what it has.",
    )
    min_teachers: int | None = option(
        default=None,
        help="Of several teachers, go on while so many can be reached; what the others owe is asked for when the same "
        "command is run again. Left out, all must be there.",
    )
    shard_rows: int = option(default=256, help="Prompts a unit: what is verified and stored together.")


@settings
class SelectingSettings:
    """Which answers are kept."""

    verify: Any = option(
        default=None,
        help="Which answers are right: exact, contains, math_verify, package.module:function, a mapping with kind "
        "(also regex and tests) and its settings, or a list of which all must accept. Others are dropped.",
    )
    answer_column: str = option(default="answer", help="Column of the reference answer.")
    vote: dict[str, Any] | bool | None = option(
        default=None,
        help="Keep the answers on which the panel agrees: each teacher votes for the answer that it gave most often. A "
        "mapping has by (math, text, or a regular expression with a group that finds the answer) and share, the part "
        "of the votes that the winner needs.",
    )
    keep_unfinished: bool = option(default=False, help="Keep texts that reach max_new_tokens without an end.")
    min_characters: int = option(default=1, help="Characters of an answer at least, reasoning not counted.")
    max_characters: int | None = option(default=None, help="Characters of an answer at most, reasoning not counted.")
    max_reasoning_characters: int | None = option(default=None, help="Characters of the reasoning at most.")
    deduplicate: bool = option(
        default=True, help="Keep one of equal prompts, and one of equal answers to a prompt, but for space and case."
    )
    decontaminate: list[Any] | None = option(
        default=None,
        help="Evaluation sets whose items must not occur: files, directories or hub ids, or mappings with dataset, "
        "split, name and columns.",
    )
    ngram: int = option(default=5, help="Words of the n-grams by which prompts and answers are compared with those.")
    overlap: float = option(
        default=0.5,
        help="Part of an item's n-grams from which it is found; what holds it is dropped and listed.",
    )
    keep: int | None = option(default=None, help="Answers kept a prompt, the shortest reasoning first; null keeps all.")
    balance: list[str] | None = option(
        default=None,
        help="Columns whose values, together, are groups that get equally many rows, such as domain; pass_rate is "
        "the part of a prompt's answers that are right, in quarters.",
    )
    per_group: int | None = option(
        default=None, help="Rows a group at most, for balance; null takes the size of the smallest."
    )
    reasoning: str = option(
        default="think",
        help="Where reasoning goes: think puts it before the answer, between <think> and </think>, as DeepSeek-R1 "
        "writes; field into the message's reasoning_content, for templates that render it; drop leaves it out.",
    )


@settings
class TextSettings(LineageSettings, SelectingSettings, AskingSettings):
    """How text is captured: what is asked, and which answers are kept."""

    def __post_init__(self) -> None:
        for name, least in (("completions", 1), ("max_new_tokens", 1), ("shard_rows", 1), ("ngram", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}.")
        for name in ("min_teachers", "keep", "per_group", "max_characters", "max_reasoning_characters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1, or nothing.")
        if not 0 < self.overlap <= 1:
            raise ConfigError(f"overlap={self.overlap}: expected above 0 and at most 1.")
        require_known("reasoning", self.reasoning, REASONING)
        if isinstance(self.vote, dict):
            require_known_keys(self.vote, ("by", "share"), "vote")
        if self.per_group is not None and not self.balance:
            raise ConfigError("per_group is set, and balance names no columns whose values are the groups.")
