"""Short greedy runs of each host, with an engine or without; also for the interpreter that has vLLM and no pytest."""

import torch
from lightning.pytorch import Trainer as LightningTrainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kd_plugin.lightning import TeacherPanelCorrection
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.teachers import LocalTeacher
from kd_plugin.transformers import TeacherPanelMixin
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import TOPICS, losses, prompts, settings
from tests.lightning.help import Plain

STEPS, TOKENS = 5, 24
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
GREEDY = {"top_k": 1, "max_completion_length": TOKENS, "divergence": "reverse_kl"}


def student_of(directory, lora):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(**LORA)) if lora else model


def trl(out, directory, teacher, engine, lora, steps=STEPS, **options):
    trainer = TeacherPanelTrainer(
        model=student_of(directory, lora),
        teacher_models={"t": LocalTeacher(teacher, dtype="float32")},
        args=TeacherPanelConfig(
            **settings(out, rollout_engine=engine, max_steps=steps, **{"learning_rate": 5e-3, **GREEDY, **options})
        ),
        train_dataset=prompts(),
        processing_class=LocalTeacher(directory).tokenizer,
    )
    trainer.train()
    return losses(trainer)


class _PanelTrainer(TeacherPanelMixin, Trainer):
    pass


def plain(out, directory, teacher, engine, lora, steps=STEPS):
    trainer = _PanelTrainer(
        model=student_of(directory, lora),
        args=TrainingArguments(**settings(out, max_steps=steps, learning_rate=5e-3)),
        teacher_models={"t": LocalTeacher(teacher, dtype="float32")},
        panel_settings=PanelSettings(rollout_engine=engine, **GREEDY),
        train_dataset=prompts(),
        processing_class=LocalTeacher(directory).tokenizer,
    )
    trainer.train()
    return losses(trainer)


class Rows(torch.utils.data.Dataset):
    column_names = ("prompt",)

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return {"prompt": f"{TOPICS[i % 8]} {'x' * (i % 5)}?"}


def lightning(out, directory, teacher, engine, lora, steps=STEPS):
    """Shuffled by Lightning's own seed, as users have it: an engine must not change the order of rows."""
    module = Plain(student_of(directory, lora), lr=5e-3)
    callback = TeacherPanelCorrection(
        {"t": LocalTeacher(teacher, dtype="float32")},
        tokenizer=LocalTeacher(directory).tokenizer,
        rollout_engine=engine,
        **GREEDY,
    )
    trainer = LightningTrainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[callback],
    )

    def collate(rows):
        return {"prompt": [row["prompt"] for row in rows]}

    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=4, shuffle=True, collate_fn=collate))
    return module.losses
