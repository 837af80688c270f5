"""An OpenAI-compatible server that writes what a test's script says, and fails in all the ways that servers fail."""

import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Script:
    """What the server does; tests change it while it runs.

    ``write`` is called with the request's body and returns a text, or a mapping with ``content`` and any of
    ``reasoning_content``, ``reasoning``, ``finish_reason``, ``model``, ``usage``.

    ``faults`` are taken one a request, None for none: a status; ``(429, headers)``; ``"drop"`` the connection,
    ``"half"`` of the announced bytes, ``"cut json"`` of a whole answer, ``"cut stream"``, ``"html"``, ``"hang"`` for
    ``hang`` seconds, ``"empty"``, ``"no end"`` (no finish_reason), ``"error event"``.
    """

    write: object = lambda body: "written"
    models: list = field(default_factory=lambda: [{"id": "scripted", "root": "org/scripted"}])
    latency: float = 0.0
    hang: float = 5.0
    faults: list = field(default_factory=list)
    log: list = field(default_factory=list)  # bodies of requests for text, as they come, with when
    headers: list = field(default_factory=list)
    answered: Counter = field(default_factory=Counter)  # requests that were answered in full, by their body
    counts_usage: bool = True
    at_once: int = 0
    most_at_once: int = 0


def _tokens(text):
    return len(text.split())


def _choice(script, body):
    made = script.write(body)
    made = {"content": made} if isinstance(made, str) else dict(made)
    ended, model, usage = made.pop("finish_reason", "stop"), made.pop("model", body["model"]), made.pop("usage", None)
    read = "".join(str(m["content"]) for m in body["messages"]) if "messages" in body else body["prompt"]
    written = _tokens(made["content"] or "") + _tokens(made.get("reasoning_content") or made.get("reasoning") or "")
    usage = usage or {"prompt_tokens": _tokens(read), "completion_tokens": written}
    return made, ended, model, usage if script.counts_usage else None


def whole(script, body):
    message, ended, model, usage = _choice(script, body)
    choice = {"index": 0, "finish_reason": ended}
    choice |= {"message": {"role": "assistant", **message}} if "messages" in body else {"text": message["content"]}
    return {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


def events(script, body):
    message, ended, model, usage = _choice(script, body)
    for name in ("reasoning_content", "reasoning", "content"):
        for start in range(0, len(message.get(name) or ""), 7):
            part = message[name][start : start + 7]
            delta = {"delta": {name: part}} if "messages" in body else {"text": part}
            yield {"model": model, "choices": [{"index": 0, **delta, "finish_reason": None}]}
    yield {"model": model, "choices": [{"index": 0, "delta": {}, "finish_reason": ended}]}
    if body.get("stream_options", {}).get("include_usage"):
        yield {"model": model, "choices": [], "usage": usage}


@contextmanager
def scripted_writer(script=None, port=0):
    """Serve, and yield (url, script)."""
    script, lock = script or Script(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args):
            pass

        def send(self, status, data, kind="application/json", headers=None, announced=None):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(announced or len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def drop(self):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self):
            data = json.dumps({"data": script.models}).encode()
            self.send(200 if script.models is not None and "/v4" not in self.path else 404, data)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script.log.append((time.monotonic(), body))
                script.headers.append(dict(self.headers))
                fault = script.faults.pop(0) if script.faults else None
                script.at_once += 1
                script.most_at_once = max(script.most_at_once, script.at_once)
            try:
                time.sleep(script.latency)
                self.answer(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    script.at_once -= 1

        def answer(self, body, fault):
            if isinstance(fault, tuple | int):
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                self.send(status, json.dumps({"error": {"message": "made to fail"}}).encode(), headers=headers)
                return
            if fault == "hang":
                time.sleep(script.hang)
            if fault in ("drop", "hang"):
                return self.drop()
            if fault == "html":
                return self.send(200, b"<!DOCTYPE html><html><body>Bad gateway</body></html>", "text/html")
            if fault == "empty":
                return self.send(200, b"")
            if body.get("stream"):
                return self.stream(body, fault)
            answer = whole(script, body)
            if fault == "no end":
                answer["choices"][0]["finish_reason"] = None
            data = json.dumps(answer).encode()
            if fault == "half":
                self.send(200, data[: len(data) // 2], announced=len(data))
                return self.drop()
            if fault == "cut json":
                return self.send(200, data[: len(data) // 2])
            self.send(200, data)
            self.count(body, fault)

        def count(self, body, fault):
            with lock:
                script.answered[json.dumps(body, sort_keys=True)] += fault is None

        def stream(self, body, fault):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            found = list(events(script, body))
            self.wfile.write(b": keep-alive\n\n")
            for number, event in enumerate(found):
                if number == len(found) // 2 and fault == "cut stream":
                    return self.drop()
                if number == len(found) // 2 and fault == "error event":
                    event = {"error": {"message": "overloaded"}}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
            self.count(body, fault)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that went away

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
