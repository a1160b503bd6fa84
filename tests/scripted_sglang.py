"""A stand-in for an SGLang server: real HTTP on this machine, answers as SGLang 0.5.23 words them, trouble on demand.

It generates nothing: the tokens of a text are a function of prompt and seed. What it keeps track of is what the client
has to get right: the update session, requests that run while weights change, what was cached and under which key.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

Answer = tuple[int, Any]  # status and body; status 0 hangs up without a word
Body = dict[str, Any]


@dataclass
class Call:
    path: str
    body: Body
    started: float
    ended: float = 0.0


class ScriptedServer:
    """`trouble(server, path, body)` may answer instead of the server; None lets it answer as it should."""

    def __init__(self, port: int = 0) -> None:
        self.trouble: Callable[[ScriptedServer, str, Body], Answer | None] = lambda server, path, body: None
        self.calls: list[Call] = []
        self.misused: list[str] = []  # what the client must never do
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "default"
        self.session = False
        self.released = False
        self.running = 0
        self.cached: set[tuple[str, tuple[int, ...]]] = set()
        self.delay_s = 0.0
        self.deterministic = True
        self.started_in_s = time.perf_counter()
        self.lock = threading.Lock()
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"])) or "{}"))

            def _answer(self, body: Body) -> None:
                path = self.path.partition("?")[0]
                call = Call(path, body, time.monotonic())
                with scripted.lock:
                    scripted.calls.append(call)
                try:
                    status, answer = scripted.trouble(scripted, path, body) or scripted.answer(path, body)
                except AssertionError as error:
                    scripted.misused.append(str(error))
                    status, answer = 500, str(error)
                call.ended = time.monotonic()
                if status == 0:
                    self.close_connection = True
                    return
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(status)
                self.send_header(
                    "content-type", "text/plain" if path in ("/flush_cache", "/health_generate") else "application/json"
                )
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            connections: ClassVar[list[socket.socket]] = []

            def process_request(self, request: Any, client_address: Any) -> None:
                self.connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client hung up first

        self.http = Server(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """As a crash: what it knew is gone."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.http.connections:
            with contextlib.suppress(OSError):  # closed before
                connection.shutdown(socket.SHUT_RDWR)
        self.version, self.session, self.cached, self.weights = "default", False, set(), {}

    def paths(self) -> list[str]:
        return [call.path for call in self.calls]

    def generated(self) -> list[Call]:
        return [call for call in self.calls if call.path == "/generate"]

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(self, path: str, body: Body) -> Answer:
        if path == "/generate":
            return self.generate(body)
        known = getattr(self, path[1:], None)
        if known is None:
            return 404, {"detail": "Not Found"}
        with self.lock:
            return known(body)

    def generate(self, body: Body) -> Answer:
        with self.lock:
            self.running += 1
            assert not self.session and not self.released, "asked for a text while weights change or are gone"
            version, parameters = self.version, body["sampling_params"]
            ids, key = tuple(body["input_ids"]), body["extra_key"]
            cached = max((n for n in range(len(ids)) if (key, ids[:n]) in self.cached), default=0)
            self.cached |= {(key, ids[:n]) for n in range(len(ids) + 1)}
        time.sleep(self.delay_s)
        with self.lock:
            self.running -= 1
        stops = parameters.get("stop_token_ids", [])
        text: list[int] = []
        while len(text) < parameters["max_new_tokens"] and not (text and text[-1] in stops):
            seed = parameters.get("sampling_seed", 0)
            text.append(zlib.crc32(repr((ids, seed, len(text))).encode()) % 50)
        reason = {"type": "length", "length": len(text)}
        if text[-1] in stops:
            reason = {"type": "stop", "matched": text[-1]}
        meta = {
            "finish_reason": reason,
            "output_token_logprobs": [[-token / 10, token, None] for token in text],
            "cached_tokens": cached,
            "weight_version": version,
            "prompt_tokens": len(ids),
        }
        if "token_ids_logprob" in body:
            meta["output_token_ids_logprobs"] = [[[-token / 7, token, None] for token in body["token_ids_logprob"]]]
        return 200, {"text": "", "output_ids": text, "meta_info": meta}

    def server_info(self, body: Body) -> Answer:
        return 200, {
            "tp_size": 1,
            "dp_size": 1,
            "disaggregation_mode": "null",
            "enable_deterministic_inference": self.deterministic,
            "startup_time": {"load_weight": 0.25, "scheduler_e2e": self.started_in_s},
        }

    def health_generate(self, body: Body) -> Answer:
        return 200, ""

    def release_memory_occupation(self, body: Body) -> Answer:
        assert self.running == 0 and not self.released, "memory is taken away while it is needed"
        self.released = True
        self.weights.clear()
        self.cached.clear()
        return 200, None

    def resume_memory_occupation(self, body: Body) -> Answer:
        assert self.released, "memory is taken that has not been given"
        self.released = False
        return 200, None

    def begin_weight_update(self, body: Body) -> Answer:
        if self.session:
            return 400, {"success": False, "message": "a weight-update session is already open; call end first"}
        assert self.running == 0 and not self.released, "weights change while a text is written, or have no memory"
        self.session = True
        return 200, {"success": True, "message": "Success"}

    def update_weights_from_tensor(self, body: Body) -> Answer:
        assert self.session and body["load_format"] == "flattened_bucket" and body["flush_cache"] is False, body
        (payload,) = body["serialized_named_tensors"]
        bucket = pickle.load(io.BytesIO(base64.b64decode(payload)))
        for meta in bucket["metadata"]:
            data = bucket["flattened_tensor"][meta.start_idx : meta.end_idx]
            assert meta.numel == len(data)
            self.weights[meta.name] = data.view(meta.dtype).reshape(meta.shape).clone()
        return 200, {"success": True, "message": "Success"}

    def update_weights_from_disk(self, body: Body) -> Answer:
        for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
            self.weights |= load_file(file)
        return 200, {"success": True, "message": "Succeeded", "num_paused_requests": 0}

    def end_weight_update(self, body: Body) -> Answer:
        assert self.session, "no session to end"
        self.session = False
        return 200, {"success": True, "message": "Success"}

    def flush_cache(self, body: Body) -> Answer:
        self.cached.clear()
        return 200, "Cache flushed.\n"

    def update_weight_version(self, body: Body) -> Answer:
        assert body["abort_all_requests"] is False, "texts would be lost"
        self.version = body["new_version"]
        return 200, {"success": True, "message": "", "new_version": self.version}

    def weights_checker(self, body: Body) -> Answer:
        if body["action"] == "reset_tensors":
            self.weights = {name: torch.full_like(tensor, 7) for name, tensor in self.weights.items()}
            return 200, {"success": True, "message": "Success."}
        checksums = {name: str(tensor.double().sum().item()) for name, tensor in self.weights.items()}
        return 200, {"success": True, "message": "Success.", "ranks": [{"checksums": checksums}]}


class ScriptedRouter(ScriptedServer):
    """A stand-in for the router in front of them, as sglang-router 0.3.2 words its answers."""

    def __init__(self, *workers: str) -> None:
        self.healthy = dict.fromkeys(workers, True)
        super().__init__()

    def workers(self, body: Body) -> Answer:
        entries = [
            {
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, url)),
                "url": url,
                "model_id": "unknown",
                "priority": 50,
                "cost": 1.0,
                "worker_type": "regular",
                "is_healthy": healthy,
                "load": 0,
                "connection_mode": "HTTP",
                "metadata": {},
            }
            for url, healthy in self.healthy.items()
        ]
        stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(entries)}
        return 200, {"workers": entries, "total": len(entries), "stats": stats}

    def server_info(self, body: Body) -> Answer:
        return 200, {"router_manager": True, "routers_count": 1, "workers_count": len(self.healthy)}
