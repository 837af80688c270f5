"""What every teacher can do, what it declares of itself, and which weights it has, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.hashing import sha256_file, weight_files
from kd_plugin.lineage.sources import Source
from kd_plugin.signals import HiddenSignal, SparseSignal
from kd_plugin.vocab import Vocabulary

Gives = Literal["hidden", "top_k", "all_tokens", "draws", "sampled_token"]


@dataclass(frozen=True)
class Capabilities:
    """What a teacher gives and needs. Whoever uses a teacher asks this, and never which class it is.

    Attributes:
        kind: how a message names it, with its article: ``a server``.
        gives: ``hidden``: last hidden states and a head, so the whole distribution. ``top_k``: its likeliest tokens.
            ``all_tokens``: a list of every token. ``draws``: tokens that were drawn from its distribution.
            ``sampled_token``: the log-probability of the token that stands at the next position.
        in_process: it computes in this process, so that the rows of one call share this machine's memory.
        sharded: each pass gathers weights from other ranks, so that every rank must join it.
        shares: whose weights it uses beside its own: the ``student``'s, those of another ``teacher``, or nobody's.
        any_row: it scores whatever the student generates; False if only rows that were fixed in advance.
        temperature: at which its log-probabilities are given; None for any, which takes ``hidden``.
        listed: tokens that ``top_k`` lists a position; None where that is not fixed.
        generates: how it generates completions for a capture: through the ``generate`` of its ``model``, as one in this
            process, through ``requests``, as :class:`~kd_plugin.teachers.server.ServerTeacher`, or not at all.
    """

    kind: str
    gives: frozenset[Gives]
    in_process: bool = False
    sharded: bool = False
    shares: Literal["student", "teacher"] | None = None
    any_row: bool = True
    temperature: float | None = None
    listed: int | None = None
    generates: Literal["model", "requests"] | None = None


@runtime_checkable
class Teacher(Protocol):
    """A model that scores tokens. How it is reached never matters to the loss.

    These four members are all that a teacher needs. A class may also have what the functions below look for:
    ``adopt_vocabulary``, ``end_tokens``, ``identity``, ``max_length``, ``reach``, ``resident`` and ``tokenizer``; and,
    if it computes in this process, ``place`` (see :mod:`kd_plugin.teachers.in_process`). A teacher that shares the
    student's weights has ``require_student``. One that is the student has ``adopt_source``, ``keeps_start`` and
    ``keep``, ``follow``, ``follows``, ``state_dict`` and ``load_state_dict``, as
    :class:`~kd_plugin.teachers.itself.SelfTeacher`.

    Shape suffixes: B rows, L tokens, N scored positions.
    """

    @property
    def source(self) -> Source:
        """What this teacher is and under which terms; known before anything is loaded."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks; needs the tokenizer, not the weights."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this teacher gives and needs; known before anything is loaded, but for ``sharded``."""
        ...

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> HiddenSignal | SparseSignal:
        """Score the next token at some positions.

        Args:
            input_ids: (B, L) int64 token ids, padded on either side.
            attention_mask: (B, L) 1 for tokens, 0 for padding.
            positions: (N,) int64 indices into the flattened (B * L); position ``b * L + t`` is the
                distribution over token ``t + 1`` of row ``b``.

        Returns:
            The signal at the N positions, in their order.
        """
        ...


def missing_members(found: Any) -> list[str]:
    """Name what an object lacks to be a teacher; its properties are not read, which may load something."""
    # Python 3.11 has no list of a protocol's members
    return [m for m in ("source", "vocabulary", "capabilities", "score") if not _has(found, m)]


def _has(found: Any, member: str) -> bool:
    return hasattr(type(found), member) or member in getattr(found, "__dict__", {})


def adopt_vocabulary(teacher: Teacher, student: Vocabulary) -> None:
    """Let a teacher that names no tokenizer of its own take the student's; it decides whether it does."""
    adopt = getattr(teacher, "adopt_vocabulary", None)
    if adopt is not None:
        adopt(student)


def adopt_source(teacher: Teacher, student: Source) -> None:
    """Let a teacher that is the student itself take the student's source, and so its terms."""
    adopt = getattr(teacher, "adopt_source", None)
    if adopt is not None:
        adopt(student)


def keeps_start(teacher: Teacher) -> bool:
    """Whether a teacher must see the student before a checkpoint is loaded into it, by its method ``keep``."""
    return bool(getattr(teacher, "keeps_start", False))


def follow(teacher: Teacher) -> None:
    """Tell a teacher of an optimizer step that was made; one that does not follow the student is not told."""
    own = getattr(teacher, "follow", None)
    if own is not None:
        own()


def state_of(teacher: Teacher) -> dict[str, Tensor]:
    """Return what a checkpoint must hold of a teacher that changes in training; nothing of others."""
    own = getattr(teacher, "state_dict", None)
    return {} if own is None else dict(own())


def end_tokens(teacher: Teacher) -> frozenset[int]:
    """Return the ids at which a teacher ends a response; by default its tokenizer's end of sequence."""
    own: frozenset[int] | None = getattr(teacher, "end_tokens", None)
    if own is not None:
        return own
    end = teacher.vocabulary.special_ids.get("eos_token")
    return frozenset() if end is None else frozenset({end})


def tokenizer_of(teacher: Teacher) -> Any:
    """Return a teacher's own tokenizer, loaded on first use; None where it names none."""
    try:
        return getattr(teacher, "tokenizer", None)
    except ConfigError:
        return None


def most_tokens(teacher: Teacher) -> int | None:
    """Return how many tokens of one row a teacher reads; None where it does not say."""
    return getattr(teacher, "max_length", None)


def identity(teacher: Any) -> dict[str, Any]:
    """Describe a teacher so that two descriptions are equal when they teach the same; a mapping that JSON can hold.

    By default its class's name and its source. What a resumed run compares.
    """
    own: Mapping[str, Any] | None = getattr(teacher, "identity", None)
    if own is not None:
        return dict(own)
    return {"kind": type(teacher).__name__, "repo": teacher.source.ref, "revision": teacher.source.revision}


def reach(teacher: Any) -> Sequence[float]:
    """Have a teacher that computes elsewhere say what it is; one that does not is not asked.

    Returns:
        Log-probabilities in nats that tell its weights from others, the same on every rank; none of most teachers.

    Raises:
        ServerError: it is away, or cannot do what is needed of it.
    """
    own = getattr(teacher, "reach", None)
    return () if own is None else own()


def resident(teacher: Teacher, device: torch.device | str) -> AbstractContextManager[None]:
    """Return a block in which ``teacher`` is on ``device``; teachers that are not moved need nothing."""
    enter = getattr(teacher, "resident", None)
    return nullcontext() if enter is None else enter(device)


def reference_identity(reference: str, revision: str | None) -> dict[str, Any]:
    """Describe weights by the sha256 of their files, for a directory; by hub id and commit elsewhere."""
    path = Path(reference)
    if path.is_dir():
        return {"weights": _files_digest(path)}
    return {"repo": reference, "revision": revision}


def tensors_digest(model: nn.Module) -> str:
    """Digest a model's parameters, whatever device and module tree holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_digest(directory: Path) -> str:
    """Digest the weight files of a directory; a file that has not changed is read once a process."""
    digest = hashlib.sha256()
    for file in weight_files(directory):
        status = file.stat()
        digest.update(_sha256(file, status.st_size, status.st_mtime_ns).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, modified: int) -> str:
    return sha256_file(file)
