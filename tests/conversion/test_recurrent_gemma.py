"""Conversion: RecurrentGemma of Transformers, DeepMind's checkpoints, and back."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurrent_gemma_models import small_recurrent_gemma, small_recurrent_gemma_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaForCausalLM,
)

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.conversion.recurrent_gemma import (
    RG_LRU_NAMES,
    griffin_config_from_recurrent_gemma,
    griffin_name,
    griffin_tensors_from_deepmind,
    recurrent_gemma_config_from_griffin,
    recurrent_gemma_name,
)


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_recurrent_gemma.py"
spec = importlib.util.spec_from_file_location("convert_recurrent_gemma", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    )


@pytest.fixture
def source(tmp_path) -> Path:
    """A bfloat16 checkpoint in several files, with tokenizer and generation config."""
    folder = tmp_path / "source"
    model = small_recurrent_gemma().to(torch.bfloat16)
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=1)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def ids(length: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 61, (2, length))


# Configurations and names


def test_config_says_what_the_source_meant():
    config = griffin_config_from_recurrent_gemma(small_recurrent_gemma_config(), GriffinConfig)
    assert config.attention_window_size == 7  # 6 past tokens and itself
    assert config.intermediate_size == 96  # one branch
    assert config.num_gate_blocks == config.num_attention_heads == 4
    assert config.num_key_value_heads == 1
    assert config.layer_types == ["linear_attention", "linear_attention", "sliding_attention"]
    assert (config.final_logit_softcapping, config.scale_embeddings, config.rg_lru_c) == (30.0, True, 8.0)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert config.lambda_init == "recurrent_gemma"


def test_default_key_value_heads_are_not_multi_query():
    config = griffin_config_from_recurrent_gemma(small_recurrent_gemma_config(num_key_value_heads=None), GriffinConfig)
    assert config.num_key_value_heads == 4


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"block_types": ["recurrent"]},
        {"block_types": ["attention", "recurrent"], "num_hidden_layers": 5},
        {"num_key_value_heads": 2, "lru_width": 48, "conv1d_width": 3, "logits_soft_cap": 50.0},
        {"tie_word_embeddings": False, "eos_token_id": [1, 7], "dtype": torch.bfloat16, "rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_config_comes_back(change):
    theirs = small_recurrent_gemma_config(**change)
    ours = griffin_config_from_recurrent_gemma(theirs, GriffinConfig)
    back = recurrent_gemma_config_from_griffin(ours).to_dict()
    assert back | {"architectures": None} == theirs.to_dict()
    assert griffin_config_from_recurrent_gemma(recurrent_gemma_config_from_griffin(ours), GriffinConfig) == ours


def test_attention_bias_is_refused():
    with pytest.raises(ValueError, match="attention_bias = True"):
        griffin_config_from_recurrent_gemma(small_recurrent_gemma_config(attention_bias=True), GriffinConfig)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="model_type = 'griffin'"):
        griffin_config_from_recurrent_gemma(GriffinConfig(), GriffinConfig)


@pytest.mark.parametrize(
    "change",
    [
        {"num_gate_blocks": 8},
        {"head_dim": 16},
        {"rg_lru_c": 4.0},
        {"scale_embeddings": False},
        {"final_logit_softcapping": None},
    ],
)
def test_what_the_port_cannot_express_is_refused(change):
    config = griffin_config_from_recurrent_gemma(small_recurrent_gemma_config(), GriffinConfig).to_dict() | change
    with pytest.raises(ValueError, match=next(iter(change))):
        recurrent_gemma_config_from_griffin(GriffinConfig(**config))


def test_every_name_maps_and_comes_back():
    theirs = small_recurrent_gemma().state_dict().keys()
    ours = (
        GriffinForCausalLM(griffin_config_from_recurrent_gemma(small_recurrent_gemma_config(), GriffinConfig))
        .state_dict()
        .keys()
    )
    assert [griffin_name(name) for name in theirs] == sorted(ours, key=[griffin_name(n) for n in theirs].index)
    assert [recurrent_gemma_name(griffin_name(name)) for name in theirs] == list(theirs)
    assert len(RG_LRU_NAMES) == 5


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model(dtype):
    theirs = small_recurrent_gemma().to(dtype)
    theirs.generation_config.temperature = 0.5
    ours = GriffinForCausalLM.from_recurrent_gemma(theirs)
    assert isinstance(ours, GriffinForCausalLM) and not ours.training
    assert ours.generation_config.temperature == 0.5
    state, source_state = ours.state_dict(), theirs.state_dict()
    for name, tensor in source_state.items():
        expected = tensor.float() if name.endswith("recurrent_param") else tensor
        assert state[griffin_name(name)].dtype == expected.dtype
        assert torch.equal(state[griffin_name(name)], expected), name
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_the_source_keeps_its_own_weights():
    theirs = small_recurrent_gemma()
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = GriffinForCausalLM.from_recurrent_gemma(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same_tensors(before, theirs.state_dict())


def test_a_folder(source, tmp_path):
    ours = GriffinForCausalLM.from_recurrent_gemma(source)
    expected = GriffinForCausalLM.from_recurrent_gemma(RecurrentGemmaForCausalLM.from_pretrained(source))
    assert ours.dtype == torch.bfloat16 and ours.generation_config.temperature == 0.7
    assert_same_tensors(ours.state_dict(), expected.state_dict())
    ours.save_pretrained(tmp_path / "saved")
    assert any(name.endswith("decay.lambda_bias") for name in all_tensors(tmp_path / "saved"))
    assert_same_tensors(GriffinForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), ours.state_dict())


def test_a_folder_in_another_dtype(source):
    ours = GriffinForCausalLM.from_recurrent_gemma(source, dtype=torch.float32)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_untied_head():
    theirs = small_recurrent_gemma(tie_word_embeddings=False)
    ours = GriffinForCausalLM.from_recurrent_gemma(theirs)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert not torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)


# The script


def test_script_there_and_back(source, tmp_path, capsys):
    script.main([str(source), str(tmp_path / "griffin"), "--max-shard-size", "30KB"])
    assert len(list((tmp_path / "griffin").glob("model-*-of-*.safetensors"))) > 1
    ours = GriffinForCausalLM.from_pretrained(tmp_path / "griffin")
    assert_same_tensors(ours.state_dict(), GriffinForCausalLM.from_recurrent_gemma(source).state_dict())
    assert ours.generation_config.temperature == 0.7 and ours.config.architectures == ["GriffinForCausalLM"]
    assert (tmp_path / "griffin" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    said = capsys.readouterr().out
    assert "attention_window_size: 6 -> 7" in said and "intermediate_size: 192 -> 96" in said
    assert "2 float32" in said and "tokenizer.json" in said

    script.main([str(tmp_path / "griffin"), str(tmp_path / "back"), "--reverse"])
    assert_same_tensors(all_tensors(tmp_path / "back"), all_tensors(source))
    back, before = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "back", source))
    assert back | {"_name_or_path": None} == before | {"_name_or_path": None}
    theirs, again = (RecurrentGemmaForCausalLM.from_pretrained(f) for f in (source, tmp_path / "back"))
    assert torch.equal(theirs(ids(12)).logits, again(ids(12)).logits)


def test_a_trained_decay_is_not_rounded_on_the_way_back(source, tmp_path):
    ours = GriffinForCausalLM.from_recurrent_gemma(source)
    decay = ours.model.layers[0].temporal_block.rg_lru.decay
    with torch.no_grad():
        decay.lambda_bias.add_(1e-4)
    ours.save_pretrained(tmp_path / "trained")
    script.main([str(tmp_path / "trained"), str(tmp_path / "back"), "--reverse"])
    saved = all_tensors(tmp_path / "back")["model.layers.0.temporal_block.rg_lru.recurrent_param"]
    assert saved.dtype == torch.float32 and torch.equal(saved, decay.lambda_bias)
    untouched = all_tensors(tmp_path / "back")["model.layers.1.temporal_block.rg_lru.recurrent_param"]
    assert untouched.dtype == torch.bfloat16


def test_script_refuses_an_existing_target(source, tmp_path):
    (tmp_path / "griffin").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in ("griffin", "link", "source"):
        with pytest.raises(SystemExit, match=f"{target}: exists; allowed is a new folder"):
            script.main([str(source), str(tmp_path / target)])


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_script_that_is_ended_half_way(source, tmp_path, sign, capsys):
    """SIGTERM leaves nothing; what SIGKILL leaves is named by the next one, which converts all the same."""
    code = (
        "import runpy, sys, time, safetensors.torch as files\n"
        "write = files.save_file\n"
        "def save_file(*words, **more):\n"
        "    write(*words, **more); print('half', flush=True); time.sleep(60)\n"
        "files.save_file, sys.argv[0] = save_file, sys.argv[1]\n"
        "del sys.argv[1]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(SCRIPT), str(source), str(tmp_path / "griffin")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parent)))}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(sign)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("griffin")]
    assert left == ([] if sign == signal.SIGTERM else [f"griffin.unfinished-{process.pid}"])
    script.main([str(source), str(tmp_path / "griffin")])
    assert all(f"{name} was left by a conversion that was killed" in capsys.readouterr().err for name in left)
    assert (tmp_path / "griffin" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "words",
    [["--revision", "a"], ["--logits-soft-cap", "0"], ["--attention-window-size", "9"], ["--no-scale-embeddings"]],
)
def test_script_refuses_what_it_would_not_heed(source, tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        script.main([str(source), str(tmp_path / "griffin"), *words])
    assert f"{words[0]}" in (said := capsys.readouterr().err) and "allowed is with" in said
    assert not (tmp_path / "griffin").exists()


DAMAGES = {
    "missing shard": "missing; allowed are checkpoints in safetensors",
    "cut shard": "Error while deserializing header",
    "bias": "attention_bias = True",
    "no weights": "missing; allowed are checkpoints in safetensors",
    "a tensor less": "the source lacks model.layers.0.mlp_block.up_proj.weight ",
    "a tensor more": "the source has unknown model.layers.7.mlp_block.up_proj.weight ",
    "a tensor twice": "the source has model.layers.0.mlp_block.up_proj.weight twice",
    "another shape": "the source has wrong shapes for model.layers.0.mlp_block.up_proj.weight ",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failure_leaves_nothing(source, tmp_path, damage):
    """And ends in one line. Loading would draw the tensor that is missing at random."""
    shards = sorted(source.glob("*.safetensors"))
    if damage == "missing shard":
        shards[-1].unlink()
    elif damage == "a tensor twice":
        name = "model.layers.0.mlp_block.up_proj.weight"
        weight = all_tensors(source)[name]
        for shard in shards:
            save_file({**load_file(shard), name: weight}, shard, metadata={"format": "pt"})
    elif damage in ("a tensor less", "a tensor more", "another shape"):
        name = "model.layers.0.mlp_block.up_proj.weight"
        (shard,) = [file for file in shards if name in load_file(file)]
        tensors = load_file(shard)
        weight = tensors.pop(name)
        if damage != "a tensor less":
            tensors[name] = weight.T.contiguous() if damage == "another shape" else weight
        if damage == "a tensor more":
            tensors["model.layers.7.mlp_block.up_proj.weight"] = weight.clone()
        save_file(tensors, shard, metadata={"format": "pt"})
    elif damage == "cut shard":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-10])
    elif damage == "no weights":
        for file in source.glob("*safetensors*"):
            file.unlink()
    else:
        config = json.loads((source / "config.json").read_text()) | {"attention_bias": True}
        (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=DAMAGES[damage]) as stop:
        script.main([str(source), str(tmp_path / "griffin")])
    assert str(stop.value).startswith("convert_recurrent_gemma.py: error: ") and "\n" not in str(stop.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refusal(source, tmp_path, *arguments) -> str:
    """The one line with which the script ends; nothing is left beside what was there."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        script.main([str(source), str(tmp_path / "griffin"), *arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    start = "convert_recurrent_gemma.py: error: "
    assert str(stop.value).startswith(start) and "\n" not in str(stop.value)
    return str(stop.value).removeprefix(start)


