"""A trainer with vLLM in its process, run by the interpreter that has vLLM; test_vllm_in_process.py starts it.

    VLLM_PYTHON -m tests.vllm.in_process SYNC TIED DIRECTORY

One process has one engine: each run of the test is a process of its own.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ServerError
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import losses, prompts, settings
from tests.tiny import save_tiny
from tests.vllm.greedy import compared_with_own

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
STEPS = 5


def trained(out, student, teacher, engine, lora):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    common = {"top_k": 1, "max_completion_length": 16, "divergence": "reverse_kl", "learning_rate": 5e-3}
    trainer = TeacherPanelTrainer(
        model=get_peft_model(model, LoraConfig(**LORA)) if lora else model,
        teacher_models={"t": LocalTeacher(teacher, dtype="float32")},
        args=TeacherPanelConfig(**settings(out, rollout_engine=engine, max_steps=STEPS, **common)),
        train_dataset=prompts(),
        processing_class=LocalTeacher(student).tokenizer,
    )
    trainer.train()
    return losses(trainer)


def main(sync: str, tied: bool, directory: str) -> None:
    out, report = Path(directory), {}
    student = save_tiny(out / "student", seed=1, hidden=128, tied=tied)
    teacher = save_tiny(out / "teacher", seed=2, hidden=128, tied=False)
    engine = {"kind": "vllm", "sync": sync, "options": {"enforce_eager": True, "max_model_len": 256}}
    ServerEngine.generate, found = compared_with_own(ServerEngine.generate)
    try:
        report["mine"] = trained(out / "a", student, teacher, engine, sync == "adapter")
        report["theirs"] = trained(out / "b", student, teacher, None, sync == "adapter")
    except ServerError as error:
        report["problem"] = str(error)
    (out / "report.json").write_text(json.dumps({**report, "found": found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied", sys.argv[3])
