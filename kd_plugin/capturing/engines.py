"""The ways to get targets out of a teacher: by its ``score`` alone, from a model in this process, and from a server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import rfc8785
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_plugin.cache.manifest import Settings
from kd_plugin.cache.schema import Example, Extracted
from kd_plugin.cache.targets import Generation, Sampled, Targets, TopP
from kd_plugin.capturing.extract import extract, from_list, from_logits
from kd_plugin.capturing.generating import Completion, Request, StudentWrites, generate_locally, uniforms
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal
from kd_plugin.teachers.agreement import ROUNDING, distances
from kd_plugin.teachers.base import Teacher, identity, missing_members, reach
from kd_plugin.teachers.in_process import InProcessTeacher
from kd_plugin.teachers.replies import Listed
from kd_plugin.teachers.server import ServerTeacher

_WEIGHT_SAMPLES = 16  # values of each weight that enter its digest
_REQUESTS_AHEAD = 8  # examples a thread that are sent together, so that threads seldom wait for the slowest


class Engine(Protocol):
    """What runs a teacher for a capture."""

    weights: str | None
    dtype: str | None
    written_by: str | None  # digest of a student that generates in the teacher's place

    def describe(self) -> dict[str, str]:
        """Return what the manifest records of it."""
        ...

    def require_same(self, recorded: Mapping[str, str]) -> None:
        """Refuse to go on with what another teacher began, as far as the settings cannot tell.

        Args:
            recorded: what :meth:`describe` said when the capture began.

        Raises:
            ConfigError: this one gives other log-probabilities.
        """
        ...

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group sequences of these lengths for one call of :meth:`score` or :meth:`generate` each."""
        ...

    def score(self, examples: Sequence[Example], settings: Settings) -> list[Extracted]:
        """Return each example's targets."""
        ...

    def generate(self, requests: Sequence[Request], settings: Settings) -> list[Completion]:
        """Return a completion a request."""
        ...


def require_teacher(teacher: Any) -> None:
    """Refuse what is no teacher that can be captured.

    Raises:
        ConfigError: it is something else, or an adapter on the base of a student that is not there.
    """
    missing = missing_members(teacher)
    if missing:
        raise ConfigError(
            f"capture needs a teacher, got {type(teacher).__name__}, which lacks {' and '.join(map(repr, missing))}. "
            "For a path, a hub id or a loaded model: LocalTeacher(...)."
        )
    has = teacher.capabilities
    if has.shares == "student":
        raise ConfigError(
            f"Teacher {teacher.source.name!r} is {has.kind} on the student's base, and a capture has no student. Name "
            "its base: AdapterTeacher(..., base='path or hub id')."
        )
    if not has.gives & {"hidden", "top_k"} or not has.any_row:
        raise ConfigError(
            f"Teacher {teacher.source.name!r} is {has.kind}, which gives no distributions of new rows, and a capture "
            "stores those. Name a model or a server."
        )


def require_targets(teacher: Teacher, targets: Targets, temperature: float) -> None:
    """Refuse targets that the teacher cannot give; nothing is loaded or sent.

    Raises:
        ConfigError: they need the whole distribution, and a server lists its likeliest tokens only.
    """
    has = teacher.capabilities
    if has.gives & {"hidden", "all_tokens"}:
        return
    if isinstance(targets, Sampled):
        raise ConfigError(
            f"Sampled targets are drawn from the whole distribution, and teacher {teacher.source.name!r} is {has.kind} "
            f"that lists {has.listed or 'some'} tokens a position. Use top_k or top_p targets, a teacher in this "
            "process, or ServerTeacher(signal='hidden') on a server that pools; ServerTeacher(top_k='all') takes "
            "--max-logprobs -1 and is slow: an answer holds every token."
        )
    if has.temperature is not None and temperature != has.temperature:
        raise ConfigError(
            f"temperature={temperature}: {has.kind} gives log-probabilities at temperature {has.temperature:g}, and "
            f"the mass of what it does not list is unknown at another. Use temperature {has.temperature:g}, a teacher "
            "in this process, or ServerTeacher(top_k='all')."
        )


def as_asked(teacher: Any, targets: Targets) -> Any:
    """Return the teacher as a capture of ``targets`` asks it: a server lists no more tokens than are kept."""
    has = teacher.capabilities
    if has.generates != "requests" or "all_tokens" in has.gives:
        return teacher
    return teacher.listing(targets.cap if isinstance(targets, TopP) else getattr(targets, "k", "all"))


def open_engine(teacher: Any, settings: Settings, batch_tokens: int, writer: InProcessTeacher | None = None) -> Engine:
    """Load the teacher's weights, or ask its server what it serves; load the student that writes in its place, if any.

    Raises:
        ServerError, VocabularyError, ConfigError: see :meth:`~kd_plugin.teachers.server.ServerTeacher.check`.
    """
    if writer is not None:
        writer.stay_on(_own_accelerator())
        scoring = open_engine(teacher, replace(settings, generation=None), batch_tokens)
        return StudentWrites(scoring, writer, weights_digest(writer.model))
    generates = teacher.capabilities.generates
    if generates == "requests":
        return ListingEngine(teacher, settings)
    return ScoringEngine(teacher, batch_tokens) if generates is None else LocalEngine(teacher, batch_tokens)


