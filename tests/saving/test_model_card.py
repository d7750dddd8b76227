"""The model card: what it says is in the files, what is not known is not in it."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard

import modeling_griffin
from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.saving.card import TEMPLATE, is_generated, keep_model_card, write_model_card


ROOT = Path(__file__).parents[2]
METRICS = {
    "command": "scripts/train.py configuration/training/demo.yaml",
    "versions": {"torch": "2.13.0"},
    "train_tokens": 1234567,
    "steps": 400,
    "seed": 0,
    "eval_loss": 1.23456,
    "bits_per_byte": 2.34567,
}


def config(**changes) -> GriffinConfig:
    shapes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_gate_blocks=2)
    return GriffinConfig(**{**shapes, "attention_window_size": 5, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "my-griffin"
    GriffinForCausalLM(config()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """config.json and weights, without a card."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.DOTALL)[1])


def test_the_template_is_the_file():
    assert (ROOT / "model_card.md").read_text(encoding="utf-8") == TEMPLATE


def test_numbers_come_from_the_files(saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    parameters = GriffinForCausalLM(config()).num_parameters()
    assert f"| parameters | {parameters:,}, embeddings counted once |" in card
    assert "2 of its 3 blocks mix tokens by the RG-LRU" in card and "to the last 5 tokens" in card
    assert '`lambda_init = "uniform"` with bounds 0.9 and 0.999: a^c uniform in [low, high]' in card
    kept = [float(number) for number in re.findall(r"0\.9\d{3}", card.split("In these weights")[1].split("##")[0])]
    assert len(kept) == 3 and kept[1] < kept[0] < kept[2]


def test_what_is_not_known_is_left_out(saved):
    card = ModelCard.load(saved / "README.md")
    assert metadata(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["griffin", "rg-lru"],
    }
    for absent in ("Training", "Results", "None", "license", "loss_curve", "Fine-tuned", "{{", "{%", "tokenizer"):
        assert absent not in card.text, absent


def test_limits_are_those_of_the_model(saved):
    """Assisted decoding was refused once, and is not any more (tests/test_rollback.py)."""
    limits = ModelCard.load(saved / "README.md").text.split("## Limits")[1]
    assert [line for line in limits.splitlines() if line.startswith("- ")] == [
        "- Attention sees the last 5 tokens. What lies further back reaches the model only through states of fixed "
        "size, so exact recall over long distances is not to be expected."
    ]


def test_figures_of_other_weights_are_not_kept(folder):
    """What metrics.json said of the weights before says nothing of those that are saved in their place."""
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    assert "model-index" in metadata(write_model_card(folder, license="mit"))
    (folder / "metrics.json").unlink()
    card = write_model_card(folder)
    assert "model-index" not in metadata(card) and "## Results" not in card.text and card.data.license == "mit"


def test_training_and_results(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "loss_curve.png").touch()
    (folder / "tokenizer_config.json").touch()
    card = write_model_card(
        folder,
        repo_id="me/griffin",
        license="mit",
        language="en",
        datasets=["me/words"],
        base_model="me/base",
        tags="x",
    )
    data = metadata(card)
    assert data["model-index"][0]["name"] == "griffin"
    measured = [metric for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert [(m["type"], m["value"]) for m in measured] == [("bits_per_byte", 2.3457), ("eval_loss", 1.2346)]
    assert data["license"] == "mit" and data["datasets"] == ["me/words"] and data["tags"] == ["griffin", "rg-lru", "x"]
    for text in (
        *("| training tokens | 1,234,567 |", "| steps | 400 |", "| seed | 0 |", "torch 2.13.0", METRICS["command"]),
        *("![Loss against tokens seen](loss_curve.png)", "| held-out text | bits per byte | 2.3457 |"),
        *("Fine-tuned from me/base.", 'AutoTokenizer.from_pretrained("me/griffin"'),
    ):
        assert text in card.text
    assert "sequence length" not in card.text


def test_facts_given_once_are_kept(folder):
    result = EvalResult("text-generation", "me/words", "Words", "perplexity", 12.5)
    write_model_card(folder, license="mit", datasets="me/words", tags=["x"], eval_results=[result])
    again = write_model_card(folder, repo_id="me/griffin", tags=["y"])
    data = metadata(again)
    assert data["license"] == "mit" and data["datasets"] == "me/words"
    assert data["tags"] == ["griffin", "rg-lru", "x", "y"]
    assert data["model-index"][0]["results"][0]["metrics"][0] == {"type": "perplexity", "value": 12.5}
    assert "| Words | perplexity | 12.5 |" in again.text and is_generated(str(again))


def test_saving_again_writes_a_generated_card_anew(tmp_path):
    GriffinForCausalLM(config()).save_pretrained(tmp_path)
    write_model_card(tmp_path, license="mit")
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    GriffinForCausalLM(config(hidden_size=32)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "| width | 32;" in card.text and "| steps | 400 |" in card.text


def test_a_broken_metrics_file_does_not_stop_a_save(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    GriffinForCausalLM(config()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "README.md").exists()


def test_unknown_facts_are_refused(folder):
    with pytest.raises(ValueError, match="the model card has no licence: allowed are license"):
        write_model_card(folder, licence="mit")


@pytest.mark.parametrize(
    "name, task, auto_class",
    [
        ("GriffinModel", "feature-extraction", "AutoModel"),
        ("GriffinForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("GriffinForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
    ],
)
def test_heads_and_hawk(tmp_path, name, task, auto_class):
    hawk = config(layer_types=["linear_attention"] * 3, id2label={0: "bad", 1: "good"})
    getattr(modeling_griffin, name)(hawk).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == task and card.data.tags == ["griffin", "rg-lru", "hawk"]
    assert f"import {auto_class}\n" in card.text and "A Hawk: 3 of its 3" in card.text and "window" not in card.text
    assert ("| labels | bad, good |" in card.text) == name.endswith("Classification")


def test_its_code_is_python(folder):
    (folder / "tokenizer_config.json").touch()
    blocks = re.findall(r"```python\n(.*?)```", str(write_model_card(folder, repo_id="me/griffin")), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)


def test_trainer_keeps_it(folder):
    """`Trainer.push_to_hub` calls `create_model_card`, with these arguments."""
    arguments = SimpleNamespace(output_dir=str(folder))
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, args=arguments, hub_model_id="me/griffin")
    keep_model_card(trainer, license="mit")
    trainer.create_model_card(model_name="griffin", language="en", tags=["x"], dataset_tags="me/words", tasks="x")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", "me/words")
    assert 'from_pretrained("me/griffin"' in card.text and card.data.base_model is None


TOKEN = "hf_" + "a1B2" * 8


def with_secrets(folder: Path) -> None:
    """metrics.json as an earlier version of the training script wrote it."""
    command = f"python scripts/train.py run.yaml --hub_token {TOKEN} --proxy_password hunter2 --seed 1"
    data = "https://me:hunter2@data.example/text.jsonl"
    settings = {"environment": {"WANDB_API_KEY": "hunter2"}, "train_data": data, "eval_data": data, "command": command}
    (folder / "metrics.json").write_text(json.dumps({**METRICS, **settings}))


def test_secrets_of_an_old_run_are_masked(folder):
    """In the card, and in metrics.json itself: uploads take both."""
    with_secrets(folder)
    written = str(write_model_card(folder)), (folder / "README.md").read_text(), (folder / "metrics.json").read_text()
    for text in written:
        assert TOKEN not in text and "hunter2" not in text
        assert "run.yaml --hub_token HIDDEN --proxy_password HIDDEN --seed 1" in text and "HIDDEN@data.example" in text
    assert json.loads(written[2])["steps"] == METRICS["steps"]


@pytest.mark.parametrize("card", ["Written by a person.", None])
def test_saving_again_masks_them_too(tmp_path, card):
    with_secrets(tmp_path)
    if card:
        (tmp_path / "README.md").write_text(card)
    GriffinForCausalLM(config()).save_pretrained(tmp_path)
    for name in ("README.md", "metrics.json"):
        text = (tmp_path / name).read_text()
        assert TOKEN not in text and "hunter2" not in text
    assert (card is None) == ("--hub_token HIDDEN" in (tmp_path / "README.md").read_text())


EVIL = "x</td>\n\n# Owned\n<script>alert(1)</script> | `code` [click](https://evil.example) **bold** \u202e $$ \ud800"


def changed_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def body(card: ModelCard) -> str:
    """The text of the card without its blocks of code, in which nothing is markup."""
    text = re.sub(r"```python\n.*?```", "", card.text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def test_markup_from_other_peoples_files_is_text(folder):
    """Every text of config.json, metrics.json, the command line's names and an earlier card."""
    expected = re.findall(r"^#.*|^\|[^|]*\|", body(write_model_card(folder, repo_id="me/fine")), flags=re.MULTILINE)
    changed_config(
        folder,
        architectures=["GriffinForSequenceClassification"],
        lambda_init=EVIL,
        lambda_init_bounds=[EVIL, "# low"],
        id2label={"0": EVIL, "1": "two\n# words"},
    )
    metrics = {**METRICS, "train_data": EVIL, "eval_data": EVIL, "versions": {EVIL: EVIL}, "device": EVIL}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "command": f"train.py '{EVIL}' ```"}))
    result = EvalResult("text-generation", "me/words", "x|y\n# z<b>", "perplexity", "<i>1", metric_name="a|b")
    card = write_model_card(
        folder, repo_id="me/fine", base_model="<b>base</b>\n# x", license="<u>", eval_results=[result]
    )
    text = body(card)
    for markup in (
        "<script",
        "<b>",
        "<i>",
        "<u>",
        "</td>",
        "\n# Owned",
        "](https://evil",
        "**bold",
        "`code`",
        "$$",
        "\u202e",
    ):
        assert markup not in text, markup
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# fine" and all(line.startswith("## ") for line in headings[1:])
    assert {line for line in headings} >= {line for line in expected if line.startswith("#")}
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.count("|") in (3, 4), line
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;b&gt;base&lt;/b&gt; # x" in text
    assert (folder / "README.md").read_text(encoding="utf-8") == str(card)


@pytest.mark.parametrize("name", ['x"); import os; ("', "x\n```\n# Owned", "<script>", "back\\slash", "ünï"])
def test_a_name_stays_a_name_in_the_code(folder, name):
    card = write_model_card(folder, repo_id=name)
    for block in re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call) and node.args]
        names = [call.args[0].value for call in calls if call.func.attr == "from_pretrained"]
        assert names == [" ".join(name.split())]
    assert "<script>" not in body(card) and "\n# Owned" not in card.text


