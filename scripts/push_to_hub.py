"""Uploads a saved model to the Hub: `python scripts/push_to_hub.py FOLDER REPO [--private] [--dry-run]`.

Checks the folder, runs it in a clean process with the code that it ships, shows what will be uploaded, uploads it in
one commit and verifies by pulling: every file byte for byte, and the model's outputs again. The folder is not changed.
The token is the one of `hf auth login` or of HF_TOKEN.
"""

import argparse
import filecmp
import fnmatch
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import spoken
import torch
from command_line import Parser
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from publishing.push_files import check_no_token, content, find_auto_class, list_files, read_config
from safetensors.torch import load_file, save_file

import modeling_griffin
from modeling_griffin.saving.card import is_generated, load_card, make_card, read_metadata
from modeling_griffin.saving.save import STALE_ON_HUB
from modeling_griffin.saving.saved_files import read_json_object


CARD_FACTS = ("license", "language", "datasets", "base_model")
# Two models with another value in one of these fields are not versions of one model.
IDENTITY = ("model_type", "architectures", "vocab_size", "hidden_size", "layer_types")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("repo", help="NAME or OWNER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="of a new repository: only its owner sees it")
    parser.add_argument("--dry-run", action="store_true", help="check and show, send nothing and ask the Hub nothing")
    parser.add_argument("--revision", help="branch to upload to; made where it does not exist (default: main)")
    parser.add_argument("--message", default="Upload model", help="commit message")
    parser.add_argument("--overwrite", action="store_true", help="also where the repository holds another model")
    parser.add_argument("--license", help="for a generated card, for example apache-2.0 (default: left out)")
    parser.add_argument("--language", nargs="+", help="for a generated card, for example en (default: left out)")
    parser.add_argument("--datasets", nargs="+", help="for a generated card: data sets on the Hub (default: left out)")
    base = "for a generated card: what this was fine-tuned from (default: left out)"
    parser.add_argument("--base-model", help=base)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the folder's code though it differs from the package's"
    )
    return parser.parse_args(argv)


def prepare_card(folder: Path, repo_id: str, given: dict) -> ModelCard:
    """The card to upload: a generated one anew, with the repository's name; one that a person wrote as it is."""
    path = folder / "README.md"
    written = path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace"))
    if not written:
        return make_card(folder, folder, repo_id, read_metadata(path), given)
    if given:
        raise ValueError(f"{path} was written by a person: say {', '.join(given)} there, not on the command line")
    check_no_token(path)
    return load_card(path)


