"""Folders in Hugging Face's format: equal logits in both directions, round trips, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmcourse.models import pretrained
from llmcourse.models.config import ModelConfig
from llmcourse.models.pretrained import config_from_hub, from_pretrained, save_pretrained, state_to_hub
from llmcourse.models.transformer import Transformer

HEADS = {"GQA": (4, 2), "MHA": (4, 4), "MQA": (4, 1)}
T = 50  # beyond 32, where the blocked kernel takes over


def config_of(kind: str, *, qk_norm: bool, tied: bool) -> ModelConfig:
    H, K = HEADS[kind]
    return ModelConfig(
        vocab_size=97,
        context_length=64,
        d_model=32,
        n_layers=3,
        n_heads=H,
        n_kv_heads=K,
        d_head=10,  # not d_model / n_heads
        d_ff=44,
        rope_theta=5000.0,
        norm_eps=1e-4,
        tie_embeddings=tied,
        qk_norm=qk_norm,
    )


def scramble(model: torch.nn.Module, seed: int) -> None:
    """Random weights, norm gains too, so that no mapping error can hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1)


def some_tokens() -> torch.Tensor:
    return torch.randint(97, (3, T), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: Transformer, theirs: torch.nn.Module) -> None:
    tokens = some_tokens()
    with torch.no_grad():
        own, other = ours(tokens), theirs(tokens).logits
    assert own.std() > 0.1
    assert (own - other).abs().max() < 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Transformer(config_of("GQA", qk_norm=False, tied=True))
    scramble(model, 0)
    return save_pretrained(model, tmp_path / "model")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kind", HEADS)
def test_ours_opens_there_with_the_same_logits(kind, qk_norm, tied, tmp_path):
    config = config_of(kind, qk_norm=qk_norm, tied=tied)
    model = Transformer(config).eval()
    scramble(model, 3)
    save_pretrained(model, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is (Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_logits(model, theirs.eval())
    # and once more through our own reader: not a bit changes
    again = from_pretrained(tmp_path)
    assert again.config == config and not again.training
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert (again.head.weight is again.embedding.weight) == tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kind", HEADS)
def test_theirs_opens_here_with_the_same_logits(kind, qk_norm, tied, tmp_path):
    H, K = HEADS[kind]
    family, model_class = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    theirs = model_class(
        family(
            vocab_size=97,
            max_position_embeddings=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=12,
            intermediate_size=40,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        )
    ).eval()
    scramble(theirs, 4)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert ours.config.rope_theta == 777.0 and ours.config.tie_embeddings == tied
    assert_same_logits(ours, theirs)
    # back again, under our hand
    save_pretrained(ours, tmp_path / "back")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval())


def test_a_default_llama_config_opens(tmp_path):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
        )
    ).eval()
    scramble(theirs, 5)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(from_pretrained(tmp_path), theirs)


def test_older_files_without_rope_parameters_or_kv_heads_open():
    hub = {
        "model_type": "llama",
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 24,
    }
    config = config_from_hub(hub)
    assert (config.n_kv_heads, config.d_head, config.rope_theta, config.norm_eps) == (4, 8, 10_000.0, 1e-6)
    assert config_from_hub(hub | {"rope_theta": 500_000}).rope_theta == 500_000.0


def test_a_sharded_checkpoint_opens(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    expected = from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    for name, tensor in from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_dtype_is_the_one_asked_for(folder):
    assert from_pretrained(folder, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    assert from_pretrained(folder).embedding.weight.dtype == torch.float32


def test_a_tied_head_is_stored_once(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    untied = Transformer(config_of("GQA", qk_norm=False, tied=False))
    assert "lm_head.weight" in state_to_hub(untied)


def test_saving_again_replaces_the_files_and_leaves_nothing_else(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    model = Transformer(config_of("MHA", qk_norm=True, tied=False))
    save_pretrained(model, folder)
    assert {path.name for path in folder.iterdir()} == names
    assert from_pretrained(folder).config == model.config


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': only llama and qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8}}, "rope scaling"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling"),
        ({"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"partial_rotary_factor": 0.25}, "partial rotary"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"head_dim": 7}, "d_head=7 is odd"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_this_model_lacks_is_refused(folder, change, word):
    edit(folder, **change)
    assert_refused(folder, word)


def assert_refused(where: Path | str, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        from_pretrained(where)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_a_config_without_a_needed_entry_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "config.json", "intermediate_size")


def test_wrong_folders_are_refused(folder, tmp_path):
    assert_refused(tmp_path / "nothing", "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "holds no config.json")
    assert_refused("a/b/c", "no such folder")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert_refused(folder, "model.safetensors", "truncated or damaged")
    weights.unlink()
    assert_refused(folder, "holds no model*.safetensors")
    weights.write_bytes(content)
    (folder / "config.json").write_text("{")
    assert_refused(folder, "config.json", "no JSON")


def test_tensors_that_do_not_fit_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lacking = {n: t for n, t in tensors.items() if n != "model.layers.2.mlp.up_proj.weight"}
    save_file(lacking, path)
    assert_refused(folder, "model.layers.2.mlp.up_proj.weight is missing", "(44, 32)")
    save_file(tensors | {"model.norm.bias": torch.zeros(32)}, path)
    assert_refused(folder, "holds model.norm.bias")
    save_file(tensors | {"model.norm.weight": torch.zeros(31)}, path)
    assert_refused(folder, "model.norm.weight is of shape (31,)", "(32,)")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}, path)
    from_pretrained(folder)  # a table that old checkpoints carry and nobody needs
    edit(folder, vocab_size=96)
    assert_refused(folder, "model.embed_tokens.weight is of shape (97, 32)", "(96, 32)")


def test_a_hub_name_is_opened_through_the_hubs_client(folder, monkeypatch):
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert from_pretrained("org/model").config.d_ff == 44
    assert asked == ["org/model"]


def test_no_network_for_a_hub_name_is_one_line(monkeypatch):
    def fail(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("long\ntext")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert_refused("org/model", "org/model", "the Hub cannot be reached", "give a local folder")


def test_a_full_disk_leaves_the_old_model(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(Transformer(config_of("MHA", qk_norm=True, tied=False)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_opening_a_local_folder_imports_no_transformers(folder):
    code = (
        "import sys; from llmcourse.models.pretrained import from_pretrained;"
        f"from_pretrained({str(folder)!r}); sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
