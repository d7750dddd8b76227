"""RecurrentGemma to Griffin: `python scripts/convert_recurrent_gemma.py SOURCE TARGET`, and back with `--reverse`.

SOURCE is a folder or Hub id of a Transformers checkpoint, or DeepMind's own PyTorch checkpoint, one `.pt` file. Weights
stream through: memory holds about one shard. TARGET must not exist yet; it appears when everything is in it.
"""

import argparse
import glob
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import spoken
import torch
from command_line import Parser, ShowDefaultsAndLines
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from training.hub_ids import require_on_hub
from transformers import AutoConfig, GenerationConfig, RecurrentGemmaForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.conversion.mlx import mlx_config_from_griffin, mlx_differences, mlx_tensors_from_griffin
from modeling_griffin.conversion.recurrent_gemma import (
    check_weight,
    griffin_config_from_deepmind,
    griffin_config_from_recurrent_gemma,
    griffin_tensors_from_deepmind,
    griffin_tensors_from_recurrent_gemma,
    recurrent_gemma_config_from_griffin,
    recurrent_gemma_tensors_from_griffin,
)
from modeling_griffin.saving.card import write_model_card
from modeling_griffin.saving.saved_files import (
    INDEX,
    LICENCE_FILES,
    TOKENIZER_FILES,
    is_of_its_folder,
    read_json_object,
    tensor_names,
    weight_files,
)


COPIED = ("generation_config.json", *TOKENIZER_FILES, *LICENCE_FILES)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# Who reads a Griffin that is turned back, and how its configuration and tensors are written for it.
READERS: dict[str, tuple[Callable, Callable]] = {
    "transformers": (recurrent_gemma_config_from_griffin, recurrent_gemma_tensors_from_griffin),
    "mlx": (mlx_config_from_griffin, mlx_tensors_from_griffin),
}
Entries = Iterator[tuple[str, torch.Tensor]]
Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


class ShardWriter:
    """Collects tensors and writes a file whenever `max_bytes` are together."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.waiting, self.waiting_bytes = {}, 0
        self.shards: list[list[str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.shapes:
            raise ValueError(f"the source has {name} twice (name as in the target)")
        size = tensor.numel() * tensor.element_size()
        if self.waiting and self.waiting_bytes + size > self.max_bytes:
            self.flush()
        self.waiting[name], self.shapes[name] = tensor.contiguous(), tuple(tensor.shape)
        self.waiting_bytes += size
        self.total_bytes += size

    def flush(self) -> None:
        if self.waiting:
            self.shards.append(list(self.waiting))
            save_file(self.waiting, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
            self.waiting, self.waiting_bytes = {}, 0

    def close(self) -> None:
        """Gives the files the names that `from_pretrained` looks for."""
        self.flush()
        count = len(self.shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names, start=1):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            weight_map = {entry: name for name, shard in zip(names, self.shards) for entry in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def safetensors_entries(folder: Path) -> Entries:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                yield name, shard.get_tensor(name)


def read_checkpoint(
    folder: Path, reader: str | None
) -> tuple[PreTrainedConfig, PreTrainedConfig, Entries, int, Change]:
    """(source config, target config, entries, how many, what becomes of each) of a Transformers checkpoint.

    reader: who reads a Griffin that is turned back, a key of `READERS`; None for the way here.
    """
    count = sum(len(tensor_names(file)) for file in weight_files(folder))
    convert_back: Callable | None = None
    change: Change = griffin_tensors_from_recurrent_gemma
    if reader is not None:
        convert_back, tensors_back = READERS[reader]
        change = partial(tensors_back, dtype=dtype_of(folder))
    config, target = read_configs(folder, convert_back)
    return config, target, safetensors_entries(folder), count, change


def dtype_of(folder: Path) -> torch.dtype:
    """The dtype of a Griffin's weights; Λ has one of its own."""
    dtypes = (tensor.dtype for name, tensor in safetensors_entries(folder) if "lambda_bias" not in name)
    return next(dtypes, torch.float32)


