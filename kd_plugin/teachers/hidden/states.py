"""Last hidden states from a vLLM server: what is asked, what answers must hold, what the server must say of itself.

vLLM (0.32) normalizes what it pools unless it is told not to, and computes in the dtype that it was started with;
neither stands in its answers. So the states of a few tokens are looked at before any is learned from.

Shape suffixes: P probe tokens, L tokens of a row, H hidden width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, NonFiniteError, ServerError
from kd_plugin.models import load_language_model
from kd_plugin.sharding import replicated_models
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.agreement import Probes
from kd_plugin.teachers.client import Client, Raw, RefusedRequest
from kd_plugin.teachers.hidden.head import Checkpoint
from kd_plugin.teachers.served import compare_tokenizers, find_model, names_of

POOLER = '{"task":"token_embed","use_activation":false}'
FLAGS = f"--runner pooling --convert embed --pooler-config '{POOLER}'"
PATH = "/pooling"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# By which states of the same tokens may differ between two passes, relative to their length. SmolLM2-135M on two
# engines: 2e-6 in float32, 0.03 in bfloat16; other weights are 0.3 and more apart.
_ROUNDING = {"float32": 1e-2, "bfloat16": 0.1, "float16": 0.1}
RUN_BELOW = 2 * 1024**3  # bytes of a checkpoint that is run on the probe here; seconds on a CPU
_CHANCE = 1.0  # nats by which a text must be likelier than any tokens
# Prose, code and figures, of which every language model has an opinion
_TEXT = (
    "The licenses for most software are designed to take away your freedom to share and change it. By contrast, our "
    "licences are intended to guarantee it. for i in range(10): print(i)  1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
)


@dataclass(frozen=True)
class _Part:
    """Where a row's states are in an answer."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


@dataclass(frozen=True)
class Pooling:
    """What is asked of a server, and what its answers are held against.

    Attributes:
        url: of the server, for messages.
        model: name that is sent.
        width: H.
        dtype: of the values that are sent back: that of the server's own, so that nothing is lost or sent for nothing.
    """

    url: str
    model: str
    width: int
    dtype: str

    def request(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the body of one request for the hidden states of all tokens of ``rows``."""
        return {
            "model": self.model,
            "input": [list(row) for row in rows],
            "task": "token_embed",
            "encoding_format": "bytes",
            "embed_dtype": self.dtype,
            "endianness": "little",
        }

    def read(self, answer: Raw | Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return (L, H) for each of ``rows``.

        Raises:
            ServerError: another model or for other tokens answered, or something is missing.
            ConfigError: the server gives something else than one state a token, or states of another width.
            NonFiniteError: NaN or infinity among the values.
        """
        try:
            told = json.loads(answer.headers["metadata"])
            model, items = told["model"], sorted(told["data"], key=lambda item: int(item["index"]))
            parts = [_Part(tuple(i["shape"]), i["embed_dtype"], int(i["start"]), int(i["end"])) for i in items]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.url}{PATH} answered without its metadata ({error!r}). vLLM 0.32 or later is needed, and "
                "nothing before it may drop the header 'metadata'."
            ) from error
        if model != self.model or len(parts) != len(rows):
            raise ServerError(
                f"{self.url}{PATH} answered with {len(parts)} rows of model {model!r} where {len(rows)} of "
                f"{self.model!r} were asked. Nothing of this answer was used. Let it serve that model again."
            )
        return [self._row(answer.content, row, part) for row, part in zip(rows, parts, strict=True)]

    def _row(self, content: bytes, row: Sequence[int], part: _Part) -> Tensor:
        if len(part.shape) != 2:
            raise ConfigError(
                f"{self.url} pools a row into one vector of shape {part.shape}, and the state of each token is needed. "
                f"Start the server with {FLAGS}."
            )
        if part.shape[1] != self.width:
            raise ConfigError(
                f"{self.url} gives states of width {part.shape[1]}, and the output head of the checkpoint takes "
                f"{self.width}. Serve the model that repo names, without a projection, or name the one that is served."
            )
        dtype, size = DTYPES[self.dtype], part.end - part.start
        if (part.shape[0], part.dtype, size) != (len(row), self.dtype, math.prod(part.shape) * dtype.itemsize):
            raise ServerError(
                f"{self.url}{PATH} gave {part.shape[0]} states in {part.dtype} ({size} bytes) for {len(row)} tokens in "
                f"{self.dtype}. Nothing of this answer was used. Does it truncate prompts?"
            )
        if len(content) < part.end:
            raise ServerError(
                f"{self.url}{PATH} gave {len(content)} bytes of {part.end}. Nothing of this answer was used."
            )
        # A copy, which may be written to and lets go of the rest
        states = torch.frombuffer(bytearray(content[part.start : part.end]), dtype=dtype).view(part.shape)
        if not bool(torch.isfinite(states).all()):
            raise NonFiniteError(
                f"{self.url} gave NaN or infinity for a hidden state. Check the weights that it serves; float16 "
                "overflows in some models: start it with --dtype bfloat16."
            )
        return states


