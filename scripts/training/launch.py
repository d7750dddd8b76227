"""What a launcher asks for and what really runs: accelerate falls back without a word, train.py refuses."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import spoken
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType


LAUNCH_COMMANDS = ("accelerate-launch", "accelerate.commands.launch")
TORCH_COMMANDS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
LAYOUTS = {"MULTI_CPU": "DDP", "MULTI_GPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}  # accelerate's names
PRECISIONS = {"no": "float32", "bf16": "bfloat16 with float32 weights", "fp16": "float16 with float32 weights"}
HINT = (
    "on CPUs take configuration/accelerate/cpu_ddp.yaml (accelerate launch starts one process for MULTI_CPU, and, "
    "without train.py's use_cpu, processes that do not know of each other)"
)


@dataclass
class Request:
    """What `accelerate launch` was told: by its file, or its command line. None where it was told nothing."""

    processes: int | None = None
    use_cpu: bool | None = None


def read_request() -> Request:
    """Of the `accelerate launch` that started this process; an empty one for torchrun, plain python and others."""
    launcher, words = _launcher()
    if launcher != ["accelerate", "launch"]:
        return Request()
    told, _ = launch_command_parser().parse_known_args(words)
    if told.config_file is None:
        return Request(told.num_processes, told.cpu or None)
    file = load_config_from_file(told.config_file)
    processes = told.num_processes or (file.num_processes if file.num_processes > 0 else None)
    return Request(processes, told.cpu or file.use_cpu)


def launch_command() -> list[str]:
    """The words that start this script again in the same way: `python` or a launcher, and the script."""
    launcher, words = _launcher()
    names = [Path(word).name for word in words]
    script = Path(sys.argv[0]).name
    if launcher and script in names:
        return [*launcher, *words[: names.index(script)], spoken.program()[-1]]
    return spoken.program()


def _launcher() -> tuple[list[str], list[str]]:
    """(how to call the launcher that started this process, the words after it); two empty lists without one."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return [], []
    names = [Path(word).name for word in words]
    if "accelerate" in names[:2] and "launch" in words[:3]:
        return ["accelerate", "launch"], words[words.index("launch") + 1 :]
    for commands, call in ((LAUNCH_COMMANDS, ["accelerate", "launch"]), (TORCH_COMMANDS, ["torchrun"])):
        if command := [name for name in names[:3] if name in commands]:
            return call, words[names.index(command[0]) + 1 :]
    return [], []


def choose_device(settings: dict, request: Request) -> dict:
    """`settings` with `use_cpu` where the launcher says so, or where there is nothing else and nobody asked for more.

    Without it accelerate starts, on a machine without a GPU, processes that know nothing of each other.
    """
    if settings.get("use_cpu") is not None:
        return settings
    if torch.accelerator.is_available():
        return {**settings, "use_cpu": bool(request.use_cpu)}
    wants_gpu = request.use_cpu is False or _flag("ACCELERATE_USE_FSDP") or _flag("ACCELERATE_USE_DEEPSPEED")
    if wants_gpu and not _flag("ACCELERATE_USE_CPU"):
        raise ValueError(
            "the launcher's configuration asks for a GPU (use_cpu: false) and this machine has none: take "
            "configuration/accelerate/cpu.yaml or cpu_ddp.yaml, or pass --use_cpu"
        )
    return {**settings, "use_cpu": True}


def says_precision(settings: dict) -> bool:
    """Whether the training configuration or the launcher says what to compute in."""
    by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" or _flag("ACCELERATE_USE_DEEPSPEED")
    return by_launcher or not settings.keys().isdisjoint(("bf16", "fp16"))


def check_processes(state: PartialState, request: Request) -> None:
    """Raises ValueError unless as many processes as asked for know of each other.

    Args:
        state: accelerate's PartialState, `TrainingArguments.distributed_state`.
    """
    for source, number in (("the launcher", request.processes), ("WORLD_SIZE", os.environ.get("WORLD_SIZE"))):
        if number is not None and int(number) != state.num_processes:
            raise ValueError(f"{source} asks for {number} processes, {state.num_processes} would train: {HINT}")
    if state.num_processes > 1 and state.distributed_type == DistributedType.NO:
        raise ValueError(f"{state.num_processes} processes would train without each other: {HINT}")


def check_launch(accelerator: Accelerator) -> None:
    """Raises ValueError where accelerate would shard, or compute, otherwise than the launcher asks."""
    kind, precision = accelerator.distributed_type, precision_of(accelerator)
    for wanted in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if _flag(f"ACCELERATE_USE_{wanted.value}") and kind != wanted:
            raise ValueError(
                f"the launcher asks for {wanted.value}, {describe(accelerator)} would run: {wanted.value} needs a GPU "
                "for each of at least two processes"
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("the launcher asks for fsdp_version 1: allowed is 2, which can keep Λ in float32")
    if kind == DistributedType.DEEPSPEED and any(_deepspeed_settings(accelerator, name) for name in ("bf16", "fp16")):
        raise ValueError(
            "mixed precision by DeepSpeed's bf16 or fp16 would round Λ: allowed is torch_autocast, as in "
            "configuration/accelerate/deepspeed_zero3.json, with no mixed_precision and no bf16 or fp16 elsewhere"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", precision):
        raise ValueError(
            f"the launcher asks for mixed precision {os.environ['ACCELERATE_MIXED_PRECISION']}, {precision} would run: "
            "let bf16 and fp16 of the training configuration say the same, or leave them out"
        )


def check_checkpoint(checkpoint: str, accelerator: Accelerator) -> None:
    """Raises ValueError where the shards of one launcher would be read by another."""
    of = "FSDP" if (Path(checkpoint) / "pytorch_model_fsdp_0").is_dir() else "NO"
    of = "DEEPSPEED" if (Path(checkpoint) / "latest").is_file() else of
    kind = accelerator.distributed_type.value
    if of != (kind if kind in ("FSDP", "DEEPSPEED") else "NO"):
        layout = {"NO": "one process or DDP"}.get(of, of)
        raise ValueError(
            f"--resume: {checkpoint} was written under {layout}, now runs {describe(accelerator)}: resume under "
            f"{layout}, or start anew from a saved model by model_name_or_path"
        )


def describe(accelerator: Accelerator) -> str:
    """One line: what really runs, as "one process on CPU, float32" or "2 processes on GPU (DDP), ..."."""
    count, device = accelerator.num_processes, accelerator.device.type
    processes = "one process" if count == 1 else f"{count} processes"
    layout = LAYOUTS.get(accelerator.distributed_type.value)
    precision = PRECISIONS[precision_of(accelerator)]
    place = {"cpu": "CPU", "cuda": "GPU"}.get(device, device.upper())
    return f"{processes} on {place}{f' ({layout})' if layout else ''}, {precision}"


def precision_of(accelerator: Accelerator) -> str:
    """ "no", "bf16" or "fp16"; what DeepSpeed computes in, accelerate calls "no"."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    autocast = _deepspeed_settings(accelerator, "torch_autocast")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(autocast.get("dtype"), "no") if autocast else "no"


def _deepspeed_settings(accelerator, name: str) -> dict:
    """A part of DeepSpeed's configuration; empty where it is switched off."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config.get(name, {})
    return settings if settings.get("enabled") in (True, "true") else {}


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