def changed(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in ("nan", "inf"):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = float(kind)
        return tensor
    return tensor.to(getattr(torch, kind))


NO_WEIGHTS = {
    "nan": "holds NaN or infinity",
    "inf": "holds NaN or infinity",
    "int32": "is torch.int32: allowed are dense tensors of float32",
    "bool": "is torch.bool: allowed",
    "float8_e4m3fn": "is torch.float8_e4m3fn: allowed",
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_tensors_that_are_no_weights(source, tmp_path, kind, reverse):
    name, folder, arguments = "model.layers.0.mlp_block.up_proj.weight", source, []
    if reverse:
        script.main([str(source), str(tmp_path / "there")])
        folder, arguments = tmp_path / "there", ["--reverse"]
    (shard,) = [file for file in folder.glob("*.safetensors") if name in load_file(file)]
    tensors = load_file(shard)
    save_file({**tensors, name: changed(tensors[name], kind)}, shard, metadata={"format": "pt"})
    assert refusal(folder, tmp_path, *arguments).startswith(f"{name} {NO_WEIGHTS[kind]}")


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_tensors_of_deepmind_that_are_no_weights(tmp_path, kind):
    tensors, name = deepmind_state_dict(), "blocks.1.recurrent_block.rg_lru.a_param"
    torch.save({**tensors, name: changed(tensors[name], kind)}, tmp_path / "2b.pt")
    assert refusal(tmp_path / "2b.pt", tmp_path).startswith(f"{name} {NO_WEIGHTS[kind]}")


@pytest.mark.parametrize(
    "index, message",
    [
        ([], "holds a list: allowed is a JSON object"),
        ({}, "weight_map = None in "),
        ({"weight_map": [1]}, "weight_map = [1] in "),
        ("../other.safetensors", "names '../other.safetensors': allowed are safetensors files beside it"),
        ("/other.safetensors", "names '/other.safetensors': allowed"),
        ("config.json", "names 'config.json': allowed"),
        (5, "names 5: allowed"),
    ],
    ids=str,
)
def test_an_index_that_is_none(source, tmp_path, index, message):
    path = source / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    name = next(iter(good))
    if not isinstance(index, (list, dict)):
        index = {"weight_map": {**good, name: index}}
    path.write_text(json.dumps(index))
    assert message in refusal(source, tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "holds a list: allowed is a JSON object"),
        ("{", "is not JSON"),
        ('{"model_type": "recurrent_gemma", "auto_map": null}', "auto_map = None in "),
        ('{"model_type": "recurrent_gemma", "hidden_size": "wide"}', "cannot be converted ("),
        ('{"model_type": "recurrent_gemma", "block_types": 3}', "cannot be converted ("),
        ('{"model_type": ["recurrent_gemma"]}', "cannot be converted ("),
        (None, "missing; allowed are folders that save_pretrained wrote"),
    ],
)
def test_a_configuration_that_is_none(source, tmp_path, text, message):
    if text is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(text)
    assert message in refusal(source, tmp_path)


