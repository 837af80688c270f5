"""A plain ``transformers.Trainer`` with offline KD, on rows that are tokenized already."""

from dataclasses import fields

from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from kd_plugin.transformers import OfflineKDMixin, OfflineSettings
from tests.hosts.runs import TOPICS, Trace, losses, settings
from tests.tiny import byte_tokenizer

TEXTS = [
    {"prompt": f"{TOPICS[i % len(TOPICS)]}?", "completion": f" answer {i} {'y' * (5 * i % 11)}"} for i in range(16)
]


class Plain(Trainer):
    """What a project's own trainer is: it does things of its own around the loss that the model returns."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches = getattr(self, "batches", 0) + 1
        return super().compute_loss(model, inputs, *args, **kwargs)


class OfflineTrainer(OfflineKDMixin, Plain):
    pass


def tokenized(texts=TEXTS, completion_only: bool = True) -> Dataset:
    """Return rows of ``input_ids`` and ``labels``, as a project that does not use TRL makes them."""
    tokenizer, rows = byte_tokenizer(), []
    for row in texts:
        prompt, rest = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = [*prompt, *rest, tokenizer.eos_token_id]
        hidden = len(prompt) if completion_only else 0
        rows.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return Dataset.from_list(rows)


def build(directory, cache, student, rows=None, cls=OfflineTrainer, callbacks=None, **kwargs):
    """Build a trainer; names of its constructor are taken out of ``kwargs``, the rest are its ``TrainingArguments``."""
    names = (
        "eval_dataset", "data_collator", "lineage", "compute_metrics", "compute_loss_func", "processing_class",
        "model_init",
    )  # fmt: skip
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    fitted = {field.name: kwargs.pop(field.name) for field in fields(OfflineSettings) if field.name in kwargs}
    model = AutoModelForCausalLM.from_pretrained(student) if isinstance(student, str) else student
    own.setdefault("processing_class", byte_tokenizer())
    own.setdefault("data_collator", DataCollatorForSeq2Seq(own["processing_class"]))
    return cls(
        model=model,
        args=TrainingArguments(**settings(directory, **kwargs)),
        teacher_cache=cache,
        offline_settings=OfflineSettings(**fitted),
        train_dataset=rows,
        callbacks=callbacks,
        **own,
    )


def train(directory, cache, student, rows=None, **kwargs):
    """Train, and return each step's loss and gradients, and the trainer."""
    trace = Trace()
    trainer = build(directory, cache, student, rows, callbacks=[trace], **kwargs)
    trainer.train()
    return losses(trainer), trace.gradients, trainer


def step(directory, cache, student, rows=None, **kwargs):
    """Return loss and gradients of one step over all rows, at a learning rate of 0."""
    chosen = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 16, **kwargs}
    found, gradients, trainer = train(directory, cache, student, rows, **chosen)
    return found[0], gradients[0], trainer