def read_configs(folder: Path, convert_back: Callable | None) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """(source config, target config). Raises ValueError for a config.json that is not the source's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing; allowed are folders that save_pretrained wrote")
    fields = read_json_object(path)
    if not isinstance(fields.get("auto_map", {}), dict):
        raise ValueError(f"auto_map = {fields['auto_map']!r} in {path}: allowed is an object")
    try:
        config = AutoConfig.from_pretrained(folder)
        if convert_back is not None:
            return config, convert_back(config)
        return config, griffin_config_from_recurrent_gemma(config, GriffinConfig)
    except Exception as error:  # what it raises depends on the field that it meets first
        raise ValueError(f"{path} cannot be converted ({error})") from error


def read_deepmind(
    file: Path, arguments: argparse.Namespace
) -> tuple[PreTrainedConfig, PreTrainedConfig, Entries, int, Change]:
    """The same of DeepMind's `.pt` file; its tensors stay on disk until they are used."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what it raises depends on what it meets first
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'empty'}"
        raise ValueError(f"{file}: allowed is a PyTorch checkpoint, tensors and nothing else ({reason})") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}: allowed is DeepMind's state dict")
    choices = (arguments.attention_window_size, arguments.logits_soft_cap, not arguments.no_scale_embeddings)
    try:
        target = griffin_config_from_deepmind(tensors, GriffinConfig, *choices)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: allowed is a whole state dict of DeepMind's torch Griffin") from error
    return None, target, iter(tensors.items()), len(tensors), griffin_tensors_from_deepmind


def check_complete(writer: ShardWriter, config: PreTrainedConfig) -> None:
    """Raises ValueError unless the tensors written are the target's: loading would draw missing ones at random."""
    model_class = GriffinForCausalLM if config.model_type == GriffinConfig.model_type else RecurrentGemmaForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unknown = sorted(expected.keys() - writer.shapes.keys() - tied), sorted(writer.shapes.keys() - expected)
    wrong = [name for name in writer.shapes.keys() & expected.keys() if writer.shapes[name] != expected[name]]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has wrong shapes for", sorted(wrong))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"the source {what} {', '.join(names[:3])}{more} (names as in the target)")


