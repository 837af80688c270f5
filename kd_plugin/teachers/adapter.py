"""Teachers that are one base model and a PEFT adapter each.

A teacher has a module tree of its own, over the very parameters of the base: copying a tree without its tensors costs
next to nothing. So a panel of n adapters holds one base, one head and n small adapters; none is switched on or off, and
what else uses the base (a teacher, a student that trains an adapter of its own) never notices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Source
from kd_plugin.sharding import gather_as_it_runs, is_sharded, move
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.adapter_check import read_adapter, require_base
from kd_plugin.teachers.base import Capabilities, Teacher, reference_identity, resident
from kd_plugin.teachers.in_process import (
    InProcessTeacher,
    Placement,
    is_tuner,
    place,
    plain_stand_ins,
    tree_over_same_tensors,
    with_plain_head,
    without_adapters,
)
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.upstream import reference_of
from kd_plugin.vocab import Vocabulary

STUDENT = "student"


class AdapterTeacher(InProcessTeacher):
    """A PEFT adapter (LoRA, IA3, OFT ...) on a base model that other teachers, or the student, share.

    Nothing is loaded until it is needed, so that the license gate can refuse it first.

    Args:
        adapter: directory or hub id of the adapter.
        base: the base that it was trained on. ``"student"`` takes the frozen base of a student that is itself a PEFT
            model. A path, a hub id or a loaded model becomes a :class:`LocalTeacher`; adapters of one panel that
            name the same path share it. A :class:`LocalTeacher` is shared with whatever else uses it.
        name: how metrics and lineage call it.
        revision: branch, tag or commit of the adapter, for a hub id.
        license: declared licence of the adapter where none can be discovered.
        accept_base: take ``base`` although the adapter names another one of the same architecture, such as a copy
            under another name.

    Raises:
        ConfigError: no adapter is there, it is one that adds tokens instead of changing layers, or (once the base is
            known) it was trained on another base.
    """

    def __init__(
        self,
        adapter: str | Path,
        *,
        base: str | Path | nn.Module | LocalTeacher = STUDENT,
        name: str = "teacher",
        revision: str | None = None,
        license: str | None = None,
        accept_base: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.adapter = str(adapter)
        self._revision, self._license, self._accept_base = revision, license, accept_base
        self._model: nn.Module | None = None
        self._gathers = False
        self._student: nn.Module | None = None
        self._student_vocabulary: Vocabulary | None = None
        self.base: LocalTeacher | None = None
        self.owns_base = not isinstance(base, LocalTeacher)
        if isinstance(base, LocalTeacher):
            self.base = base
        elif not isinstance(base, str | Path | nn.Module):
            raise ConfigError(
                f"Teacher {name!r}: its base is {getattr(base, 'name', base)!r}, a {type(base).__name__}, which is no "
                "local model. Give a path, a hub id, a loaded model, a LocalTeacher, or 'student'."
            )
        elif base != STUDENT:
            self.base = LocalTeacher(base, name=f"{name}'s base")
        if self.base is not None:
            require_base(self._config, self.adapter, self.base.reference, self.base.config, name, accept_base)

    @cached_property
    def source(self) -> Source:
        """What this teacher is; its base is discovered from the adapter's own configuration."""
        return Source(name=self.name, ref=self.adapter, revision=self._revision, license=self._license)

    @property
    def capabilities(self) -> Capabilities:
        """Its whole distribution, computed here over weights that belong to another."""
        return Capabilities(
            "an adapter",
            frozenset({"hidden"}),
            in_process=True,
            sharded=self.is_sharded,
            shares="student" if self.base is None else "teacher",
            generates=None if self.base is None else "model",
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The adapter's weights and those of its base, by content."""
        base = {"base": "student"}
        if self.base is not None:
            base = {f"base {key}": value for key, value in self.base.weights_identity.items()}
        return {"kind": "adapter", **reference_identity(self.adapter, self._revision), **base}

    def share_base(self, base: LocalTeacher) -> None:
        """Use ``base`` in the place of an equal one, before anything is loaded."""
        self.base, self.owns_base = base, False

    def require_student(self, reference: str | None, config: Any) -> None:
        """Refuse a student whose base this adapter was not trained on, before it is loaded.

        Args:
            reference: path or hub id of the student's base.
            config: its transformers configuration.

        Raises:
            ConfigError: the adapter is for another base.
        """
        require_base(self._config, self.adapter, reference, config, self.name, self._accept_base)

    def use_student(self, student: nn.Module, reference: str | None, vocabulary: Vocabulary) -> None:
        """Take the frozen base of ``student``; called by the host, once the student is loaded.

        Args:
            student: a PEFT model, unwrapped.
            reference: path or hub id of its base.
            vocabulary: the student's.

        Raises:
            ConfigError: the student is no PEFT model, its base is trained, or the adapter is for another base.
        """
        inner = getattr(student, "get_base_model", lambda: None)()
        if inner is None:
            raise ConfigError(
                f"Teacher {self.name!r} is an adapter on the student's base, but the student is no PEFT model "
                f"({type(student).__name__}): training would change that base. Train the student with "
                "peft_config, or give the teacher a base of its own: base='path or hub id'."
            )
        plain = without_adapters(tree_over_same_tensors(inner))
        trained = [n for n, parameter in plain.named_parameters() if parameter.requires_grad]
        if trained:
            raise ConfigError(
                f"Teacher {self.name!r} is an adapter on the student's base, but the student trains a part of it "
                f"({trained[0]}): the teacher would change with it. Give the teacher a base of its own."
            )
        self.require_student(reference, inner.config)
        self._student, self._student_vocabulary = plain, vocabulary

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return None if self.base is None else self.base.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks: those of its base."""
        if self.base is not None:
            return self.base.vocabulary
        if self._student_vocabulary is None:
            raise ConfigError(f"Teacher {self.name!r} is an adapter on the student's base; no student is there yet.")
        return self._student_vocabulary

    def adopt_vocabulary(self, student: Vocabulary) -> None:
        """Take the student's vocabulary, where the base is the student's or names no tokenizer."""
        if self.base is None:
            self._student_vocabulary = student
        else:
            self.base.adopt_vocabulary(student)

    @property
    def end_tokens(self) -> frozenset[int] | None:
        """Those of the base; None leaves it to the vocabulary, where the base is the student's."""
        return None if self.base is None else self.base.end_tokens

    @property
    def model(self) -> nn.Module:
        """The base with the adapter, in evaluation mode without gradients; made on first use."""
        if self._model is None:
            from peft import PeftModel

            inner = self._student if self.base is None else self.base.model
            if inner is None:
                raise ConfigError(
                    f"Teacher {self.name!r} is an adapter on the student's base; no student is there yet."
                )
            own = without_adapters(tree_over_same_tensors(inner))
            self._require_makeable(own)
            try:
                # PEFT draws initial weights before it loads: a run whose teachers load late would draw other tokens
                with torch.random.fork_rng(), plain_stand_ins(own):
                    model = PeftModel.from_pretrained(
                        own, self.adapter, config=copy.deepcopy(self._config), is_trainable=False
                    )
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"The adapter {self.adapter} does not fit the base of teacher {self.name!r}: {error}"
                ) from error
            self._model = model.eval()
            for module in own.modules():
                if is_tuner(module):
                    module.requires_grad_(False)
        return self._model

    def _require_makeable(self, base: nn.Module) -> None:
        """Refuse an adapter that copies whole layers of what FSDP2 sharded; under ZeRO-3 PEFT gathers those."""
        copied = getattr(self._config, "modules_to_save", None)
        if copied and any(hasattr(p, "full_tensor") for p in base.parameters()):
            raise ConfigError(
                f"Teacher {self.name!r} is an adapter with layers of its own (modules_to_save: {', '.join(copied)}), "
                "and FSDP2 sharded those of its base over ranks. Give it a base of its own with placement='offload', "
                "which is not sharded, or merge the adapter into a model of its own."
            )

    @cached_property
    def head(self) -> OutputHead:
        """The output head: the base's very own, unless the adapter changes it."""
        if self.base is not None and not self._changes_head:
            return self.base.head
        inner = self.model.get_base_model()  # type: ignore[operator]
        return OutputHead.from_model(with_plain_head(inner), self.vocabulary.size)

    @property
    def _changes_head(self) -> bool:
        module = self.model.get_base_model().get_output_embeddings()  # type: ignore[operator]
        return is_tuner(module)

    @contextmanager
    def resident(self, device: torch.device | str) -> Iterator[None]:
        """Have base and adapter on ``device`` inside the block."""
        if self.base is None:
            move(self.model, device, parts=False)  # the student's tensors are there already; the adapter's follow
            yield
            return
        with resident(self.base, device):
            if self.base.placement == "offload":
                move(self.model, self.base.device or device)
            yield
            if self.base.placement == "offload":
                move(self.model, "cpu")

    def stay_on(self, device: torch.device | None) -> None:
        """Have base and adapter on a device from now on: the base's, else ``device``."""
        if self.base is not None:
            self.base.stay_on(device)
            if self.base.device is not None:
                move(self.model, self.base.device)

    @property
    def is_sharded(self) -> bool:
        """Whether the base is sharded over ranks, so that every rank must join each pass."""
        return self._model is not None and is_sharded(self._model)

    def place(self, placement: Placement) -> None:
        """Place the base, once for all adapters that share it, and load the adapter over it."""
        if self.base is None:
            self.use_student(placement.student, reference_of(placement.student), placement.vocabulary)
        else:
            place([self.base], placement)
        OutputHead.from_model(self.model)  # loads it now, so that what does not fit is refused here
        if is_sharded(self.model) or (self.base is None and placement.student_is_sharded_later):
            self.run_over_shards()
        if self.base is None or self.base.placement == "resident":
            move(self.model, placement.device, parts=False)

    def run_over_shards(self) -> None:
        """Gather the base layer by layer in each pass, wherever it is sharded when the pass comes; once is enough.

        Raises:
            ConfigError: the adapter changes the output head, which would have to be merged into shards.
        """
        if self._changes_head:
            raise ConfigError(
                f"Teacher {self.name!r} is an adapter that changes the output head, and its base is sharded over "
                "ranks: the two cannot be merged. Merge the adapter into a model of its own, or train it without "
                "lm_head in target_modules and modules_to_save."
            )
        if not self._gathers:
            gather_as_it_runs(self.model)
        self._gathers = True

    @property
    def _backbone(self) -> Any:
        return self.model.get_base_model().base_model  # type: ignore[operator]

    @cached_property
    def _config(self) -> Any:
        return read_adapter(self.adapter, self._revision, self.name)


def share_bases(teachers: Iterable[Teacher]) -> None:
    """Let adapters that name one base, each by the same path, have it once."""
    bases: dict[str, LocalTeacher] = {}
    for teacher in teachers:
        if isinstance(teacher, AdapterTeacher) and teacher.base is not None and teacher.owns_base:
            teacher.share_base(bases.setdefault(teacher.base.reference or str(id(teacher.base)), teacher.base))
