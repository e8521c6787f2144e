"""Models in other forms than our .pt: folders of transformers and of the original, and the hub."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from test_model import enlarge_weights

from checkpoint import load_model
from common.errors import UserError
from generation.backends import open_backend
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
SHAPE = {"vocab_size": 96, "block_size": 32, "n_embd": 32, "n_layers": 3, "n_heads": 4}
CONFIG = GPTConfig(**SHAPE, n_kv_heads=2, rope_theta=5000.0, layer_norm_eps=1e-4)
IDS = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(1))


def large_gpt(rope_style: str = "llama") -> GPT:
    """A model whose random weights are large enough that every part of it matters."""
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(**CONFIG.to_dict() | {"rope_style": rope_style})).eval()
    return enlarge_weights(gpt)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A Llama folder that transformers itself made and wrote, and its logits of IDS."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    model = enlarge_weights(LlamaForCausalLM(config).eval())
    with torch.no_grad():
        logits = model(IDS).logits
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, logits


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of the Llama folder to spoil."""
    return Path(shutil.copytree(llama[0], tmp_path / "broken"))


def original_folder(folder: Path) -> GPT:
    """Writes a folder in the layout of the original's published models; returns the model."""
    gpt = large_gpt("lille")
    folder.mkdir()
    config = {
        "architectures": ["LilleForCausalLM"],
        "model_type": "lille-130m",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_heads": 2,
        "vocab_size": 96,
        "block_size": 32,
        "dropout": 0.1,
        "layer_norm_eps": 1e-4,
        "rope_theta": 5000.0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"transformer.{n}": t for n, t in gpt.state_dict().items() if n != "lm_head.weight"}
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    return gpt


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@torch.no_grad()
def test_llama_folder_computes_what_transformers_does(llama):
    folder, logits = llama
    gpt = load_model(folder)
    assert gpt.config == CONFIG and not gpt.training
    difference = (gpt(IDS) - logits).abs().max().item()
    assert difference < 1e-4 * logits.abs().max().item() and logits.std() > 0.5
    other_theta = GPT(GPTConfig(**CONFIG.to_dict() | {"rope_theta": 10000.0})).eval()
    other_theta.load_state_dict(gpt.state_dict())
    assert (other_theta(IDS) - logits).abs().max() > 0.01  # the comparison sees the RoPE


@torch.no_grad()
def test_older_keys_and_several_files(llama, tmp_path):
    """transformers 4 wrote rope_theta and torch_dtype, and large models lie in several files."""
    folder, logits = llama
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    change_config(tmp_path / "parts", rope_parameters=..., rope_theta=5000.0, rope_scaling=None)
    gpt = load_model(str(tmp_path / "parts"))
    assert torch.equal(gpt(IDS), load_model(folder)(IDS))


@torch.no_grad()
def test_original_layout(tmp_path):
    gpt = original_folder(tmp_path / "original")
    loaded = load_model(tmp_path / "original")
    assert loaded.config == gpt.config and loaded.config.rope_style == "lille"
    assert torch.equal(loaded(IDS), gpt(IDS))
    as_llama = large_gpt("llama")
    assert (as_llama(IDS) - gpt(IDS)).abs().max() > 0.01  # the style makes a difference here


@pytest.mark.skipif(not REFERENCE.exists(), reason="no ../shared/reference")
@torch.no_grad()
def test_reference_folder_and_checkpoint():
    """The original's own outputs, from its folder and from its .pt."""
    expected = np.load(REFERENCE / "original_logits.npz")
    ids = torch.from_numpy(expected["ids"])
    for name in ("hf_lille_original", "original_best_model.pt"):
        gpt = load_model(REFERENCE / name)
        logits = gpt(ids)[..., :: int(expected["column_stride"])].numpy()
        assert np.abs(logits - expected["logits"]).max() < 1e-5
        greedy = expected["greedy"][0].tolist()
        (new,) = gpt.generate([greedy[:16]], len(greedy) - 16, temperature=0)
        assert new == greedy[16:]


def test_dtype_of_the_weights_is_kept(broken):
    def to_bfloat16(tensors):
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    change_tensors(broken, to_bfloat16)
    assert {p.dtype for p in load_model(broken).parameters()} == {torch.bfloat16}
    wide = load_model(broken, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def extra(tensors):
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(256, 32)


def other_shape(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 32)


def other_kind(tensors):
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)


def bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


