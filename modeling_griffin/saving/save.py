"""What a saved Griffin consists of, and how it is written: complete, and all of it or nothing.

A folder that the Hub can load holds the configuration with an `auto_map`, safetensors, the generation configuration,
the model card and the code: every file that the loader of Transformers will look for, flat.

Stock saving, which a copy of the code in a model repository uses, falls short in four places:
  - where rank 0 of several fails to write, the others wait for it until the process group's timeout;
  - it gathers sharded weights for one rank only in newer versions;
  - it writes into the folder as it goes: a failure leaves half a model, and a change between one file of weights and
    several leaves the old ones beside the new, where the loader prefers them;
  - `push_to_hub` writes an empty model card. So does `Trainer.push_to_hub`, over the one that the model has saved:
    `keep_model_card(trainer)` prevents that.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, try_to_load_from_cache
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..configuration_griffin import AUTO_MAP, OUR_CLASSES, GriffinConfig
from .card import card_for_hub, refresh_card
from .saved_files import STAGE_PREFIX, TOKENIZER_FILES, in_place_of, is_of_its_folder
from .sharded import all_ranks_or_none, gather, is_sharded


logger = logging.get_logger(__name__)

# Weights of an earlier push, which would win over the new ones: removed in the same commit.
STALE_ON_HUB = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
CARD_FILES = ("README.md", "metrics.json", "loss_curve.png")  # of these, what the folder holds
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def save_config(
    config: GriffinConfig, stock: Callable, save_directory: str | os.PathLike, push_to_hub: bool, **kwargs: Any
) -> None:
    """`GriffinConfig.save_pretrained` with the code beside it. stock: the method of Transformers."""
    # Its copying of code is done here, where each file takes its place in one step.
    config.__dict__["_auto_class"] = None
    try:
        if Path(save_directory).is_file():
            stock(save_directory)  # which says what is wrong
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with in_place_of(Path(save_directory) / "config.json") as beside:
            stock(beside.parent)
    finally:
        del config.__dict__["_auto_class"]
    names = ["config.json", *copy_code(save_directory)]
    if push_to_hub:
        arguments = _upload_arguments(kwargs, save_directory)
        upload(save_directory, names, **{**arguments, "repo_id": create_repo(arguments)})


def save_model(
    model: torch.nn.Module,
    stock: Callable,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Saves configuration, safetensors, generation configuration, code and model card; adapters as PEFT has them.

    Arguments of `save_pretrained` as in Transformers; stock: its method. Everything is written beside the files of the
    folder and then moved to its place: a save that fails leaves the folder as it was, says so and raises. Files that
    are not the model's stay, and so does a model card that was not generated. A tokenizer comes along from the folder
    that the model was loaded from, where the new one has none.

    A folder `checkpoint-<number>` of Trainer gets no code: it goes one level up, once, because Trainer uploads that
    level during training, to which it copies the weights and the configuration only.

    Of a model that tensor parallelism or FSDP2 has sharded every rank must call this, unless `state_dict` is whole:
    the weights are gathered, and rank 0 writes them as those of a model in one process.

    Raises:
        RuntimeError: on the ranks of a sharded model that did not fail themselves, where another one did.
        ValueError: for `distributed_checkpoint=True` with `push_to_hub=True`: PyTorch's sharded files are for
            resuming, and no Hub client reads them.
    """
    in_shards = kwargs.get("distributed_checkpoint", False)
    if in_shards and push_to_hub:
        raise ValueError(
            "push_to_hub = True: allowed only without distributed_checkpoint, whose files are for resuming"
        )
    upload_arguments = _upload_arguments(kwargs, save_directory)
    folder, writes = Path(save_directory), model.should_save_on_this_rank(is_main_process)
    weights = model.state_dict() if state_dict is None else state_dict
    together = not in_shards and is_sharded(weights)
    with all_ranks_or_none(together):
        if push_to_hub and writes:  # before the work of saving: a missing token or right shows at once
            upload_arguments["repo_id"] = create_repo(upload_arguments)
    if together:
        state_dict = gather(weights, model.all_tied_weights_keys, keep=writes)
    model.config.auto_map = _auto_map_of(model)
    with all_ranks_or_none(together), _stock_saving_kept_short(model):
        if in_shards:
            stock(save_directory, is_main_process=is_main_process, **kwargs)
        elif writes:
            with all_or_nothing(folder) as stage:
                stock(stage, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
                if (stage / "config.json").exists():  # an adapter has none: code and card are its base model's
                    _complete(model, stage, folder)
                names = [path.name for path in stage.iterdir()]
    if push_to_hub and writes:
        upload(folder, [*names, *CARD_FILES], **upload_arguments)


def _complete(model, stage: Path, folder: Path) -> None:
    """Puts into `stage` what stock saving leaves out of a model's `folder`."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # here: it brings PEFT, which takes seconds to import

    refresh_card(stage, folder)
    if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        copy_code(stage, _own_class(model))
        _copy_tokenizer(model.config, stage, folder)
        return
    for path in code_files(_own_class(model)):
        (stage / path.name).unlink(missing_ok=True)
    copy_code(folder.parent, _own_class(model))
    if not (folder.parent / "README.md").exists():
        refresh_card(stage, folder.parent, target=folder.parent)


def _copy_tokenizer(config: GriffinConfig, stage: Path, folder: Path) -> None:
    """From the folder or repository that the model was loaded from, unless there is one already."""
    if any((folder / name).exists() for name in TOKENIZER_FILES) or not config._name_or_path:
        return
    for name in TOKENIZER_FILES:
        if (path := _beside_the_weights(config, name)) is not None:
            shutil.copyfile(path, stage / name)


def _beside_the_weights(config: GriffinConfig, name: str) -> Path | None:
    """A file of the folder, or of the repository as far as it was downloaded: nothing is fetched for it.

    Where the cache has models of several revisions, none is taken: this one does not say which is its own.
    """
    source = Path(config._name_or_path)
    if (source / "config.json").exists():
        return source / name if is_of_its_folder(source / name) else None
    if len(source.parts) != 2 or source.exists():
        return None
    found = try_to_load_from_cache(config._name_or_path, name)
    if not isinstance(found, str) or len(list(Path(found).parents[1].glob("*/config.json"))) != 1:
        return None
    return Path(found)


def push_model(
    model: torch.nn.Module,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **kwargs: Any,
) -> CommitInfo | None:
    """`push_to_hub`, arguments and result as in Transformers.

    A card on the Hub that a person wrote stays, with `tags` added.
    """
    writes = model.should_save_on_this_rank(True)
    arguments = _upload_arguments({**kwargs, "repo_id": repo_id}, repo_id)
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    with tempfile.TemporaryDirectory() as folder:
        with all_ranks_or_none(is_sharded(model.state_dict())):
            if writes:
                arguments["repo_id"] = create_repo(arguments)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not writes:
            return None
        if (Path(folder) / "config.json").exists():
            tags = sorted({*tags, *(model.model_tags or [])})
            card_for_hub(folder, arguments["repo_id"], tags, arguments.get("token"))
        return upload(folder, os.listdir(folder), **arguments)


def code_files(model_class: type | None = None) -> list[Path]:
    """The source files that a saved folder needs: those of `AUTO_MAP`, of a user's own class, and what they import."""
    here = Path(__file__).parents[1]
    roots = {here / f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()}
    if model_class is not None and model_class.__name__ not in OUR_CLASSES and model_class.__module__ != "__main__":
        roots.add(Path(sys.modules[model_class.__module__].__file__))
    files = {}
    for root in roots:
        for path in (root, *map(Path, get_relative_import_files(root))):
            files[path.name] = path
    return [files[name] for name in sorted(files)]


def copy_code(folder: str | os.PathLike, model_class: type | None = None) -> list[str]:
    """Copies `code_files` into the folder, each in one step; returns their names."""
    paths = code_files(model_class)
    for path in paths:
        target = Path(folder) / path.name
        if target.exists() and target.samefile(path):
            continue
        with in_place_of(target) as beside:
            shutil.copyfile(path, beside)
            shutil.copymode(path, beside)
    return [path.name for path in paths]


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into; at the end its files take their places in `folder`, or none does.

    The stage lies inside `folder`, hence on the same disk. What a failure cannot undo: a process that is killed between
    two renames, where no data is written any more. The files of before are then in the stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{STAGE_PREFIX}*"):
        logger.warning(
            f"{leftover} was left by a save that was killed: delete it, unless files of {folder} are missing"
        )
    stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=folder))
    new, old = stage / "new", stage / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new
        _swap_in(new, old, folder)
    except BaseException as error:
        state = f"its old files are in {old}" if old.exists() and any(old.iterdir()) else "it is as it was before"
        logger.error(f"saving to {folder} failed with {type(error).__name__}: {error}; {state}")
        if state.startswith("it is"):
            shutil.rmtree(stage, ignore_errors=True)
        raise
    shutil.rmtree(stage, ignore_errors=True)


