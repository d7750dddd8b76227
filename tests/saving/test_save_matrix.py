"""Every way in times every way of saving: what was saved loads in clean processes without the package, twice over.

Ways in: the installed package, the code of a local folder, the code of a repository. Each is a process of its own; the
last two cannot import `modeling_griffin`, and save by stock code, which must copy all files. A clean process compares
each model with the logits that it had when it was saved, and saves it again; another one compares what that wrote.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.saving.save import AUTO_MAP, code_files
from tests.hub_client import environment_of
from tests.hub_server import LoopbackHub, Repo


CODE = {path.name for path in code_files()}
WAYS = ("package", "folder", "hub")
MODELS = ("model", "run/checkpoint-1", "run/checkpoint-2", "run", "merged", "sharded")
HIDE = "import sys; sys.modules['modeling_griffin'] = None"
HEAD = """
import json, os, torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

IDS = torch.arange(3, 25)[None]
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits
def difference(folder, model):
    return (logits(load(folder)) - logits(model)).abs().max().item()
"""
SAVE = """
expected = {}
def saved(name, model):
    expected[name] = logits(model).tolist()
model = load(SOURCE)
assert (sys.modules.get("modeling_griffin") is None) == type(model).__module__.startswith("transformers_modules")
model.save_pretrained("model")
saved("model", model)
model.push_to_hub("me/from-" + WAY, token="token-of-me")
model.config.save_pretrained("config")
rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
arguments = TrainingArguments("run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
class Watched(Trainer):
    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        saved(f"run/checkpoint-{self.state.global_step}", model)
        model.train()
trainer = Watched(load(SOURCE), arguments, train_dataset=rows)
trainer.train()
trainer.save_model()
saved("run", trainer.model)
import peft
torch.manual_seed(0)
adapted = peft.get_peft_model(load(SOURCE), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
merged = adapted.merge_and_unload()
merged.save_pretrained("merged")
saved("merged", merged)
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sharded = load(SOURCE)
fully_shard(sharded)
generated = type(sharded).__name__, type(sharded).__module__
whole = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}
sharded.save_pretrained("sharded", state_dict=whole)
assert generated == (type(sharded).__name__, type(sharded).__module__) and generated[0].startswith("FSDP")
saved("sharded", sharded)
dist.destroy_process_group()
json.dump(expected, open("expected.json", "w"))
"""
# NAMES: of one way's folders, those whose code came along.
READ_AND_SAVE_AGAIN = """
found = {}
for way, names in NAMES.items():
    expected = json.load(open(f"{way}/expected.json"))
    for name in names:
        model = load(f"{way}/{name}")
        found[f"{way}/{name}"] = (logits(model) - torch.tensor(expected[name])).abs().max().item()
        model.save_pretrained(f"again/{way}/{name}")
    model = load("me/from-" + way)
    found[f"{way}/push"] = (logits(model) - torch.tensor(expected["model"])).abs().max().item()
    model.push_to_hub(f"me/again-{way}", token="token-of-me")
    AutoConfig.from_pretrained(f"{way}/config", trust_remote_code=True).save_pretrained(f"again/{way}/config")
json.dump(found, open("differences.json", "w"))
"""
READ_AGAIN = """
found = {}
for way, names in NAMES.items():
    expected = json.load(open(f"{way}/expected.json"))
    for name in names:
        found[f"{way}/{name}"] = (logits(load(f"again/{way}/{name}")) - torch.tensor(expected[name])).abs().max().item()
    found[f"{way}/push"] = (logits(load("me/again-" + way)) - torch.tensor(expected["model"])).abs().max().item()
    assert AutoConfig.from_pretrained(f"again/{way}/config", trust_remote_code=True).hidden_size == 32
json.dump(found, open("differences-again.json", "w"))
"""
# A Trainer's checkpoint made with the package carries no code: the package reads it.
NAMES = {way: [name for name in MODELS if way != "package" or "checkpoint" not in name] for way in WAYS}


def run(folder: Path, code: str, url: str, *, package: bool = False, **variables) -> str:
    """Runs the code in `folder`, with caches of its own; returns what it wrote to stderr."""
    home = folder / f"home-{len(list(folder.glob('home-*')))}"
    home.mkdir()
    given = "".join(f"{name} = {value!r}\n" for name, value in variables.items())
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys" if package else HIDE, given, HEAD, textwrap.dedent(code)])],
        cwd=folder,
        env=environment_of(url, home, None, package),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def tiny_model() -> GriffinForCausalLM:
    shapes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_gate_blocks": 2}
    return GriffinForCausalLM(GriffinConfig(**shapes, num_hidden_layers=3, attention_window_size=5))


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({"token-of-me": "me"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """A folder for each way in, with all that was saved there, read and saved again by processes of their own."""
    folder = tmp_path_factory.mktemp("ways")
    tiny_model().save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    (folder / "source" / "tokenizer_config.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in (folder / "source").iterdir()}
    hub.repos["me/source"] = Repo("me", private=False)
    hub.repos["me/source"].commit("main", {name: hub.store(data) for name, data in files.items()})
    for way in WAYS:
        (folder / way).mkdir()
        source = "me/source" if way == "hub" else str(folder / "source")
        code = "import modeling_griffin\n" + SAVE if way == "package" else SAVE
        log = run(folder / way, code, hub.url, package=way == "package", SOURCE=source, WAY=way)
        (folder / way / "log").write_text(log)
    run(folder, READ_AND_SAVE_AGAIN, hub.url, NAMES=NAMES)
    run(folder, READ_AGAIN, hub.url, NAMES=NAMES)
    return folder


@pytest.mark.parametrize("when", ["differences", "differences-again"])
def test_each_loads_again_with_the_same_numbers(folder, when):
    """In a clean process what another one has saved, then in a third what that one has saved once more."""
    found = json.loads((folder / f"{when}.json").read_text())
    expected = {f"{way}/{name}" for way in WAYS for name in (*NAMES[way], "push")}
    assert found == dict.fromkeys(expected, 0.0)
    trained = json.loads((folder / "folder" / "expected.json").read_text())
    assert len({json.dumps(trained[name]) for name in ("model", "run/checkpoint-1", "run", "merged")}) == 4


def test_all_code_is_there_byte_for_byte(folder, hub):
    for name in [f"{way}/{name}" for way in WAYS for name in NAMES[way]]:
        for path in code_files():
            assert (folder / name / path.name).read_bytes() == path.read_bytes(), f"{name}/{path.name}"
        assert {path.name for path in (folder / name).glob("*.py")} == CODE, "no folder of the package came along"
        assert not [path for path in (folder / name).glob("*/") if "checkpoint" not in path.name], name
        assert json.loads((folder / name / "config.json").read_text())["auto_map"] == AUTO_MAP
    for way in WAYS:
        files = hub.files(f"me/from-{way}")
        assert {name: files[name] for name in CODE} == {path.name: path.read_bytes() for path in code_files()}


def test_checkpoints_of_the_package_carry_no_code(folder):
    for name in ("checkpoint-1", "checkpoint-2"):
        assert (folder / "package" / "run" / name / "model.safetensors").exists()
        assert not list((folder / "package" / "run" / name).glob("*.py"))


def test_the_package_keeps_the_tokenizer(folder, hub):
    for name in ("model", "run", "merged", "sharded"):
        assert (folder / "package" / name / "tokenizer.json").read_text() == "{}", name
    assert hub.files("me/from-package")["tokenizer.json"] == b"{}"


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_a_configuration_alone_has_the_code_of_its_class(folder, way):
    python = {path.name for path in (folder / way / "config").glob("*.py")}
    assert {"configuration_griffin.py", "lambda_init.py", "slots.py", "tensor_parallel.py"} <= python <= CODE


@pytest.mark.parametrize("way, lines", [("folder", 1), ("hub", 1), ("package", 0)])
def test_one_line_says_what_is_missing(folder, way, lines):
    said = [line for line in (folder / way / "log").read_text().splitlines() if "not at full speed" in line]
    assert len(said) == lines and all("pip install" in line for line in said)


def test_several_copies_say_it_once(folder, hub):
    for name in ("one", "two"):
        shutil.copytree(folder / "source", folder / name)
    said = run(folder, "assert difference('one', load('two')) == 0.0", hub.url)
    assert said.count("not at full speed") == 1


def test_beside_the_installed_package(folder, hub):
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
        for name in ("run/checkpoint-1", "run/checkpoint-2"):  # without code, so that the package reads it
            checkpoint = AutoModelForCausalLM.from_pretrained("package/" + name).eval()
            expected = json.load(open("package/expected.json"))[name]
            assert torch.equal(logits(checkpoint), torch.tensor(expected))
        """,
        hub.url,
        package=True,
    )
    (line,) = [line for line in said.splitlines() if "not at full speed" in line]
    assert "import modeling_griffin" in line