@dataclass(frozen=True)
class HiddenGreeting:
    """What a server of hidden states said at the handshake.

    Attributes:
        served: its own description of the model: ``id``, ``max_model_len``, ``root``.
        pooling: what is asked of it from now on.
        probe: (P,) tokens that go with every request.
        states: (P, H) float32, what it said of them.
        logprobs: nats of the tokens of the long probe after its first, by the checkpoint's head.
    """

    served: Mapping[str, Any]
    pooling: Pooling
    probe: tuple[int, ...]
    states: Tensor
    logprobs: tuple[float, ...]

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have."""
        most = self.served.get("max_model_len")
        return None if most is None else int(most)

    def require_probe(self, found: Tensor) -> None:
        """Refuse an answer whose probe is not what it was.

        Raises:
            ServerError: another model, or one in another state, answers behind the address.
        """
        apart = distance(self.states, found.float())
        if not apart <= _ROUNDING[self.pooling.dtype]:
            raise ServerError(
                f"{self.pooling.url} answers one question in two ways: the states of a probe that goes with every "
                f"request are {apart:.1%} from what they were, where rounding explains "
                f"{_ROUNDING[self.pooling.dtype]:.0%}. Nothing of it was used. Do several servers with different "
                "weights stand behind this address? Name one server, or serve the same weights from all."
            )


def shake_hands_with_pooler(
    client: Client,
    wanted: str | None,
    checkpoint: Checkpoint,
    head: OutputHead,
    dtype: str,
    tokenizer: Any,
    name: str,
    admit: Callable[[Sequence[str]], None] | None = None,
) -> HiddenGreeting:
    """Refuse a server whose hidden states are not those that the checkpoint's head takes.

    Args:
        client: the way to the server.
        wanted: name of the model; None for the only one.
        checkpoint: of the weights that should be served.
        head: its output head, on the CPU.
        dtype: that the server should compute in; ``auto`` for that of the head.
        tokenizer: the teacher's.
        name: how messages call the teacher.
        admit: told of the names that the server gives for the model, before anything is sent to it; refuses by raising.

    Raises:
        LicenseRefusedError: what it serves by its own word may not teach.
        ServerError: it is away, or does not serve the model.
        VocabularyError: its tokenizer is another one.
        ConfigError: it was started without the flags of a pooler, normalizes, computes in another dtype, allows more
            context than the model has, or gives states of another model.
    """
    size = int(head.vocab_size or head.weight.shape[0])
    with client.said(name):
        served = find_model(client, wanted)
        if admit is not None:
            admit(names_of(served))
        pooling = Pooling(client.root, str(served["id"]), int(head.weight.shape[1]), "float32")
        limit = served.get("max_model_len")
        _require_context(client.root, limit, checkpoint.config)
        compare_tokenizers(client, pooling.model, size, tokenizer, name)
        probes = Probes.of(size, None if limit is None else int(limit))
        text = [int(i) for i in tokenizer(_TEXT, add_special_tokens=False)["input_ids"] if i < size][:limit]
        rows = [probes.short, probes.long, text]
        short, long, read = (states.float() for states in _ask(client, pooling, rows))
        _require_unnormalized(client.root, torch.cat([short, long, read]))
        _require_dtype(client.root, torch.cat([short, long, read]), dtype, head)
        pooling = replace(pooling, dtype=_observed_dtype(torch.cat([short, long, read])))
        _require_checkpoint(pooling, checkpoint, head, [(probes.long, long), (text, read)])
    logprobs = token_logprobs(head, long, probes.long)
    return HiddenGreeting(served, pooling, probes.short, short, tuple(logprobs.tolist()))


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Return how far (N, H) states are apart, relative to their length.

    The median: in some models a rounding sends a token to another expert.
    """
    return float(((mine - theirs).norm(dim=-1) / mine.norm(dim=-1).clamp(min=1e-20)).median())