def _swap_in(new: Path, old: Path, folder: Path) -> None:
    """Moves the files of `new` into `folder`, what they replace into `old`; undoes it all where a move fails."""
    names = sorted(path.name for path in new.iterdir())
    moves = []
    try:
        for name in [*names, *_stale_weights(names, folder)]:
            for source, target in ((folder / name, old / name), (new / name, folder / name)):
                if source.exists():
                    os.replace(source, target)
                    moves.append((source, target))
    except BaseException:
        for source, target in reversed(moves):
            os.replace(target, source)
        raise


def _stale_weights(names: list[str], folder: Path) -> list[str]:
    """Weights of an earlier save under the name of the new ones, in another number of files."""
    families = {_weights_family(name) for name in names} - {None}
    return [path.name for path in folder.iterdir() if _weights_family(path.name) in families and path.name not in names]


def _weights_family(name: str) -> tuple[str, str] | None:
    """("model", ".fp16") for model.fp16.safetensors, for its shards and for their index; None for other files."""
    pattern = r"(.+?)(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors|(.+?)\.safetensors\.index(\.\w+)?\.json"
    match = re.fullmatch(pattern, name)
    return None if match is None else (match[1] or match[4], match[2] or match[5] or "")


def _own_class(model) -> Any:
    """The class that has a source file: FSDP2 puts a generated FSDP<name> before it."""
    return next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))