def test_a_tokenizer_that_is_a_link(source, tmp_path):
    """Out of the folder: what it leads to would be given away. To nothing: the copy would lack it."""
    (tmp_path / "elsewhere").write_text("{}")
    tokenizer = source / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to(tmp_path / "elsewhere")
    expected = f"{tokenizer}: a link to {tmp_path / 'elsewhere'}; allowed are files of the folder itself"
    assert refusal(source, tmp_path) == expected
    (tmp_path / "elsewhere").unlink()
    assert refusal(source, tmp_path).startswith(f"{tokenizer}: a link to nothing, or not a file")
    tokenizer.unlink()
    tokenizer.mkdir()
    assert refusal(source, tmp_path).startswith(f"{tokenizer}: a link to nothing, or not a file")
    tokenizer.rmdir()
    tokenizer.write_text("[]")
    assert refusal(source, tmp_path).startswith(f"{tokenizer} holds a list")


def test_links_of_the_hubs_cache(source, tmp_path):
    """A snapshot is a folder of links to the blobs beside it."""
    cache = tmp_path / "models--google--small"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in source.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    script.main([str(snapshot), str(tmp_path / "griffin")])
    copied = tmp_path / "griffin" / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_bytes() == (blobs / "tokenizer.json").read_bytes()


def test_only_exact_names_are_copied(source, tmp_path):
    for name in ("tokenizer_token.txt", "tokenizer.env", "LICENSE_KEY.txt", "secret.model", "NOTICE.pem", "LICENSE"):
        (source / name).write_text("hf_SECRET")
    script.main([str(source), str(tmp_path / "griffin")])
    names = {path.name for path in (tmp_path / "griffin").iterdir()}
    assert not names & {"tokenizer_token.txt", "tokenizer.env", "LICENSE_KEY.txt", "secret.model", "NOTICE.pem"}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json"} <= names


