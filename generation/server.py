"""Server of inference.py that speaks OpenAI's protocol.

    pip install -r requirements/web.txt
    python inference.py --serve                # http://127.0.0.1:8000/v1, on this machine only

`/v1/chat/completions` and `/v1/completions`, whole or streamed, and `/v1/models`. Requests that
arrive together are decoded together. A conversation that no longer fits loses its oldest turns, as
in inference.py. What the model cannot do, such as tools, is refused and not ignored.
"""

import asyncio
import codecs
import hmac
import json
import os
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import UserError
from generation.backends import open_backend
from generation.batching import BatchedDecoder, Request
from generation.conversation import Lille, Sampling
from generation.guard import LOOPBACK, guarded
from generation.openai_requests import (
    ApiError,
    UntilStop,
    messages_of,
    sampling_of,
    stops_of,
    text_of,
    value_of,
)
from tokenizer import Tokenizer

MAX_BODY = 1 << 20  # bytes
MAX_WAITING = 64  # requests beside those that are being answered
KEY = "LILLE_API_KEY"  # environment variable


@dataclass
class Answer:
    """An answer as it grows."""

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Server:
    """The endpoints, for one model; `options` are defaults of the sampling settings."""

    def __init__(
        self,
        decoder: BatchedDecoder,
        tokenizer: Tokenizer,
        name: str,
        options: dict[str, Any],
        api_key: str = "",
        loopback: bool = True,
    ):
        self.decoder, self.tokenizer, self.name, self.options = decoder, tokenizer, name, options
        self.api_key, self.loopback, self.created = api_key, loopback, int(time.time())

    def app(self):
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        def route(path: str, method: str, handler: Callable) -> Route:
            async def endpoint(request):
                try:
                    self.check_key(request)
                    return await handler(request)
                except ApiError as error:
                    return error.response()

            return Route(path, endpoint, methods=[method])

        async def not_here(request, error):
            return ApiError(
                f"{request.method} {request.url.path}: {error.detail}", error.status_code
            ).response()

        async def failed(request, error):
            return ApiError("the server failed: see its terminal", 500).response()

        routes = [
            route("/v1/models", "GET", self.models),
            route("/v1/models/{name:path}", "GET", self.models),
            route("/v1/chat/completions", "POST", self.complete),
            route("/v1/completions", "POST", self.complete),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: not_here, 500: failed})
        return guarded(app, lambda reason: ApiError(reason, 403).response(), self.loopback)

    def check_key(self, request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if self.api_key and not (scheme.lower() == "bearer" and right):
            raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")

    async def models(self, request):
        from starlette.responses import JSONResponse

        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "lille"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self.check_model(request.path_params["name"])
        return JSONResponse(model)

    def check_model(self, name: Any) -> None:
        if name != self.name:
            message = f"there is no model {str(name)[:100]!r} here: take {self.name!r}"
            raise ApiError(message, 404, "model", "model_not_found")

    async def read_body(self, request) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY:
                raise ApiError(f"the body has more than {MAX_BODY:,} bytes", 413)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):  # UnicodeDecodeError too
            raise ApiError("the body is not JSON") from None
        if not isinstance(body, dict):
            raise ApiError("the body is not a JSON object")
        return body

    async def complete(self, request):
        """Answers a conversation or continues a text, whole or streamed."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response, StreamingResponse

        try:
            body = await self.read_body(request)
        except ClientDisconnect:
            return Response(status_code=400)
        chat = request.url.path.endswith("/chat/completions")
        self.check_model(value_of(body, "model", self.name, str, bool))
        sampling, stops = sampling_of(body, self.options), stops_of(body)
        ids = self.prompt_ids(body, chat, sampling.max_new_tokens)
        if len(self.decoder.waiting) >= MAX_WAITING:
            raise ApiError("the server is busy: try again later", 429, code="rate_limit_exceeded")
        answer = Answer(len(ids))
        pieces = self.pieces(ids, sampling, stops, answer)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": self.name,
        }
        if value_of(body, "stream", False, bool, lambda _: True):
            options = value_of(body, "stream_options", {}, dict, lambda _: True)
            chunks = self.chunks(head, chat, pieces, answer, bool(options.get("include_usage")))
            return StreamingResponse(chunks, media_type="text/event-stream")
        text = await until_disconnect(request, joined(pieces))
        if text is None:
            return Response(status_code=499)
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": answer.finish_reason}
        return JSONResponse({**head, "choices": [choice], "usage": answer.usage()})

    def prompt_ids(self, body: dict[str, Any], chat: bool, max_new_tokens: int) -> list[int]:
        """Token ids of a request's prompt; no text of it becomes a control token."""
        if not chat:
            prompt = body.get("prompt")
            prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            ids = self.tokenizer.encode(text_of(prompt, "prompt"))
            if not 1 <= len(ids) <= self.decoder.block_size:
                raise ApiError(
                    f"the prompt has {len(ids)} tokens and the context {self.decoder.block_size}",
                    param="prompt",
                    code="context_length_exceeded" if ids else "",
                )
            return ids
        messages = messages_of(body)
        session = Lille(self.decoder, self.tokenizer)
        session.history = messages[:-1]
        try:
            return session.fit(messages[-1], max_new_tokens)[0]
        except UserError as error:
            raise ApiError(str(error), 400, "messages", "context_length_exceeded") from None

    async def pieces(
        self, ids: list[int], sampling: Sampling, stops: list[str], answer: Answer
    ) -> AsyncIterator[str]:
        """The answer's text as it becomes certain; `answer` is kept up to date."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def emit(item: int | str | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed % (1 << 63)
        stop_tokens = (self.tokenizer.eos_id, self.tokenizer.user_id)
        request = Request(ids, sampling, seed, emit, stop_tokens)
        decoder, text = codecs.getincrementaldecoder("utf-8")(errors="replace"), UntilStop(stops)
        self.decoder.submit(request)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, str):
                    answer.finish_reason = item
                    end = decoder.decode(b"", final=True) if item == "stop" else ""
                    yield text.push(end, final=True)
                    return
                answer.completion_tokens += 1
                if not self.tokenizer.is_control[item]:
                    piece = decoder.decode(self.tokenizer.decode_bytes([item]))
                    certain = text.push(piece)
                    if certain or text.stopped:
                        yield certain
                if text.stopped:
                    answer.finish_reason = "stop"
                    return
        finally:
            request.cancelled = True

    async def chunks(
        self, head: dict, chat: bool, pieces: AsyncIterator[str], answer: Answer, usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        if chat:
            head = head | {"object": "chat.completion.chunk"}

        def event(content: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
            return f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"

        try:
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}})
            async for piece in pieces:
                if piece:
                    yield event({"delta": {"content": piece}} if chat else {"text": piece})
            yield event({"delta": {}} if chat else {"text": ""}, answer.finish_reason)
            if usage:
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage()})}\n\n"
        except Exception as error:
            message = {"message": f"the server failed: {error}", "type": "server_error"}
            yield f"data: {json.dumps({'error': message})}\n\n"
        finally:
            await pieces.aclose()
        yield "data: [DONE]\n\n"


async def joined(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


async def until_disconnect(request, work) -> Any:
    """The result of `work`, or None if the client leaves before, when it is cancelled."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            return None
    return task.result()


