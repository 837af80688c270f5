"""How vLLM servers generate for the student: where they are, how weights get there, and what may be stale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.inputs import read_yaml
from kd_plugin.settings import option, other_default, require_known, settings
from kd_plugin.teachers.client import RequestSettings

SYNCS = ("adapter", "reload", "nccl")
_DTYPES = (None, "float32", "bfloat16", "float16")


@settings
class EngineSettings(RequestSettings):
    """A rollout engine beside the trainer, in YAML ``rollout_engine``.

    Raises:
        ConfigError: an unknown name, a value out of range, or settings that contradict each other.
    """

    kind: str = option(default="vllm", help="What generates: 'vllm', servers that are started apart.")
    url: str | None = option(
        default=None, help="Address of the server, `http://host:port`; left out, vLLM generates in this process."
    )
    urls: list[str] | None = option(
        default=None, help="Addresses of several, which share the rows of a batch; in the place of `url`."
    )
    sync: str = option(
        default="adapter",
        help="How weights get there: 'adapter' loads the adapter of a PEFT student from `directory`; 'reload' has all "
        "weights read from it anew; 'nccl' sends all weights from GPU to GPU, which was never run.",
    )
    directory: str | None = option(
        default=None,
        help="Directory that the trainer and all servers see under the same path; left out, `rollout-engine` in the "
        "output directory.",
    )
    max_staleness: int = option(
        default=0,
        help="Optimizer steps by which the weights that generate may be behind. 0 generates each batch with the "
        "weights that it trains; n lets the servers generate ahead while the trainer trains.",
    )
    model: str | None = option(
        default=None,
        help="Name under which the servers list the student, none for the only one; without `url` the path of the "
        "weights that vLLM starts from, none for the student's own.",
    )
    dtype: str | None = option(
        default=None, help="dtype in which weights are sent; left out, that in which the student holds them."
    )
    tolerance: float | None = option(
        default=None,
        help="Nats by which the servers' log-probabilities may differ from the student's; left out, 0.001 in float32 "
        "and 0.25 in 16 bits.",
    )
    on_mismatch: str = option(
        default="stop",
        help="When they differ by more: 'stop' ends the run, 'transformers' lets the student generate in this process "
        "from then on.",
    )
    chunk: int = option(
        default=512,
        help="Tokens of one request. A response goes on from request to request, so that a server that dies, or new "
        "weights, interrupt it and do not begin it anew.",
    )
    max_concurrency: int = other_default(RequestSettings, "max_concurrency", 64)
    max_retries: int = other_default(RequestSettings, "max_retries", 3)
    options: dict[str, Any] | None = option(
        default=None, help="Without `url`: further arguments of `vllm.LLM`, such as gpu_memory_utilization."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "vllm":
            require_known("rollout_engine: kind", self.kind, ("vllm",))
        require_known("rollout_engine: sync", self.sync, SYNCS)
        require_known("rollout_engine: on_mismatch", self.on_mismatch, ("stop", "transformers"))
        if self.dtype not in _DTYPES:
            require_known("rollout_engine: dtype", self.dtype, tuple(name for name in _DTYPES if name))
        if self.url is not None and self.urls:
            raise ConfigError("rollout_engine: both url and urls are set; name the server, or the servers.")
        if self.in_process and (self.max_staleness or self.sync == "nccl"):
            raise ConfigError(
                "rollout_engine without url: vLLM generates in this process, where max_staleness is 0 and sync is "
                "adapter or reload. Name servers with url or urls for the rest."
            )
        if self.options and not self.in_process:
            raise ConfigError(
                "rollout_engine: options are those of vLLM in this process; servers are started with theirs."
            )
        for name, value, least in (
            ("max_staleness", self.max_staleness, 0),
            ("chunk", self.chunk, 1),
        ):
            if value < least:
                raise ConfigError(f"rollout_engine: {name} is {value}; expected at least {least}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"rollout_engine: tolerance is {self.tolerance}; expected a positive number of nats.")

    @property
    def in_process(self) -> bool:
        """Whether vLLM generates in the trainer's own process."""
        return self.url is None and not self.urls

    @property
    def addresses(self) -> tuple[str, ...]:
        """All servers; none where vLLM generates in this process."""
        return () if self.in_process else tuple(self.urls or [str(self.url)])


def engine_settings(block: Mapping[str, Any] | str | None) -> EngineSettings | None:
    """Read a ``rollout_engine`` block, or the YAML file that holds it; None where there is none.

    Raises:
        ConfigError: an unknown key, naming the near one, or what :class:`EngineSettings` refuses.
    """
    if block is None:
        return None
    where = "rollout_engine"
    if isinstance(block, str):
        content, where = read_yaml(Path(block)), block
        block = content["rollout_engine"] if set(content) == {"rollout_engine"} else content
    if not isinstance(block, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {type(block).__name__}.")
    require_known_keys(block, [field.name for field in fields(EngineSettings)], where)
    return EngineSettings(**block)
