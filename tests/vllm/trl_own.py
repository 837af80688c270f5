"""TRL's own ``use_vllm`` on a CPU, run by the interpreter that has vLLM; test_vllm_trl.py starts it.

    VLLM_PYTHON -m tests.vllm.trl_own MODE DIRECTORY STUDENT TEACHER [URL]

First as it is, by TRL's trainer and by ours; then with the one call that a CPU does not have, by which weights reach
vLLM, replaced. All else is TRL's code and vLLM itself.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import requests
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import losses, prompts, settings
from tests.vllm.hosts import student_of

COMMON = {"top_k": 1, "max_completion_length": 16, "learning_rate": 5e-3, "max_steps": 4}


def ours(out, student, teacher, **options):
    trainer = TeacherPanelTrainer(
        model=student_of(student, False),
        teacher_models={"t": LocalTeacher(teacher, dtype="float32")},
        args=TeacherPanelConfig(**settings(out, divergence="reverse_kl", **{**COMMON, **options})),
        train_dataset=prompts(),
        processing_class=LocalTeacher(student).tokenizer,
    )
    trainer.train()
    return trainer


def theirs(out, student, teacher, **options):
    trainer = DistillationTrainer(
        model=student_of(student, False),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=DistillationConfig(**settings(out, **{**COMMON, **options})),
        train_dataset=prompts(),
        processing_class=LocalTeacher(student).tokenizer,
    )
    trainer.train()


def what_stops(run, *arguments, **options):
    try:
        run(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def through_files(student, directory):
    """Have the server read the weights that TRL would send by NCCL."""
    config = AutoModelForCausalLM.from_pretrained(student).config

    def update(self, metadata, named):
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in named}
        assert [one for one, _, _ in metadata] == list(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(directory)
        told = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        requests.post(f"{self.base_url}/collective_rpc", json=told, timeout=60).raise_for_status()

    VLLMClient.init_communicator = lambda self, device: None
    VLLMClient.update_named_params = update


def through_an_iterator():
    """Have vLLM reload what TRL would hand over by ``load_weights``."""

    def sync(self):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(self._iter_named_params()))})
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync


def sampled_apart(trainer):
    """Return by how much the log-probabilities that vLLM told of sampled tokens differ from the student's."""
    trainer.model.train()
    output = trainer._generate_and_score_completions([dict(row) for row in trainer.train_dataset.select(range(4))])
    mask = output["completion_mask"].bool()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits
    logprobs = logits[:, output["prompt_ids"].shape[1] - 1 : -1].log_softmax(-1)
    own = logprobs.gather(-1, output["completion_ids"].unsqueeze(-1))[..., 0]
    return float((output["scored"].behaviour_logprobs - own)[mask].abs().max())


def main(mode: str, directory: str, student: str, teacher: str, url: str | None = None) -> None:
    out, report = Path(directory), {}
    options = {"use_vllm": True, "vllm_mode": mode}
    if mode == "server":
        options |= {"vllm_server_base_url": url, "vllm_server_timeout": 30}
    else:
        options |= {"vllm_max_model_length": 256, "vllm_gpu_memory_utilization": 0.2}
        # TRL has vLLM compile the model, which takes minutes here, and choose the dtype: 16 bits, also for 32
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    for name, run in (("theirs", theirs), ("ours", ours)):
        report[f"{name} stopped by"] = what_stops(run, out / name, student, teacher, **options)
    through_files(student, out) if mode == "server" else through_an_iterator()
    report["vllm"] = losses(ours(out / "vllm", student, teacher, **options))
    report["transformers"] = losses(ours(out / "transformers", student, teacher))
    sampled = ours(out / "sampled", student, teacher, **options, estimator="sampled", top_k=0)
    report["sampled"], report["apart"] = losses(sampled), sampled_apart(sampled)
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