def token_logprobs(head: OutputHead, states: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return (L - 1,) nats of the tokens of a row after its first, from its (L, H) states."""
    logits = head.logits(states[:-1].float()).float()
    return logits.log_softmax(-1).gather(1, torch.tensor(list(tokens)[1:]).unsqueeze(1))[:, 0]


def _ask(client: Client, pooling: Pooling, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    try:
        return pooling.read(client.post(PATH, pooling.request(rows)), rows)
    except RefusedRequest as error:
        if error.status == 404:
            raise ConfigError(
                f"{client.root} has no {PATH}: it was started to generate, or is older than vLLM 0.32. Start the "
                f"server with {FLAGS}."
            ) from error
        if "pooling_task" in error.says or "Unsupported task" in error.says:
            raise ConfigError(
                f"{client.root} does not give the hidden states of tokens; it says {error.says!r}. Start the server "
                f"with {FLAGS}."
            ) from error
        raise


def _require_context(url: str, limit: Any, config: Any) -> None:
    """Refuse a server that takes longer rows than the model was made for, as vLLM can be forced to."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factors = [value for value in (scaling, *scaling.values()) if isinstance(value, Mapping)]
    factor = max([1.0, *(float(one["factor"]) for one in factors if one.get("factor"))])
    if limit is None or most is None or int(limit) <= most * factor:
        return
    raise ConfigError(
        f"{url} takes {limit} tokens, and the model was made for {int(most * factor)}: beyond, its states mean "
        f"nothing. Start the server with --max-model-len {int(most * factor)}."
    )


def _require_unnormalized(url: str, states: Tensor) -> None:
    lengths = states.norm(dim=-1)
    lengths = lengths[lengths > 0]  # a first token that is padding has no state
    if bool(((lengths - 1).abs() < 1e-2).all()):
        raise ConfigError(
            f"{url} normalizes its hidden states to length 1, and the output head needs them as they are. Start the "
            f"server with --pooler-config '{POOLER}'."
        )


def _observed_dtype(states: Tensor) -> str:
    """Return the dtype that values were computed in: what is exact in 16 bits was never more."""
    for name in ("bfloat16", "float16"):
        if torch.equal(states.to(DTYPES[name]).float(), states):
            return name
    return "float32"


def _require_dtype(url: str, states: Tensor, wanted: str, head: OutputHead) -> None:
    own = str(head.weight.dtype).removeprefix("torch.")
    expected, observed = own if wanted == "auto" else wanted, _observed_dtype(states)
    if observed == expected:
        return
    why = "that of the checkpoint's head" if wanted == "auto" else "server_dtype"
    raise ConfigError(
        f"{url} computes in {observed}, and {expected} is expected ({why}). Start the server with --dtype {expected}, "
        f"or accept it: server_dtype='{observed}'."
    )


def _require_checkpoint(
    pooling: Pooling, checkpoint: Checkpoint, head: OutputHead, rows: Sequence[tuple[Sequence[int], Tensor]]
) -> None:
    """Refuse states that are not the checkpoint's.

    A small checkpoint is run here on the same tokens. Of a large one only the head is at hand: by it a text must be
    likelier than chance, which states of another model, or before the final norm, do not make it.
    """
    size = checkpoint.bytes
    if size is not None and size <= RUN_BELOW:
        own = _own_states(checkpoint, DTYPES[pooling.dtype], [tokens for tokens, _ in rows])
        apart = max(distance(mine, theirs) for mine, (_, theirs) in zip(own, rows, strict=True))
        if not apart <= _ROUNDING[pooling.dtype]:
            raise ConfigError(
                f"{pooling.url} serves other weights than {checkpoint.reference!r}: the states of the same tokens are "
                f"{apart:.1%} apart, where rounding explains {_ROUNDING[pooling.dtype]:.0%}. Serve that checkpoint "
                f"(--model {checkpoint.reference}), or name with repo the one that is served."
            )
        return
    tokens, states = rows[-1]
    found, chance = -float(token_logprobs(head, states, tokens).mean()), math.log(int(head.vocab_size or 2))
    if not found <= chance - _CHANCE:
        raise ConfigError(
            f"By the output head of {checkpoint.reference!r} a plain text costs {found:.1f} nats per token in the "
            f"states that {pooling.url} gives, and {chance:.1f} would be chance. The states are of another model, or "
            f"not those after the final norm. Serve that checkpoint (--model {checkpoint.reference}) with {FLAGS}."
        )


@torch.no_grad()
def _own_states(checkpoint: Checkpoint, dtype: torch.dtype, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    with replicated_models():
        model: Any = load_language_model(checkpoint.reference, revision=checkpoint.revision, dtype=dtype).eval()
    backbone = model.base_model
    return [backbone(input_ids=torch.tensor([list(row)]), use_cache=False).last_hidden_state[0].float() for row in rows]
