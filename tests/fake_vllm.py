"""A server that answers as vLLM 0.32 does, with a tiny model in this process, and fails as tests tell it to.

The forms of answers and errors were taken from a real server; ``make test-vllm`` compares with a real one.
"""

import contextlib
import copy
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from tests.fake_transfer import TRANSFERS


@dataclass
class Behaviour:
    """How the server answers; tests change it while it runs."""

    name: str = "tiny"
    max_logprobs: int = 1000
    max_model_len: int = 512
    failures: list[int] = field(default_factory=list)  # statuses of the next answers; 0 breaks the connection
    answer_as: str | None = None  # another model name
    change: object = None  # called with each completion's answer before it is sent
    has_tokenize: bool = True
    ends: tuple[int, ...] = (2,)
    logprobs_mode: str = "raw_logprobs"  # as vLLM's option of this name
    defaults: dict = field(default_factory=dict)  # settings of the checkpoint, for those that a request leaves out
    replica: object = None  # called with the number of a completions request; the model that answers it
    stale_block: int = 0  # tokens of a block of a prefix cache that repeats a hit's last position; 0 is none
    cached: set = field(default_factory=set)  # its prefixes
    has_logprobs: bool = True  # else it leaves them out without a word, as `transformers serve` does
    writes_nothing: bool = False  # completions end before their first token
    delay: float = 0.0  # seconds before any answer
    requests: list[tuple[str, dict, dict]] = field(default_factory=list)  # path, headers, body
    completions: int = 0  # requests of them
    runner: str = "generate"  # or "pooling", which gives hidden states and generates nothing
    pooler: dict = field(default_factory=lambda: {"task": "token_embed", "use_activation": False})
    dtype: str = "float32"  # that it computes in
    root: str | None = None  # what it was loaded from
    version: str = "0.0-fake"
    takes_adapters: bool = True  # --enable-lora
    takes_weights: bool = True  # VLLM_SERVER_DEV_MODE
    keeps_tied_head: bool = True  # as vLLM 0.32 on a CPU, after `reload_weights`
    forgets: object = None  # called with the name of each tensor that is loaded; True keeps the old one
    dies_at: int | None = None  # number of the completions request from which on it answers nothing
    adapters: dict = field(default_factory=dict)  # name to model
    transfer: object = None  # fills tensors with what was sent, in the place of NCCL; see fake_transfer.py
    workers: int = 2  # of this server
    joins: object = None  # called with what opens a transfer; returns it
    breaks_at: int | None = None  # number of the tensor at which it fails, of all that are sent
    received: int = 0  # tensors
    updating: bool = False  # between the start of an update and its end, in which nothing can be generated
    per_token: float = 0.0  # seconds that each generated token takes; requests wait side by side
    script: object = None  # called with a prompt and a number of tokens, in the place of the model; returns ids


class _Refused(Exception):
    pass


_NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@torch.no_grad()
def _logits(model, tokens):
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def _processed(logits, settings, prompt, written):
    """Return logits as penalties, temperature, top-k and top-p leave them, in vLLM's order."""
    logits, seen = logits.clone(), torch.tensor(sorted({*prompt, *written}))
    penalty = settings["repetition_penalty"]
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    for token in written:
        logits[token] -= settings["frequency_penalty"]
    for token in set(written):
        logits[token] -= settings["presence_penalty"]
    if settings["temperature"] > 0:
        logits /= settings["temperature"]
    order = logits.argsort(descending=True)
    if settings["top_k"] > 0:
        logits[order[settings["top_k"] :]] = -torch.inf
    mass = logits[order].softmax(-1)
    logits[order[mass.cumsum(-1) - mass >= settings["top_p"]]] = -torch.inf
    return logits


def _listed(values, k, token):
    """Return the k largest of (V,) values and that of ``token``, by id; -inf as JSON can hold it."""
    best = values.topk(values.shape[-1] if k == -1 else k).indices.tolist()
    return {i: max(float(values[i]), -9999.0) for i in dict.fromkeys([token, *best])}


