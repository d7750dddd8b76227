"""The arguments of train.py: one YAML file, overridden by `--key value`, read into dataclasses by HfArgumentParser."""

import dataclasses
import difflib
import json
import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import spoken
import torch
from command_line import OneLineErrors, Parser, ShowDefaultsAndLines
from presets import find_preset, preset_names
from transformers import HfArgumentParser, TrainingArguments
from yaml_file import read_yaml

from training.fingerprint import ALLOWED, check_allowed
from training.launch import choose_device, read_request, says_precision
from training.ranks import join_in_time


@dataclass
class ModelArguments:
    """Which model. Exactly one of `config_name` and `model_name_or_path`."""

    config_name: str | None = field(
        default=None,
        metadata={"help": "train from scratch: a JSON file, a folder with config.json, or a ready-made one's name"},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'fields to change in it, a mapping, as JSON on the command line: {"lambda_init": ...}'},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "continue or fine-tune: a folder or Hub id with weights"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa or flex_attention"})
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "processes that share each row; a divisor of their number"}
    )
    float8: str | None = field(
        default=None, metadata={"help": "tensorwise or rowwise: linear layers multiply in float8, by torchao"}
    )
    record_steps: bool = field(
        default=False, metadata={"help": "steps as CUDA graphs, which pays where a GPU waits for its host"}
    )

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1:
            raise ValueError(
                f"sequence_parallel_size = {self.sequence_parallel_size}: allowed are whole numbers from 1"
            )
        if self.record_steps and self.sequence_parallel_size > 1:
            raise ValueError(
                f"record_steps = true with sequence_parallel_size = {self.sequence_parallel_size}: allowed is 1, since "
                "processes that share a row talk to each other inside of a step"
            )


@dataclass
class DataArguments:
    """Which text, how it is turned into tokens and rows, and what is held out."""

    train_data: str = field(
        metadata={"help": "a text file, a folder of text or source files, jsonl, parquet (or a glob), or a Hub id"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "held-out text, likewise; unset: held out of train_data by eval_fraction"}
    )
    text_column: str = field(default="text", metadata={"help": "column of a record that holds its text"})
    dataset_subset: str | None = field(default=None, metadata={"help": "subset (configuration) of a Hub data set"})
    train_split: str = field(default="train", metadata={"help": "split of a Hub data set to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split of the Hub data set given as eval_data"})
    eval_fraction: float = field(default=0.05, metadata={"help": "share of the documents held out, without eval_data"})
    split_seed: int = field(default=0, metadata={"help": "which documents are held out; independent of seed"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "bytes, bpe (trained on train_data), a folder or Hub id; unset: the model's own, or bytes"},
    )
    tokenizer_vocab_size: int = field(default=4096, metadata={"help": "entries of a bpe, special tokens included"})
    sequence_length: int = field(default=1024, metadata={"help": "tokens in a row; documents are packed into rows"})
    preprocessing_num_proc: int | None = field(
        default=None, metadata={"help": "processes that tokenise; unset: this one, by its threads"}
    )

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length = {self.sequence_length}: allowed are whole numbers from 2")
        if self.preprocessing_num_proc is not None and self.preprocessing_num_proc < 1:
            raise ValueError(
                f"preprocessing_num_proc = {self.preprocessing_num_proc}: allowed are whole numbers from 1"
            )


TRAIN = str(Path(__file__).parents[1] / "train.py")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, TrainingArguments)
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


class SettingsParser(HfArgumentParser):
    """Reads settings of the file and of the command line by the same types."""

    error = OneLineErrors.error


@dataclass
class Resume:
    """What the command line says of an interrupted run."""

    checkpoint: Any = None  # None: a new run; True: the newest checkpoint; or a checkpoint's folder
    allow_changed: list[str] = field(default_factory=list)  # settings that may differ from the checkpoint's


def read_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments, Resume]:
    """(model, data, training, resume) from `CONFIG.yaml [--resume [CHECKPOINT]] [--key value ...]`.

    The command line wins over the file; `--key=` unsets.
    """
    command_line = Parser(
        TRAIN,
        usage="%(prog)s CONFIG.yaml [--resume [CHECKPOINT]] [--key value ...]",
        description="Trains a Griffin. Every key of the file can be overridden: --learning_rate 1e-3",
        epilog="\n".join(
            [
                "keys of the file, and options of the same names:",
                *(line for c in ARGUMENT_CLASSES[:2] for f in dataclasses.fields(c) for line in _describe(f)),
                "",
                "All others, max_steps, learning_rate, logging_steps ..., are those of transformers.TrainingArguments.",
            ]
        ),
        formatter_class=ShowDefaultsAndLines,
        allow_abbrev=False,
    )
    command_line.add_argument("config", help="a YAML file, or the name of a ready-made one: own_text")
    command_line.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="continue an interrupted run: from this folder, or from the newest one in output_dir (default: off)",
    )
    command_line.add_argument(
        "--allow_changed",
        nargs="+",
        default=[],
        metavar="KEY",
        help=f"with --resume: settings that may differ from that run's, of {', '.join(ALLOWED)} (default: none)",
    )
    known, rest = command_line.parse_known_args(argv)
    resume = Resume(known.resume, known.allow_changed)
    _check_resume(resume)
    known.config, names = find_preset(known.config, "training"), ", ".join(preset_names("training"))
    settings = _merge(read_yaml(Path(known.config), f"YAML files and ready-made ones: {names}"), _read_overrides(rest))
    _check_keys(settings, known.config)
    if settings.get("config_name") is not None:
        settings["config_name"] = find_preset(str(settings["config_name"]), "model")
    settings = choose_device(settings, read_request())
    on_cpu = str(settings["use_cpu"]).lower() in ("true", "t", "yes", "y", "1")  # as HfArgumentParser reads it
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not on_cpu and not says_precision(settings):
        settings["bf16"] = True
    if not torch.cuda.is_available():
        settings = {"dataloader_pin_memory": False, **settings}
    # Counted for the loss curve and the metrics; `logging_nan_inf_filter` would hide the loss that must stop the run.
    settings = {"include_num_input_tokens_seen": True, **settings, "logging_nan_inf_filter": False}
    settings = {"ddp_find_unused_parameters": False, **settings}  # every parameter takes part in every step
    if on_cpu:
        join_in_time(settings.get("ddp_backend"), settings.get("ddp_timeout", TrainingArguments.ddp_timeout))
    parser = SettingsParser(ARGUMENT_CLASSES, prog=command_line.prog, add_help=False)
    words = [word for key, value in settings.items() for word in _as_words(key, value)]
    model, data, training = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    _check_model(model)
    _check_training(training)
    _hide_token(training)
    return model, data, training, resume


