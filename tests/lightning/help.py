"""Plain LightningModules as users write them, rows of a cache, and quiet trainers."""

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

TOPICS = ["one plus two", "the sea", "a red bird", "what is time", "count to six", "say hello", "why rain", "odd"]
ROWS = [{"prompt": f"{TOPICS[i % 8]}?", "completion": f" answer {i} {'y' * (i % 7)}"} for i in range(16)]


def collate(rows, keep=("teacher_index",)):
    """Pad on the right, as a user would."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch |= {name: torch.full_like(batch["input_ids"], -1) for name in keep}
    for i, row in enumerate(rows):
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"]).bool()
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, : len(ids)] = torch.where(mask, ids, -100)
        for name in keep:
            batch[name][i, : len(ids)] = torch.tensor(row[name])
    return batch


def loader(cache, batch_size=4, collate_fn=collate, shuffle=False):
    return DataLoader(cache.dataset(), batch_size=batch_size, collate_fn=collate_fn, shuffle=shuffle)


class Plain(pl.LightningModule):
    """The model in an attribute, its own loss returned."""

    def __init__(self, model, lr=1e-3):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="float32") if isinstance(model, str) else model
        self.lr = lr
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("own", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Losses(pl.Callback):
    """The loss of each batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning shows the loss times the batches of a window; see Trainer.accumulate_grad_batches
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def trainer(tmp_path, callbacks=(), **kwargs):
    defaults = {
        "max_steps": 5, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "default_root_dir": tmp_path, "use_distributed_sampler": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})
