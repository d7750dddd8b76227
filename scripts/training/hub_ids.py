"""Whether a name that is no file or folder here is on the Hub: known within five seconds, also without a network."""

import sys
import threading
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id


SECONDS = 4  # for one answer, names and connections included
ALLOWED_MODEL = "a folder or Hub id with a model and its tokenizer"
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".md", ".py", ".yaml", ".safetensors", ".bin", ".pt")


def require_model(field: str, name: str, allowed: str = ALLOWED_MODEL) -> None:
    """Raises ValueError, before anything waits for the network, where `name` is neither a folder nor on the Hub."""
    if Path(name).is_file():
        raise ValueError(f"{field} = {name!r} is a file: allowed are {allowed}")
    if not Path(name).is_dir():
        require_on_hub(field, name, "model", allowed)


def require_on_hub(field: str, name: str, kind: str, allowed: str) -> None:
    """Returns where the Hub, or its cache on this machine, has `name`; afterwards it can be loaded.

    Args:
        field: the argument that holds the name, for the message.
        kind: "model" or "dataset".
        allowed: what the argument may be, for the message.

    Raises:
        ValueError: one line with the name, what was looked for and what is allowed.
    """
    reason = "no such file or folder"
    if is_hub_id(name):
        said = _ask(name, kind)
        if said is None:
            return
        reason += f", and {said}"
    raise ValueError(f"{field} = {name!r} does not exist ({reason}): allowed are {allowed}")


def is_hub_id(name: str) -> bool:
    """Whether the name could be one of the Hub's rather than a path."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in FILE_SUFFIXES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _ask(name: str, kind: str) -> str | None:
    """None where it can be loaded, else why not."""
    of = f"{'data set' if kind == 'dataset' else kind} of this name"
    if constants.is_offline_mode():
        return None if _is_cached(name, kind) else f"offline (HF_HUB_OFFLINE) the cache has no {of}"
    answer = _answer(name, kind)
    if isinstance(answer, GatedRepoError):
        return "the Hub wants its terms accepted and a token (hf auth login) for this name"
    if isinstance(answer, RepositoryNotFoundError):
        return f"the Hub ({constants.ENDPOINT}) has no public {of}"
    if not isinstance(answer, BaseException):
        return None
    if not _is_cached(name, kind):
        return f"the Hub ({constants.ENDPOINT}) cannot be reached: {' '.join(str(answer).split())[:120]}"
    print(f"the Hub cannot be reached: {name} is taken from the cache", file=sys.stderr)
    constants.HF_HUB_OFFLINE = True  # or each file waits for its own time-out
    if (loaded := sys.modules.get("datasets")) is not None:  # who only generates needs no data sets
        loaded.config.HF_HUB_OFFLINE = True
    return None


def _answer(name: str, kind: str):
    """What the Hub says of the repository, or the error; a thread, since looking up the host's name has no time-out."""
    answer: list = [TimeoutError(f"no answer in {SECONDS} s")]

    def ask():
        try:
            answer[0] = HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
        except Exception as error:  # the client's errors have no common class
            answer[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answer[0]


def _is_cached(name: str, kind: str) -> bool:
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    return any(snapshots.glob("*")) or (kind == "dataset" and _is_prepared(name))


def _is_prepared(name: str) -> bool:
    """Whether `datasets` has its own copy of this data set."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
