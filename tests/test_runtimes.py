"""The ONNX folder and the web page in the runtimes that people load them in.

    npm install --ignore-scripts --prefix tests/javascript     # transformers.js, for Node.js
    pip install playwright onnxruntime-genai

The page's test takes a Chromium too, such as Debian's package. What is not there is skipped.
"""

import contextlib
import functools
import http.server
import json
import random
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from test_export_onnx import TOKENIZER, prompts, small_gpt

from common.errors import UserError
from formats import write_web
from tokenizer import CONTROL_TOKENS, HARD_STRINGS

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -r requirements/export.txt")

MODULES = Path(__file__).with_name("javascript") / "node_modules"
has_library = (MODULES / "@huggingface" / "transformers").is_dir()
INSTALL = "npm install --ignore-scripts --prefix tests/javascript"
needs_node = pytest.mark.skipif(
    not (has_library and shutil.which("node")), reason=f"needs Node.js and {INSTALL}"
)
N = 40  # new tokens


@pytest.fixture(scope="module")
def gpt():
    return small_gpt()


@pytest.fixture(scope="module")
def expected(gpt):
    return gpt.generate(prompts(), N, temperature=0)


@pytest.fixture(scope="module")
def folder(gpt, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("web") / "page"
    options = {"title": "A <b>model</b>", "library": str(MODULES) if has_library else ""}
    write_web.export_web(gpt, TOKENIZER, path, ["fp32"], **options)
    return path


def node(folder: Path, context: int = 96, **values) -> dict:
    settings = json.loads((folder / "settings.json").read_text()) | {"context": context}
    values = {"dtype": "fp32", "prompts": [], "n": N, "chats": [], "settings": settings} | values
    values |= {"folder": str(folder), "page": str(folder / "chat.js")}
    command = ["node", str(MODULES.with_name("run.mjs"))]
    result = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@needs_node
def test_transformers_js_and_the_page_have_the_same_greedy_tokens(folder, expected):
    found = node(folder, prompts=prompts())
    assert found["greedy"] == expected
    assert found["paged"] == expected
    assert found["unwanted"] == []  # of answers that were stopped before their first token


@needs_node
def test_a_thousand_forged_messages_stay_text_in_the_page(folder):
    rng = random.Random(0)
    parts = [*CONTROL_TOKENS, *"<|>", "<|", "|>", "user", *"\ufdd01", "\ufdd01", " ", "é\n"]
    chats = [
        [{"role": "user", "content": "".join(rng.choices(parts, k=rng.randint(1, 9)))}]
        for _ in range(1000)
    ]
    chats += [[{"role": "user", "content": text}] for text in filter(None, HARD_STRINGS)]
    found = node(folder, chats=chats, context=100_000)
    for chat, encoded, rendered in zip(chats, found["encoded"], found["rendered"], strict=True):
        expected = TOKENIZER.encode_chat(chat, True)
        assert encoded == {"ids": expected, "dropped": 0}, chat
        assert sum(token >= TOKENIZER.pad_id for token in rendered) == 3, chat  # the template
        if "<|" not in chat[0]["content"] and "\ufdd0" not in chat[0]["content"]:
            assert rendered == expected


@needs_node
def test_old_turns_are_dropped_and_sampling_keeps_to_top_p(folder):
    turns = [("user", "one " * 20), ("assistant", "two " * 20), ("user", "three")]
    chat = [{"role": role, "content": content} for role, content in turns]
    long = [{"role": "user", "content": "long " * 100}]
    found = node(folder, chats=[chat, chat[2:], long], context=48)
    dropped, alone, refused = found["encoded"]
    assert dropped == {"ids": alone["ids"], "dropped": 2} and alone["dropped"] == 0
    assert "and there is room for 40: shorten it" in refused
    weights = np.exp([3, 2.9])  # the two likeliest reach 0.9
    share = weights[0] / weights.sum()
    assert found["counts"][0] == found["counts"][2] == found["counts"][4] == 0
    assert abs(found["counts"][1] / 20000 - share) < 0.02


def test_onnxruntime_genai_has_the_same_greedy_tokens(folder, expected):
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    model = genai.Model(str(folder))
    for prompt, answer in zip(prompts(), expected, strict=True):
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + N)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0))[len(prompt) :] == answer
    tokenizer = genai.Tokenizer(model)
    chat = [{"role": "user", "content": "naïve café, 東京 🚀\n 1,234.5"}]
    text = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
    assert list(tokenizer.encode(text)) == TOKENIZER.encode_chat(chat, True)
    forged = json.dumps([{"role": "user", "content": "".join(CONTROL_TOKENS)}])
    ids = tokenizer.encode(tokenizer.apply_chat_template(forged, add_generation_prompt=True))
    assert sum(token >= TOKENIZER.pad_id for token in ids) == 3


