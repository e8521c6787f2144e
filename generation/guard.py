"""Refuses requests that pages of other sites send to a server on this machine."""

import re
from collections.abc import Callable
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def refusal(scope: dict[str, Any], loopback: bool = True) -> str:
    """Why the ASGI request is refused; empty if it is not.

    The host name is checked, where the server is at `loopback`, since another site can point its
    own one to 127.0.0.1 and then read the answers (DNS rebinding); the origin since it can send
    requests without reading the answers.
    """
    pairs = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]]
    headers = dict(pairs)
    host, origin = headers.get("host", ""), headers.get("origin")
    if [key for key, _ in pairs].count("host") > 1:
        return "a request has one host"
    if loopback and not re.fullmatch(
        r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", host, re.IGNORECASE
    ):
        return "this server is at 127.0.0.1 and localhost only"
    if origin is not None and origin not in (
        f"http://{host}",
        *([] if loopback else [f"https://{host}"]),
    ):
        return "requests of other pages are refused"
    if headers.get("content-type", "").lower().startswith("multipart/"):
        return "there is nothing to upload here"
    return ""


def guarded(app: Callable, answer: Callable[[str], Callable], loopback: bool = True) -> Callable:
    """ASGI middleware that gives the requests with a `refusal` the response `answer(reason)`."""

    async def guard(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        reason = scope["type"] != "lifespan" and refusal(scope, loopback)
        await (answer(reason) if reason else app)(scope, receive, send)

    return guard
