"""Saving and loading: nothing loaded is drawn again, what is missing is drawn as it should be, dtypes are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_griffin import GriffinForCausalLM
from tests.tolerances import assert_close


ROOT = Path(__file__).resolve().parents[2]
KINDS = ("griffin", "hawk")
IDS = torch.tensor([[1, 5, 2, 28, 7, 7, 0, 3, 9, 11, 4]])


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(kind, tied, small_model, tmp_path):
    model = small_model(kind, "sdpa", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in tensors_of(tmp_path)) != tied
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GriffinForCausalLM and not any(report.values())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_close("exact", loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    for name, tensor in tensors_of(tmp_path).items():
        assert torch.equal(tensors_of(tmp_path / "again")[name], tensor)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto", None], ids=str)
def test_dtypes(stored, dtype, small_model, tmp_path):
    """The dtype asked for, Λ always in float32, and every number the stored one rounded once."""
    small_model().to(stored).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else stored
    assert loaded.dtype == expected
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "lambda" in name else expected), name
        assert torch.equal(parameter, tensors_of(tmp_path)[name].to(parameter.dtype)), name
    loss = loaded(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in loaded.parameters())


def test_lambda_is_saved_in_float32(small_config, tmp_path):
    GriffinForCausalLM._from_config(small_config(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    dtypes = {"lambda" in name: tensor.dtype for name, tensor in tensors_of(tmp_path).items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "to keyword", "type", "submodule"])
def test_casts_leave_lambda_float32(cast, small_model):
    """Casts by hand as from_pretrained: what rounds Λ rounds the memory of every channel."""
    model = small_model()
    decay = model.model.layers[0].temporal_block.rg_lru.decay
    expected = decay.lambda_bias.detach().clone()
    model(IDS, labels=IDS).loss.backward()
    casts = {
        "to": lambda: model.to(torch.bfloat16),
        "half": lambda: model.half(),
        "bfloat16": lambda: model.bfloat16(),
        "to keyword": lambda: model.to("cpu", dtype=torch.float16),
        "type": lambda: model.type(torch.bfloat16),
        "submodule": lambda: model.model.layers.to(torch.bfloat16),
    }
    casts[cast]()
    assert model.model.layers[0].mlp_block.up_proj.weight.dtype in (torch.bfloat16, torch.float16)
    assert decay.lambda_bias.dtype == decay.lambda_bias.grad.dtype == torch.float32
    assert torch.equal(decay.lambda_bias, expected)
    if cast != "submodule":
        model.zero_grad()
        assert model(IDS, labels=IDS).loss.isfinite()


def test_lambda_goes_where_the_model_goes(small_model):
    model = small_model()
    decay = model.model.layers[0].temporal_block.rg_lru.decay
    assert model.double() and decay.lambda_bias.dtype == torch.float64
    assert model.bfloat16() and decay.lambda_bias.dtype == torch.float32
    assert model.to("meta", torch.bfloat16) and decay.lambda_bias.is_meta and decay.lambda_bias.dtype == torch.float32
    assert model.to_empty(device="cpu") and decay.lambda_bias.device.type == "cpu"


@pytest.mark.parametrize("part", ["weight", "bias", "lambda_bias", "layers.0", "norm", "embed_tokens", "lm_head"])
def test_partially_missing_weights(part, small_model, tmp_path):
    """Everything in the file is kept bit for bit, also in a module of which the other half is missing."""
    model = small_model()
    model.save_pretrained(tmp_path)
    dropped = (lambda name: name.endswith(f".{part}")) if part in ("weight", "bias") else (lambda name: part in name)
    kept = {name: tensor for name, tensor in tensors_of(tmp_path).items() if not dropped(name)}
    missing = set(tensors_of(tmp_path)) - set(kept)
    assert kept and missing
    rewrite(tmp_path, kept)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(9)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert report["missing_keys"] == missing
        state = loaded.state_dict()
        for name, tensor in kept.items():
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name
        for name in missing:
            assert state[name].isfinite().all(), name
            assert not torch.equal(state[name].float(), model.state_dict()[name]), name
            is_zero = name.endswith(".bias") or "norm" in name
            assert (state[name] == 0).all() == is_zero, name


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_from_a_language_model_to_another_head(auto_class, small_model, tmp_path):
    model = small_model(attention="sdpa")
    model.save_pretrained(tmp_path)
    loaded, report = auto_class.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score"}
    body = loaded if auto_class is AutoModel else loaded.model
    assert_close("exact", body.eval()(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    if auto_class is not AutoModel:
        assert loaded.score.weight.shape == (4, 16) and 0 < loaded.score.weight.std() < 1
    loaded.save_pretrained(tmp_path / "head")
    again = auto_class.from_pretrained(tmp_path / "head").eval()
    assert_close("exact", again(IDS)[0], loaded(IDS)[0])


def test_a_checkpoint_in_several_files(small_model, tmp_path):
    model = small_model(attention="sdpa")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_close("exact", AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_loading_does_not_disturb_the_random_state(small_model, tmp_path):
    """A complete checkpoint draws nothing."""
    small_model().save_pretrained(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_same_logits_in_a_new_process(small_model, tmp_path):
    """With nothing but `import modeling_griffin`, from another folder."""
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys, torch, modeling_griffin\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained('model', attn_implementation='eager')\n"
        "torch.save(model(torch.tensor(eval(sys.argv[1]))).logits, 'logits.pt')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code, str(IDS.tolist())], check=True, cwd=tmp_path, env=environment)
    assert_close("exact", torch.load(tmp_path / "logits.pt"), model(IDS).logits)
