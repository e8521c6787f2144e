"""The server, driven over real sockets by OpenAI's client and by plain HTTP.

pip install -r requirements/web.txt -r requirements/eval.txt
"""

import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.errors import UserError
from generation import server as server_module
from generation.batching import BatchedDecoder, Request
from generation.conversation import Sampling
from generation.fast_decode import Decoder
from generation.openai_requests import ApiError, UntilStop, messages_of
from generation.server import Server
from model import GPT, GPTConfig
from ops.kv_cache import KVCache
from tokenizer import CONTROL_TOKENS, load_tokenizer

TOKENIZER = load_tokenizer()
OPTIONS = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 0.95, "top_k": None}
KEY = "sk-secret"


def small_gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=64, n_layers=2, n_heads=4, n_kv_heads=2, block_size=96)).eval()
    for parameter in gpt.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    return gpt


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return small_gpt()


@pytest.fixture(scope="module")
def decoder(gpt):
    decoder = BatchedDecoder(gpt)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def address(decoder):
    """(host, port) of a running server that has a key."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs requirements/web.txt")
    pytest.importorskip("starlette", reason="needs requirements/web.txt")
    app = Server(decoder, TOKENIZER, "lille", OPTIONS, KEY).app()
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()
    running.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def client(address):
    openai = pytest.importorskip("openai", reason="needs requirements/eval.txt")
    url = f"http://127.0.0.1:{address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def alone(gpt: GPT, ids: list[int], n: int) -> list[int]:
    """The greedy answer to a prompt by itself, with the token that ends it."""
    ids = gpt.generate([ids], n, temperature=0)[0]
    stops = (TOKENIZER.eos_id, TOKENIZER.user_id)
    return ids[: next((i for i, token in enumerate(ids) if token in stops), n)]


def text(ids: list[int]) -> str:
    """Without a character that is cut at the end, which the server does not send."""
    pieces = TOKENIZER.decode_bytes(t for t in ids if t < TOKENIZER.pad_id)
    return pieces.decode(errors="replace").rstrip("\ufffd")


def post(address, body, path="/v1/chat/completions", **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", address[1], timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}"} | {k.title(): v for k, v in headers.items()}
    connection.request("POST", path, content, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_rows_do_not_depend_on_each_other(gpt):
    """Bitwise: the logits of a row in a batch of any size are those of the row alone."""
    step, rng = Decoder(gpt), random.Random(0)
    rows = [[rng.randrange(TOKENIZER.pad_id) for _ in range(3 + 9 * i)] for i in range(8)]
    caches = []
    for ids in rows:
        cache = KVCache.empty(gpt.config, 1, like=gpt.lm_head.weight.detach())
        with torch.inference_mode():
            gpt.hidden(torch.tensor([ids[:-1]]), cache=cache)
        cache.lengths += len(ids) - 1
        caches.append(cache)
    for size in (2, 3, 8):
        cache = KVCache(
            torch.cat([c.keys for c in caches[:size]], dim=1),
            torch.cat([c.values for c in caches[:size]], dim=1),
            torch.cat([c.lengths for c in caches[:size]]),
        )
        together = step(torch.tensor([ids[-1] for ids in rows[:size]]), cache)
        for i in range(size):
            assert torch.equal(together[i : i + 1], step(torch.tensor(rows[i][-1:]), caches[i]))


def test_answers_that_are_decoded_together_are_those_of_each_alone(gpt, decoder):
    """Forty prompts that arrive at random moments, in eight rows; some are given up."""
    rng = random.Random(1)
    prompts = [
        [rng.randrange(TOKENIZER.pad_id) for _ in range(rng.randint(1, 90))] for _ in range(40)
    ]
    answers = [[] for _ in prompts]
    requests = []
    for ids, answer in zip(prompts, answers, strict=True):
        sampling = Sampling(rng.randint(1, 30), temperature=0)
        requests.append(Request(ids, sampling, 0, answer.append))
        decoder.submit(requests[-1])
        if rng.random() < 0.3:
            time.sleep(0.01)
        if rng.random() < 0.1:
            requests[-1].cancelled = True
    wait_for(lambda: not decoder.active and not decoder.waiting)
    finished = 0
    for request, answer in zip(requests, answers, strict=True):
        n = min(request.sampling.max_new_tokens, 97 - len(request.ids))
        expected = gpt.generate([request.ids], n, temperature=0)[0]
        if request.cancelled:
            assert answer == [] or answer[:-1] == expected[: len(answer) - 1]
        else:
            assert answer == [*expected, "length"]
            finished += 1
    assert finished > 30


def test_sampled_answers_follow_their_seed(decoder):
    def answer(seed: int) -> list:
        items = []
        decoder.submit(Request([1, 2, 3], Sampling(20, temperature=1.0), seed, items.append))
        wait_for(lambda: items and isinstance(items[-1], str))
        return items

    assert answer(1) == answer(1) != answer(2)


def test_a_prompt_that_fails_ends_no_other_answer(gpt):
    decoder, items, bad = BatchedDecoder(gpt), [], []
    decoder.submit(Request([1, 2], Sampling(60, temperature=0), 0, items.append))
    wait_for(lambda: len(items) > 3)
    decoder.submit(Request([1 << 20], Sampling(60, temperature=0), 0, bad.append))
    wait_for(lambda: bad and items[-1] == "length")
    assert isinstance(bad[0], IndexError) and len(items) == 61
    decoder.close()


def test_requests_are_decoded_together_and_given_up_ones_leave(gpt):
    """Steps are held until all have come: one row would take eight times as many."""
    decoder, answers, sizes = BatchedDecoder(gpt), [[] for _ in range(12)], []
    step, gate = decoder.step, threading.Semaphore(0)

    def held(tokens, cache):
        gate.acquire()
        sizes.append(len(tokens))
        return step(tokens, cache)

    decoder.step = held
    requests = [Request([1, 2], Sampling(9, temperature=0), 0, a.append) for a in answers]
    for request in requests:
        decoder.submit(request)
    for _ in range(2):
        gate.release()
    wait_for(lambda: len(sizes) == 2 and len(decoder.waiting) == 4)
    assert sizes[1] == 8
    for request in requests[3:]:
        request.cancelled = True
    for _ in range(99):
        gate.release()
    wait_for(lambda: not decoder.active and not decoder.waiting)
    assert set(sizes[4:]) == {3} and len(sizes) <= 10  # neither rows nor waiting ones are computed
    assert all(answer[-1] == "length" for answer in answers[:3])
    assert all("length" not in answer for answer in answers[3:])
    decoder.close()


def test_a_failure_is_told_and_the_next_request_works(gpt, monkeypatch):
    decoder, items = BatchedDecoder(gpt), []
    step = decoder.step
    decoder.step = lambda *_: 1 / 0
    decoder.submit(Request([1, 2], Sampling(5, temperature=0), 0, items.append))
    wait_for(lambda: items and isinstance(items[-1], Exception))
    decoder.step = step
    decoder.submit(Request([1, 2], Sampling(5, temperature=0), 0, items.append))
    wait_for(lambda: items[-1] == "length")
    with pytest.raises(ValueError, match="takes 1 to 96"):
        decoder.submit(Request([], Sampling(), 0, items.append))
    decoder.close()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_client_gets_the_models_answer(gpt, client):
    ids = TOKENIZER.encode_chat(user("Who are you?"), add_generation_prompt=True)
    expected = alone(gpt, ids, 24)
    answer = client.chat.completions.create(model="lille", messages=user("Who are you?"))
    assert answer.choices[0].message.content.rstrip("\ufffd") == text(expected)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 24 and answer.choices[0].finish_reason == "length"

    stream = client.chat.completions.create(
        model="lille",
        messages=user("Who are you?"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == answer.choices[0].message.content and len(pieces) > 5
    assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["lille"]
    assert client.models.retrieve("lille").owned_by == "lille"


def test_settings_of_a_request(gpt, client):
    ids = TOKENIZER.encode("The sky is")
    expected = text(alone(gpt, ids, 10))
    answer = client.completions.create(model="lille", prompt="The sky is", max_tokens=10)
    assert answer.choices[0].text.rstrip("\ufffd") == expected
    middle = len(expected) // 2
    stop = expected[middle : middle + 4]
    for stream in (False, True):
        stopped = client.completions.create(
            model="lille", prompt="The sky is", max_tokens=10, stop=[stop, "\0"], stream=stream
        )
        choices = [c.choices[0] for c in stopped] if stream else stopped.choices
        assert "".join(choice.text for choice in choices) == expected[: expected.index(stop)]
        assert choices[-1].finish_reason == "stop"

    def sampled(seed):
        return client.completions.create(
            model="lille", prompt="The", max_tokens=10, temperature=1.5, top_p=1, seed=seed
        )

    assert sampled(1).choices[0].text == sampled(1).choices[0].text != sampled(2).choices[0].text


def test_eight_clients_get_the_answers_they_would_get_alone(gpt, client):
    questions = [f"{'word ' * i}What is {i}?" for i in range(24)]

    def ask(question: str) -> str:
        answer = client.chat.completions.create(model="lille", messages=user(question))
        return answer.choices[0].message.content.rstrip("\ufffd")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, questions))
    for question, answer in zip(questions, answers, strict=True):
        ids = TOKENIZER.encode_chat(user(question), add_generation_prompt=True)
        assert answer == text(alone(gpt, ids, 24)), question


def test_clients_that_leave_in_the_middle(address, decoder):
    """Their rows are given up; a half-sent request takes nothing."""
    for stream in (True, False):
        body = json.dumps({"messages": user("Hi"), "stream": stream, "max_tokens": 80}).encode()
        for sent in (body, body[:-5]):
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            with socket.create_connection(address) as connection:
                connection.sendall(head.encode() + sent)
                time.sleep(0.05)
    wait_for(lambda: not decoder.active and not decoder.waiting, 10)
    status, answer = post(address, {"messages": user("Hi"), "max_tokens": 2})
    assert status == 200 and answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "the body is not JSON"),
        (b"\xff{", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[1]", "the body is not a JSON object"),
        ({}, "messages is a list"),
        ({"messages": []}, "messages is a list"),
        ({"messages": [1]}, "messages[0]: system messages come first"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]: system"),
        ({"messages": user("a") * 2}, "messages[1]: system messages come first"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last message is the user's"),
        ({"messages": user("")}, None),
        ({"messages": user("\ud800")}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text"),
        ({"messages": user("word " * 200)}, "takes 204 tokens and the context has room"),
        ({"messages": user("a"), "temperature": 3}, "temperature cannot be 3"),
        ({"messages": user("a"), "temperature": "hot"}, "temperature cannot be"),
        ({"messages": user("a"), "top_p": 0}, "top_p cannot be 0"),
        ({"messages": user("a"), "max_tokens": 0}, "max_tokens cannot be 0"),
        ({"messages": user("a"), "max_tokens": True}, "max_tokens cannot be true"),
        ({"messages": user("a"), "temperature": 10**400}, "temperature cannot be"),
        ({"messages": user("a"), "tool_choice": "required"}, "tool_choice is not supported"),
        ({"messages": user("a"), "stop": False}, "stop is a string"),
        ({"messages": user("a"), "seed": 1.5}, "seed cannot be 1.5"),
        ({"messages": user("a"), "stream": "yes"}, "stream cannot be"),
        ({"messages": user("a"), "stop": [""]}, "not empty"),
        ({"messages": user("a"), "stop": ["a"] * 5}, "at most 4"),
        ({"messages": user("a"), "tools": [{}]}, "tools is not supported"),
        ({"messages": user("a"), "n": 2}, "n is not supported"),
        ({"messages": user("a"), "model": "gpt-4"}, "there is no model 'gpt-4' here"),
    ],
)
def test_bad_bodies(address, body, message):
    status, answer = post(address, body)
    if message is None:
        assert status == 200
        return
    assert status in (400, 404) and message in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_other_paths_sizes_keys_and_origins(address):
    body = {"messages": user("a"), "max_tokens": 1}
    for result, status in (
        (post(address, b"x" * (2 << 20)), 413),
        (post(address, body, "/v1/embeddings"), 404),
        (post(address, body, "/v1/models"), 405),
        (post(address, body, authorization="Bearer wrong"), 401),
        (post(address, body, authorization=f"Basic {KEY}"), 401),
        (post(address, body, origin="http://evil.example"), 403),
        (post(address, body, origin="null"), 403),
        (post(address, body, host="evil.example"), 403),
        (post(address, body, origin=f"http://127.0.0.1:{address[1]}"), 200),
    ):
        assert result[0] == status, result
        assert KEY not in json.dumps(result[1])
        if status != 200:
            assert result[1]["error"]["message"]


def test_a_thousand_forged_messages_stay_text(decoder):
    server, rng = Server(decoder, TOKENIZER, "lille", OPTIONS), random.Random(0)
    parts = [*CONTROL_TOKENS, "<|", "|>", "user", "\ufdd0", " ", "é"]
    for _ in range(1000):
        content = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        chat = [{"role": "system", "content": content}, *user(content)]
        ids = server.prompt_ids({"messages": chat}, True, 8)
        assert sum(token >= TOKENIZER.pad_id for token in ids) == 3
        assert all(t < TOKENIZER.pad_id for t in server.prompt_ids({"prompt": content}, False, 8))


def test_a_system_message_becomes_text_before_the_first_turn():
    turns = [{"role": "developer", "content": "Be brief."}, *user("Hi")]
    assert messages_of({"messages": turns}) == user("Be brief.\n\nHi")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of({"messages": [{"role": "user", "content": parts}]}) == user("ab")


def test_text_up_to_a_stop_string():
    """However the text is cut into pieces, and as early as it is certain."""
    rng = random.Random(0)
    for _ in range(2000):
        whole = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        ends = [whole.find(stop) for stop in stops if stop in whole]
        # the first stop string that is complete ends the text
        first = min((whole.find(s) + len(s) for s in stops if s in whole), default=None)
        until, got, at = UntilStop(stops), "", 0
        while at < len(whole) and not until.stopped:
            size = rng.randint(1, 3)
            got += until.push(whole[at : at + size])
            at += size
        if not until.stopped:
            got += until.push("", final=True)
        assert until.stopped == bool(ends)
        assert got == whole if first is None else whole.startswith(got) and len(got) < first
    until = UntilStop(["xyz"])
    assert [until.push(piece) for piece in ("a", "x", "b", "xy", "z")] == ["a", "", "xb", "", ""]


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv(server_module.KEY, raising=False)
    assert server_module.api_key_for("127.0.0.1") == ""
    with pytest.raises(UserError, match="lets other machines in: set the environment variable"):
        server_module.api_key_for("0.0.0.0")
    monkeypatch.setenv(server_module.KEY, "k")
    assert server_module.api_key_for("0.0.0.0") == "k"
    with pytest.raises(ApiError):
        messages_of({"messages": None})
