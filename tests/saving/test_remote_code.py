"""Models that were loaded by the code beside their weights, without the package: saved by stock code, whatever the way.

Everything happens in processes of their own, whose `modeling_griffin` cannot be imported. Stock saving must copy all
code; what it wrote must load again in another clean process with the same logits, and once more after a second save.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.saving.save import AUTO_MAP, code_files


CODE = {path.name for path in code_files()}
HIDE = "import sys; sys.modules['modeling_griffin'] = None"
HEAD = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

IDS = torch.arange(3, 25)[None]
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
def difference(folder, model):
    with torch.no_grad():
        return (load(folder)(IDS).logits - model.eval()(IDS).logits).abs().max().item()
"""
SAVE = """
model = load("source")
model.save_pretrained("model")
model.config.save_pretrained("config")
rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
arguments = TrainingArguments("run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(load("source"), arguments, train_dataset=rows)
trainer.train()
trainer.save_model("trained")
import peft
adapted = peft.get_peft_model(load("source"), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
adapted.merge_and_unload().save_pretrained("merged")
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sharded = load("source")
fully_shard(sharded)
assert type(sharded).__name__.startswith("FSDP")
whole = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}
sharded.save_pretrained("sharded", state_dict=whole)
assert type(sharded).__name__.startswith("FSDP")
dist.destroy_process_group()
"""
SAVE_AGAIN = """
for name in ("model", "trained", "run/checkpoint-2", "merged", "sharded"):
    model = load(name)
    model.save_pretrained(name + "-again")
    assert difference(name + "-again", model) == 0.0, name
from transformers import AutoConfig
assert AutoConfig.from_pretrained("config", trust_remote_code=True).hidden_size == 32
result = {name: load(name)(IDS).logits.flatten().tolist() for name in ("source", "model", "sharded")}
__import__("json").dump(result, open("result.json", "w"))
"""


def run(folder: Path, code: str, *, package: bool = False) -> str:
    """Runs the code in `folder`; returns what it wrote to stderr."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    text = ("" if package else HIDE) + HEAD + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def tiny_model() -> GriffinForCausalLM:
    shapes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_gate_blocks": 2}
    return GriffinForCausalLM(GriffinConfig(**shapes, num_hidden_layers=3, attention_window_size=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user without the package makes of a model in a local folder."""
    folder = tmp_path_factory.mktemp("remote")
    tiny_model().save_pretrained(folder / "source")
    (folder / "log").write_text(run(folder, SAVE))
    run(folder, SAVE_AGAIN)
    return folder


@pytest.mark.parametrize("name", ["model", "run/checkpoint-1", "run/checkpoint-2", "trained", "merged", "sharded"])
def test_all_code_is_there_byte_for_byte(folder, name):
    for path in code_files():
        assert (folder / name / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((folder / name / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_configuration_alone_has_the_code_of_its_class(folder):
    python = {path.name for path in (folder / "config").glob("*.py")}
    assert {"configuration_griffin.py", "lambda_init.py", "slots.py", "tensor_parallel.py"} <= python <= CODE


def test_each_loads_again_with_the_same_numbers(folder):
    result = json.loads((folder / "result.json").read_text())
    assert result["source"] == result["model"] == result["sharded"] and len(result["source"]) == 22 * 64


def test_no_folder_of_the_package_came_along(folder):
    for name in ("model", "trained", "merged-again"):
        python = {path.name for path in (folder / name).rglob("*.py")}
        assert python == CODE


def test_one_line_says_what_is_missing(folder):
    said = [line for line in (folder / "log").read_text().splitlines() if "not at full speed" in line]
    assert len(said) == 1 and "pip install" in said[0]


def test_beside_the_installed_package(folder):
    """It is installed and not imported: the copy says so once; both in one process do not disturb each other."""
    said = run(
        folder,
        """
        copy = load("source")
        import modeling_griffin
        ours = modeling_griffin.GriffinForCausalLM.from_pretrained("source").eval()
        assert type(copy).__module__.startswith("transformers_modules") and type(ours).__module__.startswith("modeling")
        assert difference("source", copy) == difference("source", ours) == 0.0
        assert torch.equal(copy.generate(IDS, max_new_tokens=5), ours.generate(IDS, max_new_tokens=5))
        assert (copy(IDS).logits - ours(IDS).logits).abs().max() == 0
        try:
            copy.generate_batch([])
            raise AssertionError("a copy has no batched generation")
        except ImportError as error:
            assert "import modeling_griffin" in str(error)
        copy.save_pretrained("beside-copy"), ours.save_pretrained("beside-ours")
        assert difference("beside-copy", ours) == difference("beside-ours", copy) == 0.0
        """,
        package=True,
    )
    (line,) = [line for line in said.splitlines() if "not at full speed" in line]
    assert "import modeling_griffin" in line
