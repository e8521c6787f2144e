"""The model against independent references: transformers' Llama and what the original computed."""

import copy
import dataclasses
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from benchmarks.peers import llama_of
from model import GPT, GPTConfig, apply_rope, rope_tables
from ops.attention import attend_by_segment, document_mask, flash_varlen, uses_segments
from ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from ops.kv_cache import KVCache
from ops.sampling import sample

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
TINY = GPTConfig(
    n_embd=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, block_size=64, dropout=0.0
)


def enlarge_weights(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with random weights so large that every part of it matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def tiny_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY, **changes))
    with torch.no_grad():  # larger weights than at initialisation, so that attention is not uniform
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_ids(batch: int, length: int, vocab_size: int = 512, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def llama_twin(model: GPT):
    """transformers' LlamaForCausalLM with the same weights, and the map from its names to ours."""
    config = model.config
    theirs = llama_of(config).eval()
    kv_dim = config.n_kv_heads * config.head_dim
    sources = {"model.embed_tokens.weight": ("tok_embeddings.weight", slice(None))}
    sources["model.norm.weight"] = ("norm.weight", slice(None))
    for i in range(config.n_layers):
        a, b = f"model.layers.{i}", f"layers.{i}"
        queries, keys = slice(0, config.n_embd), slice(config.n_embd, config.n_embd + kv_dim)
        values = slice(config.n_embd + kv_dim, None)
        for name, rows in (("q", queries), ("k", keys), ("v", values)):
            sources[f"{a}.self_attn.{name}_proj.weight"] = (f"{b}.attention.qkv_proj.weight", rows)
        sources |= {
            f"{a}.self_attn.o_proj.weight": (f"{b}.attention.out_proj.weight", slice(None)),
            f"{a}.input_layernorm.weight": (f"{b}.attention.norm.weight", slice(None)),
            f"{a}.post_attention_layernorm.weight": (f"{b}.feed_forward.norm.weight", slice(None)),
        }
        for name in ("gate_proj", "up_proj", "down_proj"):
            sources[f"{a}.mlp.{name}.weight"] = (f"{b}.feed_forward.{name}.weight", slice(None))
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            source, rows = sources[name]
            parameter.copy_(ours[source][rows])
    return theirs, sources


def test_full_configuration_has_127171200_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.n_parameters() == 127_171_200
    assert model.config.ffn_dim == 1792
    assert model.flops_per_token() == 857_399_040  # 6·N + 12·24·640·512: 857 MFLOP (PaLM)


def test_state_dict_keys_are_the_public_interface():
    expected = {"tok_embeddings.weight", "norm.weight", "lm_head.weight"}
    for i in range(TINY.n_layers):
        expected |= {f"layers.{i}.attention.{n}.weight" for n in ("norm", "qkv_proj", "out_proj")}
        names = ("norm", "gate_proj", "up_proj", "down_proj")
        expected |= {f"layers.{i}.feed_forward.{n}.weight" for n in names}
    assert set(GPT(TINY).state_dict()) == expected


def test_initialisation_scales_residual_projections():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, n_embd=256, n_layers=8))
    layer = model.layers[0]
    assert layer.attention.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for projection in (layer.attention.out_proj, layer.feed_forward.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_logits_and_gradients_equal_llama(n_kv_heads):
    model = tiny_model(n_kv_heads=n_kv_heads)
    theirs, sources = llama_twin(model)
    ids = random_ids(3, 48)
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets[0, 5:9] = IGNORE_INDEX
    ours_logits, their_logits = model(ids), theirs(ids).logits
    scale = their_logits.abs().max()
    assert (ours_logits - their_logits).abs().max() / scale < 1e-5
    model(ids, targets).backward()
    F.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        source, rows = sources[name]
        error = (gradients[source][rows] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_causality_is_bit_exact():
    model, ids = tiny_model(), random_ids(1, 40)
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 7) % 512
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("rope_style", ["llama", "lille"])
def test_packed_row_equals_its_segments_alone(rope_style):
    model, ids = tiny_model(rope_style=rope_style), random_ids(2, 48)
    borders = [[0, 13, 14, 40, 48], [0, 48]]
    positions = torch.zeros_like(ids)
    for row, cuts in enumerate(borders):
        for a, b in zip(cuts, cuts[1:], strict=False):
            positions[row, a:b] = torch.arange(b - a)
    packed = model(ids, positions=positions)
    for row, cuts in enumerate(borders):
        for a, b in zip(cuts, cuts[1:], strict=False):
            alone = model(ids[row : row + 1, a:b])
            torch.testing.assert_close(packed[row : row + 1, a:b], alone, atol=2e-5, rtol=1e-5)
    unpacked = model(ids)
    assert (unpacked[0, 14:] - packed[0, 14:]).abs().max() > 1e-2  # the mask did mask


def test_document_mask_by_hand():
    mask = document_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert torch.equal(mask[0, 0].int(), torch.tensor(expected, dtype=torch.int32))


def rope_scores(style: str) -> torch.Tensor:
    """q·k for one query and key put at every pair of positions of a context of 16."""
    config = dataclasses.replace(TINY, rope_style=style, block_size=16)
    cos, sin = rope_tables(config)
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 1, 1, config.head_dim).expand(2, 1, 16, 1, config.head_dim)
    q, k = (apply_rope(x, cos[:, None], sin[:, None], style)[0, :, 0] for x in (q, k))
    return q @ k.T