def _own_accelerator() -> torch.device | None:
    """Return this process's accelerator, if the machine has any."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None else torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


class ScoringEngine:
    """Any teacher, through its ``score`` alone; it generates nothing.

    Args:
        teacher: it; is given tensors on the CPU.
        batch_tokens: tokens of a call, padding included.
    """

    written_by: str | None = None

    def __init__(self, teacher: Teacher, batch_tokens: int) -> None:
        self._teacher, self._batch_tokens = teacher, batch_tokens
        self._device = torch.device("cpu")
        self.weights: str | None = hashlib.sha256(rfc8785.dumps(identity(teacher))).hexdigest()
        self.dtype: str | None = None

    def describe(self) -> dict[str, str]:
        """Return the teacher's class, which a reader may look up, and what tells its weights if they are elsewhere."""
        kind = type(self._teacher)
        probe = _probe(reach(self._teacher))
        return {"name": f"{kind.__module__}.{kind.__qualname__}", **probe, "kd-plugin": _own_version()}

    def require_same(self, recorded: Mapping[str, str]) -> None:
        """Compare a few log-probabilities of weights that are elsewhere; others are among the settings."""
        _require_same_probe(recorded, reach(self._teacher))

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group by the token budget, longest first."""
        return batches(lengths, self._batch_tokens)

    def score(self, examples: Sequence[Example], settings: Settings) -> list[Extracted]:
        """Return each example's targets, from one call over all of them."""
        signal = self._teacher.score(*padded_examples(examples, self._device))
        if isinstance(signal, HiddenSignal):
            extracted = extract(
                signal.hidden,
                signal.head,
                settings.targets,
                temperature=settings.temperature,
                uniforms=random_numbers(examples, settings),
            )
        else:
            assert not isinstance(settings.targets, Sampled)  # refused before
            order = signal.logprobs.argsort(dim=-1, descending=True)
            ids, logprobs = (t.gather(-1, order).cpu().numpy() for t in (signal.ids, signal.logprobs.float()))
            extracted = from_list(ids, logprobs, signal.tail_logmass.float().cpu().numpy(), settings.targets)
        return extracted.split([len(example.scored) for example in examples])

    def generate(self, requests: Sequence[Request], settings: Settings) -> list[Completion]:
        """Refuse: :func:`~kd_plugin.capturing.capture.prepare` does before."""
        raise NotImplementedError(f"{type(self._teacher).__name__} generates nothing")


class LocalEngine(ScoringEngine):
    """A teacher in this process, on its accelerator unless the user chose a device.

    Args:
        teacher: it; loaded here, and on its device for the whole capture, whatever its ``placement`` is.
        batch_tokens: tokens of a forward pass, padding included.
    """

    def __init__(self, teacher: InProcessTeacher, batch_tokens: int) -> None:
        teacher.stay_on(_own_accelerator())  # an offloaded one too: no student is here to make room for
        self._model_teacher, self._teacher, self._batch_tokens = teacher, teacher, batch_tokens
        self._device = teacher.head.weight.device
        self.weights = weights_digest(teacher.model)
        self.dtype = str(teacher.head.weight.dtype).removeprefix("torch.")

    def describe(self) -> dict[str, str]:
        """Return the versions that ran the teacher."""
        return {
            "name": "transformers",
            "transformers": version("transformers"),
            "torch": version("torch"),
            "kd-plugin": _own_version(),
        }

    def generate(self, requests: Sequence[Request], settings: Settings) -> list[Completion]:
        """Write one batch; what is kept of it is scored by one forward pass afterwards."""
        return generate_locally(self._model_teacher, requests, _generation(settings), settings.seed)


