"""What a training run leaves behind: loss in nats and bits per byte, metrics.json, loss_curve.png."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import spoken
import tokenizers
import torch
import transformers
from whole_files import in_one_step

from training.launch import launch_command
from training.masking import mask_secrets, mask_values


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p in nats (B, T - 1) of labels[:, 1:] under logits[:, :-1], float32; 0 where the label is -100."""
    targets = labels[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(targets.shape)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits to encode the text, its documents' ends included, for each byte of it."""
    return total_nats / math.log(2) / num_bytes


def held_out_metrics(num_bytes: int) -> Callable:
    """`compute_metrics` for Trainer, whose predictions are `token_losses`: exact means over tokens and over bytes."""

    def compute(prediction) -> dict[str, float]:
        total = float(prediction.predictions.sum(dtype=np.float64))
        predicted = int((prediction.label_ids[:, 1:] != -100).sum())
        return {"loss": total / predicted, "bits_per_byte": bits_per_byte(total, num_bytes)}

    return compute


def versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, datasets, tokenizers)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def summarize(log_history: list[dict]) -> dict[str, list[dict]]:
    """Trainer's log as two lists: training losses and held-out losses, each with step and tokens seen."""
    entries = [{**entry, "tokens": entry.get("num_input_tokens_seen", 0)} for entry in log_history]
    train_keys, eval_keys = ("loss", "learning_rate", "grad_norm"), ("eval_loss", "eval_bits_per_byte")

    def pick(keys):
        return [
            {key: entry[key] for key in ("step", "tokens", *keys) if key in entry}
            for entry in entries
            if keys[0] in entry
        ]

    return {"train": pick(train_keys), "eval": pick(eval_keys)}


def command_again() -> str:
    """What reproduces this run from its beginning: launcher, script and arguments, without --resume and secrets."""
    words, dropped = [], False
    for word in sys.argv[1:]:
        dropped = word.split("=")[0] in ("--resume", "--allow_changed") or (dropped and not word.startswith("-"))
        words += [] if dropped else [word]
    return shlex.join(mask_secrets([*launch_command(), *words]))


def write_metrics(path: Path, log_history: list[dict], **facts: Any) -> dict:
    """Writes `facts`, command, versions and all logged losses as JSON, without any secret; returns them."""
    metrics = {"command": command_again(), "versions": versions(), **facts, **summarize(log_history)}
    metrics = mask_values(metrics)
    with in_one_step(path) as half:
        half.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def next_steps(folder: str, data: str | None) -> str:
    """Commands to copy: what to do with the model in `folder`, measured on `data`."""
    model, data = shlex.quote(folder), shlex.quote(data or "OTHER_TEXT")
    commands = {
        "generate": f"{spoken.another('generate')} {model} --prompt 'Once upon a time'",
        "evaluate": f"{spoken.another('evaluate')} {model} {data}",
        "fine-tune": f"{spoken.another('train')} finetune --model_name_or_path {model} --train_data YOUR_TEXT",
        "publish": f"{spoken.another('push')} {model} NAME",
    }
    return "\n".join(["what next:", *(f"  {name:<10} {command}" for name, command in commands.items())])


def plot_losses(path: Path, metrics: dict) -> None:
    """Training and held-out loss against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, key, style in (("training", "loss", {"linewidth": 1}), ("held-out", "eval_loss", {"marker": "o"})):
        entries = metrics["train" if key == "loss" else "eval"]
        axes.plot([e["tokens"] for e in entries], [e[key] for e in entries], label=name, **style)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(
        f"{metrics['parameters']:,} parameters, {metrics['bits_per_byte']:.3f} bits per byte held-out", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    pyplot.close(figure)
