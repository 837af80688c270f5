"""How the student of a TRL trainer generates: by TRL, with our decoding loop, under ZeRO-3, or through vLLM.

TRL's ``VLLMGeneration`` (1.16) takes equal counts on all ranks for granted, and drops log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.sampling import completed, draw_settings, own_generation_config, require_whole_distribution
from kd_plugin.rollouts import Drawn, Propose
from kd_plugin.rollouts.decoding import decode_with, generates_row_by_row, real_tokens
from kd_plugin.rollouts.in_process import GenerationProgress, slow_notice
from kd_plugin.rollouts.rows import StopLoops
from kd_plugin.sharding import free_bytes, missing_bytes, most_of_any_rank
from kd_plugin.trl.upstream import unwrapped_for_generation, whole_parameters
from kd_plugin.vocab import Vocabulary

logger = logging.get_logger(__name__)


class TRLEngine:
    """``DistillationTrainer``'s generation as :class:`~kd_plugin.rollouts.RolloutEngine`.

    Args:
        trainer: whose student generates.
        vocabulary: of the run.
    """

    def __init__(self, trainer: Any, vocabulary: Vocabulary) -> None:
        self.trainer = trainer
        self.vocabulary = vocabulary
        self.turn: Callable[[list[list[int]]], list[list[int]]]  # TRL's own generation of one turn
        self._fits: bool | None = None

    @property
    def together(self) -> bool:
        """Whether ranks generate, or take the weights to what generates, by calls that all of them must make."""
        trainer = self.trainer
        if trainer.accelerator.num_processes == 1:
            return False
        return (self.takes_nothing and ranks_together(trainer.vllm_generation)[0] > 1) or self._is_sharded

    @property
    def takes_nothing(self) -> bool:
        """Whether it may be called without a prompt."""
        return self.trainer.use_vllm

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Drawn]:
        """Return a response to each prompt."""
        trainer, repeats = self.trainer, self.trainer.args.repetition_stop
        model, options = self._model, {}
        if repeats:
            longest, multiple = max(map(len, prompts), default=0), trainer.pad_to_multiple_of or 1
            stop = StopLoops(-(-longest // multiple) * multiple, repeats)
            options = {"stopping_criteria": StoppingCriteriaList([stop])}
        with self._decoding(), generating(model, **options):  # TRL passes no criteria to it (1.16)
            return [Drawn(ids) for ids in self.turn([list(ids) for ids in prompts])]

    @contextmanager
    def proposing(self) -> Iterator[Propose]:
        """Hold the student's weights ready, and yield what has it propose tokens."""
        trainer = self.trainer
        with (
            self._decoding(),
            unwrapped_for_generation(trainer) as student,
            torch.no_grad(),
            whole_parameters(trainer),
        ):
            yield lambda ids, mask, count: student.generate(
                input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config, max_new_tokens=count
            )

    @property
    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)

    @property
    def _is_sharded(self) -> bool:
        return self.trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Let transformers generate with our loop, and cast weights for autocast once instead of for each token."""
        trainer = self.trainer
        if trainer.use_vllm:
            yield
            return
        model = self._model
        together = (
            self._is_sharded and trainer.accelerator.num_processes > 1
        )  # each token waits for other ranks' shards
        options: dict[str, Any] = dict(real_tokens(model, self.vocabulary))
        if not together and generates_row_by_row(trainer.generation_config):
            options["custom_generate"] = decode_with(trainer.args.rollout_draws)
        with trainer.accelerator.autocast(), self._gathered_where_they_fit(model), generating(model, **options):
            yield

    @contextmanager
    def _gathered_where_they_fit(self, model: Any) -> Iterator[None]:
        """Under ZeRO-3 gather the weights for generation if they fit, and else say that it will be slow.

        A collective call the first time.
        """
        trainer = self.trainer
        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is None or plugin.zero_stage != 3:
            yield
            return
        if self._fits is None:
            self._decide(model)
        if trainer.args.ds3_gather_for_generation:
            yield
            return
        progress = GenerationProgress(trainer.args.max_completion_length, says=trainer.accelerator.is_main_process)
        with generating(model, stopping_criteria=StoppingCriteriaList([progress])):
            yield

    def _decide(self, model: Any) -> None:
        """Look once whether gathered weights fit on every rank; all ranks must do the same."""
        accelerator, args = self.trainer.accelerator, self.trainer.args
        free = free_bytes(accelerator.device)
        too_large = free is not None and missing_bytes(model) > free
        self._fits = most_of_any_rank([int(too_large)], accelerator.device) == [0]
        if args.ds3_gather_for_generation and not self._fits:
            args.ds3_gather_for_generation = False
        if not args.ds3_gather_for_generation and accelerator.is_main_process:
            logger.warning(slow_notice(model, accelerator.num_processes, fits=self._fits))


@contextmanager
def generating(model: Any, **options: Any) -> Iterator[None]:
    """Have ``model.generate`` called with further arguments inside the block, which TRL's trainer does not let one say.

    Blocks may stand in one another; their ``stopping_criteria`` add up.
    """
    generate, before = model.generate, vars(model).get("generate")

    def called(*args: Any, **own: Any) -> Any:
        both = [*(options.get("stopping_criteria") or ()), *(own.get("stopping_criteria") or ())]
        criteria = {"stopping_criteria": StoppingCriteriaList(both)} if both else {}
        return generate(*args, **{**options, **own, **criteria})

    model.generate = called
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def require_draws(
    panel: TeacherPanel, args: Any, model: PreTrainedModel | str, config: GenerationConfig | None = None
) -> None:
    """Refuse a student whose own generation configuration biases the sampled estimator.

    Args:
        panel: the teachers, and how they are estimated.
        args: the trainer's settings.
        model: the student, or where it is.
        config: of the trainer, once there is one; TRL 1.16 adds to it what a processor needs.

    Raises:
        ConfigError: tokens would not be drawn from the student's whole distribution.
    """
    engine = args.engine_settings()
    if args.use_vllm or (engine is not None and engine.on_mismatch == "stop"):
        return  # it is told every setting, and takes nothing from the checkpoint
    given = {"do_sample": True, "cache_implementation": args.cache_implementation, **draw_settings(args)}
    own = own_generation_config(model, (args.model_init_kwargs or {}).get("revision"))
    whole = completed(GenerationConfig(**given) if config is None else config, own)
    require_whole_distribution(panel, whole, args.temperature, given)


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
    for token, values, listed in zip(tokens, logprobs, ids, strict=False):  # `padded_logprobs` compares their numbers
        value = values[listed.index(token)]
        found.append(float("nan") if value is None else value)
    return found


def padded_logprobs(found: list[list[float]], completion_mask: Tensor, *, cut: bool = False) -> Tensor:
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