def test_llama_rope_scores_depend_on_the_offset_only_and_lille_do_not():
    llama, lille = rope_scores("llama"), rope_scores("lille")
    for offset in range(16):
        diagonal = llama.diagonal(-offset)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert (lille.diagonal(-1) - lille[1, 0]).abs().max() > 0.1


@pytest.mark.parametrize("rope_style", ["llama", "lille"])
def test_cached_decode_equals_the_full_forward_at_every_position(rope_style):
    model, ids = tiny_model(rope_style=rope_style), random_ids(2, 40)
    full = model(ids)
    cache = KVCache.empty(model.config, 2, like=model.tok_embeddings.weight)
    steps = [9] + [1] * 31  # a prompt, then token by token
    start = 0
    with torch.inference_mode():
        for size in steps:
            logits = model(ids[:, start : start + size], cache=cache)
            cache.lengths += size
            expected = full[:, start : start + size]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
            start += size


def greedy_without_cache(model: GPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_of_unequal_prompts_equals_each_alone_without_cache():
    model = tiny_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 7, 23)]
    batch = model.generate(prompts, max_new_tokens=12, temperature=0)
    assert batch == [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in batch}) == 3


def test_generate_stops_at_stop_tokens_and_at_the_end_of_the_context():
    model = tiny_model()
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 60, 64)]
    rows = model.generate(prompts, max_new_tokens=20, temperature=0)
    assert [len(row) for row in rows] == [20, 5, 1]  # 64 - 60 places, and one token beyond
    assert rows[1] == greedy_without_cache(model, prompts[1], 5)
    stop = rows[0][3]
    stopped = model.generate(prompts[:1], max_new_tokens=20, temperature=0, stop_tokens=[stop])
    assert stopped[0] == rows[0][: rows[0].index(stop)]
    assert model.generate(prompts[:1], max_new_tokens=0) == [[]]


