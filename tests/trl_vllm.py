"""vLLM under TRL 1.16's ``VLLMGeneration``: the engine and the server are replaced, and all of TRL's own code runs.

The answers have vLLM's forms, also where they are inconvenient: no log-probabilities unless they are asked for, and of
several the likeliest comes first, not the one that was drawn. A completion says which prompt it belongs to.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch

LENGTH = 5


def completion(prompt: list[int], length: int = LENGTH) -> list[int]:
    """Return what the double writes after ``prompt``: tokens that few other prompts give."""
    return [(sum(prompt) * 7 + j * 3) % 200 + 40 for j in range(length)]


@torch.no_grad()
def logprobs_of(model: Any, prompt: list[int], ids: list[int], temperature: float, count: int) -> list[dict[int, Any]]:
    """Return at each token the sampled one's log-probability and those of the ``count`` likeliest, by token id."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    found = []
    for token, row in zip(ids, logprobs, strict=True):
        listed = [token, *row.topk(count).indices.tolist()] if count else [token]
        ranks = {i: int((row > row[i]).sum()) + 1 for i in listed}
        found.append({i: SimpleNamespace(logprob=float(row[i]), rank=rank) for i, rank in ranks.items()})
    return found


class Sampling:
    """``vllm.SamplingParams``."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update({"logprobs": None, **settings})


class Engine:
    """``vllm.LLM``; ``loaded`` counts the tensors that reached it."""

    model: ClassVar[Any] = None  # gives log-probabilities, at the sampling temperature
    asked: ClassVar[list[tuple[int, int | None]]] = []  # prompts and `logprobs` of each call

    def __init__(self, **kwargs: Any) -> None:
        self.loaded = 0
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self._load)))
        model_config = SimpleNamespace(max_model_len=512)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=runner), model_config=model_config
        )

    def _load(self, tensors: Any) -> None:
        self.loaded += len(tensors)

    def reset_prefix_cache(self) -> None:
        """Do nothing."""

    def generate(self, prompts: Any, sampling_params: Sampling, use_tqdm: bool = False) -> list[Any]:
        """Answer as vLLM does."""
        Engine.asked.append((len(prompts), sampling_params.logprobs))
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _answer(self, prompt: list[int], sampling: Sampling) -> Any:
        ids, listed = completion(prompt, min(LENGTH, sampling.max_tokens)), None
        if sampling.logprobs is not None:
            listed = logprobs_of(Engine.model, prompt, ids, sampling.temperature, sampling.logprobs)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=listed)])


class Session:
    """The HTTP session of TRL's client: one server, in this process."""

    logprobs_mode: ClassVar[str] = "processed_logprobs"

    def get(self, url: str, **kwargs: Any) -> Any:
        """Answer ``/server_info``."""
        info = {"vllm_config": {"model_config": {"logprobs_mode": Session.logprobs_mode}}}
        return SimpleNamespace(status_code=200, json=lambda: info)


def client_class() -> type:
    """Return TRL's ``VLLMClient`` with its network calls answered here."""
    from trl.generation.vllm_client import VLLMClient

    class Client(VLLMClient):
        def __init__(self, base_url: str, **kwargs: Any) -> None:
            self.base_url, self.model, self.session = base_url, "served", Session()

        def init_communicator(self, device: Any = 0) -> None:
            pass

        def update_named_params(self, metadata: Any, parameters: Any) -> None:
            assert len(metadata) == len(list(parameters))

        def reset_prefix_cache(self) -> None:
            pass

        def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
            assert url.endswith("/v1/completions") and json["prompt"], "vLLM refuses a request without prompts"
            Engine.asked.append((len(json["prompt"]), json["logprobs"]))
            return {"choices": [self._choice(prompt, json) for prompt in json["prompt"]]}

        def _choice(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
            ids, told = completion(prompt, min(LENGTH, body["max_tokens"])), None
            if body["logprobs"] is not None:
                listed = logprobs_of(Engine.model, prompt, ids, body["temperature"], body["logprobs"])
                named = [{f"token_id:{i}": entry.logprob for i, entry in row.items()} for row in listed]
                own = [row[f"token_id:{i}"] for i, row in zip(ids, named, strict=True)]
                told = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": own, "top_logprobs": named}
            return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": told}

    return Client


def install(patch: Any, model: Any = None) -> type[Engine]:
    """Let TRL find vLLM.

    Args:
        patch: called with a module, a name and a value, such as ``monkeypatch.setattr``.
        model: what the double takes log-probabilities from.
    """
    import trl.generation.vllm_generation as generation
    import trl.trainer.distillation_trainer as trainer

    for module in (generation, trainer):
        patch(module, "is_vllm_available", lambda *args, **kwargs: True)
    patch(generation, "SamplingParams", Sampling)
    patch(generation, "LLM", Engine)
    patch(generation, "VLLMClient", client_class())
    Engine.model, Engine.asked = model, []
    return Engine