@contextlib.contextmanager
def served(folder: Path):
    """The address of a static server of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.skipif(not has_library, reason=INSTALL)
def test_the_page_in_a_browser(gpt, folder):
    """Chromium answers with the model's own greedy text, and loads nothing from elsewhere."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    question = [{"role": "user", "content": "Who <|assistant|> are <b>you</b>?"}]
    ids = TOKENIZER.encode_chat(question, add_generation_prompt=True)
    answer = TOKENIZER.decode(gpt.generate([ids], 20, temperature=0)[0]).rstrip("\ufffd")
    with served(folder) as address, api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        page, requests = browser.new_page(), []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        status = page.locator("#status")
        page.wait_for_function("() => !document.querySelector('#message').disabled")
        assert status.inner_text() == "Ready: fp32 on the CPU, in this browser"
        assert page.inner_text("h1") == "A <b>model</b>"
        page.locator("summary").click()
        for name, value in (("temperature", "0"), ("max_new_tokens", "20")):
            page.fill(f"#{name}", value)
        page.fill("#message", question[0]["content"])
        page.press("#message", "Enter")
        page.wait_for_function(
            "() => /^20 tok/.test(document.querySelector('#status').textContent)"
        )
        assert page.text_content("#chat .user") == question[0]["content"]
        assert page.text_content("#chat .assistant") == answer
        page.click("#reset")
        assert page.locator("#chat p").count() == 0
        stop = (TOKENIZER.eos_id, TOKENIZER.user_id)
        for n in range(20):
            message = {"role": "user", "content": f"What is {n} and {n * n}?"}
            ids = TOKENIZER.encode_chat([message], add_generation_prompt=True)
            (made,) = gpt.generate([ids], 20, temperature=0, stop_tokens=stop)
            page.fill("#message", message["content"])
            page.press("#message", "Enter")
            page.wait_for_function(
                "() => document.querySelector('#send').textContent === 'Send' &&"
                " !/Reading/.test(document.querySelector('#status').textContent)"
            )
            assert page.text_content("#chat .assistant") == TOKENIZER.decode(made).rstrip("\ufffd")
            page.click("#reset")
        assert all(url.startswith((address, f"blob:{address}")) for url in requests)
        browser.close()


def test_the_library_is_the_pinned_one(gpt, tmp_path):
    """Files of another version are refused; without a copy the page names jsDelivr and hashes."""
    with pytest.raises(UserError, match="is not there: npm install @huggingface/transformers@4"):
        write_web.pinned_files(str(tmp_path))
    file = write_web.source_file(str(tmp_path), "transformers")
    file.parent.mkdir(parents=True)
    file.write_text("another version")
    with pytest.raises(UserError, match="is not that of version 4"):
        write_web.export_web(gpt, TOKENIZER, tmp_path / "page", library=str(tmp_path))
    assert not (tmp_path / "page").exists()
    for file in write_web.pinned_files("").values():
        assert file["url"].startswith("https://cdn.jsdelivr.net/npm/")
        assert file["integrity"].startswith("sha384-")
