"""Every save is complete, correct, and all or nothing."""

import importlib
import json
import logging
import os
import resource
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import modeling_griffin
import modeling_griffin.saving.save as hub
from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.saving.card import write_model_card
from modeling_griffin.saving.save import AUTO_MAP, STAGE_PREFIX, all_or_nothing, code_files


CODE = sorted(path.name for path in code_files())
MODEL = ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def tiny_config(**changes) -> GriffinConfig:
    shapes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_gate_blocks=2)
    return GriffinConfig(**{**shapes, "attention_window_size": 5, **changes})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GriffinForCausalLM(tiny_config())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_complete(folder: Path, model, code: bool = True) -> None:
    """Configuration, code and card are there, and the weights are the model's."""
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "config.json"} <= names and names & set(CODE) == (set(CODE) if code else set())
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    for path in code_files() if code else ():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    loaded = type(model).from_pretrained(folder)
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "name", [reference.split(".")[1] for auto, reference in AUTO_MAP.items() if auto != "AutoConfig"]
)
def test_complete(tmp_path, name):
    model = getattr(modeling_griffin, name)(tiny_config())
    model.save_pretrained(tmp_path)
    expected = [*MODEL, *CODE] if name == "GriffinForCausalLM" else [*set(MODEL) - {"generation_config.json"}, *CODE]
    assert sorted(contents(tmp_path)) == sorted(expected)
    assert_complete(tmp_path, model)


def test_between_one_file_of_weights_and_several(tmp_path, model):
    """The loader prefers one file: were it left beside the new ones, the old weights would be loaded."""
    other = GriffinForCausalLM(tiny_config())
    for saved, size in ((other, "1GB"), (model, "8KB"), (other, "4KB"), (model, "1GB")):
        saved.save_pretrained(tmp_path, max_shard_size=size)
        assert_complete(tmp_path, saved)
    assert sorted(contents(tmp_path)) == sorted([*MODEL, *CODE])


def test_a_variant_stays_beside(tmp_path, model):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="other", max_shard_size="8KB")
    model.save_pretrained(tmp_path, variant="other")
    assert {"model.safetensors", "model.other.safetensors"} <= set(contents(tmp_path))
    assert not [name for name in contents(tmp_path) if "-of-" in name or "index" in name]


def test_other_files_stay(tmp_path, model):
    others = {"tokenizer.json": b"{}", "optimizer.pt": b"1", "README.md": b"Written by a person.", "sub/file": b"2"}
    (tmp_path / "sub").mkdir()
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    model.save_pretrained(tmp_path)
    assert {name: contents(tmp_path)[name] for name in others} == others
    assert_complete(tmp_path, model)


@pytest.fixture
def log():
    """What the package logs."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    hub.logger.addHandler(handler)
    yield messages
    hub.logger.removeHandler(handler)


def test_a_full_disk_leaves_the_old_model(tmp_path, model, monkeypatch, log):
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    written = []

    def fails_at_the_third_shard(tensors, filename, metadata=None):
        written.append(filename)
        Path(filename).write_bytes(b"half a file")
        if len(written) == 3:
            raise OSError("No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fails_at_the_third_shard)
    with pytest.raises(OSError, match="No space left"):
        GriffinForCausalLM(tiny_config(lambda_init="constant")).save_pretrained(tmp_path, max_shard_size="8KB")
    assert contents(tmp_path) == before
    assert [entry for entry in os.listdir(tmp_path) if entry.startswith(STAGE_PREFIX)] == []
    assert log[-1].endswith("failed with OSError: No space left on device; it is as it was before")


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_move_that_fails_is_undone(tmp_path, monkeypatch, log, failing):
    old = {"config.json": b"old", "model.safetensors": b"old", "tokenizer.json": b"kept"}
    new = {"config.json": b"new", "model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    moves, replace = [], os.replace

    def fails_once(source, target):
        moves.append(source)
        if len(moves) == failing:
            raise PermissionError("moved no more")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    try:
        with all_or_nothing(tmp_path) as stage:
            for name, data in new.items():
                (stage / name).write_bytes(data)
    except PermissionError:
        assert contents(tmp_path) == old and "it is as it was before" in log[-1]
    else:
        assert failing > 5, "two moves for config.json, one for each shard, one for what is replaced"
        assert contents(tmp_path) == {**new, "tokenizer.json": b"kept"}


def test_what_a_killed_save_leaves_is_named(tmp_path, model, log):
    (tmp_path / f"{STAGE_PREFIX}abc").mkdir()
    model.save_pretrained(tmp_path)
    assert "was left by a save that was killed" in log[0]


def test_only_the_main_process_writes(tmp_path, model):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == {}


def test_a_file_in_the_place_of_the_folder(tmp_path, model):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "model")


def test_shards_for_resuming_are_not_pushed(tmp_path, model):
    with pytest.raises(ValueError, match="allowed only without distributed_checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True, push_to_hub=True)


def test_under_fsdp2(tmp_path, model):
    """FSDP2 swaps the model's class for a generated one, of a file of PyTorch's."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert type(model).__name__ == "FSDPGriffinForCausalLM"
        model.save_pretrained(tmp_path / "model", state_dict=dict(weights))
    finally:
        destroy_process_group()
    whole = GriffinForCausalLM(tiny_config())
    whole.load_state_dict(weights)
    assert sorted(contents(tmp_path / "model")) == sorted([*MODEL, *CODE])
    assert_complete(tmp_path / "model", whole)