def check_shipped_code(folder: Path, model: str, environment: dict, revision: str | None = None) -> float:
    """Largest difference between the outputs of the installed package and of the model's own code, by their scale."""
    architecture, auto_class = find_auto_class(folder)
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = f"{scratch}/inputs.safetensors", f"{scratch}/outputs.safetensors"
        ids = torch.arange(2 * 40).reshape(2, 40) * 7919 % read_config(folder)["vocab_size"]
        save_file({"input_ids": ids}, inputs)
        script = Path(__file__).with_name("run_shipped_code.py")
        command = [sys.executable, str(script), model, auto_class, inputs, outputs, "--trust-remote-code"]
        environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules", **environment}
        command += ["--revision", revision] if revision else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"{model} does not run by the code that it ships: {said[-1]}")
        theirs = load_file(outputs)["outputs"].float()
    package_class = getattr(modeling_griffin, architecture, None)
    if package_class is None:  # a user's own class: nothing to compare with
        return 0.0
    package_model, loaded = package_class.from_pretrained(
        folder, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    for what, key in (("lack", "missing_keys"), ("hold what is not the model's:", "unexpected_keys")):
        if names := ", ".join(sorted(loaded[key])[:3]):
            raise ValueError(f"the weights in {folder} {what} {names}: save the model again")
    package_model.eval()
    with torch.no_grad():
        ours = package_model(input_ids=ids, use_cache=False)[0].float()
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= 16 * torch.finfo(package_model.dtype).eps:
        raise ValueError(
            f"{model} gives other outputs by the code that it ships: they differ by {difference:.1e} of scale"
        )
    return difference


def check_rights(api: HfApi, repo: str) -> str:
    """The full name of the repository, in which this token's account may write."""
    account = api.whoami()
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    repo_id = repo if "/" in repo else f"{owners[0]}/{repo}"
    if repo_id.split("/")[0] not in owners:
        try:
            api.model_info(repo_id)
        except RepositoryNotFoundError:
            raise ValueError(f"no right to create {repo_id}: this token is {owners[0]}'s") from None
        raise ValueError(f"the name {repo_id} is taken, and this token, {owners[0]}'s, may not write there")
    return repo_id


def check_private(api: HfApi, repo_id: str) -> None:
    """Raises ValueError where the repository is there and public: the Hub would leave it so without a word."""
    if api.repo_exists(repo_id) and not api.model_info(repo_id).private:
        raise ValueError(f"--private: {repo_id} is there already, and public: pass another name, or make it private")


def check_same_model(api: HfApi, repo_id: str, folder: Path, revision: str | None) -> list[str]:
    """Names of the files that are there already. Raises ValueError where they are another model's."""
    if not api.repo_exists(repo_id):
        return []
    if revision is not None and not api.revision_exists(repo_id, revision):
        revision = None
    names = api.list_repo_files(repo_id, revision=revision)
    if "config.json" not in names:
        if others := [name for name in names if name not in ("README.md", ".gitattributes")]:
            raise ValueError(
                f"{repo_id} holds other files ({', '.join(others[:3])}): pass another name, or --overwrite"
            )
        return names
    there = read_json_object(Path(hf_hub_download(repo_id, "config.json", revision=revision)))
    here = read_config(folder)
    if differs := [field for field in IDENTITY if there.get(field) != here.get(field)]:
        field = differs[0]
        raise ValueError(
            f"{repo_id} holds another model ({field} = {there.get(field)!r}, here {here.get(field)!r}): pass another "
            "name, or --overwrite"
        )
    return names


def upload(
    api: HfApi, repo_id: str, folder: Path, names: list[str], card: ModelCard, arguments: argparse.Namespace
) -> str:
    """One commit with everything, which also removes weights that are replaced; returns its name."""
    api.create_repo(repo_id, private=arguments.private or None, exist_ok=True)
    if arguments.revision:
        api.create_branch(repo_id, branch=arguments.revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=arguments.revision)
    stale = [name for name in there if name not in names and any(fnmatch.fnmatch(name, p) for p in STALE_ON_HUB)]
    operations = [CommitOperationAdd(name, content(folder, name)) for name in names]
    operations += [CommitOperationAdd("README.md", str(card).encode()), *map(CommitOperationDelete, stale)]
    return api.create_commit(repo_id, operations, commit_message=arguments.message, revision=arguments.revision).oid


def verify(repo_id: str, commit: str, folder: Path, names: list[str], card: ModelCard) -> float:
    """Pulls the commit into an empty cache, compares every file, runs it; returns the difference of the outputs."""
    with tempfile.TemporaryDirectory() as cache:
        pulled = Path(snapshot_download(repo_id, revision=commit, cache_dir=cache))
        spoiled = [name for name in names if not came_back(pulled / name, content(folder, name))]
        if (pulled / "README.md").read_text(encoding="utf-8") != str(card):
            spoiled.append("README.md")
        if spoiled:
            raise ValueError(f"{', '.join(spoiled)} came back from {repo_id} other than sent: do not use {commit}")
        return check_shipped_code(folder, repo_id, {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}, commit)


def came_back(pulled: Path, sent: Path | bytes) -> bool:
    """Whether a pulled file is the one that was sent, byte for byte."""
    if isinstance(sent, bytes):
        return pulled.read_bytes() == sent
    return filecmp.cmp(pulled, sent, shallow=False)


def push(arguments: argparse.Namespace) -> None:
    folder, api = arguments.folder, HfApi()
    validate_repo_id(arguments.repo)
    names, left_out = list_files(folder, arguments.trust_remote_code)
    given = {name: value for name in CARD_FACTS if (value := getattr(arguments, name)) is not None}
    repo_id = arguments.repo if arguments.dry_run else check_rights(api, arguments.repo)
    if arguments.private and not arguments.dry_run:
        check_private(api, repo_id)
    if not arguments.dry_run and not arguments.overwrite:
        check_same_model(api, repo_id, folder, arguments.revision)
    card = prepare_card(folder, repo_id, given)
    difference = check_shipped_code(folder, str(folder), {"HF_HUB_OFFLINE": "1"})
    print(f"runs by the code that it ships; outputs differ from the package's by {difference:.1e} of scale")
    print(
        f"card: license {card.data.license or 'not given (--license)'}, {card.data.pipeline_tag}, tags {card.data.tags}"
    )
    for name in names:
        sent = content(folder, name)
        size = len(sent) if isinstance(sent, bytes) else sent.stat().st_size
        print(f"  {size:>14,}  {name}")
    print(f"  {len(str(card).encode()):>14,}  README.md")
    if masked := [name for name in names if isinstance(content(folder, name), bytes)]:
        print(f"sent with its secrets masked, revoke them where others could read the file: {', '.join(masked)}")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if arguments.dry_run:
        return print(f"dry run: nothing was sent to {repo_id}")
    commit = upload(api, repo_id, folder, names, card, arguments)
    difference = verify(repo_id, commit, folder, names, card)
    print(f"verified by pulling: {len(names) + 1} files the same, outputs differ by {difference:.1e} of scale")
    print(f"{constants.ENDPOINT}/{repo_id}/tree/{arguments.revision or 'main'} at {commit}")


def main(argv: list[str] | None = None) -> None:
    """Runs `push`, with one line for what a user can mend."""
    arguments = read_arguments(argv)
    try:
        push(arguments)
    except LocalTokenNotFoundError:
        spoken.stop(__file__, "no token: run `hf auth login`, or set HF_TOKEN to a token with the right to write")
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {401: "the token is not valid", 403: f"no right to write to {arguments.repo}"}
        spoken.stop(__file__, f"{reasons.get(status, 'the Hub refused')} ({str(error).strip().splitlines()[-1]})")
    except (ValueError, HFValidationError) as error:
        spoken.stop(__file__, error)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            spoken.stop(__file__, f"{error.filename}: {error.strerror}")
        # The client's HTTP library, and with it this class, is another one from release to release.
        if "TransportError" not in [cls.__name__ for cls in type(error).__mro__]:
            raise
        spoken.stop(__file__, f"no network: {constants.ENDPOINT} does not answer ({error})")


if __name__ == "__main__":
    main()
