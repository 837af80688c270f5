"""The student as its own teacher: the same model, which a view shows more than the student sees.

Its distribution comes from weights of one of three kinds: those at the start of the run, an exponential moving average
of those that it went through, or those of now. The module tree is the student's over the very same tensors, but for
those that are trained: of these a start and an average have their own. With an adapter these are the adapter's alone.

On-policy self-distillation; TRL's experimental SDFT and SDPO trainers are two forms of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Source
from kd_plugin.settings import require_known
from kd_plugin.sharding import gather_as_it_runs, is_sharded
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.base import Capabilities
from kd_plugin.teachers.in_process import (
    InProcessTeacher,
    Placement,
    is_tuner,
    tree_over_same_tensors,
    with_plain_head,
)
from kd_plugin.upstream import own_parameters
from kd_plugin.vocab import Vocabulary

Weights = Literal["start", "ema", "current"]


@dataclass
class _Followed:
    """A tensor that the student trains, and the teacher's own in its place.

    Attributes:
        trained: the student's.
        own: the teacher's, in the module tree.
        average: of the student's, in float32; None where ``own`` holds it.
    """

    trained: nn.Parameter
    own: nn.Parameter
    average: Tensor | None = None

    @torch.no_grad()
    def settle(self) -> None:
        """Take on the device and dtype that the student has by now: a trainer may move and cast it after the start."""
        to = self.trained
        if (self.own.device, self.own.dtype) == (to.device, to.dtype):
            return
        if to.dtype != torch.float32 and self.average is None:
            self.average = self.own.detach().to(to.device, torch.float32)
        self.own.data = self.own.detach().to(to.device, to.dtype)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average towards the student by one step."""
        self.settle()
        average = self.own.data if self.average is None else self.average
        average.lerp_(self.trained.detach().to(average.dtype), 1.0 - decay)
        if self.average is not None:
            self.own.data.copy_(self.average)

    @property
    def value(self) -> Tensor:
        """The average, as a checkpoint holds it."""
        return (self.own.detach() if self.average is None else self.average).cpu()

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        """Set what :attr:`value` returned."""
        self.settle()
        if self.average is None and self.own.dtype != value.dtype:
            self.average = torch.empty_like(self.own, dtype=torch.float32)
        if self.average is not None:
            self.average.copy_(value)
        self.own.data.copy_(value)