def _describe(key: dataclasses.Field) -> list[str]:
    """Lines of help, as argparse lays out an option."""
    text, default = key.metadata["help"], key.default
    if default is dataclasses.MISSING:
        text += " (required)"
    elif default is not None:
        text += f" (default: {'off' if default is False else default})"
    elif "unset: " not in text:
        text += " (default: unset)"
    return [f"  --{key.name}", *textwrap.wrap(text, 98, initial_indent=" " * 24, subsequent_indent=" " * 24)]


def _check_resume(resume: Resume) -> None:
    check_allowed(resume.allow_changed)
    if resume.allow_changed and resume.checkpoint is None:
        raise ValueError(f"--allow_changed {' '.join(resume.allow_changed)} is given without --resume")


def _hide_token(training: TrainingArguments) -> None:
    """Where huggingface_hub looks for it; these arguments are saved with the model."""
    if training.hub_token:
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None


def _read_overrides(words: list[str]) -> dict:
    """{"key": value, or [values]} of `--key value ...`, `--key=value`, bare `--key` (true), `--key=` (None: unset)."""
    overrides, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            overrides[key] = [value] if equals else []
        elif key is None:
            raise ValueError(f"{word!r} follows no --key: allowed is one CONFIG.yaml, then --key value")
        else:
            overrides[key].append(word)
    return {key: _simplest(values) for key, values in overrides.items()}


def _simplest(words: list[str]) -> list[str] | str | bool | None:
    if len(words) > 1:
        return words
    return (words[0] or None) if words else True


def _merge(file: dict, command_line: dict) -> dict:
    """The command line wins over the file; in `config_overrides` field by field, and the result is one mapping."""
    settings = {**file, **command_line}
    if settings.get("config_overrides") is not None:
        given = [source["config_overrides"] for source in (file, command_line) if source.get("config_overrides")]
        settings["config_overrides"] = {key: field for value in given for key, field in _read_mapping(value).items()}
    return settings


def _read_mapping(value) -> dict:
    """`config_overrides` of the file (a mapping, or JSON) or of the command line (its words)."""
    try:
        fields = value if isinstance(value, dict) else json.loads(" ".join(value) if isinstance(value, list) else value)
    except (TypeError, json.JSONDecodeError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"config_overrides = {value!r}: allowed is a mapping, on the command line as JSON")
    if taken := sorted(TOKEN_IDS & fields.keys()):
        raise ValueError(f"config_overrides sets {taken}: those come from the tokenizer, allowed are other fields")
    return fields


def _check_keys(settings: dict, path: str) -> None:
    allowed = [f.name for arguments in ARGUMENT_CLASSES for f in dataclasses.fields(arguments) if f.init]
    for key in settings:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=3, cutoff=0.5)
            hint = f"the nearest allowed are {', '.join(near)}" if near else f"see `{spoken.name(TRAIN)} --help`"
            raise ValueError(f"unknown key {key!r} in {path} or on the command line: {hint}")


def _check_model(model: ModelArguments) -> None:
    if (model.config_name is None) == (model.model_name_or_path is None):
        raise ValueError(
            f"config_name = {model.config_name!r} and model_name_or_path = {model.model_name_or_path!r}: "
            "allowed is exactly one of them, a configuration to start from scratch or weights to continue"
        )
    if model.config_overrides is not None and model.config_name is None:
        raise ValueError("config_overrides is given without config_name: weights cannot change their configuration")


def _check_training(training: TrainingArguments) -> None:
    """What TrainingArguments takes, and stumbles over later."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"{name} = {getattr(training, name)}: allowed are whole numbers from 1")
    if training.include_num_input_tokens_seen == "no":
        raise ValueError("include_num_input_tokens_seen = false: allowed is true, the loss curve is drawn over tokens")


def _as_words(key: str, value) -> list[str]:
    """The command-line words for one setting, so that the file and the command line are read by the same types."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}={value[0]}"] if len(value) == 1 else [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]
