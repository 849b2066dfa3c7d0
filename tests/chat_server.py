"""A server with the OpenAI chat interface that fails as it is told, as a process of its own.

    python chat_server.py [PORT]                 prints its port, and serves until it is killed
    POST /v1/chat/completions, GET /v1/models    what captioners ask
    POST /told {"every": [...], "shades": {"7": [...]}, "key": "...", "delay_s": 0.1}     how to answer
    GET /seen                                    what was asked: requests, and the most at once

An image is known by the grey of its middle. For each shade, and for all, a list says how the next requests are answered: one of
the methods of `Fault`, after those as usual: "a picture of shade 7".
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.request import ProxyHandler, Request, build_opener

from PIL import Image

MODEL = "tiny-vlm"


class State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.told: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    def next_fault(self, shade: int) -> str | None:
        with self.lock:
            for faults in (self.told.get("shades", {}).get(str(shade), []), self.told.get("every", [])):
                if faults:
                    return faults[0] if faults[0].endswith("*") else faults.pop(0)
        return None


STATE = State()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/seen":
            with STATE.lock:
                self._json(200, {"asked": STATE.asked, "most_at_once": STATE.most_at_once})
        elif self.path == "/v1/models":
            if not self._refused():
                self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self._json(404, {"error": {"message": f"no such path {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/told":
            with STATE.lock:
                STATE.told, STATE.asked, STATE.most_at_once = body, [], 0
            return self._json(200, {})
        if self.path != "/v1/chat/completions":
            return self._json(404, {"error": {"message": f"no such path {self.path}"}})
        with STATE.lock:
            STATE.at_once += 1
            STATE.most_at_once = max(STATE.most_at_once, STATE.at_once)
        time.sleep(STATE.told.get("delay_s", 0))
        with STATE.lock:  # before the answer: its asker may ask again at once
            STATE.at_once -= 1
        self._chat(body)

    def _chat(self, body: dict[str, Any]) -> None:
        (image, prompt) = body["messages"][0]["content"]
        url = image["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        shade = picture.convert("L").getpixel((picture.width // 2, picture.height // 2))
        about = {key: value for key, value in body.items() if key != "messages"}
        with STATE.lock:
            STATE.asked.append(
                about
                | {
                    "shade": shade,
                    "size": picture.size,
                    "format": picture.format,
                    "url": url[:23],
                    "prompt": prompt["text"],
                    "authorization": self.headers.get("Authorization"),
                    "at": time.time(),
                }
            )
        if self._refused():
            return
        if body["model"] != MODEL:
            return self._json(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        fault = STATE.next_fault(shade)
        if fault is None:
            self._answer(f"a picture of shade {shade}", tokens=5)
        else:
            name, _, argument = fault.rstrip("*").partition(":")
            getattr(Fault, name)(self, argument, shade)

    def _refused(self) -> bool:
        wanted, given = STATE.told.get("key"), self.headers.get("Authorization", "")
        if wanted is None or given == f"Bearer {wanted}":
            return False
        self._json(401, {"error": {"message": f"Incorrect API key provided: {given.removeprefix('Bearer ')}"}})
        return True

    def _answer(self, text: Any, tokens: int = 1, reason: str = "stop", **message: Any) -> None:
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
        usage = {"prompt_tokens": 9, "completion_tokens": tokens}
        self._json(200, {"model": MODEL, "choices": [choice], "usage": usage, "system_fingerprint": "fp_1"})

    def _json(self, status: int, body: Any, **headers: str) -> None:
        self._bytes(status, json.dumps(body).encode(), **headers)

    def _bytes(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


class Fault:
    """Each a way to answer."""

    @staticmethod
    def status(handler: Handler, argument: str, shade: int) -> None:
        """status:CODE or status:CODE,RETRY_AFTER"""
        code, _, after = argument.partition(",")
        handler._json(
            int(code), {"error": {"message": f"told so for shade {shade}"}}, **({"Retry_After": after} if after else {})
        )

    @staticmethod
    def stall(handler: Handler, argument: str, shade: int) -> None:
        time.sleep(float(argument))
        handler.close_connection = True

    @staticmethod
    def drip(handler: Handler, argument: str, shade: int) -> None:
        """A byte now and then, for so many seconds."""
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        end = time.monotonic() + float(argument)
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            time.sleep(0.05)
        handler.close_connection = True

    @staticmethod
    def cut(handler: Handler, argument: str, shade: int) -> None:
        """Half a body."""
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [{"mess')
        handler.close_connection = True

    @staticmethod
    def html(handler: Handler, argument: str, shade: int) -> None:
        handler._bytes(200, b"<html>\x1b[31mplease log in</html>")

    @staticmethod
    def other(handler: Handler, argument: str, shade: int) -> None:
        """JSON, but of another interface."""
        handler._json(200, {"generated_text": "a cat"})

    @staticmethod
    def huge(handler: Handler, argument: str, shade: int) -> None:
        handler._bytes(200, b" " * (6 << 20))

    @staticmethod
    def empty(handler: Handler, argument: str, shade: int) -> None:
        handler._answer(None)

    @staticmethod
    def refusal(handler: Handler, argument: str, shade: int) -> None:
        handler._answer(None, refusal="I can't help with that.")

    @staticmethod
    def filtered(handler: Handler, argument: str, shade: int) -> None:
        handler._answer("A pict", reason="content_filter")

    @staticmethod
    def length(handler: Handler, argument: str, shade: int) -> None:
        handler._answer(f"A shade of {shade}. It is as gr", tokens=64, reason="length")

    @staticmethod
    def say(handler: Handler, argument: str, shade: int) -> None:
        handler._answer(argument, tokens=len(argument.split()))

    @staticmethod
    def parts(handler: Handler, argument: str, shade: int) -> None:
        handler._answer([{"type": "text", "text": "a picture"}, {"type": "text", "text": "in parts"}])


class ChatServer:
    """The process, and what a test tells it and asks of it."""

    def __init__(self, port: int = 0) -> None:
        self.port = port

    def __enter__(self) -> Self:
        command = [sys.executable, str(Path(__file__)), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self._open = build_opener(ProxyHandler({})).open
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def tell(self, **told: Any) -> None:
        """Forgets what it was told and asked before."""
        self._open(Request(f"http://127.0.0.1:{self.port}/told", json.dumps(told).encode())).read()

    def seen(self) -> dict[str, Any]:
        return json.loads(self._open(f"http://127.0.0.1:{self.port}/seen").read())

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self.seen()["asked"]


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