def require_packages() -> None:
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise UserError(f"the server needs {name}: pip install -r requirements/web.txt")


def api_key_for(host: str) -> str:
    """The API key, from the environment; UserError where it is needed and missing."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii():
        raise UserError(f"{KEY} has characters that are not ASCII: choose another key")
    if host not in LOOPBACK and not key:
        raise UserError(
            f"--host={host} lets other machines in: set the environment variable {KEY} to a key "
            "of your choice"
        )
    return key


def run(config: Any, options: dict[str, Any]) -> None:
    """Serves the model of inference.py's settings until Ctrl-C; `options` of the sampling."""
    if config.backend != "torch":
        raise UserError("--serve decodes with the torch backend only: leave out --backend")
    key = api_key_for(config.host)
    where = (config.device or None, config.dtype or None)
    backend, tokenizer = open_backend("torch", config.model, *where)
    decoder = BatchedDecoder(backend.gpt, backend.decoder)
    name = Path(config.model).name.removesuffix(".pt")
    serve(
        Server(decoder, tokenizer, name, options, key, config.host in LOOPBACK),
        config.host,
        config.port,
    )


def serve(server: Server, host: str, port: int) -> None:
    """Serves at a port, 8000 for 0, until Ctrl-C."""
    import uvicorn

    port = port or 8000
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve at {host} port {port} ({error}): try another --port"
        ) from None
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{listener.getsockname()[1]}/v1"
    where = "on this machine only" if server.loopback else "with the API key"
    print(f"Serving {server.name} at {url} ({where}; Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])