def test_ordinary_names_are_not_touched():
    from modeling_griffin.saving.card_text import inline

    for text in ("held-out text", "my_text.jsonl", "torch 2.13.0, triton 3.5", "NVIDIA H200 (sm_90)", "me/words", "é"):
        assert inline(text) == text
    assert inline("a" * 500) == "a" * 199 + "…" and inline(0.9) == "0.9"


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", [], "config.json holds a list: allowed is a JSON object"),
        ("config.json", {"hidden_size": "<b>"}, "hidden_size = '<b>' in .*config.json: allowed are positive whole"),
        ("config.json", {"layer_types": None}, "layer_types = None in .*config.json: allowed is a list of names"),
        ("config.json", {"architectures": []}, r"architectures = \[\] in .*config.json: allowed is a list of names"),
        ("config.json", {"attention_window_size": True}, "attention_window_size = True in "),
        ("config.json", {"rg_lru_c": "8"}, "rg_lru_c = '8' in .*config.json: allowed are numbers"),
        ("metrics.json", [], "metrics.json holds a list: allowed is a JSON object"),
        ("metrics.json", {"versions": ["torch"]}, r"versions = \['torch'\] in metrics.json: allowed is an object"),
        ("metrics.json", {"eval_loss": "low"}, "eval_loss = 'low' in metrics.json: allowed are numbers"),
        ("metrics.json", {"command": ["train.py"]}, r"command = \['train.py'\] in metrics.json: allowed is a text"),
    ],
)
def test_fields_of_other_kinds_are_named(folder, file, content, message):
    if isinstance(content, dict) and file == "config.json":
        changed_config(folder, **content)
    else:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        write_model_card(folder)


