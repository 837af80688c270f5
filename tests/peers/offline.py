"""``OfflineKDTrainer`` in the place of ``SFTTrainer``: with a cache captured from the rows that the test trains on."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import get_training_chat_template

from kd_plugin import LocalTeacher, TeacherCache, capture
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

# Every dataset that the test has loaded: a user who evaluates on a split later has captured it as well
LOADED: list[Any] = []


class CapturingTrainer(OfflineKDTrainer):
    """Does first what a user does first: captures the datasets, from a random teacher with the student's tokenizer.

    Nothing else of ``OfflineKDTrainer`` is changed.
    """

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        cache = captured(Path(self._scratch.name), model, args, **kwargs)
        super().__init__(model, args, teacher_cache=cache, **kwargs)


def captured(
    scratch: Path,
    model: Any,
    args: OfflineKDConfig | None,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    formatting_func: Any = None,
    **_: Any,
) -> TeacherCache:
    """Capture the rows of the datasets, each once."""
    name = model if isinstance(model, str) else model.config._name_or_path
    trusted = bool(args is not None and getattr(args, "trust_remote_code", False))
    tokenizer = processing_class or AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    template = getattr(args, "chat_template_path", None)
    if template is not None:
        is_file = Path(template).is_file()
        tokenizer.chat_template = (
            Path(template).read_text() if is_file else AutoTokenizer.from_pretrained(template).chat_template
        )
    rows = list(_unique_rows(train_dataset, eval_dataset)) or [{"text": "a cache of other rows"}]
    if formatting_func is not None:
        rows = [{"text": formatting_func(row)} for row in rows]
    teacher = LocalTeacher(random_teacher(len(tokenizer)), tokenizer=tokenizer, license="apache-2.0")
    return capture(
        rows,
        teacher,
        scratch / "cache",
        completion_only=getattr(args, "completion_only_loss", None),
        assistant_only=bool(getattr(args, "assistant_only_loss", False)),
        chat_template=get_training_chat_template,
        batch_tokens=1024,
        progress=False,
    )


def random_teacher(size: int) -> LlamaForCausalLM:
    """Return a random teacher over a vocabulary of ``size`` tokens."""
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


def _unique_rows(train_dataset: Any, eval_dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield each row of the given datasets, and of loaded ones of their form, once."""
    given = [] if train_dataset is None else [train_dataset]
    given += list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset] if eval_dataset else []
    forms = [set(next(iter(dataset))) for dataset in given]
    seen = set()
    for dataset in [*given, *LOADED]:
        for row in dataset:
            key = json.dumps(row, sort_keys=True, default=str)
            if key not in seen and (not forms or set(row) in forms):
                seen.add(key)
                yield row