def companions(source: Path) -> list[Path]:
    """Tokenizer, generation config and licence. Raises ValueError for what could be copied only by half.

    A link that leads out of the folder is refused, because the copy is meant to be given away.
    """
    files = [source / name for name in COPIED if os.path.lexists(source / name)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: a link to nothing, or not a file; put the file there or take it away")
        if not is_of_its_folder(file):
            raise ValueError(f"{file}: a link to {file.resolve()}; allowed are files of the folder itself")
        if file.suffix == ".json":
            read_json_object(file)
    return files


def describe_change(source: PreTrainedConfig, target: PreTrainedConfig) -> list[str]:
    """The fields whose value or name changed."""
    before = {} if source is None else source.to_dict()
    after = target.to_dict()
    skipped = ("_name_or_path", "architectures", "auto_map", "transformers_version")
    lines = []
    for field in sorted(before.keys() | after.keys()):
        if field not in skipped and before.get(field) != after.get(field):
            old, new = (values.get(field, "(none)") for values in (before, after))
            lines.append(f"  {field}: {_short(old)} -> {_short(new)}")
    return lines


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def convert(arguments: argparse.Namespace) -> None:
    """Writes beside the target and renames at the end; a failure leaves nothing."""
    target = Path(arguments.target)
    if os.path.lexists(target):
        raise ValueError(f"{target}: exists; allowed is a new folder")
    source = Path(arguments.source)
    if source.is_file():
        if arguments.reverse:
            raise ValueError(f"{source}: with --reverse allowed is a folder or Hub id of a Griffin")
        read = read_deepmind(source, arguments)
    else:
        if not source.is_dir():
            require_on_hub(
                "SOURCE", arguments.source, "model", "a folder, a Hub id (OWNER/NAME) or DeepMind's .pt file"
            )
            patterns = ["*.safetensors", "*.json", *COPIED]
            source = Path(snapshot_download(arguments.source, allow_patterns=patterns, revision=arguments.revision))
        read = read_checkpoint(source, arguments.reader if arguments.reverse else None)
    copied = companions(source if source.is_dir() else source.parent)
    max_shard_bytes = parse_size(arguments.max_shard_size)
    source_config, target_config, entries, count, change = read

    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(target.parent.glob(f"{glob.escape(target.name)}.unfinished-*")):
        print(f"{leftover} was left by a conversion that was killed, unless one is running: delete it", file=sys.stderr)
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        writer, dtypes = ShardWriter(unfinished, max_shard_bytes), {}
        for name, tensor in tqdm(entries, total=count, unit="tensor", desc="converting"):
            check_weight(name, tensor)
            for new_name, new_tensor in change(name, tensor).items():
                writer.add(new_name, new_tensor)
                dtypes.setdefault(str(new_tensor.dtype).removeprefix("torch."), []).append(new_name)
        writer.close()
        check_complete(writer, target_config)
        target_config.architectures = target_config.architectures or ["GriffinForCausalLM"]
        target_config.save_pretrained(unfinished)
        for file in copied:
            shutil.copyfile(file, unfinished / file.name)
        if not (unfinished / "generation_config.json").exists():
            GenerationConfig.from_model_config(target_config).save_pretrained(unfinished)
        if target_config.model_type == GriffinConfig.model_type:
            from_hub = not Path(arguments.source).exists()
            write_model_card(unfinished, repo_id=target.name, **({"base_model": arguments.source} if from_hub else {}))
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    report(arguments.source, target, source_config, target_config, writer, dtypes, [file.name for file in copied])
    if arguments.reverse:
        for line in differences(arguments.reader, source_config, target_config, dtypes):
            print(line)


def differences(
    reader: str, source_config: PreTrainedConfig, target_config: PreTrainedConfig, dtypes: dict[str, list[str]]
) -> list[str]:
    """Where the reader's numbers are not this Griffin's."""
    if reader == "mlx":
        dtype = getattr(torch, max(dtypes, key=lambda name: len(dtypes[name])))
        return [f"mlx-lm differs: {line}" for line in mlx_differences(source_config, dtype)]
    return [
        f"Transformers' class attends {target_config.attention_window_size} tokens, this Griffin one more; "
        "on longer inputs their logits differ."
    ]


def report(
    source: str,
    target: Path,
    source_config: PreTrainedConfig,
    target_config: PreTrainedConfig,
    writer: ShardWriter,
    dtypes: dict,
    copied: list[str],
) -> None:
    tensors = sum(len(names) for names in dtypes.values())
    kinds = ", ".join(f"{len(names)} {dtype}" for dtype, names in sorted(dtypes.items()))
    print(f"{source} -> {target}")
    print(f"{tensors} tensors ({kinds}), {writer.total_bytes / 1e6:.1f} MB in {len(writer.shards)} file(s)")
    print("Configuration:", *describe_change(source_config, target_config), sep="\n")
    print("Copied:", ", ".join(copied) or "nothing, the source has neither tokenizer nor generation config")


def parse_size(text: str) -> int:
    """'5GB' -> 5000000000."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"max_shard_size = {text!r}: allowed are sizes like 500MB or 5GB")
    return size


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("source", help="folder, Hub id, or DeepMind's .pt file")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("--reverse", action="store_true", help="from Griffin to RecurrentGemma")
    parser.add_argument(
        "--for", dest="reader", choices=list(READERS), help="who reads it, with --reverse (default: transformers)"
    )
    parser.add_argument("--revision", help="of a Hub id (default: main)")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: %(default)s)")
    deepmind = parser.add_argument_group("what a .pt file does not tell (defaults: RecurrentGemma 2B and 9B)")
    deepmind.add_argument(
        "--attention-window-size", type=int, default=2048, help="tokens, in DeepMind's sense, without itself"
    )
    deepmind.add_argument("--logits-soft-cap", type=float, default=30.0, help="0 for none")
    scaled = "embeddings are not multiplied by the square root of the width"
    deepmind.add_argument("--no-scale-embeddings", action="store_true", help=scaled)
    arguments = parser.parse_args(argv)
    if arguments.reader and not arguments.reverse:
        parser.error(f"--for {arguments.reader}: allowed is with --reverse only")
    is_file = Path(arguments.source).is_file()
    for name in ("attention_window_size", "logits_soft_cap", "no_scale_embeddings"):
        if getattr(arguments, name) != parser.get_default(name) and not is_file:
            parser.error(
                f"--{name.replace('_', '-')}: allowed is with DeepMind's .pt file only, which does not tell it"
            )
    if arguments.revision is not None and Path(arguments.source).exists():
        parser.error(f"--revision {arguments.revision}: allowed is with a Hub id only; {arguments.source} is here")
    arguments.reader = arguments.reader or "transformers"
    return arguments


def main(argv: list[str] | None = None) -> None:
    try:
        convert(parse_arguments(argv))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        spoken.stop(__file__, error)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind then
    main()