def test_the_users_own_class(tmp_path, monkeypatch):
    """Its file is shipped too, and the Auto class that it registered for leads to it."""
    (tmp_path / "griffin_of_mine.py").write_text(
        "from modeling_griffin import GriffinForCausalLM\n\nclass Mine(GriffinForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("griffin_of_mine").Mine(tiny_config())
    model.save_pretrained(tmp_path / "model")
    assert sorted(contents(tmp_path / "model")) == sorted([*MODEL, *CODE, "griffin_of_mine.py"])
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map == {**AUTO_MAP, "AutoModelForCausalLM": "griffin_of_mine.Mine"}


def test_trainer_checkpoints(tmp_path, model):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": [5, 9, 1, 33], "labels": [5, 9, 1, 33]}] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert_complete(tmp_path / "checkpoint-2", model, code=False)
    assert_complete(tmp_path / "saved", model)
    assert {"optimizer.pt", "trainer_state.json"} <= set(os.listdir(tmp_path / "checkpoint-1"))
    # What Trainer uploads while it trains is this folder, with weights and configuration copied into it.
    assert {"README.md", *CODE} <= set(os.listdir(tmp_path))


def test_peft_adapters(tmp_path, model):
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    base = GriffinForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 9, 1, 33, 60, 2, 7]])
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.eval()(ids).logits, expected)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_complete(tmp_path / "merged", merged)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}", "the tokenizer comes along"
    (tmp_path / "merged" / "tokenizer.json").write_text("mine")
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("where", ["snapshots", "elsewhere"])
def test_the_tokenizer_of_a_folder_of_links(tmp_path, model, where):
    """The Hub's cache, whose files are links to its own blobs, is one folder; what lies elsewhere is not given away."""
    model.save_pretrained(tmp_path / "source")
    blobs = tmp_path / ("cache/blobs" if where == "snapshots" else "private")
    snapshot = tmp_path / "cache" / where / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    for file in (tmp_path / "source").iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    GriffinForCausalLM.from_pretrained(snapshot).save_pretrained(tmp_path / "again")
    saved = tmp_path / "again" / "tokenizer.json"
    assert saved.exists() == (where == "snapshots") and not saved.is_symlink()


def test_adapter_of_transformers(tmp_path, model, monkeypatch):
    """Transformers 5.24 asks here for PEFT 0.22, which came after it: what we save is the same with older ones."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert sorted(set(after) - set(before)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {name: after[name] for name in before} == before


def test_configuration_alone(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(["config.json", *CODE])
    assert GriffinConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP


def test_a_full_disk_leaves_the_old_configuration_card_and_code(tmp_path, model):
    """RLIMIT_FSIZE is a disk that is full in the middle of a file."""
    model.save_pretrained(tmp_path)
    (tmp_path / "cache_name.py").write_text("older")
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        for save in (lambda: model.config.save_pretrained(tmp_path), lambda: write_model_card(tmp_path)):
            with pytest.raises(OSError, match="File too large"):
                save()
        with pytest.raises(OSError, match="File too large"):
            hub.copy_code(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older
    model.config.save_pretrained(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "config.json").read_bytes() == older["config.json"]
    assert not list(tmp_path.rglob(f"{STAGE_PREFIX}*"))


def test_only_safetensors(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".py", ".json", ".md", ".safetensors"}