class ListingEngine:
    """A vLLM server, asked to list no more tokens than the targets keep.

    Args:
        teacher: the way to it, as :func:`as_asked` returns it; asked here what it serves, if it was not before.
        settings: what is kept, and whether it generates.
    """

    written_by: str | None = None

    def __init__(self, teacher: ServerTeacher, settings: Settings) -> None:
        self._teacher = teacher
        teacher.check()
        if settings.generation is not None:
            teacher.check_generation()
        self.weights: str | None = None
        self.dtype: str | None = None

    def describe(self) -> dict[str, str]:
        """Return what the server says it is; no address, which is nobody's business."""
        told = {"name": "vllm", "vllm": self._teacher.server_version(), "kd-plugin": _own_version()}
        return told | _probe(self._teacher.reference.long.tolist())

    def require_same(self, recorded: Mapping[str, str]) -> None:
        """Compare a few log-probabilities: a server says its model's name, and not which weights it has."""
        _require_same_probe(recorded, self._teacher.reference.long.tolist())

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group neighbours: the server batches by itself."""
        size = self._teacher.client.max_concurrency * _REQUESTS_AHEAD
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def score(self, examples: Sequence[Example], settings: Settings) -> list[Extracted]:
        """Return each example's targets, from one request an example."""
        # A causal model: what stands after the last scored token changes nothing.
        tokens = [example.input_ids[: example.scored[-1] + 2].tolist() for example in examples]
        listed = self._teacher.score_tokens(tokens, [example.scored.tolist() for example in examples])
        return [self._kept(one, [e], settings) for one, e in zip(listed, examples, strict=True)]

    def generate(self, requests: Sequence[Request], settings: Settings) -> list[Completion]:
        """Write a completion a request, with its targets from the same pass."""
        generation = _generation(settings)
        written = self._teacher.generate_tokens(
            [request.prompt.tolist() for request in requests],
            [request.max_new_tokens for request in requests],
            [_seed(settings.seed, request) for request in requests],
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
        )
        done = []
        for request, one in zip(requests, written, strict=True):
            ids = np.asarray(one.ids, np.int32)
            example = Example.of(np.concatenate([request.prompt, ids]), len(request.prompt), {})
            targets = self._kept(one.listed, [example], settings) if len(example.scored) == len(ids) > 0 else None
            done.append(Completion(ids, one.finished, targets))
        return done

    def _kept(self, listed: Listed, examples: Sequence[Example], settings: Settings) -> Extracted:
        targets, size = settings.targets, self._teacher.vocabulary.size
        if self._teacher.lists_all:
            logprobs = torch.full((len(listed.ids), size), -torch.inf)
            logprobs.scatter_(1, torch.from_numpy(listed.ids), torch.from_numpy(listed.logprobs).float())
            return from_logits(
                logprobs, targets, temperature=settings.temperature, uniforms=random_numbers(examples, settings)
            )
        assert not isinstance(targets, Sampled)  # refused before
        return from_list(listed.ids, listed.logprobs, listed.tail_logmass, targets)


def _probe(logprobs: Sequence[float]) -> dict[str, str]:
    """Return what a manifest keeps of log-probabilities that tell a teacher's weights; nothing where there are none."""
    return {"probe": " ".join(f"{value:.3f}" for value in logprobs)} if len(logprobs) else {}


def _require_same_probe(recorded: Mapping[str, str], now: Sequence[float]) -> None:
    there = np.array([float(value) for value in recorded.get("probe", "").split()])
    common = min(len(there), len(now))  # a server that takes shorter rows is asked for less
    distance = float(distances(there[:common], np.array(now[:common])).mean()) if common else 0.0
    if not distance <= ROUNDING:
        raise ConfigError(
            f"The server gives other log-probabilities than the one that began this capture: {distance:.2f} nats "
            f"apart on average over {common} tokens, where rounding explains {ROUNDING}. Nothing was stored. Serve "
            "the weights of then, or choose another output directory."
        )


def padded_examples(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids and attention mask (B, L), padded on the right, and the scored positions (N,) in (B * L)."""
    longest = max(len(example.input_ids) for example in examples)
    ids = np.zeros((len(examples), longest), np.int64)
    attention = np.zeros((len(examples), longest), np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = example.input_ids
        attention[row, : len(example.input_ids)] = 1
    positions = np.concatenate([row * longest + example.scored for row, example in enumerate(examples)])
    ids_BL, attention_BL, positions_N = (torch.from_numpy(array).to(device) for array in (ids, attention, positions))
    return ids_BL, attention_BL, positions_N


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows, longest first, so that rows times longest stays within ``batch_tokens``; at least one row each."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    grouped: list[list[int]] = []
    for i in order:
        if grouped and (len(grouped[-1]) + 1) * lengths[grouped[-1][0]] <= batch_tokens:
            grouped[-1].append(i)
        else:
            grouped.append([i])
    return grouped


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a sample of every weight: enough to tell a teacher from a retrained one of the same name."""
    names, samples = [], []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _WEIGHT_SAMPLES)
        names.append(f"{name} {tuple(parameter.shape)}")
        samples.append(flat[::stride][:_WEIGHT_SAMPLES].float())
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(torch.cat([sample.cpu() for sample in samples]).numpy().tobytes())
    return digest.hexdigest()


def random_numbers(examples: Sequence[Example], settings: Settings) -> NDArray[np.float64] | None:
    """Return the random numbers of sampled targets, (N, D); None for the others."""
    if not isinstance(settings.targets, Sampled):
        return None
    draws = settings.targets.draws
    return np.concatenate([uniforms(settings.seed, e.example_id, len(e.scored), draws) for e in examples])


def _seed(seed: int, request: Request) -> int:
    """Return a 31-bit seed for a server, which depends on what the local random numbers depend on."""
    return int.from_bytes(hashlib.sha256(f"{seed}/write/{request.key}".encode()).digest()[:4], "little") >> 1


def _generation(settings: Settings) -> Generation:
    assert settings.generation is not None
    return settings.generation


def _own_version() -> str:
    from kd_plugin import __version__

    return __version__
