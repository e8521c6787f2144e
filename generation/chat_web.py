"""The browser side of inference.py: gradio's chat page, on this machine only.

    pip install -r requirements/web.txt
    python inference.py --web

Nothing is told to anybody else: no analytics, no sharing, and the page may load nothing from other
hosts, not even an image that an answer names.
"""

import inspect
import os
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from common.errors import UserError

ADDRESS = "127.0.0.1"  # not reachable from other machines
# The browser refuses to load anything from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LAUNCH = {
    "ssr_mode": False,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "head": f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
}


def require_gradio() -> None:
    if find_spec("gradio") is None:
        raise UserError("the chat page needs gradio: pip install -r requirements/web.txt")


def build(model: Any, options: dict[str, Any]):
    """The page as a gradio ChatInterface over a `Lille`; each browser has its own conversation.

    The conversation is the one that the browser shows, so gradio's buttons to retry, undo and clear
    work. What a user wrote is shown without its indentation: `exact`, per browser, remembers it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also of the parts that ask it at import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    one_at_a_time = threading.Lock()  # the model has one cache

    def check(message: str):
        """Before a message leaves the text box: what cannot be answered stays in it."""
        try:
            model.session().stream(message)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(True, "")

    def reply(
        message: str,
        shown: list[dict[str, Any]],
        exact: dict[str, str],
        max_new_tokens: float,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        session = model.session()
        session.notify = gr.Info
        session.history = complete_turns(shown, exact)
        settings = {"temperature": temperature, "top_p": top_p, "top_k": options["top_k"]}
        exact = exact | {inspect.cleandoc(message): message}
        said = ""
        try:
            pieces = session.stream(message, max_new_tokens=int(max_new_tokens), **settings)
            while True:
                with one_at_a_time:
                    piece = next(pieces, None)
                if piece is None:
                    break
                said += piece
                content = [{"type": "text", "text": said}]
                yield {"role": "assistant", "content": content}, exact
        except (RuntimeError, ValueError) as error:  # raised, it would leave the text box locked
            gr.Warning(str(error))
            return
        if not said:
            gr.Info("The model gave no answer.")
        elif session.report.stopped in ("max_new_tokens", "context"):
            gr.Info("The answer was cut: it reached the limit of tokens or of the context.")

    exact = gr.State({})
    longest = model.backend.block_size
    tokens = min(options["max_new_tokens"], longest)
    settings = [
        gr.Slider(1, longest, tokens, step=1, label="Tokens at most"),
        gr.Slider(
            0, 2, min(options["temperature"], 2), label="Temperature (0: the likeliest token)"
        ),
        gr.Slider(0.05, 1, max(options["top_p"], 0.05), label="Top p"),
    ]
    return gr.ChatInterface(
        reply,
        chatbot=gr.Chatbot(
            label="Lille", height="65vh", buttons=["copy"], allow_tags=True, reasoning_tags=[]
        ),
        additional_inputs=[exact, *settings],
        additional_outputs=[exact],
        validator=check,
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        title="Lille",
        flagging_mode="never",
        analytics_enabled=False,
        api_visibility="private",
        concurrency_limit=1,
    )


def complete_turns(shown: list[dict[str, Any]], exact: dict[str, str]) -> list[dict[str, str]]:
    """The history in gradio's messages: questions without an answer are left out."""
    texts = [(message["role"], text_of(message["content"])) for message in shown]
    history = []
    for (role, question), (next_role, answer) in zip(texts, texts[1:], strict=False):
        if (role, next_role) == ("user", "assistant"):
            history.append({"role": "user", "content": exact.get(question, question)})
            history.append({"role": "assistant", "content": answer})
    return history


def text_of(content: Any) -> str:
    """The text of a gradio message: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def serve(model: Any, options: dict[str, Any], port: int) -> None:
    """Shows the page until Ctrl-C; `port` 0 takes the first free one from 7860."""
    page = build(model, options)
    try:
        page.launch(
            server_name=ADDRESS,
            server_port=port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            **LAUNCH,
        )
    except (OSError, OverflowError):
        raise UserError(f"the chat page cannot use port {port}: try another --port") from None
    print(f"Chat at {page.local_url} (on this machine only; Ctrl-C ends it)", flush=True)
    page.block_thread()
