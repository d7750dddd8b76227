"""The model card: what it says is in the files, what is not known is not in it."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

import modeling_griffin
from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.saving.card import is_generated, keep_model_card, write_model_card
from modeling_griffin.saving.card_template import TEMPLATE


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


def test_a_card_does_not_tell_where_files_lay():
    from modeling_griffin.saving.card_facts import without_folders

    command = "python scripts/train.py run.yaml --train_data /home/someone/secret/text.jsonl --seed 1"
    assert without_folders(command) == "python scripts/train.py run.yaml --train_data text.jsonl --seed 1"
    assert without_folders(None) is None
