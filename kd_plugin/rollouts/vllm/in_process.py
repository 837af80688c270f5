"""vLLM in the trainer's own process, in the place of servers.

Each rank has an engine, and weights reach it as they reach a server, through files. ``reload_weights`` and adapters
work there as on a server; ``load_weights``, by which others hand weights over, fails on a CPU (vLLM 0.32). On a GPU the
engine sleeps while the trainer trains: its weights go to host memory and its cache is dropped. Tested on a
CPU, on one rank and on two (tests/vllm/test_vllm_in_process*.py); sleeping was written against vLLM's interface and not
run.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from kd_plugin.errors import ConfigError
from kd_plugin.rollouts import Drawn
from kd_plugin.rollouts.in_process import Sampling, random_states_kept
from kd_plugin.rollouts.vllm.jobs import Job, sampling_arguments, vllm_rank
from kd_plugin.rollouts.vllm.settings import EngineSettings
from kd_plugin.teachers.replies import Listed, read_entries

HERE = "this process"


class InProcessVllm:
    """One engine, with what :class:`~kd_plugin.rollouts.vllm.pool.EnginePool` has for a ``ServerEngine``.

    Args:
        settings: of the engine.
        sampling: how tokens are drawn.
        end_tokens: ids that end a response.
        vocab_size: ids at or above it are no tokens.
        rows: of the student's head.
        student: directory or hub id that the engine starts from.
        dtype: in which it computes.
        lora_rank: of the student's adapter; 0 where all of it trains.
        rank: of this process.
        ranks: processes that have one each.
        device: of the student.

    Raises:
        ConfigError: a setting of generation that vLLM does not have, or an engine over several ranks.
    """

    on_each_rank = True

    def __init__(
        self,
        settings: EngineSettings,
        sampling: Sampling,
        end_tokens: Sequence[int],
        vocab_size: int,
        rows: int,
        *,
        student: str,
        dtype: torch.dtype,
        lora_rank: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    ) -> None:
        if ranks > 1:
            _require_one_device(settings.options or {})
        self.settings, self._sampling, self._rows = settings, sampling, rows
        self._fixed = sampling_arguments(sampling, end_tokens, vocab_size, rows)
        self.version = -1  # optimizer steps of the weights that the engine has
        self._adapter: Any = None
        self._busy = 0.0
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it when it is imported
        import vllm

        options = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_logprobs": 32,
            **({"enable_lora": True, "max_lora_rank": vllm_rank(lora_rank)} if lora_rank else {}),
            "enable_sleep_mode": device.type == "cuda",
            **({"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}),
            **(settings.options or {}),
        }
        self._vllm = vllm
        self._sleeps = bool(options["enable_sleep_mode"])
        # vLLM sets the seeds of the process, and reads from the environment which rank it is
        with random_states_kept(), _environment(rank, ranks, device):
            self._llm = vllm.LLM(model=settings.model or student, **options)
        if self._sleeps:
            self._llm.sleep(level=1)

    @property
    def live(self) -> list[str]:
        """The engine."""
        return [HERE]

    @property
    def names(self) -> dict[str, str]:
        """The engine, as a pool of servers would name it."""
        return {HERE: HERE}

    def forget_adapter(self) -> None:
        """Do nothing: the engine is this trainer's own."""

    def keep(self, names: Mapping[str, str]) -> None:
        """Do nothing: there is one."""

    def load(self, directory: str, version: int) -> None:
        """Take the weights of a directory."""
        with self._awake():
            if self.settings.sync == "adapter":
                from vllm.lora.request import LoRARequest

                self._adapter = LoRARequest("kd-plugin-policy", 1, directory, load_inplace=True)
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            self._llm.reset_prefix_cache()
        self.version = version

    def listed(self, url: str, prefixes: Sequence[Sequence[int]], tokens: int) -> Listed:
        """Return the likeliest tokens after some prefixes; see the pool's."""
        most = min(tokens, self._rows)
        answers = self._answer(prefixes, [{"max_tokens": 1, "logprobs": most, "ignore_eos": True}] * len(prefixes))
        entries = [_entry(answer.logprobs[0]) for answer in answers]
        return read_entries(entries, [int(answer.token_ids[0]) for answer in answers], most, self._rows)

    def submit(self, jobs: Sequence[Job], first: int = 0) -> list[Future[Drawn]]:
        """Generate some responses, and return when they are there."""
        own = {
            **self._fixed,
            "max_tokens": self._sampling.max_completion_length,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": self._sampling.top_k,
            "logprobs": 1,
        }
        began = time.monotonic()
        answers = self._answer([job.prompt for job in jobs], [own | {"seed": job.seed % 2**31} for job in jobs])
        self._busy += time.monotonic() - began
        found = []
        for answer in answers:
            ids = [int(token) for token in answer.token_ids]
            logprobs = [float(at[token].logprob) for token, at in zip(ids, answer.logprobs, strict=True)]
            done: Future[Drawn] = Future()
            done.set_result(Drawn(ids, logprobs, [self.version] * len(ids)))
            found.append(done)
        return found

    def held(self) -> Any:
        """Return a block in which nothing is generated: nothing is, beside :meth:`submit`."""
        return nullcontext()

    def busy_seconds(self) -> float:
        """Return for how long it generated since this was asked last."""
        busy, self._busy = self._busy, 0.0
        return busy

    def _answer(self, prompts: Sequence[Sequence[int]], arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        if not prompts:
            return []
        with self._awake():
            found = self._llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                [self._vllm.SamplingParams(**one) for one in arguments],
                lora_request=self._adapter,
                use_tqdm=False,
            )
        return [one.outputs[0] for one in found]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Have the GPU hold the engine's weights and cache inside the block; the trainer has their room outside."""
        if not self._sleeps:
            yield
            return
        self._llm.wake_up()
        try:
            yield
        finally:
            self._llm.sleep(level=1)


def require_vllm() -> None:
    """Refuse an environment without vLLM; nothing is imported for it.

    Raises:
        ConfigError: names the ways out.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout_engine has no url, so vLLM would generate in this process, and it is not installed here. Name "
            "the servers that generate with url or urls, or install vLLM (docs/engines.md)."
        )


def _require_one_device(options: Mapping[str, Any]) -> None:
    # Ranks ask for different rows, and an engine over several ranks must be asked for the same by all of them
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if options.get(name, 1) != 1:
            raise ConfigError(
                f"rollout_engine: options has {name}: {options[name]}, and without url each rank has an engine of its "
                "own on its own device. Leave it out, or start servers and name them with urls."
            )


@contextmanager
def _environment(rank: int, ranks: int, device: torch.device) -> Iterator[None]:
    """Say which rank this is by the names of torchrun, of which Lightning and Slurm lack some, inside the block."""
    local = rank if device.index is None else device.index
    named = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    kept = {name: os.environ.get(name) for name in named}
    os.environ.update(named)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _entry(listed: Mapping[int, Any]) -> dict[str, Any]:
    return {str(token): {"logprob": one.logprob} for token, one in listed.items()}
