"""Settings of a capture that Python, the command and its YAML share."""

from __future__ import annotations

from kd_plugin.lineage.config import LineageSettings
from kd_plugin.settings import option, settings


@settings
class ScoringSettings(LineageSettings):
    """Which tokens of which rows are scored, and in which portions."""

    filter: str | None = option(
        default=None,
        help="Which completions are kept: exact_match or math_verify against answer_column, or a function as "
        "package.module:function, called with the completion and the row, which returns True, False, or the reason to "
        "drop it as text.",
    )
    answer_column: str = option(default="answer", help="Column of the reference answer.")
    temperature: float = option(default=1.0, help="The logits are divided by it before the softmax.")
    max_length: int | None = option(
        default=None, help="Tokens kept from the start of a row, as in SFTConfig; null keeps all."
    )
    completion_only: bool | None = option(
        default=None, help="Score completions only; null does so where rows have a prompt and a completion."
    )
    assistant_only: bool = option(
        default=False,
        help="Score the assistant's turns only, as assistant_only_loss trains on them; the chat template must mark "
        "them with {% generation %}.",
    )
    date: str | None = option(
        default=None,
        help="Day that a template which prints today's date is given, such as 2026-11-29; null takes that of the "
        "capture which is there, else today. It is kept in the manifest, and training renders with it.",
    )
    shard_rows: int = option(
        default=1024,
        help="Dataset rows a unit, the most that an interruption costs, and whose targets are held at once.",
    )
    batch_tokens: int = option(
        default=16_384,
        help="Tokens of a forward pass, padding included. Lower it when memory runs out; stored values then differ in "
        "rounding.",
    )
    seed: int = option(default=0, help="Seed of the draws of sampled targets.")