def test_only_the_models_weights_are_counted(folder):
    from safetensors.torch import save_file

    parameters = GriffinForCausalLM(config()).num_parameters()
    save_file({"optimizer.state": torch.zeros(1000)}, folder / "model-optimizer.safetensors")
    assert f"| parameters | {parameters:,}, embeddings counted once |" in write_model_card(folder).text


@pytest.mark.parametrize("name", ["model", "Model", "output", "checkpoint-400", "final_model", "me/model"])
def test_the_title_is_not_that_of_any_folder(folder, tmp_path, name):
    """Then it says what the model is. A name that somebody chose stays."""
    if "/" in name:
        card = write_model_card(folder, repo_id=name)
    else:
        saved = folder / name
        saved.mkdir()
        for file in ("config.json", "model.safetensors"):
            (saved / file).write_bytes((folder / file).read_bytes())
        card = write_model_card(saved)
    parameters = GriffinForCausalLM(config()).num_parameters()
    assert (
        re.search(r"^# (.*)$", card.text, flags=re.MULTILINE)[1] == f"Griffin with {parameters / 1000:.2g}K parameters"
    )
    assert write_model_card(folder, repo_id="me/my-griffin").text.startswith("\n# my-griffin\n")


def test_it_names_the_licence_of_the_code(folder):
    """The weights' is their owner's to choose."""
    card = write_model_card(folder)
    assert card.data.license is None
    assert "The Python files beside the weights are under the Apache License 2.0 (Apache-2.0)" in card.text
    given = write_model_card(folder, license="gemma")
    assert given.data.license == "gemma" and "The weights are not covered by it. Theirs: gemma.\n" in given.text


@pytest.mark.parametrize(
    "number, text",
    [(7, "7"), (1234, "1.2K"), (123456, "123K"), (1_234_567, "1.2M"), (2_100_000_000, "2.1B"), (999_999, "1M")],
)
def test_short_numbers(number, text):
    from modeling_griffin.saving.card_text import short_number

    assert short_number(number) == text


def test_a_card_does_not_tell_where_files_lay():
    from modeling_griffin.saving.card_facts import without_folders

    command = "python scripts/train.py run.yaml --train_data /home/someone/secret/text.jsonl --seed 1"
    assert without_folders(command) == "python scripts/train.py run.yaml --train_data text.jsonl --seed 1"
    assert without_folders("train.py --train_data=/home/someone/text.jsonl") == "train.py --train_data=text.jsonl"
    assert without_folders("https://host/a/b.jsonl and a/b") == "https://host/a/b.jsonl and a/b"
    assert without_folders(None) is None
