"""Requests of OpenAI's protocol: parameters, messages, stop strings, and errors in its form."""

import json
from collections.abc import Callable
from typing import Any

from generation.conversation import Message, Sampling

MAX_STOPS = 4
# Parameters that would change the answer and are not offered, with the values that change nothing.
REFUSED = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "top_k": (),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def response(self):
        from starlette.responses import JSONResponse

        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse({"error": error}, self.status, headers)


def value_of(body: dict[str, Any], name: str, default: Any, kind: type, valid: Callable) -> Any:
    """A parameter of a request, or the default for null; ApiError for another type or value."""
    value = body.get(name)
    if value is None:
        return default
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not kind or not valid(value):
        raise ApiError(f"{name} cannot be {json.dumps(value)[:100]}", param=name)
    return value


def sampling_of(body: dict[str, Any], defaults: dict[str, Any]) -> Sampling:
    """The sampling settings of a request; ApiError for what is not offered."""
    for name, harmless in REFUSED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise ApiError(f"{name} is not supported: leave it out", param=name)
    tokens = value_of(body, "max_tokens", defaults["max_new_tokens"], int, lambda n: n >= 1)
    return Sampling(
        max_new_tokens=value_of(body, "max_completion_tokens", tokens, int, lambda n: n >= 1),
        temperature=value_of(
            body, "temperature", defaults["temperature"], float, lambda x: 0 <= x <= 2
        ),
        top_p=value_of(body, "top_p", defaults["top_p"], float, lambda x: 0 < x <= 1),
        top_k=defaults["top_k"],
        seed=value_of(body, "seed", None, int, lambda n: -(1 << 63) <= n < 1 << 63),
    )


def stops_of(body: dict[str, Any]) -> list[str]:
    """The strings at which an answer ends."""
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not (isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)):
        raise ApiError("stop is a string or a list of strings that are not empty", param="stop")
    if len(stops) > MAX_STOPS:
        raise ApiError(f"stop has {len(stops)} strings, at most {MAX_STOPS} work", param="stop")
    return stops


def messages_of(body: dict[str, Any]) -> list[Message]:
    """The turns of a conversation; a system message becomes text before the first user turn."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages is a list of at least one message", param="messages")
    system, turns = [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        content = text_of(message.get("content"), where) if role else ""
        if role in ("system", "developer") and not turns:
            system.append(content)
        elif role == ("user", "assistant")[len(turns) % 2]:
            turns.append({"role": role, "content": content})
        else:
            raise ApiError(
                f"{where}: system messages come first, then user and assistant in turn",
                param=where,
            )
    if len(turns) % 2 == 0:
        raise ApiError("the last message is the user's", param="messages")
    if system:
        first = {"role": "user", "content": "\n\n".join([*system, turns[0]["content"]])}
        turns = [first, *turns[1:]]
    return turns


def text_of(content: Any, where: str) -> str:
    """The text of a message: a string, or a list of parts of type "text"."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [
        p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(f"{where} has content that is not text", param=where)
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(f"{where} is not valid Unicode (a lone surrogate)", param=where) from None
    return text


class UntilStop:
    """Passes text on up to the first of some strings, which itself is left out."""

    def __init__(self, stops: list[str]):
        self.stops, self.pending, self.stopped = stops, "", False

    def push(self, piece: str, final: bool = False) -> str:
        """The text that is certain after `piece`; what may begin a stop string is held back."""
        self.pending += piece
        found = [self.pending.find(stop) for stop in self.stops]
        found = [at for at in found if at >= 0]
        if found:
            self.stopped, self.pending = True, self.pending[: min(found)]
            final = True
        held = 0
        if not final:
            ends = range(1, max(map(len, self.stops), default=1))
            held = max(
                (n for n in ends if any(s.startswith(self.pending[-n:]) for s in self.stops)),
                default=0,
            )
            held = min(held, len(self.pending))
        text = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(self.pending) - held :]
        return text
