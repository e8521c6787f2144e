"""Web interface of inference.py: a gradio chat page, on this machine only.

    pip install -r requirements/web.txt
    python inference.py --web

Nothing leaves the machine: no analytics, no sharing, no saved runs, and the page may load nothing
from other hosts, not even an image that an answer names.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from common.errors import UserError
from generation.conversation import Lille, Message

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


def build(model: Lille, options: dict[str, Any]):
    """The page as a gradio ChatInterface.

    The conversation is the one that the browser shows, so each browser has its own, and gradio's
    buttons to retry, undo and clear work. Gradio removes the indentation of questions in it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # some of it is read at import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio as gr
    except ImportError:
        message = "the chat page needs gradio: pip install -r requirements/web.txt"
        raise UserError(message) from None

    def check(message: str):
        """Keeps a message that cannot be answered in the text box."""
        try:
            model.session().stream(message, **options)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(True, "")

    def reply(message: str, shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        session = model.session()
        session.notify = gr.Info
        session.history = complete_turns(shown)
        answer = ""
        try:
            for piece in session.stream(message, **options):
                answer += piece
                content = [{"type": "text", "text": answer}]  # a plain string would be unindented
                yield {"role": "assistant", "content": content}
        except RuntimeError as error:  # raised, it would leave the text box locked
            gr.Warning(str(error))
            return
        if session.report.stopped != "end":
            gr.Info("The answer was cut: it reached the limit of tokens or of the context.")

    return gr.ChatInterface(
        reply,
        title="Lille",
        chatbot=gr.Chatbot(label="Lille", height="65vh", buttons=["copy"]),
        validator=check,
        api_visibility="private",
    )


def complete_turns(shown: list[dict[str, Any]]) -> list[Message]:
    """The history in gradio's messages, without questions that have no answer."""
    messages = [
        {
            "role": message["role"],
            "content": "".join(part.get("text", "") for part in message["content"]),
        }
        for message in shown
    ]
    history = []
    for question, answer in pairwise(messages):
        if (question["role"], answer["role"]) == ("user", "assistant"):
            history += [question, answer]
    return history


def serve(model: Lille, options: dict[str, Any], port: int) -> None:
    """Serves the page until Ctrl-C; `port` 0 takes the first free one from 7860."""
    page = build(model, options)
    try:
        page.launch(server_port=port or None, **LAUNCH)
    except (OSError, OverflowError):
        raise UserError(f"the chat page cannot use port {port}: try another --port") from None
    print(f"Chat at {page.local_url} (on this machine only; Ctrl-C ends it)", flush=True)
    page.block_thread()
