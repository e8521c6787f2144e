"""The chat page in a real browser, headless.

    pip install -r requirements/web.txt playwright

It also takes a Chromium, such as Debian's package; without one of these the tests are skipped.
"""

import contextlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_inference import ROOT, TOKENIZER, Scripted, saved, small_gpt, turns

from common.errors import UserError
from generation import chat_web, guard
from generation.conversation import Lille

OPTIONS = {"max_new_tokens": 500, "temperature": 0.5, "top_p": 0.95, "top_k": None}
ANSWER = "One two 東京 🚀 three:\n\n    four five."


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chat_web, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements/web.txt$") as error:
        chat_web.require_gradio()
    assert "\n" not in str(error.value)


def test_history_is_the_turns_that_have_an_answer():
    def shown(*texts):
        return [
            {"role": role, "content": [{"type": "text", "text": text}], "metadata": None}
            for role, text in texts
        ]

    user, bot = "user", "assistant"
    messages = shown(
        (user, "lost"), (user, "a"), (bot, "b"), (user, "f:\nx"), (bot, "d"), (user, "?")
    )
    history = chat_web.complete_turns(messages, {"f:\nx": "f:\n    x"})
    assert history == turns("a", "b", "f:\n    x", "d")
    assert chat_web.complete_turns([], {}) == []


def test_refusal():
    def refusal(**headers: str) -> str:
        pairs = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
        return guard.refusal({"type": "http", "headers": pairs})

    json_type = {"content_type": "application/json"}
    for host in ("127.0.0.1:7860", "localhost", "[::1]:1", "LocalHost:80"):
        assert refusal(host=host, **json_type) == refusal(host=host, origin=f"http://{host}") == ""
        for origin in ("null", "", "http://evil.example", f"https://{host}", f"http://{host}0"):
            assert "other pages" in refusal(host=host, origin=origin)
        assert "upload" in refusal(host=host, content_type="Multipart/form-data; boundary=b")
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil",
        "127.0.0.1\n",
        "",
        "[",
    ):
        assert "localhost only" in refusal(host=host, origin=f"http://{host}")
    assert "localhost only" in refusal()
    two = {"type": "http", "headers": [(b"host", b"evil.example"), (b"host", b"localhost")]}
    assert guard.refusal(two) == "a request has one host"


class Slow(Scripted):
    """Takes its time, so that an answer can be seen to grow."""

    pause = 0.03

    def logits(self, ids):
        time.sleep(self.pause)
        return super().logits(ids)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="needs requirements/web.txt")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served():
    """(address, the backend of the page)."""
    pytest.importorskip("gradio", reason="needs requirements/web.txt")
    backend = Slow(TOKENIZER.encode(ANSWER))
    backend.block_size = 256
    page = chat_web.build(Lille(backend, TOKENIZER, seed=0), OPTIONS)
    chat_web.launch(page)
    yield page.local_url, backend
    page.close(verbose=False)


class Visitor:
    """One browser with its own cookies and storage, at the page."""

    def __init__(self, browser, address: str):
        self.context = browser.new_context(viewport={"width": 1000, "height": 800})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.box = self.page.get_by_role("textbox").first
        self.box.wait_for()

    def send(self, text: str) -> None:
        self.page.wait_for_function("() => !document.querySelector('textarea').disabled")
        self.box.fill(text)
        self.box.press("Enter")

    def bubbles(self, role: str) -> list[str]:
        return self.page.locator(f".{role}.message").all_inner_texts()

    def wait_for(self, condition, seconds: float = 30):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.bubbles("user"), self.bubbles("bot"))
            self.page.wait_for_timeout(20)

    def ask(self, text: str) -> str:
        """Sends a message and waits for the whole answer."""
        before = len(self.bubbles("bot"))
        self.send(text)
        self.wait_for(lambda: len(self.bubbles("bot")) > before)
        self.wait_for(lambda: "five." in self.bubbles("bot")[-1])
        self.page.wait_for_function("() => !document.querySelector('textarea').disabled")
        return self.bubbles("bot")[-1]


