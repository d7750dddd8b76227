"""The fingerprint of a run: its settings and its rows. A resumed run has the same, or says what may differ."""

import json
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from training.masking import mask_values


if TYPE_CHECKING:  # which imports this module
    from training.arguments import DataArguments


# Of TrainingArguments: what changes no number of the training. Whatever else there is, in any version, is compared.
FREE = {
    *("output_dir", "disable_tqdm", "run_name", "project", "prediction_loss_only", "per_device_eval_batch_size"),
    *("include_num_input_tokens_seen", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_train"),
    *("do_eval", "do_predict", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "use_cpu"),
    *("local_rank", "enable_jit_checkpoint", "skip_memory_metrics", "debug", "use_cache", "label_names"),
    *("length_column_name", "remove_unused_columns", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("torch_empty_cache_steps", "deepspeed"),
}
FREE_BEGINNINGS = (
    *("logging_", "log_", "eval_", "save_", "hub_", "push_", "report_to", "trackio_", "ddp_", "fsdp", "torch_compile"),
    *("activation_checkpointing", "gradient_checkpointing"),
)
# Of these, what all processes of one run do together, or not at all: another run may do it otherwise.
TOGETHER = ("save_", "eval_", "logging_", "ddp_")
TOGETHER += ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size")
TOGETHER += ("batch_eval_metrics", "prediction_loss_only", "include_num_input_tokens_seen")
ALONE = {"save_total_limit", "logging_dir", "ddp_timeout"}  # what each may do as it likes
# Texts are compared by their tokens, wherever they lie.
DATA_SETTINGS = ("text_column", "dataset_subset", "train_split", "eval_split", "eval_fraction", "split_seed")
TOKEN_SETTINGS = ("tokenizer", "tokenizer_vocab_size", "sequence_length")

# What --allow_changed may name, and what then happens.
ALLOWED = {
    "max_steps": "the schedule of the learning rate is that of the new end",
    "num_train_epochs": "the schedule of the learning rate is that of the new end",
    "per_device_train_batch_size": "the same rows a step, in another split",
    "gradient_accumulation_steps": "the same rows a step, in another split",
    "processes": "the same rows a step, in another split; the random state of dropout is another",
    "bf16": "other rounding",
    "fp16": "other rounding",
    "tf32": "other rounding",
    "float8": "other rounding",
    "max_grad_norm": "from here on",
    "attention_dropout": "from here on",
}


def settings_of(
    data_arguments: "DataArguments",
    training_arguments: TrainingArguments,
    shared_by: int = 1,
    float8: str | None = None,
) -> dict:
    """{name: value as JSON has it} of all that the numbers of a run depend on, but for its texts and its model.

    shared_by: how many processes share each row, see sequence_parallel_size. float8: the recipe, or None.
    """
    training = {
        name: value
        for name, value in training_arguments.to_dict().items()
        if name not in FREE and not name.startswith(FREE_BEGINNINGS)
    }
    data = {name: getattr(data_arguments, name) for name in (*DATA_SETTINGS, *TOKEN_SETTINGS)}
    processes = training_arguments.world_size
    rows = training_arguments.train_batch_size * training_arguments.gradient_accumulation_steps * processes // shared_by
    settings = {**data, **training, "float8": float8, "processes": processes, "rows of a step": rows}
    return mask_values(json.loads(json.dumps(settings, default=str)))


def settings_together(training_arguments: TrainingArguments) -> dict:
    """{name: value} of what processes do together: one that saves, evaluates or logs alone waits for the others."""
    given = training_arguments.to_dict().items()
    settings = {name: value for name, value in given if name.startswith(TOGETHER) and name not in ALONE}
    return mask_values(json.loads(json.dumps(settings, default=str)))


def check_allowed(names: list[str]) -> None:
    if unknown := sorted(set(names) - set(ALLOWED)):
        raise ValueError(f"--allow_changed {' '.join(unknown)}: allowed are {', '.join(ALLOWED)}")


def check_same_settings(checkpoint: str, before: dict, now: dict, allowed: list[str]) -> None:
    """Raises ValueError that names every setting which differs from the checkpoint's and is not in `allowed`."""
    changed = [name for name in now if name in before and before[name] != now[name] and name not in allowed]
    if not changed:
        return
    values = "; ".join(f"{name} = {before[name]!r} there, {now[name]!r} now" for name in changed)
    if fixed := [name for name in changed if name not in ALLOWED]:
        hint = f"a resumed run keeps {', '.join(fixed)}; to train on with others, start anew from the saved weights"
    else:
        hint = f"to change it on purpose, add --allow_changed {' '.join(changed)}"
    raise ValueError(f"--resume: {checkpoint} is of a run with other settings: {values}; {hint}")


def rows_of(sources: dict[str, str | None], rows: dict) -> dict:
    """{"train_data": {"source", "rows", "tokens", "sha256"}, "eval_data": ...} of two PackedRows by these names."""
    return {
        name: {
            "source": mask_values(sources[name]),
            "rows": len(each),
            "tokens": each.num_tokens,
            "sha256": each.checksum(),
        }
        for name, each in rows.items()
    }


def check_same_rows(checkpoint: str, before: dict, now: dict) -> None:
    """Raises ValueError where the texts of the interrupted run made other tokens, or laid them out otherwise."""
    for name, there in before.items():
        if there["sha256"] != now[name]["sha256"]:
            raise ValueError(
                f"--resume: {checkpoint} is of a run with other data: {name} = {now[name]['source']!r} makes other rows"
                f" ({now[name]['rows']:,} of {now[name]['tokens']:,} tokens in all) than {there['source']!r} made"
                f" ({there['rows']:,} of {there['tokens']:,}); allowed is the same text in the same order"
            )
