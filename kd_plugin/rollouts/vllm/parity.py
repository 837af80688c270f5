"""Whether the servers that generate have the student's weights: both score the same tokens after every sync.

A server may take new weights and keep some of the old ones without a word: vLLM 0.32 on a CPU leaves the output head of
a tied model as it was. Nothing that it generates then shows it.

Shape suffixes: N prefixes, K tokens that are listed after each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import ServerError
from kd_plugin.sharding import gathered_heads, is_sharded
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.agreement import Probes, floored
from kd_plugin.teachers.replies import Listed

TOLERANCE = {torch.float32: 1e-3}  # nats; two float32 engines were seen to be 2e-5 apart
COARSE = 0.25  # in 16 bits, where SmolLM2-135M is 0.06 from itself in float32
_NOISE = 4.0  # times what they differed by at the start
_LEAST = 0.01  # of the tolerance, which counts as rounding in any case
_UNEXPLAINED = 0.2  # share of what the student changed by since the last sync
_EVERY = 3  # tokens from the end of one prefix to that of the next
LISTED = 8  # likeliest tokens that are compared
_SCALES = (0.25, 0.5, 2.0, 4.0)  # of an adapter, that are tried for an explanation


@dataclass(frozen=True)
class Probe:
    """Token sequences from all over the vocabulary, and prefixes of them after which the next token is looked at.

    Attributes:
        rows: their ids.
    """

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, vocab_size: int) -> Probe:
        """Return the probe for so many tokens."""
        long = Probes.of(vocab_size, None).long
        return cls((long, long[::-1]))

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """N prefixes."""
        return [row[: end + 1] for row in self.rows for end in self.ends(row)]

    @staticmethod
    def ends(row: Sequence[int]) -> list[int]:
        """Return the positions of a row at which a prefix ends."""
        return list(range(2, len(row), _EVERY))


class Parity:
    """Compares a student with its servers, over the syncs of a run.

    Args:
        probe: what both score.
        tolerance: nats (root mean square) by which they may differ; None takes that of ``dtype``.
        dtype: that the student computes in.
    """

    def __init__(self, probe: Probe, tolerance: float | None, dtype: torch.dtype) -> None:
        self.probe = probe
        self._tolerance = tolerated(tolerance, dtype)
        self._noise: float | None = None
        self._last: Tensor | None = None

    def allowed(self, mine: Tensor, theirs: Listed) -> float:
        """Return by how many nats a server may differ from the student's (N, V) log-probabilities.

        From the second sync on it is what they differed by at the start, several times, or a part of what the student
        changed by, if that is more: so an update that did not arrive shows as soon as it is larger than rounding.
        """
        if self._noise is None or self._last is None:
            return self._tolerance
        return min(
            self._tolerance, max(_NOISE * self._noise, _UNEXPLAINED * _rms(_at(mine, theirs), _at(self._last, theirs)))
        )

    def require(self, url: str, mine: Tensor, theirs: Listed, version: int, explain: Callable[[Listed], str]) -> float:
        """Refuse a server that scores otherwise than the student.

        Args:
            url: of the server.
            mine: (N, V) nats of the student.
            theirs: what the server lists.
            version: of the weights.
            explain: called with ``theirs``; says which weights would give them, or nothing.

        Returns:
            Nats between the two, root mean square.

        Raises:
            ServerError: says by how much, and what seems stale.
        """
        apart, allowed = rms(mine, theirs), self.allowed(mine, theirs)
        if not apart <= allowed:
            start = self._noise is None
            causes = (
                "Does it serve the student's base, in the student's dtype (--dtype)? Else set rollout_engine.tolerance"
                if start
                else "Nothing that it generates is trained on"
            )
            raise ServerError(
                f"The rollout engine at {url} does not have the student's weights of step {version}: the same tokens "
                f"are {apart:.2g} nats apart (root mean square over {theirs.ids.size}), where {allowed:.2g} is allowed."
                f"{explain(theirs)} {causes}."
            )
        return apart

    def passed(self, mine: Tensor, apart: float) -> None:
        """Take note that every server agreed."""
        if self._noise is None:
            self._noise = max(apart, _LEAST * self._tolerance)
        self._last = mine


def tolerated(given: float | None, dtype: torch.dtype) -> float:
    """Return the nats by which two engines may differ that were given the same weights, unless a user says so."""
    return given or TOLERANCE.get(dtype, COARSE)


def rms(mine: Tensor, theirs: Listed) -> float:
    """Return the root mean square of differences from (N, V) nats, in nats, over the tokens that are listed."""
    listed = torch.from_numpy(theirs.logprobs)
    return _rms(_at(mine, theirs), listed)


def _rms(mine: Tensor, theirs: Tensor) -> float:
    a, b = (torch.from_numpy(floored(one.double().numpy())) for one in (mine, theirs))
    return float((a - b).square().mean().sqrt())


def _at(logprobs: Tensor, listed: Listed) -> Tensor:
    return logprobs.gather(1, torch.from_numpy(listed.ids))


@torch.no_grad()
def own_logprobs(student: Any, probe: Probe, device: torch.device) -> Tensor:
    """Return (N, V) nats that a student gives the token after each prefix, on the CPU.

    A collective call where the student is sharded.
    """
    model = student.get_base_model() if hasattr(student, "get_base_model") else student
    was_training, found = student.training, []
    student.eval()
    try:
        for row in probe.rows:
            ids = torch.tensor([list(row)], device=device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, probe.ends(row)]
            with gathered_heads([OutputHead.from_model(student)]) as (head,):
                logits = head.logits(hidden.to(head.weight.dtype)).float()
            found.append(logits.log_softmax(-1).cpu())
    finally:
        student.train(was_training)
    return torch.cat(found)


def explanation(
    student: Any, before: Iterable[tuple[str, Tensor]], score: Callable[[], Tensor], apart: float, theirs: Listed
) -> str:
    """Say which of the student's tensors, as it was before, would give a server's scores: that one seems stale.

    Each is put in its place in turn, and all of them together; of a tied head also the head alone.

    Args:
        student: not sharded; it is left as it was.
        before: name and value of each tensor at the sync before.
        score: returns the student's (N, V) nats.
        apart: nats between the two now.
        theirs: what the server lists.
    """
    if is_sharded(student):
        return ""
    parameters, found = dict(student.named_parameters()), {}
    old = {name: tensor for name, tensor in before if name in parameters}
    with _replaced(parameters, old):
        found["all of them: the update did not arrive"] = rms(score(), theirs)
    for name, tensor in old.items():
        with _replaced(parameters, {name: tensor}):
            found[name] = rms(score(), theirs)
    tied = _tied_head(student, old)
    if tied is not None:
        name, tensor = tied
        with _own_head(student, tensor):
            found[f"the output head, which is tied to {name}"] = rms(score(), theirs)
    for scale in _SCALES if hasattr(student, "peft_config") else ():
        with _scaled(student, scale):
            found[f"the adapter's scale, which seems to be {scale:g} times the student's"] = rms(score(), theirs)
    best = min(found, key=found.__getitem__, default=None)
    if best is None or not found[best] <= 0.5 * apart:
        return ""
    return f" What seems stale is {best}: with it as before, {found[best]:.2g} nats are left."


@contextmanager
def _replaced(parameters: dict[str, Any], old: dict[str, Tensor]) -> Iterator[None]:
    kept = {name: parameters[name].data for name in old}
    try:
        for name, tensor in old.items():
            parameters[name].data = tensor.to(kept[name].device, kept[name].dtype)
        yield
    finally:
        for name, tensor in kept.items():
            parameters[name].data = tensor


def _tied_head(student: Any, old: dict[str, Tensor]) -> tuple[str, Tensor] | None:
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None
    names = [name for name, parameter in student.named_parameters() if parameter is head.weight]
    return next(((name, old[name]) for name in names if name in old), None)


@contextmanager
def _own_head(student: Any, weight: Tensor) -> Iterator[None]:
    """Have the output head of a tied model be another tensor than the input embedding, inside the block."""
    head = student.get_output_embeddings()
    kept = head.weight
    try:
        head.weight = torch.nn.Parameter(weight.to(kept.device, kept.dtype), requires_grad=False)
        yield
    finally:
        head.weight = kept


@contextmanager
def _scaled(student: Any, factor: float) -> Iterator[None]:
    layers = [module for module in student.modules() if isinstance(getattr(module, "scaling", None), dict)]
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * factor for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)
