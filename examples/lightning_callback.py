"""Distil inside a LightningModule that you have: the callback is the only change.

    python examples/lightning_callback.py --student STUDENT --cache CACHE --output_dir out

`CACHE` was filled by `kd-plugin capture`, or by examples/offline_kd.py. Expected: the divergence from the teacher at
each step, `out/student.ckpt` with its lineage in `out/student.ckpt.lineage/`, and at the end `out/student.ckpt: good`.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from kd_plugin import TeacherCache
from kd_plugin.lightning import OfflineKD  # + one line
from kd_plugin.lineage import verify


class FineTuning(LightningModule):
    """A plain module, as it was before distillation."""

    def __init__(self, model):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="float32")

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-5)


def collate(rows):
    """Pad on the right; `teacher_index` travels with the tokens."""
    columns = {name: [torch.tensor(row[name]).long() for row in rows] for name in rows[0] if name in PADDING}
    batch = {name: pad_sequence(c, batch_first=True, padding_value=PADDING[name]) for name, c in columns.items()}
    trained = batch.pop("completion_mask") == 1
    batch["attention_mask"] = pad_sequence([torch.ones_like(c) for c in columns["input_ids"]], batch_first=True)
    batch["labels"] = torch.where(trained, batch["input_ids"], -100)
    return batch


PADDING = {"input_ids": 0, "completion_mask": 0, "teacher_index": -1}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", required=True, help="path or hub id; the teacher's tokenizer")
parser.add_argument("--cache", required=True, help="directory of the teacher cache")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=100)
options = parser.parse_args()

cache = TeacherCache(options.cache)
trainer = Trainer(
    max_steps=options.max_steps,
    callbacks=[OfflineKD(cache)],  # + one line
    default_root_dir=options.output_dir,
    logger=False,
)
trainer.fit(FineTuning(options.student), DataLoader(cache.dataset(), batch_size=8, shuffle=True, collate_fn=collate))
checkpoint = f"{options.output_dir}/student.ckpt"
trainer.save_checkpoint(checkpoint)

report = verify(checkpoint)
print(f"{checkpoint}: {'good' if report.exit_code == 0 else report.problems}")