def untied(tensors):
    tensors["lm_head.weight"] = torch.zeros(96, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "model.layers.1.mlp.up_proj.weight is missing"),
        (extra, "model.layers.3.mlp.up_proj.weight is not part"),
        (other_shape, r"0.self_attn.k_proj.weight has shape \[32, 32\].*says \[16, 32\]"),
        (other_kind, "model.norm.weight holds torch.int64"),
        (bias, "q_proj.bias is not part"),
        (untied, "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_tensors_that_disagree_are_named(broken, change, message):
    load_model(broken)
    change_tensors(broken, change)
    with pytest.raises(UserError, match=message) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value) and str(broken) in str(caught.value)


def test_a_checkpoint_with_two_heads_is_refused(tmp_path):
    gpt = GPT(CONFIG)
    weights = gpt.state_dict() | {"lm_head.weight": torch.zeros(96, 32)}
    path = tmp_path / "m.pt"
    torch.save({"model_state_dict": weights, "model_args": CONFIG.to_dict()}, path)
    with pytest.raises(UserError, match="lm_head.weight is not tok_embeddings.weight"):
        load_model(path)


NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "weights", "message"),
    [
        ({"block_size": 2**70}, {}, "block_size must be at least 1 and at most 1048576"),
        ({"n_layers": 10**6}, {}, "1000000 layers cannot be made of"),
        ({"n_embd": 32.0}, {}, "n_embd must be a whole number, not 32.0"),
        ({"rope_theta": NAN}, {}, "rope_theta=nan must be above 0 and finite"),
        ({"layer_norm_eps": NAN}, {}, "layer_norm_eps=nan must be above 0 and finite"),
        ({"n_embd": 2**20}, {}, "size mismatch"),  # found without taking memory for such a model
        ({}, {"norm.weight": torch.full((32,), NAN)}, "norm.weight holds NaN or infinity"),
        ({}, {"norm.weight": torch.ones(1).expand(32)}, "norm.weight holds fewer values than"),
        ({"vocab_size": 2**20}, {}, "size mismatch"),
    ],
)
def test_hostile_checkpoints_are_one_line(tmp_path, arguments, weights, message):
    state = {
        "model_state_dict": GPT(CONFIG).state_dict() | weights,
        "model_args": CONFIG.to_dict() | arguments,
    }
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "m.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """It could be 12 MB on the disk and 12 GB in memory."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(UserError, match="is compressed, which torch.save never does"):
        load_model(tmp_path / "m.pt")