@pytest.mark.parametrize("size", ["infGB", "nanGB", "-1GB", "5", "GB", "5TB"])
def test_a_size_that_is_none(source, tmp_path, size):
    assert refusal(source, tmp_path, f"--max-shard-size={size}").startswith(f"max_shard_size = {size!r}: allowed are")


def test_script_takes_a_hub_id(source, tmp_path, monkeypatch):
    asked = []

    def download(repo, allow_patterns, revision):
        asked.append((repo, revision))
        assert {"*.safetensors", "*.json", "tokenizer.model"} <= set(allow_patterns)
        return str(source)

    monkeypatch.setattr(script, "snapshot_download", download)
    monkeypatch.setattr(script, "require_on_hub", lambda field, name, kind, allowed: None)
    script.main(["someone/recurrentgemma", str(tmp_path / "griffin"), "--revision", "v2"])
    assert asked == [("someone/recurrentgemma", "v2")]
    assert GriffinForCausalLM.from_pretrained(tmp_path / "griffin").dtype == torch.bfloat16


def test_script_streams(tmp_path, monkeypatch):
    """Never holds more than one shard of the target."""
    small_recurrent_gemma().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    held = []
    original = script.ShardWriter.flush
    monkeypatch.setattr(script.ShardWriter, "flush", lambda self: (held.append(self.waiting_bytes), original(self)))
    script.main([str(tmp_path / "source"), str(tmp_path / "griffin"), "--max-shard-size", "20KB"])
    assert len(held) > 3 and max(held) <= 20000


