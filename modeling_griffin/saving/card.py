"""The model card, README.md of a saved model: from its files alone, so that nothing in it is invented.

Numbers come from config.json and from the weights, the training from metrics.json and loss_curve.png where train.py
left them; what a person adds (license, language, datasets, base_model, results, tags) is kept in the card's metadata,
and read from there when the card is written again. What is not known is left out. Secrets in metrics.json are masked,
in the file too where the card is written into its folder, because uploads take both.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from .card_facts import (
    HELD_OUT,
    architecture,
    command,
    is_hawk,
    lambda_text,
    limits,
    measured,
    read_config,
    results_table,
    summary,
    title,
    training,
)
from .card_text import inline, literal
from .mask_secrets import mask_file, mask_secrets
from .saved_files import in_place_of, read_json_object


if TYPE_CHECKING:  # its import needs accelerate
    from transformers import Trainer

logger = logging.get_logger(__name__)
TEMPLATE = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")

MARKER = "Generated from the files of this model; saving it again writes it anew. To keep your edits, delete this line."
KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model", "tags", "eval_results")
# By the end of the class's name, so that a user's subclass is found too: pipeline, Auto class, PEFT's task.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "CAUSAL_LM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "Model": ("feature-extraction", "AutoModel", "FEATURE_EXTRACTION"),
}

LOAD_CODE = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
model = {auto_class}.from_pretrained({name}, trust_remote_code=True, dtype="auto")
"""
NO_TOKENIZER_CODE = """\
from transformers import {auto_class}

model = {auto_class}.from_pretrained({name}, trust_remote_code=True, dtype="auto")
"""
GENERATE_CODE = """
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""
TUNE_CODE = """\
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained({name}, trust_remote_code=True, dtype=torch.float32)
model.train()
"""


def write_model_card(folder: str | os.PathLike, *, repo_id: str | None = None, **given: Any) -> ModelCard:
    """Writes README.md into the folder of a saved model, over any card that is there.

    Args:
        folder: with config.json and safetensors; metrics.json and loss_curve.png are used where they are there.
        repo_id: the name on the Hub; unset, the folder's name stands in its place.
        given: what the files do not tell: `license`, `language`, `datasets`, `base_model`, `tags` (strings or lists,
            as the Hub's metadata has them), `eval_results` (a list of `huggingface_hub.EvalResult`). Unset ones stay as
            the card that is there has them; results also come from metrics.json.

    Raises:
        ValueError: for a name that is none of these, and for files that are damaged or not a Griffin's.
    """
    folder = Path(folder)
    mask_file(folder / "metrics.json")
    card = make_card(folder, folder, repo_id or folder.resolve().name, read_metadata(folder / "README.md"), given)
    _save(card, folder)
    return card


def keep_model_card(trainer: "Trainer", **given: Any) -> None:
    """Makes `trainer.push_to_hub()` write this card. Stock `Trainer.create_model_card` would put its own over it.

    Args:
        trainer: a `transformers.Trainer`; its method `create_model_card` is replaced on this object.
        given: as in `write_model_card`; the arguments of `trainer.push_to_hub(...)` are added to them.
    """

    def create_model_card(finetuned_from=None, dataset_tags=None, model_name=None, **arguments):
        if trainer.is_world_process_zero():
            facts = {**arguments, "base_model": finetuned_from, "datasets": dataset_tags}
            if ignored := sorted(name for name in facts if name not in KEPT and facts[name] is not None):
                logger.warning(f"not in the model card: {', '.join(ignored)}")
            facts = given | {name: value for name, value in facts.items() if name in KEPT and value is not None}
            write_model_card(trainer.args.output_dir, repo_id=trainer.hub_model_id or model_name, **facts)

    trainer.create_model_card = create_model_card


def refresh_card(saved: Path, facts: Path, target: Path | None = None) -> None:
    """The card of the model in `saved`, with what the folder `facts` tells, into `target` (default: `saved`).

    A card in `facts` that a person wrote stays. Never raises for the card's sake: the weights matter more.
    """
    existing = facts / "README.md"
    try:
        mask_file(facts / "metrics.json")
        if existing.exists() and not is_generated(existing.read_text(encoding="utf-8")):
            return
        card = make_card(saved, facts, facts.resolve().name, read_metadata(existing), {})
        _save(card, target or saved)
    except Exception as error:
        logger.warning(f"the model card was not written: {type(error).__name__}: {error}")


def _save(card: ModelCard, folder: Path) -> None:
    with in_place_of(folder / "README.md") as beside:
        card.save(beside)


def card_for_hub(folder: str | os.PathLike, repo_id: str, tags: list[str], token: str | bool | None) -> None:
    """README.md for an upload of `folder`: the Hub's own card with `tags` where a person wrote one, else a new one."""
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        card = None
    kept = {} if card is None else _metadata(card)
    if card is None or is_generated(card.content):
        folder = Path(folder)
        card = make_card(folder, folder, repo_id, kept, {"tags": tags})
    else:
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
    card.save(Path(folder) / "README.md")


def is_generated(text: str) -> bool:
    """Whether this card may be written anew."""
    return MARKER in text


def make_card(saved: Path, facts: Path, name: str, kept: dict, given: dict) -> ModelCard:
    """The card of the weights in `saved`; `facts` holds metrics.json, `kept` the metadata of an earlier card."""
    if unknown := sorted(set(given) - set(KEPT)):
        raise ValueError(f"the model card has no {', '.join(unknown)}: allowed are {', '.join(KEPT)}")
    config, metrics = read_config(saved / "config.json"), _read_metrics(facts / "metrics.json")
    data = {**kept, **{key: value for key, value in given.items() if value}}
    results = given.get("eval_results") or measured(metrics) or kept.get("eval_results")
    tags = ["griffin", "rg-lru", *["hawk"] * is_hawk(config), *_as_list(kept.get("tags")), *_as_list(given.get("tags"))]
    data |= {"tags": list(dict.fromkeys(tags)), "eval_results": results}
    pipeline_tag, auto_class, peft_task = _task(config)
    heading = title(name, config, saved)
    return ModelCard.from_template(
        ModelCardData(
            **data, library_name="transformers", pipeline_tag=pipeline_tag, model_name=heading if results else None
        ),
        template_str=TEMPLATE,
        title=inline(heading),
        summary=summary(config),
        base_models=", ".join(map(inline, _as_list(data.get("base_model")))),
        licence=", ".join(map(inline, _as_list(data.get("license_name") or data.get("license")))),
        architecture=architecture(config, saved),
        lambda_text=lambda_text(config, saved),
        training=training(metrics),
        command=command(metrics),
        loss_curve="loss_curve.png" if (facts / "loss_curve.png").exists() else None,
        results=results_table(results or []),
        load_code=_load_code(name, auto_class, pipeline_tag, (facts / "tokenizer_config.json").exists()),
        tune_code=TUNE_CODE.format(name=literal(name), auto_class=auto_class).rstrip(),
        peft_task=peft_task,
        limits=limits(config),
        marker=MARKER,
    )


def _task(config: dict) -> tuple[str, str, str]:
    name = config["architectures"][0]
    return next(task for ending, task in TASKS.items() if name.endswith(ending) or ending == "Model")


def _load_code(name: str, auto_class: str, pipeline_tag: str, tokenizer: bool) -> str:
    code = LOAD_CODE if tokenizer else NO_TOKENIZER_CODE
    generate = GENERATE_CODE if tokenizer and pipeline_tag == "text-generation" else ""
    return (code.format(name=literal(name), auto_class=auto_class) + generate).rstrip()


def read_metadata(path: Path) -> dict:
    return _metadata(load_card(path)) if path.exists() else {}


def load_card(path: Path) -> ModelCard:
    """The card in a file. Raises ValueError, with the file's name, where its metadata cannot be read."""
    try:
        return ModelCard.load(path)
    except Exception as error:  # the YAML reader's own, or what the Hub's client makes of what it read
        raise ValueError(f"the metadata at the top of {path} cannot be read ({error})") from error


def _metadata(card: ModelCard) -> dict:
    """What an earlier card was told; not what metrics.json said of the weights of then."""
    told = {name: value for name in KEPT if (value := getattr(card.data, name, None)) is not None}
    results = [result for result in told.pop("eval_results", []) if result.dataset_type != HELD_OUT]
    return {**told, "eval_results": results} if results else told


def _read_metrics(path: Path) -> dict:
    return mask_secrets(read_json_object(path)) if path.exists() else {}


def _as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