def test_a_repeated_embedding_is_fine(broken):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(broken, repeat)
    load_model(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 2}, "model.layers.2.* is not part"),
        ({"vocab_size": 100}, r"embed_tokens.weight has shape \[96, 32\].*says \[100, 32\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \[16, 32\]"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none"),
        ({"model_type": ...}, "model_type None is none"),
        ({"hidden_size": ...}, "config.json has no hidden_size"),
        ({"hidden_size": "32"}, "has hidden_size '32', not a number"),
        ({"num_attention_heads": 5}, "n_embd=32 must be n_heads=5 times"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"intermediate_size": 128}, "intermediate_size is 128: Lille of this shape has 256"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing, and tie_word_embeddings"),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"num_hidden_layers": 10**6}, "1000000 layers cannot be made of 29 tensors"),
        ({"rope_parameters": 5}, "'int' object"),
        ({"model_type": []}, r"model_type \[\] is none"),
    ],
)
def test_configurations_that_are_no_lille(broken, changes, message):
    change_config(broken, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**6}, "1000000 layers cannot be made of 29 tensors"),
        ({"dtype": "evil"}, "evil"),
        ({"dtype": 5}, "cannot be loaded by transformers"),
        ({"model_type": []}, r"model_type \[\] is none"),
        ({"hidden_size": "x"}, "cannot be loaded by transformers"),
    ],
)
def test_configurations_that_transformers_cannot_take(broken, changes, message):
    change_config(broken, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_backend("huggingface", broken)
    assert "\n" not in str(caught.value)


def split_in_two(folder: Path) -> dict:
    """Puts the tensors of a folder into two files; returns the index to write."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    place = {}
    for i, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{i}.safetensors")
        place |= dict.fromkeys(part, f"model-{i}.safetensors")
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: place, None),
        (lambda place: place | {"x": "model-9.safetensors"}, "model-9.safetensors is missing"),
        (lambda place: place | {"x": "../model.safetensors"}, "names '../model.safetensors'"),
        (lambda place: {}, r"embed_tokens.weight is missing, .* \(and 26 more\)"),
    ],
)
def test_index_of_several_files(broken, change, message):
    index = {"weight_map": change(split_in_two(broken))}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    if message is None:
        load_model(broken)
        return
    with pytest.raises(UserError, match=message):
        load_model(broken)


def test_files_that_cannot_be_read(broken, tmp_path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged \("):
        load_model(broken)
    weights.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        load_model(broken)
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match="is a folder without config.json: give the path"):
        load_model(broken)
    with pytest.raises(UserError, match="some--one/x is no hub id: write owner/name"):
        load_model("some--one/x")
    for name in ("none.pt", "none", "a/b/c", f"{tmp_path}/none", "tests/none", "owner/none.pt"):
        with pytest.raises(UserError, match="is not there: give the path"):
            load_model(name)


LOAD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from checkpoint import load_model
from common.errors import UserError
ids = torch.arange(32)[None]
for name in sys.argv[2:]:
    try:
        with torch.no_grad():
            print(json.dumps(load_model(name)(ids)[0, -1, :8].tolist()))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def load_in_a_process(names: list[str], home: Path, endpoint: str, **environment: str) -> list:
    """What load_model gives in a fresh process for each name: some logits, or its error."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    command = [sys.executable, "-c", LOAD, str(ROOT), *names]
    result = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=home)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_full_cache_is_named(monkeypatch):
    def fill_up(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise LocalEntryNotFoundError("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill_up)
    with pytest.raises(OSError, match="No space") as caught:
        load_model("some-one/model")
    assert caught.value.filename == huggingface_hub.constants.HF_HUB_CACHE


def test_hub(llama, tmp_path):
    """Hub ids and versions; what is cached loads offline and without a network, nothing else."""
    gpt = original_folder(tmp_path / "original")
    with torch.no_grad():
        expected = gpt(torch.arange(32)[None])[0, -1, :8].tolist()
    parts = Path(shutil.copytree(llama[0], tmp_path / "parts"))
    index = {"weight_map": split_in_two(parts)}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    home = tmp_path / "home"
    home.mkdir()

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    with FakeHub() as hub:
        published = files(tmp_path / "original") | {"tokenizer.pkl": b"not fetched"}
        hub.add("models", "Nikity/lille-130m-instruct", published)
        hub.add("models", "some-one/in_parts", files(parts))
        hub.add("models", "some-one/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        hub.add("models", "some-one/bent", published)
        hub.add("models", "some-one/empty", {"README.md": b"x"})
        last = len(published["model.safetensors"]) - 5
        # The download goes on where it was cut off; that of the third model is damaged.
        hub.faults["model.safetensors"] = [("drop", 1000), ("slow", 0), ("corrupt", last)]
        names = ["130m-instruct", "Nikity/lille-130m-instruct", "some-one/in_parts"]
        others = ["some-one/bent", "some-one/bent", "some-one/none"]
        others += ["some-one/pickled", "some-one/empty"]
        outputs = load_in_a_process([*names, *others], home, hub.url)
        assert outputs[0] == outputs[1] == expected and isinstance(outputs[2], list)
        assert "some-one/bent (model.safetensors) arrived damaged" in outputs[3]
        assert outputs[4] == expected
        assert outputs[5].startswith("the hub has no model some-one/none, or not for you: check")
        assert "no model.safetensors (pickled weights are not read" in outputs[6]
        assert "some-one/empty has no config.json: not a model" in outputs[7]
        fetched = [line.split()[1] for line in hub.requests if line.startswith("GET")]
        assert not any(path.endswith(".pkl") for path in fetched)
        files_fetched = [path for path in fetched if "130m-instruct/resolve" in path]
        assert len(files_fetched) == 3  # one of the two files twice, its end
        assert all(f"/{COMMIT}/" in path for path in fetched if path.endswith(".safetensors"))

        hub.api_delay = 4  # longer than we wait: as without a network
        outputs = load_in_a_process(names[:1] + others[2:3], home, hub.url, HF_HUB_ETAG_TIMEOUT="1")
        assert outputs[0] == expected and "cannot give it (ReadTimeout)" in outputs[1]
        hub.api_delay, hub.log_in = 0, True
        assert load_in_a_process(["some-one/other"], home, hub.url)[0].startswith(
            "cannot fetch some-one/other (Expecting value"
        )

    with socket.socket() as closed:  # nobody listens at a port that was just given back
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert load_in_a_process(["130m-instruct"], home, endpoint) == [expected]
    offline = [*names, "130m-base"]
    outputs = load_in_a_process(offline, home, "https://huggingface.co", HF_HUB_OFFLINE="1")
    assert outputs[0] == outputs[1] == expected and isinstance(outputs[2], list)
    assert outputs[3] == (
        "Nikity/lille-130m-base is not in the local cache and HF_HUB_OFFLINE is set: "
        "unset it for one run, or give the path of a .pt or a folder"
    )
