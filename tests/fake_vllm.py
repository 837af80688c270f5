"""A server that answers as vLLM 0.32 does, with a tiny model in this process, and fails as tests tell it to.

The forms of answers and errors were taken from a real server; ``make test-vllm`` compares with a real one.
"""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


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
    requests: list[tuple[str, dict, dict]] = field(default_factory=list)  # path, headers, body


def _entries(model, tokens, k):
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    k = logprobs.shape[-1] if k == -1 else k
    entries = [None]
    for position, token in zip(logprobs[:-1], tokens[1:], strict=True):
        values, ids = position.topk(k)
        rank = int((position > position[token]).sum()) + 1
        entry = {str(token): {"logprob": float(position[token]), "rank": rank, "decoded_token": "?"}}
        for place, (value, i) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
            entry[str(i)] = {"logprob": value, "rank": place + 1, "decoded_token": "?"}
        entries.append(entry)
    return entries


class _Refused(Exception):
    pass


def _write(model, body, ends):
    """Sample a completion, with the distribution at each of its tokens, as the server names them."""
    k, generator = body["logprobs"], torch.Generator().manual_seed(body["seed"])
    k = model.config.vocab_size if k == -1 else k
    tokens, ids, listed = list(body["prompt"]), [], []
    while len(ids) < body["max_tokens"] and not (ids and ids[-1] in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        logprobs = logits.log_softmax(-1)
        if body["temperature"] == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator))
        values, best = logprobs.topk(k)
        entry = {f"token_id:{chosen}": float(logprobs[chosen])}
        entry.update({f"token_id:{i}": v for i, v in zip(best.tolist(), values.tolist(), strict=True)})
        listed.append(entry)
        tokens.append(chosen)
        ids.append(chosen)
    finished = bool(ids) and ids[-1] in ends
    return {
        "index": 0,
        "text": "?",
        "token_ids": ids,
        "finish_reason": "stop" if finished else "length",
        "logprobs": {"top_logprobs": listed},
    }


def _complete(model, body, behaviour):
    writes = "logprobs" in body
    k, tokens, size = body["logprobs" if writes else "prompt_logprobs"], body["prompt"], model.config.vocab_size
    asked = size if k == -1 else k
    if behaviour.max_logprobs != -1 and asked > behaviour.max_logprobs:
        raise _Refused(
            f"Requested prompt logprobs of {asked}, which is greater than max allowed: {behaviour.max_logprobs} "
            f"(parameter=prompt_logprobs, value={asked})"
        )
    if max(tokens) >= size:
        raise _Refused(f"Token id {max(tokens)} is out of vocabulary")
    if len(tokens) + body["max_tokens"] > behaviour.max_model_len:
        raise _Refused(f"This model's maximum context length is {behaviour.max_model_len} tokens.")
    answer = {
        "object": "text_completion",
        "model": behaviour.answer_as or behaviour.name,
        "choices": [
            _write(model, body, behaviour.ends)
            if writes
            else {"index": 0, "text": "?", "prompt_logprobs": _entries(model, tokens, k)}
        ],
    }
    if behaviour.change is not None:
        behaviour.change(answer)
    return answer


@contextmanager
def fake_vllm(model, tokenizer, behaviour=None, port=0):
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
            with lock:
                behaviour.requests.append((self.path, dict(self.headers), body))
                status = behaviour.failures.pop(0) if behaviour.failures else None
            if status == 0:
                self.close_connection = True
                self.connection.close()
            elif status is not None:
                self.send(status, {"error": {"message": "made to fail"}}, Location="http://elsewhere.invalid")
            return status is not None

        def do_GET(self):
            if self.fails({}):
                return
            if self.path == "/version":
                self.send(200, {"version": "0.0-fake"})
                return
            if self.path == "/health":
                self.send(200, {})
                return
            assert self.path == "/v1/models"
            self.send(200, {"data": [{"id": behaviour.name, "max_model_len": behaviour.max_model_len}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.fails(body):
                return
            if self.path == "/tokenize" and behaviour.has_tokenize:
                self.send(200, {"tokens": tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
            elif self.path == "/v1/completions":
                try:
                    with lock:
                        answer = _complete(model, body, behaviour)
                except _Refused as error:
                    self.send(400, {"error": {"message": str(error), "code": 400}})
                else:
                    self.send(200, answer)
            else:
                self.send(404, {"detail": "Not Found"})

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
