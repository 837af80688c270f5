"""One rank of a run under some strategy; ``tests/lightning/test_strategies.py`` starts as many as it needs.

    python -m tests.lightning.ranks STRATEGY DIRECTORY SETTINGS.json

DeepSpeedStrategy insists on a GPU. Three things stand in the way on a CPU, and the subclass below lifts them: the check
of the accelerator, the check of device indices, and a device without an index. All else is DeepSpeed itself, over gloo.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from kd_plugin.lightning import KDDataModule, OfflineKD, OfflineKDModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.sharding import close_process_group
from tests.hosts.runs import LORA
from tests.lightning.help import Losses

STEPS = 4


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """The strategy as it is, on two CPU processes; for tests alone."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        from lightning.fabric.utilities.seed import reset_seed

        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", self.local_rank)


def strategy(name):
    if name == "single":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    stage = {"stage": int(name[-1]), "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": stage, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return DeepSpeedOnCPU(config=config, process_group_backend="gloo")


class Wrapped(nn.Module):
    """What a user may put around a student: it hands on the loss alone."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, **batch):
        return {"loss": self.student(**batch).loss}


class Own(LightningModule):
    """A module as users write them, with a student that it loads and shards itself.

    Its optimizer is SGD, whose steps show a gradient that is too large or too small.

    Args:
        model: path of the student.
        kind: ``plain``, ``adapted``, ``altered`` (returns another tensor than the student's loss) or ``wrapped``.
    """

    def __init__(self, model, kind):
        super().__init__()
        self.model = model
        self.kind = kind
        self.net = None

    def configure_model(self):
        if self.net is None:
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype="float32")
            self.net = {"adapted": lambda: get_peft_model(base, LORA), "wrapped": lambda: Wrapped(base)}.get(
                self.kind, lambda: base
            )()
            if self.device_mesh is not None:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch)["loss"]
        return 2.0 * loss if self.kind == "altered" else loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def built(settings, callbacks):
    """Return the module of a job, ready or a user's own, and add what teaches a user's to ``callbacks``."""
    given = dict(settings["model"])
    panel = {"teacher_models", "panel"} & set(given)
    if settings.get("own"):
        module = Own(given.pop("model"), settings["own"])
        teachers = (given.pop("teacher_models"),) if "teacher_models" in given else ()
        callbacks.append(TeacherPanelCorrection(*teachers, **given) if panel else OfflineKD(**given))
        return module
    kind = TeacherPanelModule if panel else OfflineKDModule
    return kind(**{"learning_rate": 1e-3, "lr_scheduler_type": "constant", **given})


def fit(name, directory, settings, steps, ckpt_path=None):
    """Train to ``steps``, and return the mean over ranks of each step's loss."""
    ranks = 1 if name == "single" else int(os.environ["WORLD_SIZE"])
    seen = Losses()
    callbacks = [seen]
    torch.manual_seed(0)
    module = built(settings, callbacks)
    data = KDDataModule(batch_size=4 // ranks, shuffle=False, **settings["data"])
    trainer = Trainer(
        strategy=strategy(name), accelerator="cpu", devices=ranks, max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
        default_root_dir=directory, log_every_n_steps=1, **settings.get("trainer", {}),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    losses = [float(trainer.strategy.reduce(torch.tensor(loss), reduce_op="mean")) for loss in seen.losses]
    return losses, trainer


def main(name, directory, given):
    found = {}
    for job, settings in json.loads(Path(given).read_text()).items():
        print("job:", job, flush=True)  # what a test shows of ranks that fail
        checkpoint = Path(directory) / f"{job}.ckpt"
        found[job], trainer = fit(name, directory, settings, STEPS)
        if not settings.get("saved", True):
            continue
        trainer.save_checkpoint(checkpoint)
        found[f"{job} resumed"], trainer = fit(name, directory, settings, STEPS + 1, checkpoint)
    if trainer.is_global_zero:
        (Path(directory) / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
