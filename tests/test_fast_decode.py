"""Fast decoding against the plain forward pass: C++, CUDA graphs, rounded weights, batches."""

import contextlib
import copy
import functools
import math
import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_model import greedy_without_cache, random_ids, tiny_model

from generation import fast_decode
from generation.fast_decode import LARGEST_NATIVE_BATCH, LIBRARY, Decoder, quantize
from model import GPT
from ops import cpp_build
from ops.cpp_build import native_library
from ops.huge_pages import use_huge_pages
from ops.kv_cache import KVCache
from ops.sampling import draw, nucleus, sample

needs_compiler = pytest.mark.skipif(native_library(*LIBRARY) is None, reason="needs a C++ compiler")


def decode_all(model: GPT, decoder: Decoder, ids: torch.Tensor, cache: KVCache, start: int = 0):
    """Logits (B, T, V) of ids (B, T), given one by one to a cache that holds `start` tokens."""
    cache.lengths.fill_(start)
    logits = []
    for tokens in ids.T:
        logits.append(decoder(tokens, cache))
        cache.lengths += 1
    return torch.stack(logits, dim=1)


def empty_cache(model: GPT, batch: int) -> KVCache:
    return KVCache.empty(model.config, batch, like=model.lm_head.weight.detach())


def rounded(model: GPT, weights: str) -> GPT:
    """The model with float32 matrices that hold what `weights` makes of them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and weights == "bfloat16":
                parameter.copy_(parameter.bfloat16())
            elif parameter.dim() == 2:
                for row in parameter:
                    for block in row.split(32):
                        largest = block.abs().max().item() / 127
                        scale = torch.tensor(largest).bfloat16().item()
                        if scale < largest:
                            scale *= 1 + 2**-7 / math.frexp(scale)[0] / 2  # the next bfloat16
                        block.copy_((block / scale).round() * scale)
    return model


SHAPES = {
    "llama": {},
    "lille": {"rope_style": "lille"},
    "one KV head": {"n_kv_heads": 1},
    "as many KV heads as heads": {"n_kv_heads": 4},
    "no multiple of a vector": {"n_embd": 60, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 515},
}


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_native_decode_equals_the_full_forward_at_every_position(shape, batch):
    model, ids = tiny_model(**SHAPES[shape]), random_ids(batch, 64)  # up to a full context
    decoder = Decoder(model)
    assert decoder.native is not None
    with torch.inference_mode():
        logits = decode_all(model, decoder, ids, empty_cache(model, batch))
        torch.testing.assert_close(logits, model(ids), atol=5e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("shape", ["llama", "no multiple of a vector"])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights_equal_a_model_that_holds_them(weights, shape):
    model, ids = tiny_model(**SHAPES[shape]), random_ids(2, 40)
    with torch.inference_mode():
        logits = decode_all(model, Decoder(model, weights), ids, empty_cache(model, 2))
        exact, held = model(ids), rounded(model, weights)(ids)
    if weights == "bfloat16":
        torch.testing.assert_close(logits, held, atol=5e-5, rtol=1e-5)
    # int8 weights meet activations of 16 bits: an error of 3e-5 of their largest
    assert (logits - held).norm() < 5e-4 * held.norm()
    assert 1e-4 < (logits - exact).norm() / exact.norm() < {"bfloat16": 0.02, "int8": 0.05}[weights]


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_weight_that_is_not_a_number_reaches_the_logits(weights):
    model = tiny_model()
    with torch.no_grad():
        model.layers[0].feed_forward.norm.weight[3] = math.nan
    assert (
        decode_all(model, Decoder(model, weights), random_ids(1, 1), empty_cache(model, 1))
        .isnan()
        .all()
    )


@pytest.mark.parametrize("columns", [64, 50])
def test_quantized_blocks_have_the_smallest_bfloat16_scale_that_holds_them(columns):
    torch.manual_seed(0)
    weight = torch.randn(7, columns) * torch.logspace(-3, 3, columns)
    weight[3] = 0
    values, scales = quantize(weight)
    assert values.shape == (7, 64) and scales.shape == (7, 2)
    assert not values[:, columns:].any() and not values[3].any()
    values, scales = values.unflatten(1, (2, 32)).float(), scales.float()[:, :, None]
    blocks = torch.nn.functional.pad(weight, (0, 64 - columns)).unflatten(1, (2, 32))
    assert ((values * scales - blocks).abs() <= scales / 2 * (1 + 1e-6)).all()
    largest = values.abs().amax(dim=2)
    assert largest.max() == 127 and largest[[0, 1, 2, 4, 5, 6]].min() >= 126


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are moved to on Linux only")
def test_huge_pages_keep_addresses_and_values():
    def huge_bytes() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return int(rollup.partition("AnonHugePages:")[2].split()[0]) * 1024

    # Memory of its own: what earlier tests have freed may lie in huge pages already.
    memory, before = mmap.mmap(-1, 24 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), huge_bytes()
    tensors = [torch.randn(1000), torch.randn(0)]
    for offset, n in ((0, 3 << 20), (16 << 20, 2 << 20)):
        tensor = torch.frombuffer(memory, dtype=torch.float32, offset=offset, count=n)
        tensors.append(tensor.normal_())
    copies = [tensor.clone() for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    use_huge_pages(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all(map(torch.equal, tensors, copies))
    # Kernels before 6.1 have no such call.
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 1):
        assert huge_bytes() - before >= 12 << 20


@needs_compiler
def test_a_bfloat16_model_decodes_with_its_own_weights_and_a_bfloat16_cache():
    model, ids = tiny_model(), random_ids(2, 40)
    narrow = copy.deepcopy(model).bfloat16()
    decoder = Decoder(narrow)
    assert decoder.native.matrix(narrow.lm_head.weight).data == narrow.lm_head.weight.data_ptr()
    with torch.inference_mode():
        cache = empty_cache(narrow, 2)
        logits = decode_all(narrow, decoder, ids, cache)
        exact, eager = rounded(model, "bfloat16")(ids), narrow(ids).float()
    assert cache.keys.dtype is torch.bfloat16 and logits.dtype is torch.float32
    error, eager_error = ((x - exact).norm() / exact.norm() for x in (logits, eager))
    assert 1e-4 < error < 0.02 and error < eager_error  # only norms and the cache are rounded


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    model, ids, results = tiny_model(), random_ids(1, 20), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(decode_all(model, Decoder(model), ids, empty_cache(model, 1)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


DECODER_MODES = ["eager", pytest.param("auto", marks=needs_compiler), "compile"]


@pytest.mark.parametrize("mode", DECODER_MODES)
def test_greedy_tokens_of_unequal_prompts_equal_the_full_forward(mode, monkeypatch):
    # One graph without a break is what "compile" must be; generating code for it takes long.
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    model = tiny_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 7, 60, 23)]
    rows = model.generate(prompts, 12, temperature=0, decoder=Decoder(model, mode=mode))
    counts = [12, 12, 5, 12]  # the third fills its context
    expected = [
        greedy_without_cache(model, prompt, count)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    assert rows == expected and len({tuple(row) for row in rows}) == 4


def test_large_batches_equal_each_row_alone():
    model = tiny_model()
    prompts = random_ids(LARGEST_NATIVE_BATCH + 1, 5).tolist()
    rows = model.generate(prompts, 10, temperature=0)
    assert rows == [model.generate([prompt], 10, temperature=0)[0] for prompt in prompts]


@pytest.mark.parametrize("mode", DECODER_MODES[:2])
def test_a_cut_cache_continues_as_a_new_one_and_takes_no_memory(mode):
    model, ids = tiny_model(), random_ids(1, 60)
    decoder, cache = Decoder(model, mode=mode), empty_cache(model, 1)
    with torch.inference_mode():
        addresses = cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.nbytes
        first = decode_all(model, decoder, ids, cache)
        other = random_ids(1, 20, seed=5)
        second = decode_all(model, decoder, other, cache, start=30)
        expected = model(torch.cat((ids[:, :30], other), dim=1))[:, 30:]
    torch.testing.assert_close(second, expected, atol=5e-5, rtol=1e-5)
    assert (second - first[:, 30:50]).abs().max() > 0.1
    assert addresses == (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.nbytes)


@needs_compiler
def test_native_decode_refuses_what_is_out_of_range():
    model = tiny_model()
    decoder, cache = Decoder(model), empty_cache(model, 2)
    for token in (-1, 512):
        with pytest.raises(ValueError, match=f"token {token} after 0"):
            decoder(torch.tensor([3, token]), cache)
    cache.lengths[1] = 64
    with pytest.raises(ValueError, match="token 3 after 64 others"):
        decoder(torch.tensor([3, 3]), cache)
    cache.lengths[1] = 63
    assert decoder(torch.tensor([3, 3]), cache).isfinite().all()


def test_settings_that_cannot_be_had_are_refused_and_nothing_else_needs_a_compiler(monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match="mode='fast'"):
        Decoder(model, mode="fast")
    with pytest.raises(ValueError, match="weights='int4'"):
        Decoder(model, "int4")
    with pytest.raises(ValueError, match="weights='int8' needs"):
        Decoder(model, "int8", mode="eager")
    before = model.generate([[1, 2, 3]], 10, temperature=0)
    monkeypatch.setattr(fast_decode, "native_library", lambda *library: None)
    with pytest.raises(ValueError, match="weights='int8' needs"):
        Decoder(model, "int8")
    assert Decoder(model).native is None
    assert model.generate([[1, 2, 3]], 10, temperature=0) == before
    half = copy.deepcopy(model).half()  # not one of the types of decode_step.cpp
    assert len(half.generate([[1, 2, 3]], 10, temperature=0)[0]) == 10


@needs_compiler
def test_the_library_is_compiled_once_and_a_broken_compiler_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build, commands = functools.partial(native_library.__wrapped__, *LIBRARY), []

    def run(command, **options):
        commands.append(command)
        return subprocess_run(command, **options)

    subprocess_run = subprocess.run
    monkeypatch.setattr(cpp_build.subprocess, "run", run)
    assert build() is not None and build() is not None
    assert len(commands) == 1 and len(list((tmp_path / "lille").iterdir())) == 1
    monkeypatch.setenv("CXX", "/bin/false")
    assert build() is None and len(commands) == 4  # each of the three sets of options
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # a folder that cannot be written
    assert build() is None and len(commands) == 4


@needs_compiler
def test_a_decoder_follows_training_in_place_but_rounded_copies_do_not():
    model, ids = tiny_model(), random_ids(1, 5)
    own, copied = Decoder(model), Decoder(model, "int8")
    before = [decode_all(model, decoder, ids, empty_cache(model, 1)) for decoder in (own, copied)]
    with torch.no_grad():
        model.layers[0].feed_forward.up_proj.weight.mul_(2)
    after = [decode_all(model, decoder, ids, empty_cache(model, 1)) for decoder in (own, copied)]
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    torch.testing.assert_close(after[0], model(ids).detach(), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_drawn_indices_have_their_probabilities(size):
    torch.manual_seed(0)
    p = torch.rand(size) ** 4
    p[0] = p[-1] = p[2] = 0
    n = 200_000
    counts = torch.bincount(draw(3 * p.expand(n, size).clone()), minlength=size)
    expected = n * p / p.sum()
    assert (counts[p == 0] == 0).all() and counts.sum() == n
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
    one = torch.zeros(4, size)
    one[range(4), [0, 1, size - 1, size // 2]] = 1e-3
    assert draw(one).tolist() == [0, 1, size - 1, size // 2]


@pytest.mark.parametrize("spread", [8.0, 0.01])  # a partial sort is enough; it is not
def test_nucleus_equals_a_full_sort(spread):
    torch.manual_seed(0)
    probabilities = torch.softmax(torch.randn(3, 5000) * spread, dim=-1)
    filtered = nucleus(probabilities, 0.9)
    for row, result in zip(probabilities.tolist(), filtered, strict=True):
        expected, mass = torch.zeros(5000), 0.0
        for index in sorted(range(5000), key=lambda i: -row[i]):
            if mass >= 0.9 * sum(row):
                break
            expected[index], mass = row[index], mass + row[index]
        assert (result != expected).sum() <= 1  # float32 sums may differ by the token at the border
    assert ((filtered > 0).sum(dim=-1) < 1024).all() == (spread > 1)


def test_sampling_draws_the_same_tokens_from_every_decoder():
    model, rows = tiny_model(), []
    for mode in ("eager", "auto"):
        generator = torch.Generator().manual_seed(3)
        decoder = Decoder(model, mode=mode)
        rows.append(model.generate([[1, 2]], 30, 0.8, generator=generator, decoder=decoder))
    assert rows[0] == rows[1] and len(rows[0][0]) == 30
    assert sample(torch.tensor([[0.0, 9.0]]), temperature=0).tolist() == [1]


def test_a_graph_reads_and_writes_the_memory_it_was_captured_with(monkeypatch):
    """The buffers of GraphStep, with a graph that replays by running the same Python again."""
    captured = []

    @contextlib.contextmanager
    def capturing(graph):
        captured.append(graph)
        yield
        tokens, cache, logits = graph_step.tokens, graph_step.cache, graph_step.logits
        graph.replay = lambda: logits.copy_(graph_step.step(tokens, cache))

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    model, ids = tiny_model(), random_ids(2, 20)
    decoder = Decoder(model, mode="eager")
    graph_step = decoder.step = fast_decode.GraphStep(decoder.step)
    with torch.inference_mode():
        expected = model(ids)
        for _ in range(2):  # the second cache is captured anew
            cache = empty_cache(model, 2)
            for start in (0, 0):  # its lengths may be other tensors from time to time
                cache.lengths = torch.zeros(2, dtype=torch.long)
                logits = decode_all(model, decoder, ids, cache, start)
                torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)
    assert len(captured) == 2


def test_answers_in_turn_may_share_a_cache(monkeypatch):
    """So a decoder that keeps a CUDA graph captures it once; older answers' keys are not read."""
    model = tiny_model().eval()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (9, 3, 6)]
    expected = [model.generate([p], 8, temperature=0)[0] for p in prompts]
    decoder, cache = Decoder(model), empty_cache(model, 1)
    made = mock.Mock(wraps=KVCache.empty)
    monkeypatch.setattr(KVCache, "empty", made)
    for prompt, tokens in zip(prompts, expected, strict=True):  # a longer answer's keys lie there
        rows = model.generate([prompt], 8, temperature=0, decoder=decoder, cache=cache)
        assert rows == [tokens]
    assert made.call_count == 0
    assert model.generate(prompts, 8, temperature=0, decoder=decoder) == expected
    assert made.call_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "compile"])
def test_cuda_graph_equals_the_full_forward_on_the_gpu(mode):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model().cuda()
    ids = random_ids(2, 40).cuda()
    decoder, cache = Decoder(model, mode=mode), empty_cache(model, 2)
    with torch.inference_mode():
        logits = decode_all(model, decoder, ids, cache)
        repeated = decode_all(model, decoder, ids, empty_cache(model, 2))  # captured anew
        torch.testing.assert_close(logits, model(ids), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(repeated, logits, atol=1e-4, rtol=1e-4)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 7, 23)]
    rows = model.generate(prompts, 12, temperature=0, decoder=decoder)
    assert rows == model.generate(prompts, 12, temperature=0)
