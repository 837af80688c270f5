"""A teacher that runs in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.start import carried_by
from kd_plugin.models import load_language_model, naming, output_rows, require_dtype
from kd_plugin.sharding import is_sharded, move, replicated_models, swapped_apart, through
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.base import Capabilities, reference_identity, tensors_digest
from kd_plugin.teachers.in_process import InProcessTeacher, Placement
from kd_plugin.upstream import reference_of
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
Place = Literal["resident", "offload"]


class LocalTeacher(InProcessTeacher):
    """A transformers language model in this process, resident on one device or moved there when it scores.

    Nothing is loaded until it is needed, so that the license gate can refuse it first.

    Args:
        model: a hub id, a local directory, or a loaded model.
        tokenizer: the teacher's tokenizer; loaded from ``model`` where that is a path or names one.
        name: how metrics and lineage call it.
        revision: branch, tag or commit, for a hub id.
        license: declared licence where none can be discovered: a hub id such as ``apache-2.0``, or ``own``.
        dtype: a torch dtype or its name; ``"auto"`` takes the checkpoint's own.
        device: where it runs; None leaves it to the host.
        placement: ``resident`` keeps the weights on the device. ``offload`` keeps them in host memory, moves them in
            once for all rows of a generation batch, and out again, so that a device holds one such teacher at a time.
            Where a host cuts teachers over ranks, that is said of each rank's part.
        trust_remote_code: run Python code that the model repository ships. Off unless you read that code.
        model_init_kwargs: further arguments of ``from_pretrained``.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Any = None,
        name: str = "teacher",
        revision: str | None = None,
        license: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        placement: Place = "resident",
        trust_remote_code: bool = False,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        if placement not in get_args(Place):
            raise ConfigError(
                f"placement={placement!r} of teacher {name!r}; expected one of {', '.join(get_args(Place))}."
                + nearest(str(placement), list(get_args(Place)))
            )
        self.device = device
        self.placement: Place = placement
        self._holders = 0
        self._ref = _reference(model)
        self._revision = revision
        self._license = license
        require_dtype(dtype)
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._model_init_kwargs = dict(model_init_kwargs or {})
        self._tokenizer = tokenizer
        self._model = model if isinstance(model, nn.Module) else None
        if self._model is not None:
            self._model.eval().requires_grad_(False)
            if device is not None and placement == "resident":
                self._model.to(device)

    @cached_property
    def source(self) -> Source:
        """What this teacher is; see :class:`~kd_plugin.lineage.sources.Source`."""
        carried = None if self._model is None else carried_by(self._model)  # a run of this process trained it
        record = None if carried is None else carried.record()
        return Source(self.name, ref=self._ref, revision=self._revision, license=self._license, record=record)

    @property
    def capabilities(self) -> Capabilities:
        """Its whole distribution, computed here."""
        return Capabilities(
            "a model in this process",
            frozenset({"hidden"}),
            in_process=True,
            sharded=self.is_sharded,
            generates="model",
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Its weights, by content."""
        return {"kind": "local", **self.weights_identity}

    @property
    def weights_identity(self) -> dict[str, Any]:
        """The sha256 of the weights' files or tensors, or hub id and revision."""
        if self._ref is not None:
            return reference_identity(self._ref, self._revision)
        return {"weights": tensors_digest(self.model)}

    @property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if self._ref is None:
                raise ConfigError(
                    f"Teacher {self.name!r} is a loaded model that names no tokenizer; its vocabulary cannot be "
                    "checked. Pass LocalTeacher(model, tokenizer=...)."
                )
            from transformers import AutoTokenizer

            with naming(self._ref):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self._ref, revision=self._revision, trust_remote_code=self._trust_remote_code
                )
        return self._tokenizer

    @property
    def names_a_tokenizer(self) -> bool:
        """Whether a tokenizer was given or can be looked up; a model built in memory has neither."""
        return self._tokenizer is not None or self._ref is not None

    def assume_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take ``vocabulary`` for this teacher's own, where it names none that could be checked."""
        self.__dict__["vocabulary"] = vocabulary.within(self._rows)

    def adopt_vocabulary(self, student: Vocabulary) -> None:
        """Take the student's vocabulary, and say so, where this model names no tokenizer."""
        if self.names_a_tokenizer:
            return
        logger.warning(
            f"Teacher {self.name!r} is a loaded model that names no tokenizer; its token ids are taken to be the "
            "student's. Pass LocalTeacher(model, tokenizer=...) to have them checked."
        )
        self.assume_vocabulary(student)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks; those that its head has rows for."""
        return Vocabulary.from_tokenizer(self.tokenizer).within(self._rows)

    @property
    def _rows(self) -> int | None:
        """Rows of the head, read from the configuration where no weights are here."""
        if self._model is not None:
            return output_rows(self._model)
        try:
            return output_rows(self.config)
        except (OSError, ValueError):
            return None  # no config.json, as of a GGUF file: its head shows once it is loaded

    @property
    def model(self) -> nn.Module:
        """The model in evaluation mode without gradients, loaded on first use."""
        if self._model is None:
            assert self._ref is not None  # a loaded model is one
            model = load_language_model(
                self._ref,
                revision=self._revision,
                trust_remote_code=self._trust_remote_code,
                **{"dtype": self._dtype, **self._model_init_kwargs},
            )
            self._model = model.eval().requires_grad_(False)
            if self.device is not None and self.placement == "resident":
                self._model.to(self.device)
        return self._model

    @cached_property
    def head(self) -> OutputHead:
        """The output head, cut to the tokenizer's vocabulary."""
        return OutputHead.from_model(self.model, self.vocabulary.within(output_rows(self.model)).size)

    @property
    def reference(self) -> str | None:
        """Path or hub id of the weights; None for a model that names none."""
        return self._ref

    @property
    def config(self) -> Any:
        """The model's configuration, read without its weights."""
        if self._model is not None:
            return self._model.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._ref, revision=self._revision, trust_remote_code=self._trust_remote_code)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids at which this teacher ends a response, by its tokenizer and its generation configuration."""
        from transformers import GenerationConfig

        found = {self.vocabulary.special_ids.get("eos_token")}
        settings = getattr(self._model, "generation_config", None)
        if settings is None and self._ref is not None:
            try:
                settings = GenerationConfig.from_pretrained(self._ref, revision=self._revision)
            except OSError:
                settings = None  # a model need not have one
        ends = getattr(settings, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
        return frozenset(token for token in found if token is not None)

    @contextmanager
    def resident(self, device: torch.device | str) -> Iterator[None]:
        """Have the weights on ``device`` inside the block; an offloaded teacher leaves it with the outermost one."""
        if self.placement == "resident":
            yield
            return
        self._holders += 1
        try:
            if self._holders == 1:
                self._move(self.device or device)
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                self._move("cpu")

    def stay_on(self, device: torch.device | None) -> None:
        """Have the weights on a device from now on, offloaded or not: the one that the user chose, else ``device``."""
        self.device = device if self.device is None else self.device
        if self.device is not None:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        move(self.model, device)

    def place(self, placement: Placement) -> None:
        """Load the model and have the host wrap it; one that an earlier run sharded stays as it is."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        if self.is_attached and self.is_sharded:
            return
        with swapped_apart() if is_deepspeed_zero3_enabled() else replicated_models():
            model = self.model
        OutputHead.from_model(model)  # raises early where the teacher has no head
        offloaded = self.placement == "offload"
        if offloaded and not placement.shards_move:
            return
        self.attach(through(placement.wrap(model), model))
        if offloaded:
            move(model, "cpu")

    @property
    def is_sharded(self) -> bool:
        """Whether each pass gathers weights from other ranks, so that every rank must join it."""
        return self._model is not None and is_sharded(self._model)

    @property
    def _backbone(self) -> Any:
        return self.model.base_model


def _reference(model: str | Path | nn.Module) -> str | None:
    if isinstance(model, nn.Module):
        return reference_of(model) or None
    return str(model)
