"""Where a run starts: anew, from a checkpoint, or not at all; what --resume compares before anything is read."""

from pathlib import Path
from typing import NoReturn

from command_line import check_folder
from transformers import TrainingArguments

from modeling_griffin import GriffinConfig
from training.arguments import TOKEN_IDS, DataArguments, Resume
from training.checkpoint import find_checkpoint, is_final, read_manifest, read_state
from training.fingerprint import check_same_settings, settings_of
from training.ranks import leave_together


# What a configuration may change between an interruption and --resume; the tokenizer gives the ids.
CHANGEABLE = {"use_cache", *TOKEN_IDS}


def where_to_start(
    data_arguments: DataArguments,
    arguments: TrainingArguments,
    resume: Resume,
    shared_by: int = 1,
    float8: str | None = None,
) -> tuple[str | None, bool]:
    """(the checkpoint to continue from, or None; whether all of that run is done). Before anything is read."""
    checkpoint = find_checkpoint(resume.checkpoint, arguments.output_dir, arguments.load_best_model_at_end)
    check_folder("output_dir", Path(arguments.output_dir))
    if checkpoint is None:
        return None, False
    before = read_manifest(checkpoint).get("settings", {})
    now = settings_of(data_arguments, arguments, shared_by, float8)
    check_same_settings(checkpoint, before, now, resume.allow_changed)
    is_trained = is_complete(checkpoint, arguments)
    is_over = is_trained and is_final(checkpoint, arguments.output_dir)
    if is_trained and not is_over:
        print(f"{checkpoint} is the run's end, the last save is not whole: evaluating and saving again")
    return checkpoint, is_over


def is_complete(checkpoint: str, arguments: TrainingArguments) -> bool:
    """Whether nothing is left to train. Stock Trainer would take one step more, since it looks after each step."""
    state = read_state(checkpoint)
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return state["epoch"] >= arguments.num_train_epochs


def check_same_model(checkpoint: str, config: GriffinConfig, allowed: list[str]) -> None:
    """Raises ValueError where the interrupted run trained a model of other sizes or another recurrence."""
    before = GriffinConfig.from_pretrained(checkpoint)
    values = {name: (getattr(before, name), getattr(config, name)) for name in GriffinConfig.__annotations__}
    changed = [
        f"{name} = {old!r} there, {new!r} now"
        for name, (old, new) in values.items()
        if old != new and name not in CHANGEABLE and name not in allowed
    ]
    if changed:
        raise ValueError(f"--resume: the checkpoint {checkpoint} is of another model: {'; '.join(changed)}")


def end_of_complete_run(checkpoint: str, arguments: TrainingArguments) -> NoReturn:
    if arguments.process_index == 0:
        print(
            f"the run is complete, {checkpoint} is its end: to go on, raise max_steps or num_train_epochs and name it "
            "after --allow_changed"
        )
    leave_together()
    raise SystemExit(0)
