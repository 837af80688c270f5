"""``vllm.LLM`` as vLLM 0.32 has it, with a tiny model in the place of its kernels, and its inconvenient ways.

It sets the seeds of the process, reads from the environment which rank it is, keeps the old head of a tied model, and
cannot be asked while it sleeps.
"""

from __future__ import annotations

import os
import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests import fake_vllm


class LLM:
    """One engine; ``made`` has all of them, ``calls`` what each was asked."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, **options: Any) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "the engine is in this process"
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.options, self.calls = options, []
        if options.get("distributed_executor_backend") == "external_launcher":
            self.place = [int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        dtype = getattr(torch, options["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.behaviour, self.asleep, self.fails = fake_vllm.Behaviour(), False, False
        LLM.made.append(self)

    def _asked(self, name: str) -> None:
        assert not self.asleep, f"{name} while the engine sleeps: its weights are unmapped, and a GPU would crash"
        self.calls.append(name)

    def sleep(self, level: int) -> None:
        """Drop the cache; at level 1 the weights come back with ``wake_up``, at level 2 they would not."""
        assert self.options.get("enable_sleep_mode"), "Sleep mode is not enabled in the model config"
        assert level == 1 and not self.asleep
        self.asleep = True

    def wake_up(self) -> None:
        """Bring weights and cache back."""
        assert self.options.get("enable_sleep_mode"), "Sleep mode is not enabled in the model config"
        self.asleep = False

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        """Reload a checkpoint."""
        self._asked(method)
        fake_vllm._reload(self.model, {"method": method, "kwargs": kwargs}, self.behaviour)

    def reset_prefix_cache(self) -> None:
        """Note the call: keys and values of a prefix are those of the weights that read it."""
        self._asked("reset_prefix_cache")

    def generate(self, prompts: Any, params: Any, *, lora_request: Any = None, use_tqdm: bool = True) -> list[Any]:
        """Answer prompts of token ids, each by its own sampling parameters."""
        self._asked("generate")
        if self.fails:
            raise RuntimeError("the engine is out of memory")
        return [
            self._answer(one["prompt_token_ids"], own, lora_request) for one, own in zip(prompts, params, strict=True)
        ]

    def _answer(self, prompt: list[int], params: SamplingParams, lora: Any) -> Any:
        model = self.model
        if lora is not None:
            held = self.behaviour.adapters
            if (lora.lora_name, lora.lora_path) not in held:
                assert lora.load_inplace or lora.lora_name not in {name for name, _ in held}
                name = {"lora_name": (lora.lora_name, lora.lora_path)}
                fake_vllm._load_adapter(
                    model, {"lora_path": lora.lora_path, "load_inplace": True, **name}, self.behaviour
                )
            model = held[lora.lora_name, lora.lora_path]
        settings = {name: getattr(params, name, value) for name, value in fake_vllm._NEUTRAL.items()}
        answer = fake_vllm._write(model, prompt, vars(params) | {"return_token_ids": True}, settings, self.behaviour)
        listed = [
            {int(name.removeprefix("token_id:")): SimpleNamespace(logprob=value) for name, value in at.items()}
            for at in answer["logprobs"]["top_logprobs"]
        ]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer["token_ids"], logprobs=listed)])


class SamplingParams:
    """Keeps what it is told."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)


class LoRARequest:
    """``vllm.lora.request.LoRARequest``."""

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str, load_inplace: bool = False) -> None:
        self.lora_name, self.lora_path, self.load_inplace = lora_name, lora_path, load_inplace


def install(monkeypatch: Any) -> type[LLM]:
    """Let ``import vllm`` find this."""
    LLM.made = []
    parts = {"vllm": {"LLM": LLM, "SamplingParams": SamplingParams}, "vllm.lora": {}}
    for name, content in (parts | {"vllm.lora.request": {"LoRARequest": LoRARequest}}).items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return LLM
