"""What any vLLM is told to generate, on a server or in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.rollouts.in_process import Sampling

_UNLIKELY = -100.0  # added to the logit of a row that is no token
# What else `generate` may be told that vLLM has under the same name
_SAME_NAMES = ("presence_penalty", "frequency_penalty", "min_tokens")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, for which vLLM can be started


@dataclass(frozen=True)
class Job:
    """A response to be generated.

    Attributes:
        prompt: token ids.
        seed: of its draws.
    """

    prompt: tuple[int, ...]
    seed: int


def sampling_arguments(sampling: Sampling, end_tokens: Sequence[int], vocab_size: int, rows: int) -> dict[str, Any]:
    """Return vLLM's arguments that are the same for all responses, beside temperature, nucleus, top-k and length.

    Args:
        sampling: how tokens are drawn.
        end_tokens: ids that end a response; those of the checkpoint do not.
        vocab_size: ids at or above it are no tokens.
        rows: of the student's head.

    Raises:
        ConfigError: a setting of generation that vLLM does not have.
    """
    unknown = set(sampling.generation_kwargs) - set(_SAME_NAMES)
    if unknown:
        raise ConfigError(
            f"generation_kwargs has {', '.join(sorted(unknown))}, which servers do not take. They take "
            f"{', '.join(_SAME_NAMES)} beside the fields of their own. Leave the others out, or generate in this "
            "process."
        )
    found: dict[str, Any] = {
        **sampling.generation_kwargs,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        # Ends are the run's, not those of the checkpoint on the server
        "ignore_eos": True,
        "stop_token_ids": list(end_tokens),
    }
    if rows > vocab_size:
        found["logit_bias"] = {str(i): _UNLIKELY for i in range(vocab_size, rows)}
    return found


def vllm_rank(rank: int) -> int:
    """Return the ``max_lora_rank`` that vLLM is started with for an adapter: the least that is enough."""
    return next((one for one in _RANKS if one >= rank), rank)