@pytest.fixture
def visitor(browser, served):
    guest = Visitor(browser, served[0])
    yield guest
    guest.context.close()


def prompt(*texts: str) -> list[int]:
    return TOKENIZER.encode_chat(turns(*texts), add_generation_prompt=True)


def test_an_answer_grows_and_the_conversation_goes_on(visitor, served):
    backend, seen = served[1], []
    visitor.send("First <|assistant|> question")
    visitor.wait_for(
        lambda: seen.append("".join(visitor.bubbles("bot")[-1:])) or "five." in seen[-1]
    )
    grown = [text for i, text in enumerate(seen) if text and text not in seen[:i]]
    assert len(grown) > 4 and "\ufffd" not in "".join(seen)
    assert {"One", "One two"} <= set(grown) and "東京 🚀 three:" in grown[-1]
    assert "First <|assistant|> question" in visitor.bubbles("user")[0]
    assert backend.prompts[-1] == prompt("First <|assistant|> question")
    code = "def f():\n    return 1"  # gradio would forget the indentation
    visitor.ask(code)
    assert backend.prompts[-1] == prompt("First <|assistant|> question", ANSWER, code)
    visitor.ask("Third")
    expected = ["First <|assistant|> question", ANSWER, code, ANSWER, "Third"]
    assert backend.prompts[-1] == prompt(*expected)
    visitor.page.get_by_label("Clear").first.click()
    visitor.wait_for(lambda: not visitor.bubbles("user"))
    visitor.ask("Anew")
    assert backend.prompts[-1] == prompt("Anew")
    hosts = {url.split("/")[2].split(":")[0] for url in visitor.requests if url.startswith("http")}
    assert hosts == {"127.0.0.1"}  # nothing is loaded from, or told to, anybody else