class SelfTeacher(InProcessTeacher):
    """The student itself as a teacher, with weights of its start, of their moving average, or of now.

    By itself it says what the student says; give it a view that shows it more, such as a solution.

    Args:
        weights: ``start`` keeps what the student was before its first step. ``ema`` follows it: after each optimizer
            step the average becomes ``decay`` times itself and the rest of the student. ``current`` is the student of
            the generation batch, from which no gradient flows back.
        decay: of ``ema``, in [0, 1): 0.999 remembers about a thousand steps. One that follows too fast loses what it
            knew of the context, which the student never sees, and both collapse.
        name: how metrics and lineage call it.

    Raises:
        ConfigError: unknown weights, or a decay out of range.
    """

    def __init__(self, weights: Weights = "start", *, decay: float = 0.999, name: str = "teacher") -> None:
        super().__init__()
        require_known("weights", weights, get_args(Weights))
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay is {decay} of teacher {name!r}; expected a number from 0 up to, without, 1.")
        self.name, self.weights, self.decay = name, weights, decay
        self._source = Source(name)
        self._vocabulary: Vocabulary | None = None
        self._model: nn.Module | None = None
        self._followed: dict[str, _Followed] = {}
        self._student: weakref.ref[nn.Module] | None = None
        self._saved: Mapping[str, Tensor] | None = None

    @property
    def source(self) -> Source:
        """The student's own source, under this teacher's name."""
        return self._source

    def adopt_source(self, student: Source) -> None:
        """Take the source of the student, whose terms are this teacher's."""
        self._source = replace(student, name=self.name, is_student=True)

    @property
    def capabilities(self) -> Capabilities:
        """Its whole distribution, computed here over tensors of the student."""
        return Capabilities(
            "the student itself",
            frozenset({"hidden"}),
            in_process=True,
            sharded=self._model is not None and is_sharded(self._model),
            shares="student",
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Which weights of the student teach."""
        return {"kind": "self", "weights": self.weights} | ({"decay": self.decay} if self.weights == "ema" else {})

    @property
    def vocabulary(self) -> Vocabulary:
        """The student's."""
        if self._vocabulary is None:
            raise ConfigError(f"Teacher {self.name!r} is the student itself; no student is there yet.")
        return self._vocabulary

    def adopt_vocabulary(self, student: Vocabulary) -> None:
        """Take the student's vocabulary."""
        self._vocabulary = student

    @property
    def tokenizer(self) -> Any:
        """None of its own."""
        return None

    @property
    def end_tokens(self) -> None:
        """Those of the vocabulary."""
        return None

    def require_student(self, reference: str | None, config: Any) -> None:
        """Any student is itself."""

    @property
    def keeps_start(self) -> bool:
        """Whether it must see the student before a checkpoint is loaded into it."""
        return self.weights == "start"

    def place(self, placement: Placement) -> None:
        """Take the student's tensors, and its own of those that are trained."""
        self.keep(placement.student, placement.vocabulary, sharded_later=placement.student_is_sharded_later)

    def keep(self, student: nn.Module, vocabulary: Vocabulary, *, sharded_later: bool = False) -> None:
        """Build the teacher over ``student``, unwrapped; once, so that a start stays that of the first call.

        Args:
            student: before its first step.
            vocabulary: the student's.
            sharded_later: whether it will be sharded when training starts.

        Raises:
            ConfigError: the student is sharded over ranks, and these weights need tensors of their own.
        """
        self._vocabulary = vocabulary
        if self._student is not None and self._student() is student:
            return
        self._student, self._followed = weakref.ref(student), {}
        self.__dict__.pop("head", None)
        shards = is_sharded(student) or sharded_later
        if shards and self.weights != "current":
            instead = (
                "Name the start by its own path, as a teacher of kind: local"
                if self.weights == "start"
                else "Train under DistributedDataParallel or ZeRO-1 or 2, where each rank has all of it"
            )
            raise ConfigError(
                f"Teacher {self.name!r} is the student itself with weights={self.weights!r}, which keeps whole tensors "
                f"beside those that are trained, and here the student is sharded over ranks. {instead}; or use "
                "weights='current'."
            )
        own = tree_over_same_tensors(student)
        own.__dict__.pop("save_pretrained", None)  # it is never saved, and needs no lineage
        if self.weights != "current":
            self._take_own(student, own)
        self._model = own.eval()
        OutputHead.from_model(with_plain_head(self._inner))  # refused here where there is none
        if shards:
            self._gather()
        if self._saved is not None:
            self.load_state_dict(self._saved)

    def _take_own(self, student: nn.Module, own: nn.Module) -> None:
        names = {id(p): name for name, p in student.named_parameters() if p.requires_grad}
        copies: dict[int, nn.Parameter] = {}
        for parameters, name, p in own_parameters(own.modules()):
            if id(p) in names:
                if id(p) not in copies:
                    copies[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)
                    self._followed[names[id(p)]] = _Followed(p, copies[id(p)])
                parameters[name] = copies[id(p)]

    def _gather(self) -> None:
        if is_tuner(self._inner.get_output_embeddings()):
            raise ConfigError(
                f"Teacher {self.name!r} is the student itself, sharded over ranks, and its adapter trains the output "
                "head, which cannot be merged into shards. Take the head out of modules_to_save."
            )
        gather_as_it_runs(self.model)

    @property
    def follows(self) -> bool:
        """Whether it changes with the student in a way that a checkpoint must hold."""
        return self.weights == "ema"

    def follow(self) -> None:
        """Take note of an optimizer step that was made; an average moves."""
        if self.follows:
            for one in self._followed.values():
                one.follow(self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of this teacher: an average; nothing of others."""
        return {name: one.value for name, one in self._followed.items()} if self.follows else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, now or once the student is there.

        Raises:
            ConfigError: it holds other tensors than the student trains.
        """
        if not self.follows:
            return
        if self._model is None:
            self._saved = state
            return
        if state.keys() != self._followed.keys():
            differing = sorted(state.keys() ^ self._followed.keys())
            raise ConfigError(
                f"The checkpoint's average of teacher {self.name!r} holds {len(state)} tensors, and the student trains "
                f"{len(self._followed)}: {differing[0]!r} is in one of them. Train the same parameters as before, or "
                "start anew."
            )
        for name, one in self._followed.items():
            one.load(state[name])
        self._saved = None

    @property
    def own_bytes(self) -> int:
        """Bytes of tensors that this teacher holds beside the student's."""
        tensors = [t for one in self._followed.values() for t in (one.own, one.average) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def model(self) -> nn.Module:
        """The student's module tree over this teacher's tensors."""
        if self._model is None:
            raise ConfigError(f"Teacher {self.name!r} is the student itself; no student is there yet.")
        return self._model

    @cached_property
    def head(self) -> OutputHead:
        """The output head."""
        return OutputHead.from_model(with_plain_head(self._inner), self.vocabulary.size)

    def stay_on(self, device: torch.device | None) -> None:
        """Do nothing: it is where the student is."""

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states (B, L, H) of a batch (B, L), after the final norm."""
        for one in self._followed.values():
            one.settle()
        return super().hidden_states(input_ids, attention_mask)

    @property
    def _inner(self) -> Any:
        wrapped: Any = self.model
        return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped

    @property
    def _backbone(self) -> Any:
        return self._inner.base_model