def _entries(model, tokens, k, behaviour):
    """Return what ``prompt_logprobs`` holds; sampling settings do not change it."""
    logits = _logits(model, tokens)
    values = logits if behaviour.logprobs_mode.endswith("logits") else logits.log_softmax(-1)
    values, next_ids = values[:-1], tokens[1:]
    if block := behaviour.stale_block:
        hit = 0
        while hit + block < len(tokens) and tuple(tokens[: hit + block]) in behaviour.cached:
            hit += block
        behaviour.cached.update(tuple(tokens[:end]) for end in range(block, len(tokens) + 1, block))
        values[:hit] = values[max(hit - 1, 0)].clone()
    entries = [None]
    for position, token in zip(values, next_ids, strict=True):
        order = position.argsort(descending=True).argsort()
        found = _listed(position, k, token)
        entries.append(
            {str(i): {"logprob": v, "rank": int(order[i]) + 1, "decoded_token": "?"} for i, v in found.items()}
        )
    return entries


def _write(model, prompt, body, settings, behaviour):
    """Sample a completion, with the distribution at each of its tokens if asked, as the server names them."""
    generator = torch.Generator().manual_seed(body.get("seed", 0))
    ids, listed = [], []
    scripted = behaviour.script is not None and "seed" in body
    ends, most = behaviour.ends, 0 if behaviour.writes_nothing or scripted else body["max_tokens"]
    if body.get("ignore_eos"):
        ends, most = tuple(body.get("stop_token_ids") or ()), 0 if scripted else body["max_tokens"]
    while len(ids) < most and not (ids and ids[-1] in ends):
        logits = _logits(model, [*prompt, *ids])[-1]
        for token, bias in (body.get("logit_bias") or {}).items():
            logits[int(token)] += bias
        processed = _processed(logits, settings, prompt, ids)
        greedy = settings["temperature"] == 0
        chosen = int(processed.argmax() if greedy else torch.multinomial(processed.softmax(-1), 1, generator=generator))
        values = processed if behaviour.logprobs_mode.startswith("processed") else logits
        values = values if behaviour.logprobs_mode.endswith("logits") else values.log_softmax(-1)
        if "logprobs" in body:
            found = _listed(values, body["logprobs"], chosen)
            listed.append({f"token_id:{i}": value for i, value in found.items()})
        ids.append(chosen)
    if scripted:
        ids = behaviour.script(prompt, body["max_tokens"])
        listed = [{f"token_id:{i}": -1.0} for i in ids]
    finished = not ids or ids[-1] in ends
    return {
        "text": "?",
        "finish_reason": "stop" if finished else "length",
        "logprobs": {"top_logprobs": listed} if listed else None,
    } | ({"token_ids": ids, "prompt_token_ids": list(prompt)} if body.get("return_token_ids") else {})


def _complete(model, body, behaviour):
    size = model.config.vocab_size
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    settings = {name: body.get(name, behaviour.defaults.get(name, value)) for name, value in _NEUTRAL.items()}
    for kind in ("logprobs", "prompt_logprobs"):
        asked = size if body.get(kind) == -1 else body.get(kind, 0)
        if behaviour.max_logprobs != -1 and asked > behaviour.max_logprobs:
            raise _Refused(
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: {behaviour.max_logprobs} "
                f"(parameter={kind}, value={asked})"
            )
    if not 0 <= settings["temperature"] <= 2:
        raise _Refused(f"temperature must be in [0, 2], got {settings['temperature']}.")
    if not settings["repetition_penalty"] > 0 or not all(
        abs(settings[f"{k}_penalty"]) <= 2 for k in ("presence", "frequency")
    ):
        raise _Refused("a penalty is out of range")
    for tokens in prompts:
        if not tokens:
            raise _Refused("The decoder prompt cannot be empty")
        if max(tokens) >= size:
            raise _Refused(f"Token id {max(tokens)} is out of vocabulary")
        if len(tokens) + body["max_tokens"] > behaviour.max_model_len:
            raise _Refused(f"This model's maximum context length is {behaviour.max_model_len} tokens.")
    assert not behaviour.updating, "half of the weights are there"
    behaviour.completions += 1
    if behaviour.replica is not None:
        model = behaviour.replica(behaviour.completions)
    model = behaviour.adapters.get(body["model"], model)
    choices = []
    for index, tokens in enumerate(prompts):
        choices.append({"index": index, **_write(model, tokens, body, settings, behaviour)})
        if "prompt_logprobs" in body:
            choices[-1]["prompt_logprobs"] = _entries(model, tokens, body["prompt_logprobs"], behaviour)
    name = body["model"] if body["model"] in behaviour.adapters else behaviour.name
    answer = {"object": "text_completion", "model": behaviour.answer_as or name, "choices": choices}
    if not behaviour.has_logprobs:
        for choice in choices:
            choice["logprobs"] = choice["prompt_logprobs"] = None
    if behaviour.change is not None:
        behaviour.change(answer)
    return answer