def test_a_text_cannot_make_the_browser_load_anything(visitor):
    """Answers and questions are shown as Markdown, which can name images on any host."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        visitor.ask(f'![x]({address}/markdown.png) <img src="{address}/html.png">')
        visitor.wait_for(lambda: visitor.page.locator(".user.message img").count() == 2)
        visitor.page.wait_for_timeout(500)
        assert asked == []
        assert urllib.request.urlopen(visitor.page.url, timeout=30).status == 200
        with pytest.raises(urllib.error.HTTPError):  # the server would have answered
            urllib.request.urlopen(f"{address}/test", timeout=30)
        server.shutdown()
    assert asked == ["/test"]


def test_every_browser_has_its_own_conversation(browser, served, visitor):
    address, backend = served
    other = Visitor(browser, address)
    visitor.ask("Mine")
    other.ask("Yours")
    assert backend.prompts[-1] == prompt("Yours")
    visitor.ask("Mine again")
    assert backend.prompts[-1] == prompt("Mine", ANSWER, "Mine again")
    other.ask("Yours again")
    assert backend.prompts[-1] == prompt("Yours", ANSWER, "Yours again")
    assert "Yours" not in visitor.page.content() and "Mine" not in other.page.content()
    other.context.close()


def test_a_message_that_is_too_long_stays_in_the_box(visitor, served):
    backend = served[1]
    visitor.ask("Short")
    asked, long = len(backend.prompts), "word " * 200
    visitor.send(long)
    visitor.page.get_by_text("the context has room for 192 beside the answer").wait_for()
    assert visitor.box.input_value() == long and len(backend.prompts) == asked
    visitor.ask("Then")
    assert backend.prompts[-1] == prompt("Short", ANSWER, "Then")


def test_dropped_turns_are_shown(visitor, served):
    long = "word " * 120
    visitor.ask(long)
    visitor.send("Next " * 60)
    visitor.page.get_by_text("no longer fits 256 tokens; oldest turns dropped: 1").wait_for()
    deadline = time.monotonic() + 20  # the notice comes before the first token is computed
    while served[1].prompts[-1] != prompt("Next " * 60):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stop_keeps_what_was_said(visitor, served, monkeypatch):
    backend = served[1]
    monkeypatch.setattr(backend, "pause", 0.3)
    visitor.send("Count")
    visitor.wait_for(lambda: "One two" in "".join(visitor.bubbles("bot")))
    visitor.page.locator("button.stop-button").click()
    visitor.page.wait_for_function("() => !document.querySelector('textarea').disabled")
    monkeypatch.setattr(backend, "pause", 0.0)
    visitor.ask("Then?")
    (partial,) = [m for m in visitor.bubbles("bot") if "five." not in m]
    said = backend.prompts[-1][len(prompt("Count")) :]
    said = TOKENIZER.decode(said[: said.index(TOKENIZER.eos_id)])
    assert (
        ANSWER.startswith(said) and said.startswith("One two") and said.split() == partial.split()
    )


def test_a_backend_that_fails_does_not_lock_the_page(visitor, served, monkeypatch):
    def fails(ids):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(served[1], "logits", fails)
        visitor.send("Lost")
        visitor.page.get_by_text("out of memory, say").first.wait_for()
        visitor.page.wait_for_function("() => !document.querySelector('textarea').disabled")
    visitor.ask("Once more")
    assert served[1].prompts[-1] == prompt("Once more")


def status(address: str, path: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status of a request and the origin that may read the answer; names in `headers` with _."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers["Access-Control-Allow-Origin"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Access-Control-Allow-Origin"]


def test_requests_of_other_sites_and_uploads_are_refused(served):
    address, backend = served
    port, asked = address.rstrip("/").rpartition(":")[2], len(backend.prompts)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\nx\r\n--b--\r\n'
    )
    upload = {"Content_Type": "multipart/form-data; boundary=b"}
    requests = [("/", None, {}), ("/config", None, {}), ("/gradio_api/info", None, {})]
    requests += [("/gradio_api/queue/join", b"{}", {"Content_Type": "application/json"})]
    evil = f"evil.example:{port}"
    for path, data, headers in requests:
        own = status(address, path, data, **headers)[0]
        assert own != 403
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", "[::1]"):
            assert status(address, path, data, Host=host, **headers)[0] == own
            origin = {"Host": host, "Origin": f"http://{host}"}
            assert status(address, path, data, **origin, **headers)[0] == own
        for host in (evil, "evil.example", "127.0.0.1.evil.example", "", "localhost@evil", "[::1"):
            assert status(address, path, data, Host=host, **headers)[0] in (400, 403)
        assert status(address, path, data, Host=evil, Origin=f"http://{evil}", **headers)[0] == 403
        others = ("http://evil.example", "null", "http://localhost:1", f"https://127.0.0.1:{port}")
        for origin in others:
            assert status(address, path, data, Origin=origin, **headers)[0] == 403
        assert status(address, path, data, Origin=others[0], **headers)[1] is None
    for path in ("/gradio_api/upload", "/gradio_api/component_server", "/upload"):
        for origin in ({}, {"Origin": address.rstrip("/")}, {"Origin": "http://evil.example"}):
            assert status(address, path, form, **upload, **origin)[0] == 403
    assert len(backend.prompts) == asked


def test_the_command_serves_this_machine_only(tmp_path):
    pytest.importorskip("gradio", reason="needs requirements/web.txt")
    model = saved(small_gpt(n_layers=1), tmp_path / "model.pt")
    command = [sys.executable, str(ROOT / "inference.py"), "--web", f"--model={model}"]
    process = subprocess.Popen(
        [*command, "--device=cpu"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as page:
            assert page.status == 200 and b"gradio" in page.read()
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)} - {
            "127.0.0.1"
        }
        for address in {*others, "127.0.0.2"}:
            with contextlib.closing(socket.socket()) as connection:
                if "." in address:
                    assert connection.connect_ex((address, port)) != 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model.pt"]
