"""Adapter folders: ours open in peft and peft's open here with equal logits; another base is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcourse.models.adapters import PromptSettings, add_adapters, add_prompt, prepend_prompt
from llmcourse.models.config import ModelConfig
from llmcourse.models.lora import (
    LoRASettings,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
)
from llmcourse.models.nf4 import quantize_model
from llmcourse.models.peft_format import PREFIX, base_fingerprint, load_adapter, save_adapter
from llmcourse.models.pretrained import save_pretrained
from llmcourse.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, context_length=48, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_head=6, d_ff=20
)
KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "some": {"targets": ("query", "down")},
}


def small_model(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(replace(CONFIG, **changes)).eval()


def some_tokens() -> torch.Tensor:
    return torch.randint(61, (2, 35), generator=torch.Generator().manual_seed(5))


def shake(parameters: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + noise) if parameter.ndim == 1 else parameter.add_(noise)


def adapted(kind: str = "lora", **changes: object) -> Transformer:
    model = add_lora(small_model(), LoRASettings(**({"rank": 3, "alpha": 5.0} | KINDS[kind] | changes)))
    shake(list(lora_parameters(model).values()))
    return model


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(some_tokens())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return folder


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_opens_in_peft_with_the_same_logits(kind, qk_norm, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = small_model(qk_norm=qk_norm)
    save_pretrained(base, tmp_path / "base")
    before = logits(base)
    model = add_lora(base, LoRASettings(**({"rank": 3, "alpha": 5.0} | KINDS[kind])))
    shake(list(lora_parameters(model).values()))
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        expected = theirs(some_tokens()).logits
        merged = theirs.merge_and_unload()(some_tokens()).logits
    assert (logits(model) - before).abs().max() > 0.05
    assert (logits(model) - expected).abs().max() < 1e-5
    merge_lora(model)
    assert (logits(model) - merged).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_opens_here_with_the_same_logits(kind, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = small_model()
    save_pretrained(model, tmp_path / "base")
    options = KINDS[kind]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora="rslora" in options,
        use_dora="dora" in options,
        target_modules=r".*\.(q_proj|down_proj)$" if kind == "some" else "all-linear",
        init_lora_weights="gaussian",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs.eval()(some_tokens()).logits
    assert (logits(model) - expected).abs().max() < 1e-5
    settings = next(iter(lora_layers(model).values())).settings
    expected_settings = LoRASettings(rank=4, alpha=6, dropout=0.1, init="gaussian", **options)
    assert set(settings.targets) == set(expected_settings.targets)
    assert replace(settings, targets=expected_settings.targets) == expected_settings


def test_a_prompt_goes_to_peft_and_back(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = small_model()
    save_pretrained(model, tmp_path / "base")
    add_prompt(model, PromptSettings(length=5))
    shake([model.embedding.prompt])
    save_adapter(model, tmp_path / "prompt")
    batch = prepend_prompt(model, {"tokens": some_tokens(), "targets": some_tokens()})
    with torch.no_grad():
        ours = model(batch["tokens"])
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "prompt"
        ).eval()
        assert (theirs(some_tokens()).logits - ours).abs().max() < 1e-5
        theirs.save_pretrained(tmp_path / "back")
        again = load_adapter(small_model(), tmp_path / "back")
        assert torch.equal(again(batch["tokens"]), ours)
    narrow = small_model(d_model=18)
    with pytest.raises(ValueError, match=r"prompt_embeddings is \(5, 24\), this model needs \(5, 18\)"):
        load_adapter(narrow, tmp_path / "prompt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_changes_no_bit(kind, tmp_path):
    model = adapted(kind, dropout=0.2)
    merge_lora(model)  # what is written does not depend on it
    again = load_adapter(small_model(), save_adapter(model, tmp_path))
    for (name, one), (other_name, other) in zip(
        lora_parameters(model).items(), lora_parameters(again).items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other) and other.requires_grad
    assert all(layer.settings.dropout == 0.2 for layer in lora_layers(again).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_fingerprint_survives_quantization_rounding_and_adapters():
    base = base_fingerprint(small_model())
    assert base_fingerprint(adapted()) == base
    assert base_fingerprint(quantize_model(small_model())) == base
    assert base_fingerprint(small_model().bfloat16()) == base
    assert base_fingerprint(add_prompt(small_model(), PromptSettings(length=3))) == base
    others = [small_model(1), small_model(rope_theta=5000.0), small_model(tie_embeddings=False)]
    gains = small_model()
    with torch.no_grad():
        gains.blocks[1].mlp_norm.weight[3] = 1.25
    head = small_model(tie_embeddings=False)
    with torch.no_grad():
        head.head.weight[0, 0] += 1
    prints = {base, *(base_fingerprint(model) for model in (*others, gains, head))}
    assert len(prints) == 6


def test_an_adapter_trained_on_a_quantized_base_opens_on_the_plain_one(tmp_path):
    model = add_lora(quantize_model(small_model()), LoRASettings(rank=3))
    shake(list(lora_parameters(model).values()))
    save_adapter(model, tmp_path)
    for base in (small_model(), quantize_model(small_model())):
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))


def test_another_base_is_refused_and_left_alone(folder):
    foreign = small_model(1)
    before = logits(foreign)
    with pytest.raises(ValueError, match="trained on another base") as error:
        load_adapter(foreign, folder)
    assert "\n" not in str(error.value) and not lora_layers(foreign)
    assert torch.equal(logits(foreign), before) and all(p.requires_grad for p in foreign.parameters())
    assert len(lora_layers(load_adapter(foreign, folder, any_base=True))) == 14
    for change, message in (
        (
            {"d_model": 36},
            r"lora_A.weight is \(3, 24\), this model needs \(3, 36\): it belongs to another base",
        ),
        ({"n_layers": 1}, r"layers\.1\..*belongs to another base"),
        ({"n_layers": 3}, r"layers\.2\..*is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(small_model(**change), folder, any_base=True)


def test_adapters_of_one_base_can_take_turns(tmp_path):
    first, second = adapted(), adapted("dora")
    save_adapter(first, tmp_path / "1")
    save_adapter(second, tmp_path / "2")
    model = small_model()
    for model_of, name in ((first, "1"), (second, "2"), (first, "1")):
        load_adapter(model, tmp_path / name)
        assert torch.equal(logits(model), logits(model_of))
        remove_lora(model)


def test_unsupported_and_damaged_folders_are_refused(folder, tmp_path):
    query = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"r": None}, "r=None"),
        ({"r": 4}, r"lora_A.weight is \(3, 24\), this model needs \(4, 24\)"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ]
    for number, (change, message) in enumerate(cases):
        copy = shutil.copytree(folder, tmp_path / f"config{number}")
        with pytest.raises(ValueError, match=message):
            load_adapter(small_model(), edit(copy, **change))
    tensors = [
        ({query: torch.full((3, 24), torch.nan)}, "NaN or infinity"),
        ({query: None}, "is missing"),
        ({f"{PREFIX}lm_head.lora_A.weight": torch.ones(3, 24)}, "lm_head, which this model cannot adapt"),
        ({query.replace("_A", "_C"): torch.ones(1)}, "does not account for"),
    ]
    for number, (change, message) in enumerate(tensors):
        copy = shutil.copytree(folder, tmp_path / f"tensors{number}")
        with pytest.raises(ValueError, match=message):
            load_adapter(small_model(), rewrite(copy, **change))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_adapter(small_model(), folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load_adapter(small_model(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        load_adapter(small_model(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        load_adapter(small_model(), folder)
    with pytest.raises(ValueError, match="no such folder"):
        load_adapter(small_model(), tmp_path / "nowhere")


def test_models_that_cannot_be_saved_or_loaded_into(folder, tmp_path):
    with pytest.raises(ValueError, match="neither LoRA nor a prompt"):
        save_adapter(small_model(), tmp_path)
    both = add_prompt(adapted(), PromptSettings(length=3))
    with pytest.raises(ValueError, match="both LoRA and a prompt"):
        save_adapter(both, tmp_path)
    with pytest.raises(ValueError, match="an adapter already"):
        load_adapter(adapted(), folder)
    with pytest.raises(ValueError, match="inside another adapter"):
        load_adapter(add_adapters(small_model()), folder)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(adapted(), blocked)
