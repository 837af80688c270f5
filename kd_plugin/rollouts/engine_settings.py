"""How vLLM servers generate for the student: where they are, how weights get there, and what may be stale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.inputs import read_yaml
from kd_plugin.settings import option, require_known, settings

SYNCS = ("adapter", "reload")
_DTYPES = (None, "float32", "bfloat16", "float16")
NCCL = (
    "sync='nccl' is not offered: vLLM's own weight transfer needs a GPU on both sides, and it was never run here. Use "
    "sync='adapter' for a student that trains an adapter and 'reload' for others, through a directory that both see; "
    "or TRL's own use_vllm=True, which transfers weights by NCCL."
)


@settings
class EngineSettings:
    """A rollout engine beside the trainer, in YAML ``rollout_engine``.

    Raises:
        ConfigError: an unknown name, a value out of range, or no address.
    """

    kind: str = option(default="vllm", help="What generates: 'vllm', servers that are started apart.")
    url: str | None = option(default=None, help="Address of the server, `http://host:port`.")
    urls: list[str] | None = option(
        default=None, help="Addresses of several, which share the rows of a batch; in the place of `url`."
    )
    sync: str = option(
        default="adapter",
        help="How weights get there: 'adapter' loads the adapter of a PEFT student from `directory`; 'reload' has all "
        "weights read from it anew.",
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
    model: str | None = option(default=None, help="Name under which the servers list the student; none for the only.")
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
    timeout: float = option(default=600.0, help="Seconds until a request without an answer counts as failed.")
    max_concurrency: int = option(default=64, help="Requests at a time to each server.")
    max_retries: int = option(default=3, help="Further attempts of a request before a server counts as dead.")
    api_key_env: str | None = option(default=None, help="Environment variable with the servers' key.")

    def __post_init__(self) -> None:
        if self.kind != "vllm":
            require_known("rollout_engine: kind", self.kind, ("vllm",))
        if self.sync == "nccl":
            raise ConfigError(NCCL)
        require_known("rollout_engine: sync", self.sync, SYNCS)
        require_known("rollout_engine: on_mismatch", self.on_mismatch, ("stop", "transformers"))
        if self.dtype not in _DTYPES:
            require_known("rollout_engine: dtype", self.dtype, tuple(name for name in _DTYPES if name))
        if (self.url is None) == (not self.urls):
            raise ConfigError(
                f"rollout_engine: {'neither url nor urls is' if self.url is None else 'both url and urls are'} set; "
                "name the server, or the servers, that generate. For vLLM in the trainer's own process use TRL's "
                "use_vllm=True."
            )
        for name, value, least in (
            ("max_staleness", self.max_staleness, 0),
            ("chunk", self.chunk, 1),
            ("max_retries", self.max_retries, 0),
            ("max_concurrency", self.max_concurrency, 1),
        ):
            if value < least:
                raise ConfigError(f"rollout_engine: {name} is {value}; expected at least {least}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"rollout_engine: tolerance is {self.tolerance}; expected a positive number of nats.")

    @property
    def addresses(self) -> tuple[str, ...]:
        """All servers."""
        return tuple(self.urls or [str(self.url)])


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