def deepmind_state_dict(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The names and shapes of DeepMind's torch checkpoints: two recurrent layers and one attention layer."""
    width, heads, lru, branch = 32, 4, 48, 96
    shapes = {"embedder.input_embedding": (61, width), "final_norm.scale": (width,)}
    for i in range(3):
        shapes |= {f"blocks.{i}.{norm}.scale": (width,) for norm in ("temporal_pre_norm", "channel_pre_norm")}
        up = {"ffw_up.w": (2, width, branch), "ffw_up.b": (2, 1, 1, branch)}
        down = {"ffw_down.weight": (width, branch), "ffw_down.bias": (width,)}
        shapes |= {f"blocks.{i}.mlp_block.{name}": shape for name, shape in (up | down).items()}
        gate, bias = (heads, lru // heads, lru // heads), (heads, lru // heads)
        recurrent = {
            "linear_x.weight": (lru, width),
            "linear_y.weight": (lru, width),
            "linear_out.weight": (width, lru),
        }
        recurrent |= {"linear_x.bias": (lru,), "linear_y.bias": (lru,), "linear_out.bias": (width,)}
        recurrent |= {"conv_1d.w": (4, lru), "conv_1d.b": (lru,), "rg_lru.a_param": (lru,)}
        recurrent |= {"rg_lru.a_gate.w": gate, "rg_lru.a_gate.b": bias}
        recurrent |= {"rg_lru.input_gate.w": gate, "rg_lru.input_gate.b": bias}
        attention = {"proj_q.weight": (width, width), "proj_k.weight": (width // heads, width)}
        attention |= {"proj_v.weight": (width // heads, width), "proj_final.weight": (width, width)}
        attention |= {"proj_final.bias": (width,)}
        kind, names = ("attention_block", attention) if i == 2 else ("recurrent_block", recurrent)
        shapes |= {f"blocks.{i}.{kind}.{name}": shape for name, shape in names.items()}
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def test_script_converts_deepminds_file(tmp_path, capsys):
    tensors = deepmind_state_dict()
    torch.save(tensors, tmp_path / "2b.pt")
    script.main([str(tmp_path / "2b.pt"), str(tmp_path / "griffin"), "--attention-window-size", "10"])
    config = GriffinConfig.from_pretrained(tmp_path / "griffin")
    assert config.attention_window_size == 11 and config.num_gate_blocks == config.num_attention_heads == 4
    assert (config.intermediate_size, config.lru_width, config.num_key_value_heads) == (96, 48, 1)
    assert (config.final_logit_softcapping, config.scale_embeddings) == (30.0, True)
    model, report = GriffinForCausalLM.from_pretrained(tmp_path / "griffin", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name, tensor in tensors.items():
        for ours, expected in griffin_tensors_from_deepmind(name, tensor).items():
            assert torch.equal(state[ours], expected)
    with torch.no_grad():
        assert model(ids(15)).logits.isfinite().all()


def test_script_reads_files_of_old_pytorch(tmp_path):
    torch.save(deepmind_state_dict(), tmp_path / "new.pt")
    torch.save(deepmind_state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new", "old"):
        script.main([str(tmp_path / f"{name}.pt"), str(tmp_path / name)])
    assert_same_tensors(all_tensors(tmp_path / "new"), all_tensors(tmp_path / "old"))


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight": torch.zeros(2)}, "embedder.input_embedding is missing"),
        ({"embedder.input_embedding": torch.zeros(2, 2), "blocks.0.x": torch.zeros(2)}, "lacks 'blocks.0"),
        ([torch.zeros(2)], "holds a list: allowed is DeepMind's state dict"),
        ({"embedder.input_embedding": 3}, "embedder.input_embedding = 3: allowed is a tensor"),
        ({"embedder.input_embedding": torch.zeros(2)}, r"input_embedding has shape \(2,\): allowed are 2 dimensions"),
        ({"embedder.input_embedding": torch.zeros(2, 0)}, r"input_embedding has shape \(2, 0\): allowed"),
        ({"embedder.input_embedding": torch.zeros(2, 2)}, "blocks none: allowed are blocks from 0 on"),
        ({"embedder.input_embedding": torch.zeros(2, 2), 7: torch.zeros(2)}, "allowed are tensors, under the names"),
        ({"embedder.input_embedding": torch.zeros(2, 2), "step": 7}, "step = 7: allowed are tensors"),
        (("blocks.0.mlp_block.ffw_down.weight", torch.zeros(3)), r"ffw_down.weight has shape \(3,\): allowed are 2"),
        (("blocks.0.mlp_block.ffw_up.w", torch.zeros(3)), r"ffw_up.w has shape \(3,\): allowed are 3 dimensions, 2 of"),
        (("blocks.0.mlp_block.ffw_up.b", torch.zeros(3, 1, 1, 96)), r"ffw_up.b has shape \(3, 1, 1, 96\): allowed"),
        (("blocks.0.recurrent_block.conv_1d.w", torch.zeros(4)), r"conv_1d.w has shape \(4,\): allowed are 2"),
        (("blocks.0.recurrent_block.rg_lru.a_gate.w", torch.tensor(1.0)), r"a_gate.w has shape \(\): allowed are 3"),
        (("blocks.2.attention_block.proj_k.weight", torch.zeros(0, 32)), r"proj_k.weight has shape \(0, 32\)"),
        (("blocks.500000.recurrent_block.conv_1d.w", torch.zeros(4, 48)), "blocks 0, 1, 2, 500000: allowed are blocks"),
        ({"embedder.input_embedding": Code()}, "tensors and nothing else .UnpicklingError"),
        (b"", "tensors and nothing else .EOFError"),
        (b"some text", "tensors and nothing else"),
        ("cut", "tensors and nothing else"),
        ("a tensor less", r"the source lacks model.layers.1.mlp_block.down_proj.weight \("),
        ("a tensor more", "blocks.1.mystery: not a parameter of DeepMind's recurrentgemma"),
    ],
)
def test_script_refuses_a_file_that_is_none(tmp_path, monkeypatch, content, message):
    file = tmp_path / "other.pt"
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        tensors = deepmind_state_dict()
        if content == "a tensor less":
            del tensors["blocks.1.mlp_block.ffw_down.weight"]
        if content == "a tensor more":
            tensors["blocks.1.mystery"] = torch.zeros(2)
        torch.save(tensors, file)
        if content == "cut":
            file.write_bytes(file.read_bytes()[:-5000])
    else:
        torch.save({**deepmind_state_dict(), content[0]: content[1]} if isinstance(content, tuple) else content, file)
    with pytest.raises(SystemExit, match=message) as stop:
        script.main([str(file), str(tmp_path / "griffin")])
    assert str(stop.value).startswith("convert_recurrent_gemma.py: error: ") and "\n" not in str(stop.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "a/b/c"])
def test_script_names_a_source_that_is_not_there(source, tmp_path):
    with pytest.raises(SystemExit, match=f"SOURCE = {source!r} does not exist .*a Hub id .OWNER/NAME."):
        script.main([source, str(tmp_path / "griffin")])


def test_unknown_names_are_refused():
    with pytest.raises(KeyError):
        griffin_tensors_from_deepmind("blocks.0.mystery", torch.zeros(1))
