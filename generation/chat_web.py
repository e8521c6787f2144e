"""Web interface of inference.py: a gradio chat page, on this machine only.

    pip install -r requirements/web.txt
    python inference.py --web

Nothing leaves the machine: no analytics, no sharing, no saved runs, and the page may load nothing
from other hosts, not even an image that an answer names. Pages of other sites, which a browser lets
send requests to this machine, are refused, and so are uploads.
"""

import inspect
import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from common.errors import UserError
from generation.conversation import Lille, Message
from generation.guard import guarded

# The browser refuses to load anything from other hosts.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LAUNCH = {
    "server_name": "127.0.0.1",  # not reachable from other machines
    "share": False,
    "run_history": False,
    "enable_monitoring": False,
    "footer_links": [],
    "head": f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    "quiet": True,
    "prevent_thread_lock": True,
}


def require_gradio() -> None:
    if find_spec("gradio") is None:
        raise UserError("the chat page needs gradio: pip install -r requirements/web.txt")


def build(model: Lille, options: dict[str, Any]):
    """The page as a gradio ChatInterface; each browser has its own conversation.

    The conversation is the one that the browser shows, so gradio's buttons to retry, undo and clear
    work. Gradio removes the indentation of questions: `originals`, per browser, maps the questions
    shown to the questions asked.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # some of it is read at import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    def check(message: str):
        """Keeps a message that cannot be answered in the text box."""
        try:
            model.session().stream(message)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(True, "")

    def reply(
        message: str,
        shown: list[dict[str, Any]],
        originals: dict[str, str],
        max_new_tokens: float,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        session = model.session()
        session.notify = gr.Info
        session.history = complete_turns(shown, originals)
        originals = originals | {inspect.cleandoc(message): message}
        answer = ""
        try:
            for piece in session.stream(
                message,
                max_new_tokens=int(max_new_tokens),
                temperature=temperature,
                top_p=top_p,
                top_k=options["top_k"],
            ):
                answer += piece
                content = [{"type": "text", "text": answer}]  # a plain string would be unindented
                yield {"role": "assistant", "content": content}, originals
        except (RuntimeError, ValueError) as error:  # raised, it would leave the text box locked
            gr.Warning(str(error))
            return
        if not answer:
            gr.Info("The model gave no answer.")
        elif session.report.stopped != "end":
            gr.Info("The answer was cut: it reached the limit of tokens or of the context.")

    originals = gr.State({})
    block_size = model.backend.block_size
    tokens = min(options["max_new_tokens"], block_size)
    temperature, top_p = min(options["temperature"], 2), max(options["top_p"], 0.05)
    sliders = [
        gr.Slider(1, block_size, tokens, step=1, label="Tokens at most"),
        gr.Slider(0, 2, temperature, label="Temperature (0: the likeliest token)"),
        gr.Slider(0.05, 1, top_p, label="Top p"),
    ]
    return gr.ChatInterface(
        reply,
        title="Lille",
        chatbot=gr.Chatbot(label="Lille", height="65vh", buttons=["copy"]),
        additional_inputs=[originals, *sliders],
        additional_outputs=[originals],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        validator=check,
        api_visibility="private",
    )


def complete_turns(shown: list[dict[str, Any]], originals: dict[str, str]) -> list[Message]:
    """The history in gradio's messages, without questions that have no answer."""
    texts = [
        (message["role"], "".join(part.get("text", "") for part in message["content"]))
        for message in shown
    ]
    history = []
    for (role, question), (next_role, answer) in pairwise(texts):
        if (role, next_role) == ("user", "assistant"):
            history.append({"role": "user", "content": originals.get(question, question)})
            history.append({"role": "assistant", "content": answer})
    return history


def launch(page: Any, port: int = 0) -> None:
    """Serves the page in a thread; `port` 0 takes the first free one from 7860."""
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse

    guard = {"middleware": [Middleware(guarded, lambda reason: PlainTextResponse(reason, 403))]}
    page.launch(server_port=port or None, app_kwargs=guard, **LAUNCH)


def serve(model: Lille, options: dict[str, Any], port: int) -> None:
    """Serves the page until Ctrl-C."""
    page = build(model, options)
    try:
        launch(page, port)
    except (OSError, OverflowError):
        raise UserError(f"the chat page cannot use port {port}: try another --port") from None
    print(f"Chat at {page.local_url} (on this machine only; Ctrl-C ends it)", flush=True)
    page.block_thread()
