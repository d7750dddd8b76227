"""`push_to_hub: true` of train.py: a repository before anything is trained, and the whole folder when all is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from training.checkpoint import NotSaved


def make_repo(trainer: Trainer, make: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """`make(...)`, stock Trainer's `init_hf_repo`; what keeps it from the Hub is said in one line, as a ValueError."""
    try:
        make(*args, **kwargs)
    except Exception as error:  # the client's errors have no common class
        name = trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name
        raise ValueError(
            f"push_to_hub = true: {name!r} cannot be made on the Hub ({_reason(error)}); allowed is a name there that "
            "your token (hf auth login) may write to, or false: a finished folder can be pushed at any time"
        ) from error


def push(trainer: Trainer) -> None:
    """Uploads output_dir as stock Trainer does, but behind metrics, curve and card. Raises NotSaved, in one line."""
    folder, repo_id = trainer.args.output_dir, trainer.hub_model_id
    try:
        trainer._finish_current_push()
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=["_*", "checkpoint-*"],
            revision=trainer.args.hub_revision,
        )
    except Exception as error:
        raise NotSaved(
            f"{folder} holds the model, the Hub did not take it as {repo_id} ({_reason(error)}); --resume tries again"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