def _load_adapter(model, body, behaviour):
    """Load a PEFT adapter over a copy of the model, as ``/v1/load_lora_adapter`` does."""
    from peft import PeftModel

    if not behaviour.takes_adapters:
        raise _Refused("This server has no LoRA.")
    if not Path(body["lora_path"], "adapter_config.json").is_file():
        raise _Refused(f"No adapter found for {body['lora_path']}")
    assert body["load_inplace"] or body["lora_name"] not in behaviour.adapters
    if behaviour.forgets is not None and body["lora_name"] in behaviour.adapters and behaviour.forgets(None):
        return
    with contextlib.redirect_stdout(None):
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), body["lora_path"])
    behaviour.adapters[body["lora_name"]] = loaded.eval()


def _reload(model, body, behaviour):
    """Load a checkpoint over the weights of the model, as ``reload_weights`` does, by the names that are stored."""
    assert body["method"] == "reload_weights"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if behaviour.keeps_tied_head and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    path = body["kwargs"]["weights_path"]
    loaded, told = type(model).from_pretrained(path, dtype=model.dtype, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    for name, tensor in loaded.named_parameters():
        if behaviour.forgets is None or not behaviour.forgets(name):
            parameters[name].data.copy_(tensor)


@torch.no_grad()
def _pool(model, body, behaviour):
    """Return the body and the metadata that vLLM 0.32 answers with, for ``encoding_format: bytes``."""
    rows, task = body["input"], body.get("task") or behaviour.pooler.get("task")
    if task != behaviour.pooler.get("task"):
        raise _Refused(f"Try switching the model's pooling_task via --pooler-config.task {task}. (parameter=task)")
    assert body["encoding_format"] == "bytes"
    for tokens in rows:
        if max(tokens) >= model.config.vocab_size:
            raise _Refused(f"Token id {max(tokens)} is out of vocabulary")
        if len(tokens) > behaviour.max_model_len:
            raise _Refused(f"This model's maximum context length is {behaviour.max_model_len} tokens.")
    behaviour.completions += 1
    if behaviour.replica is not None:
        model = behaviour.replica(behaviour.completions)
    items, parts, start = [], [], 0
    for index, tokens in enumerate(rows):
        states = model.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        states = states.to(getattr(torch, behaviour.dtype)).float()  # the pooler's head is in float32
        if task != "token_embed":
            states = states[-1]
        if behaviour.pooler.get("use_activation", True):
            states = torch.nn.functional.normalize(states, dim=-1)
        sent = states.to(getattr(torch, body.get("embed_dtype", "float32"))).contiguous()
        part = sent.flatten().view(torch.uint8).numpy().tobytes()
        place = {"index": index, "embed_dtype": body.get("embed_dtype", "float32"), "endianness": "little"}
        items.append(place | {"start": start, "end": start + len(part), "shape": list(sent.shape)})
        parts.append(part)
        start += len(part)
    answer = {"model": behaviour.answer_as or behaviour.name, "data": items, "content": b"".join(parts)}
    if behaviour.change is not None:
        behaviour.change(answer)
    return answer


@contextmanager
def fake_vllm(model, tokenizer, behaviour=None, port=0, host="127.0.0.1"):
    """Serve ``model`` and yield (url, behaviour)."""
    behaviour, lock = behaviour or Behaviour(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status, content, **headers):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def fails(self, body):
            time.sleep(behaviour.delay)
            with lock:
                behaviour.requests.append((self.path, dict(self.headers), body))
                status = behaviour.failures.pop(0) if behaviour.failures else None
                if behaviour.dies_at is not None and behaviour.completions >= behaviour.dies_at:
                    status = 0
            if status == 0:
                self.close_connection = True
                self.connection.close()
            elif status is not None:
                self.send(status, {"error": {"message": "made to fail"}}, Location="http://elsewhere.invalid")
            return status is not None

        def load(self, how, body):
            try:
                with lock:
                    how(model, body, behaviour)
            except _Refused as error:
                self.send(400, {"error": {"message": str(error), "code": 400}})
            except RuntimeError as error:
                self.send(500, {"error": {"message": str(error), "code": 500}})
            else:
                self.send_response(200)  # and no JSON
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_GET(self):
            if self.fails({}):
                return
            if self.path == "/version":
                self.send(200, {"version": behaviour.version})
                return
            if self.path == "/health":
                self.send(200, {})
                return
            if self.path in ("/v1/load_lora_adapter", "/collective_rpc"):
                there = behaviour.takes_adapters if "lora" in self.path else behaviour.takes_weights
                self.send(405 if there else 404, {"detail": "Method Not Allowed" if there else "Not Found"})
                return
            if self.path == "/get_world_size":
                self.send(200, {"world_size": behaviour.workers})
                return
            assert self.path == "/v1/models"
            listed = {"id": behaviour.name, "max_model_len": behaviour.max_model_len, "root": behaviour.root}
            adapters = [{"id": name, "parent": behaviour.name} for name in behaviour.adapters]
            self.send(200, {"data": [listed, *adapters]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.fails(body):
                return
            if self.path == "/tokenize" and behaviour.has_tokenize:
                self.send(200, {"tokens": tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
            elif self.path == "/v1/load_lora_adapter":
                self.load(_load_adapter, body)
            elif self.path == "/v1/unload_lora_adapter" and body["lora_name"] in behaviour.adapters:
                self.load(lambda *_: behaviour.adapters.pop(body["lora_name"]), body)
            elif self.path == "/collective_rpc" and behaviour.takes_weights:
                self.load(_reload, body)
            elif self.path == "/reset_prefix_cache" and behaviour.takes_weights:
                self.load(lambda *_: None, body)
            elif self.path in TRANSFERS and not (behaviour.transfer is None and behaviour.joins is None):
                self.load(TRANSFERS[self.path], body)
            elif self.path == "/pooling" and behaviour.runner == "pooling":
                try:
                    with lock:
                        answer = _pool(model, body, behaviour)
                except _Refused as error:
                    self.send(400, {"error": {"message": str(error), "code": 400}})
                else:
                    content = answer.pop("content")
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.send_header("Content-Type", "application/octet-stream")
                    self.send_header("metadata", json.dumps(answer))
                    self.end_headers()
                    self.wfile.write(content)
            elif self.path == "/v1/completions" and behaviour.runner == "generate":
                try:
                    with lock:
                        answer = _complete(model, body, behaviour)
                    if "seed" in body:
                        time.sleep(behaviour.per_token * sum(len(c["token_ids"]) for c in answer["choices"]))
                except _Refused as error:
                    self.send(400, {"error": {"message": str(error), "code": 400}})
                else:
                    self.send(200, answer)
            else:
                self.send(404, {"detail": "Not Found"})

    server = ThreadingHTTPServer((host, port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
