"""A real HTTP server that answers chat completions as a script says, in every way an endpoint can go wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Trouble = Literal["", "reset", "cut", "twice"]


@dataclass(frozen=True)
class Answer:
    body: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    trouble: Trouble = ""  # the connection is reset, the body ends too early, or the whole reply comes twice


@dataclass
class Received:
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    at: float
    hung_up: bool = False  # the client did not wait for the answer

    @property
    def user(self) -> str:
        return str(self.body["messages"][-1]["content"])


def says(content: str, prompt_tokens: int = 7, completion_tokens: int = 3, **fields: Any) -> Answer:
    """A chat completion; `finish_reason` and the fields of `Answer` as keywords."""
    choice = {"message": {"content": content}, "finish_reason": fields.pop("finish_reason", "stop")}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Answer(json.dumps({"choices": [choice], "usage": usage}), **fields)


class MisbehavingEndpoint:
    """Serves in a thread until `close`; `answer(n, request)` makes the n-th answer."""

    def __init__(self, answer: Callable[[int, Received], Answer]) -> None:
        self.received: list[Received] = []
        self.most_at_once = 0
        self._answer = answer
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            keep_alive = True
            while keep_alive and (head := await reader.readuntil(b"\r\n\r\n")):
                line, *lines = head.decode().rstrip().split("\r\n")
                headers = {name.lower(): value for name, value in (header.split(": ", 1) for header in lines)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                keep_alive = headers.get("connection") != "close"
                received = Received(body, headers, line.split()[1], time.monotonic())
                self.received.append(received)
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    answer = self._answer(len(self.received) - 1, received)
                    await self._wait(answer.after_s, reader, received)
                finally:
                    self._at_once -= 1
                if received.hung_up or not self._reply(writer, answer):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # clients may hang up at any time, and `close` cancels
        finally:
            writer.close()

    @staticmethod
    async def _wait(seconds: float, reader: asyncio.StreamReader, received: Received) -> None:
        if seconds:
            deadline = time.monotonic() + seconds
            while not received.hung_up and (left := deadline - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.02))
                received.hung_up = reader.at_eof()

    @staticmethod
    def _reply(writer: asyncio.StreamWriter, answer: Answer) -> bool:
        """Whether the connection is still good."""
        if answer.trouble == "reset":
            peer: socket.socket = writer.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
            return False
        body = answer.body.encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} .", *(f"{name}: {value}" for name, value in headers.items())]
        reply = "\r\n".join([*lines, "", ""]).encode() + body
        if answer.trouble == "cut":
            writer.write(reply[: -len(body) // 2])
            return False
        writer.write(reply * (2 if answer.trouble == "twice" else 1))
        return True