def _auto_map_of(model) -> dict:
    """All our classes, and in the place of one of them the user's own class."""
    cls, entries = _own_class(model), getattr(model.config, "auto_map", None) or {}
    entries = {auto: name for auto, name in entries.items() if auto not in AUTO_MAP}
    if cls.__name__ not in OUR_CLASSES and cls.__module__ != "__main__" and cls._auto_class is not None:
        entries[cls._auto_class] = f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
    return {**AUTO_MAP, **entries}


@contextmanager
def _stock_saving_kept_short(model) -> Iterator[None]:
    """Takes from stock saving, on this object only, what is done here: copying code, gathering, waiting for others."""
    replaced = {
        "_auto_class": None,
        "is_remote_code": lambda: False,
        "gather_sharded_state_dict_for_save": lambda model, state_dict, *args, **kwargs: state_dict,
        "barrier_after_gathered_checkpoint_save": lambda distributed_config: None,
    }
    model.__dict__.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            model.__dict__.pop(name, None)


def _upload_arguments(kwargs: dict, folder: str | os.PathLike) -> dict:
    """Takes the arguments of `upload` out of kwargs; the repository is called like the folder unless it is named."""
    arguments = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
    return {"repo_id": Path(folder).resolve().name, **arguments}


def create_repo(arguments: dict) -> str:
    """Creates the repository of these `upload` arguments unless it exists; returns its full name."""
    api = HfApi(token=arguments.get("token"))
    return api.create_repo(arguments["repo_id"], private=arguments.get("private"), exist_ok=True).repo_id


def upload(folder: str | os.PathLike, names: list[str], **arguments: Any) -> CommitInfo:
    """Uploads the named files of the folder in one commit, which also removes weights that they replace.

    Args:
        arguments: `repo_id`, of a repository that exists, and others of `UPLOAD_ARGUMENTS`, as in Transformers.

    Returns:
        huggingface_hub's CommitInfo.
    """
    api, repo_id, revision = HfApi(token=arguments.get("token")), arguments["repo_id"], arguments.get("revision")
    create_pr = arguments.get("create_pr") or False
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    replaces_weights = any(_weights_family(name) == ("model", "") for name in names)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        delete_patterns=STALE_ON_HUB if replaces_weights else None,
        commit_message=arguments.get("commit_message") or "Upload model",
        commit_description=arguments.get("commit_description"),
        revision=revision,
        create_pr=create_pr,
    )