def test_generate_is_reproducible_with_a_generator_and_leaves_training_mode_as_it_was():
    model = tiny_model(dropout=0.5)
    prompt = [[1, 2, 3]]
    runs = []
    for mode in (True, False):
        model.train(mode)
        generator = torch.Generator().manual_seed(7)
        runs.append(model.generate(prompt, 20, temperature=1.0, generator=generator))
        assert model.training is mode
    assert runs[0] == runs[1]  # dropout is off while generating, whatever the mode
    other = model.generate(prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(8))
    assert other != runs[0]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1] * 65], {}, "65 tokens"),
        ([[]], {}, "at least one token"),
        ([], {}, "at least one token"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
    ],
)
def test_generate_refuses_what_cannot_be_done(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(prompts, max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="context"):
        tiny_model()(random_ids(1, 65))


def test_sample_follows_the_distribution_and_its_filters():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        drawn = sample(logits, generator=generator, **settings)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    def close(result, expected):  # four standard errors of a share of 40,000 draws are 0.01
        torch.testing.assert_close(result, torch.tensor(expected), atol=0.01, rtol=0)

    close(shares(), [0.5, 0.3, 0.15, 0.05])
    close(shares(top_k=2), [0.625, 0.375, 0.0, 0.0])
    close(shares(top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0])
    close(shares(top_p=0.4), [1.0, 0.0, 0.0, 0.0])
    close(shares(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    assert sample(logits[:2], temperature=0).tolist() == [0, 0]


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (4, 64) and cu_seqlens of two full rows, several segments, and padding."""
    lengths = [64, 64, 1, 40, 23, 30, 30, 4]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(4, 64)
    cu_seqlens = torch.tensor([0, *lengths, 0, 0], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return positions, cu_seqlens


def test_attention_by_segment_equals_the_document_mask():
    """On a CPU: logits, loss and gradients with cu_seqlens and with positions only."""
    ids, targets = random_ids(4, 64), random_ids(4, 64, seed=2)
    positions, cu_seqlens = packed_rows()
    results = []
    for cu in (None, cu_seqlens):
        model = tiny_model()
        loss = model(ids, targets, positions, cu)
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([loss, model(ids, None, positions, cu), *gradients])
    for masked, by_segment in zip(*results, strict=True):  # the same sums in another order
        assert (masked - by_segment).norm() <= 1e-5 * masked.norm()
    causal = tiny_model()(ids)
    assert (causal - results[1][1]).abs().max() > 0.1  # segments matter


def test_a_compiled_cpu_model_takes_the_mask_and_compiles_once(monkeypatch):
    """Segment lengths would decide a loop; the eager model takes that loop."""
    model, ids, frames = tiny_model(), random_ids(4, 64), []

    def backend(graph, inputs):
        frames.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    positions, cu_seqlens = packed_rows()
    whole_rows = torch.arange(64).expand(4, 64).contiguous()
    no_packing = torch.tensor([0, 64, 128, 192] + [256] * 7, dtype=torch.int32)
    loop = mock.Mock(wraps=attend_by_segment)
    monkeypatch.setattr("model.attend_by_segment", loop)
    with torch.no_grad():
        for packing in ((positions, cu_seqlens), (whole_rows, no_packing)):
            expected = model(ids, None, *packing)
            assert loop.call_count == model.config.n_layers
            torch.testing.assert_close(compiled(ids, None, *packing), expected, atol=2e-5, rtol=0)
            assert loop.call_count == model.config.n_layers
            loop.reset_mock()
    assert len(frames) == 1 and any("scaled_dot_product" in target for target in frames[0])


def test_choice_of_the_attention_kernel(monkeypatch):
    def choice(device: str, dtype: torch.dtype, head_dim: int = 64) -> bool:
        return uses_segments(torch.device(device), dtype, head_dim)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choice("cpu", torch.float32) and choice("cpu", torch.bfloat16, 60)
    assert choice("cuda", torch.bfloat16) and choice("cuda", torch.float16, 256)
    assert not choice("cuda", torch.float32)
    assert not choice("cuda", torch.bfloat16, 60) and not choice("cuda", torch.bfloat16, 264)
    assert not choice("mps", torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not choice("cuda", torch.float16)


@pytest.mark.parametrize("compiling", [False, True])
def test_linear_cross_entropy_equals_the_plain_formula(compiling, monkeypatch):
    monkeypatch.setattr("ops.cross_entropy.MIN_CHUNK", 1)  # so that there are three, of 32 tokens
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    x = torch.randn(70, 32, requires_grad=True)
    weight = torch.randn(128, 32, requires_grad=True)
    targets = torch.randint(128, (70,))
    targets[3:9] = IGNORE_INDEX
    plain = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain, (x, weight))
    ours = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(3 * ours, (x, weight)), expected, strict=True):
        torch.testing.assert_close(found, 3 * wanted, rtol=1e-4, atol=1e-4)
    if not compiling:  # its gradients are scaled in place
        ours = linear_cross_entropy(x, weight, targets)
        ours.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            ours.backward()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), plain.detach())
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE_INDEX))
    assert nothing.item() == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_cross_entropy_under_autocast(dtype, tolerance):
    """In float16 the products are float32, since unscaled gradients would leave its range."""
    torch.manual_seed(0)
    x = torch.randn(200, 64, requires_grad=True)
    weight = torch.randn(512, 64, requires_grad=True)
    targets = torch.randint(512, (200,))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = linear_cross_entropy(x, weight, targets)
        results.append([loss, *torch.autograd.grad(loss, (x, weight))])
    for plain, autocast in zip(*results, strict=True):
        assert (plain - autocast).norm() / plain.norm() < tolerance


def test_sampled_labels_follow_the_model_and_skip_unlabelled_positions():
    # One token's softmax is (0.7, 0.3, 0, …): the sampled loss must average to its entropy.
    weight = torch.full((8, 1), -30.0)
    weight[0, 0], weight[1, 0] = np.log(0.7), np.log(0.3)
    x = torch.ones(40_000, 1, requires_grad=True)
    targets = torch.full((40_000,), 5)  # never drawn: the true labels must not matter
    targets[::2] = IGNORE_INDEX
    torch.manual_seed(0)
    loss = linear_cross_entropy(x, weight, targets, sample_targets=True)
    entropy = -(0.7 * np.log(0.7) + 0.3 * np.log(0.3))
    assert loss.item() / 20_000 == pytest.approx(entropy, abs=0.02)
    loss.backward()
    assert torch.all(x.grad[::2] == 0) and torch.all(x.grad[1::2] != 0)


@pytest.mark.skipif(not REFERENCE.exists(), reason="../shared/reference is not here")
def test_original_checkpoint_gives_the_original_logits():
    from checkpoint import load_model

    model = load_model(REFERENCE / "original_best_model.pt")
    expected = np.load(REFERENCE / "original_logits.npz")
    stride, ids = int(expected["column_stride"]), torch.from_numpy(expected["ids"])
    assert model.config.rope_style == "lille"
    with torch.inference_mode():
        logits = model(ids)[..., ::stride]
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)

        padded = torch.from_numpy(expected["padded"])
        masked = model(padded)[..., ::stride].numpy()
        real = expected["padded"] != 32763
        assert not real.all()
        np.testing.assert_allclose(masked[real], expected["masked_logits"][real], atol=1e-4)

        cache = KVCache.empty(model.config, len(ids), like=model.tok_embeddings.weight)
        model(ids[:, :32], cache=cache)  # the reference cached 32 tokens and decoded the next
        cache.lengths += 32
        step = model(ids[:, 32:33], cache=cache)[..., ::stride]
        np.testing.assert_allclose(step, expected["step_logits"], atol=1e-4)
    greedy = expected["greedy"][0].tolist()
    assert model.generate([greedy[:16]], max_new_tokens=24, temperature=0) == [greedy[16:]]


@pytest.mark.gpu
def test_flash_varlen_equals_the_masked_path_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model(n_embd=256, block_size=128).cuda().bfloat16()
    ids = random_ids(2, 128).cuda()
    lengths = [100, 28, 128]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 128).cuda()
    cu_seqlens = torch.tensor([0, 100, 128, 256, 256, 256], dtype=torch.int32).cuda()
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    gradients = []
    for cu in (None, cu_seqlens):
        model.zero_grad()
        loss = model(ids, targets, positions, cu_seqlens=cu)
        loss.backward()
        gradients.append([loss.float()] + [p.grad.float() for p in model.parameters()])
    for plain, flash in zip(*gradients, strict=True):  # bf16 carries about three digits
        assert (plain - flash).norm() / plain.norm() < 2e-2


def test_residual_stream_follows_the_matrix_products():
    model = tiny_model()
    ids = random_ids(2, 64)
    exact = model.hidden(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.hidden(ids)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 2e-2
    with torch.autocast("cpu", torch.float16):  # whose range a stream of its own could leave
        assert model.hidden(ids).dtype == torch.float32


@pytest.mark.parametrize("sample_targets", [False, True])
def test_compiled_step_of_a_gpu_is_one_graph(sample_targets, monkeypatch):
    """Flash attention over packed rows, 16 bits: traced without its device, on fake tensors."""
    graphs = []

    def capture(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def on_cuda(device, dtype, head_dim):
        return uses_segments(torch.device("cuda", 0), dtype, head_dim)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("model.uses_segments", on_cuda)
    monkeypatch.setattr("model.attend_by_segment", partial(flash_varlen, max_length=64))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(tiny_model())
    with mode, torch.autocast("cpu", torch.bfloat16):
        ids = torch.empty(2, 64, dtype=torch.int64)
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        compiled = torch.compile(model, backend=capture, fullgraph=True)
        loss = compiled(ids, ids, ids, cu_seqlens, sample_targets=sample_targets)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.fake_mode is mode
    (graph,) = graphs
    assert graph.count("torch_attn._varlen_attn") == model.config.n_layers
    assert not any("scaled_dot_product" in target for target in graph)
