"""What TRL's ``VLLMGeneration`` (1.16) takes for granted or drops: equal counts on all ranks, and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError


def ranks_together(generation: Any) -> tuple[int, int, Any]:
    """Return how many ranks generate in one call, this rank's place among them, and their process group."""
    if generation.mode == "server":
        return generation.accelerator.num_processes, generation.accelerator.process_index, None
    if generation.tensor_parallel_size == 1:
        return 1, 0, None
    return generation.tensor_parallel_size, torch.distributed.get_rank(generation.tp_group), generation.tp_group


def share_evenly(generation: Any) -> None:
    """Let ``generation.generate`` be called with any number of prompts on each rank, none included.

    TRL puts the prompts of all ranks into one list and cuts the answers by ``rank * len(prompts)``, which gives a rank
    the completions of another one's prompts as soon as their numbers differ. Here each rank asks for an equal share of
    the list, which at most ``ranks - 1`` repeated prompts fill up, and the answers go back to the ranks that they are
    for. All ranks must call it together, as before. It takes one completion a prompt, as ``DistillationTrainer`` does.
    """
    original = generation.generate
    ranks, rank, group = ranks_together(generation)

    def generate(prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> tuple[Any, ...]:
        def ask(prompts: list[list[int]], images: Any) -> tuple[Any, ...]:
            # An engine is never asked about nothing: a server refuses that
            return original(prompts, images, num_generations, profiler) if prompts else ([], [], [], [])

        if ranks == 1:
            return ask(prompts, images)
        own = list(zip(prompts, images or [None] * len(prompts), strict=True))
        asked = _gathered(own, ranks, group)
        counts = [len(rows) for rows in asked]
        if len(set(counts)) == 1:
            return ask(prompts, images)
        rows = [row for rows in asked for row in rows]
        share = -(-len(rows) // ranks)
        rows += rows[:1] * (share * ranks - len(rows))
        chosen = rows[rank * share : (rank + 1) * share]
        no_images = all(image is None for _, image in rows)
        answer = ask([ids for ids, _ in chosen], None if no_images else [image for _, image in chosen])
        answers = _gathered(answer, ranks, group)
        of_rank = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return tuple(_part(field, of_rank) for field in zip(*answers, strict=True))

    generation.generate = generate


def _gathered(value: Any, ranks: int, group: Any) -> list[Any]:
    found: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def _part(field: Sequence[list[Any] | None], rows: slice) -> list[Any] | None:
    """Cut rows out of the answers of all ranks; None where they were not asked for this field."""
    present = [part for part in field if part is not None]
    return [row for part in present for row in part][rows] if len(present) == len(field) else None


def ask_for_logprobs(generation: Any, temperature: float) -> None:
    """Have vLLM tell the log-probabilities of the tokens that it draws; TRL's ``DistillationTrainer`` does not.

    Raises:
        ConfigError: a server gives those of another temperature.
    """
    generation.logprobs = 0  # the sampled token's alone
    if generation.mode != "server" or temperature == 1.0 or not generation.accelerator.is_main_process:
        return
    mode = generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ConfigError(
            f"The vLLM server that generates for the student runs with --logprobs-mode {mode}, and the temperature is "
            f"{temperature}: estimator='sampled' needs log-probabilities at that temperature. Start the server with "
            "--logprobs-mode processed_logprobs, or use temperature=1."
        )


@contextmanager
def recorded(generation: Any) -> Iterator[list[list[float]]]:
    """Collect the log-probabilities of the tokens that are generated inside the block, one list a completion.

    See :func:`ask_for_logprobs`.
    """
    found: list[list[float]] = []
    original = generation.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        _, completions, logprobs, ids = answer
        if logprobs is None or ids is None:
            raise DataError(
                "vLLM gave no log-probabilities of its tokens, which estimator='sampled' needs. Leave `logprobs` out "
                "of generation_kwargs."
            )
        found.extend(_of_tokens(*row) for row in zip(completions, logprobs, ids, strict=True))
        return answer

    generation.generate = generate
    try:
        yield found
    finally:
        generation.generate = original


def _of_tokens(tokens: list[int], logprobs: list[list[float | None]], ids: list[list[int]]) -> list[float]:
    """Pick the sampled token's log-probability at each position: of several, the likeliest comes first."""
    found = []
    for token, values, listed in zip(tokens, logprobs, ids, strict=False):  # `padded` compares their numbers
        value = values[listed.index(token)]
        found.append(float("nan") if value is None else value)
    return found


def padded(found: list[list[float]], completion_mask: Tensor, *, cut: bool = False) -> Tensor:
    """Put the lists beside their completions.

    Args:
        found: one list a row.
        completion_mask: (B, C) 1 for tokens, which stand on the left.
        cut: completions may have lost their ends since.

    Returns:
        (B, C) nats; 0 at padding.

    Raises:
        DataError: they are not one a token.
    """
    lengths = completion_mask.sum(dim=1).tolist()
    if cut and len(found) == len(lengths):
        found = [row[:length] for row, length in zip(found, lengths, strict=True)]
    if [len(row) for row in found] != lengths:
        raise DataError(
            f"vLLM gave log-probabilities for {[len(row) for row in found]} tokens of completions of {lengths}; "
            "estimator='sampled' needs one a token. Generate without tools, or with transformers (use_vllm=False)."
        )
    rows = [torch.nn.functional.pad(torch.tensor(row), (0, completion_mask.shape[1] - len(row))) for row in found]
    return torch.stack(rows).to(completion_mask.device)
