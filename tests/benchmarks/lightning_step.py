"""An offline KD step in Lightning against the same module's plain fine-tuning step.

    python -m tests.benchmarks.lightning_step [--layers 19 --hidden 576 --vocab 49152 --rows 4 --length 128 --steps 10]

Both sides train the same module on the same batches; one has the callback. They take turns, a step of one and then a
step of the other, and the medians are compared. Limit: 1.10.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from kd_plugin.cache.joining import TARGET
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.lightning.step import DistillingStep, Prepared, without
from kd_plugin.student.forward import DistillingForward


class FineTuning(pl.LightningModule):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3,
                num_hidden_layers=options.layers, num_attention_heads=9, num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class Turns(pl.Callback):
    """Adds distillation to every other step, and times each side."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._began = 0.0

    def on_fit_start(self, trainer, pl_module) -> None:
        objective = OfflineObjective(Divergence("forward_kl"), ce_weight=self.options.ce_weight)
        self.forward = DistillingForward(pl_module.model, self.options.vocab, objective, pl_module)
        self.plain = pl_module.training_step
        self.step = DistillingStep(trainer, pl_module, self.forward, self._prepare, lambda call, total: None)
        self.wrapped = pl_module.training_step

    def _prepare(self, batch) -> Prepared:
        target = batch[TARGET]
        shape = tuple(batch["input_ids"].shape)
        return Prepared(without(batch, TARGET), target, batch["labels"], shape, target["positions"].numel())

    def _without_targets(self, batch, batch_idx):
        return self.plain(without(batch, TARGET), batch_idx)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        distils = batch_idx % 2 == 0
        pl_module.training_step = self.wrapped if distils else self._without_targets
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx >= 4:  # the first of each side warm up
            self.times[batch_idx % 2 == 0].append(time.perf_counter() - self._began)


def batches(options: argparse.Namespace) -> list[dict]:
    torch.manual_seed(1)
    ids = torch.randint(options.vocab, (options.rows, options.length))
    labels = ids.clone()
    labels[:, : options.length // 4] = -100
    scored = torch.full_like(labels, -100)
    scored[:, :-1] = labels[:, 1:]
    positions = (scored.flatten() != -100).nonzero().flatten()
    logits, listed = torch.randn(positions.numel(), options.vocab).log_softmax(-1).topk(options.top_k)
    target = {
        "positions": positions, "labels": scored.flatten()[positions], "weights": torch.ones(positions.numel()),
        "ids": listed, "logprobs": logits, "tail_logmass": torch.log1p(-logits.exp().sum(-1)),
    }  # fmt: skip
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, TARGET: target}
    return [batch] * (2 * options.steps + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 19), ("hidden", 576), ("vocab", 49152), ("rows", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of each side")
    parser.add_argument("--ce_weight", type=float, default=0.0)
    options = parser.parse_args()
    turns = Turns(options)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[turns], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(directory),
        )  # fmt: skip
        trainer.fit(FineTuning(options), DataLoader(batches(options), batch_size=None))
    ours, plain = (statistics.median(turns.times[side]) for side in (True, False))
    print(f"offline step {ours:.3f} s, fine-tuning step {plain:.3f} s, ratio {ours / plain:.3f} (limit 1.10)")


if __name__ == "__main__":
    main()
