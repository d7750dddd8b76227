"""Compares initialisations of Λ by training: learning rates, seeds, tasks, all from one YAML file.

    python scripts/compare_lambda_inits.py configuration/training/compare_lambda_inits/cpu.yaml --output build/sweep
    python scripts/report_lambda_inits.py build/sweep

Every arm of a task is first trained once with each learning rate of the grid, under a seed that is not used again; the
rate with the lowest validation loss is the arm's. Then come the measured runs, all arms with the first seed, all arms
with the second one, so that a sweep that is cut short holds complete pairs. Every finished run is a line of
OUTPUT/runs.jsonl and is not repeated: the same command continues a sweep, on another machine too if that file is there.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spoken
import torch
from benchmarks.birth_certificate import birth_certificate, now
from command_line import Parser, ShowDefaultsAndLines, check_folder, device
from lambda_study.run import make_config, run_one
from lambda_study.tasks import SYNTHETIC_TASKS, prepare_text
from presets import find_preset
from tqdm import tqdm
from yaml_file import check_shapes, read_yaml

from modeling_griffin import GriffinConfig


TEXT = "language_modelling"  # the kind of task that needs text
SWEEP_KEYS = ("tasks", "arms", "reference", "seeds", "tuning_seed", "common")
SCHEDULING = ("arms", "learning_rates", "steps", "tuning_steps")  # keys of a task that are not a run's settings
TASK_KEYS = (*SCHEDULING, "kind", "model", "warmup", "weight_decay", "max_grad_norm", "points", "rows", "held_out_rows",
             "sizes", "held_out_sizes", "options", "text", "vocab_size", "length", "long_length",
             "long_rows")  # fmt: skip
SLACK = 1.2  # a run is started when this many times its expected length is left


def read_sweep(path: Path, text: list[str]) -> dict:
    """The YAML file, with `common` merged into every task, and the texts of language tasks made ready."""
    sweep = read_yaml(path, "YAML files and ready-made ones: compare_lambda_inits/cpu, compare_lambda_inits/h100")
    if missing := [key for key in SWEEP_KEYS[:-1] if key not in sweep]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it describes no comparison")
    check_known(path, sweep, SWEEP_KEYS)
    check_mappings(path, sweep)
    check_shapes(path, sweep, seeds="a list of whole numbers, at least one")
    check_shapes(path, {"common": {}, **sweep}, common="a mapping")
    for name, task in sweep["tasks"].items():
        task = {**sweep.get("common", {}), **task}
        check_known(path, task, TASK_KEYS, f" of task {name!r}")
        check_shapes(path, {"arms": [], **task}, f" of task {name!r}", arms="a list of names")
        if unknown := set(task.get("arms", [])) - set(sweep["arms"]):
            raise ValueError(f"{path}: task {name!r} has the arms {sorted(unknown)}: allowed are {list(sweep['arms'])}")
        if task.get("kind") == TEXT:
            task["text"] = [*task.get("text", []), *text]
        sweep["tasks"][name] = task
    if sweep["reference"] not in sweep["arms"]:
        raise ValueError(f"{path}: reference = {sweep['reference']!r}: allowed are {list(sweep['arms'])}")
    if sweep["tuning_seed"] in sweep["seeds"]:
        raise ValueError(f"{path}: tuning_seed = {sweep['tuning_seed']} is one of seeds: allowed is any other")
    check_models(path, sweep)
    return sweep


def check_known(path: Path, settings: dict, allowed: tuple[str, ...], where: str = "") -> None:
    """Raises ValueError for a key that nothing reads, such as a misspelt one."""
    if unknown := [str(key) for key in settings if key not in allowed]:
        raise ValueError(f"{path}: {', '.join(unknown)}{where}: allowed are {', '.join(allowed)}")


def check_mappings(path: Path, sweep: dict) -> None:
    """Raises ValueError where tasks or arms are anything but names with settings of their own."""
    for key in ("tasks", "arms"):
        if not isinstance(sweep[key], dict) or not all(isinstance(each, dict) for each in sweep[key].values()):
            raise ValueError(
                f"{path}: {key} = {str(sweep[key])[:60]}: allowed are names, each with a mapping of settings"
            )


def check_models(path: Path, sweep: dict) -> None:
    """Raises ValueError for a task of no kind and an arm that is no configuration: now, not when its turn comes."""
    allowed, kinds = {field.name for field in dataclasses.fields(GriffinConfig)} | {"layout"}, [*SYNTHETIC_TASKS, TEXT]
    for name, task in sweep["tasks"].items():
        if (kind := task.get("kind")) not in kinds:
            raise ValueError(f"{path}: kind = {kind!r} of task {name!r}: allowed are {', '.join(kinds)}")
        of_runs = {"learning_rates": "a list of numbers, at least one", "steps": "a whole number from 1"}
        check_shapes(path, task, f" of task {name!r}", **of_runs)
        for arm in task.get("arms", sweep["arms"]):
            try:
                if unknown := sorted({**task["model"], **sweep["arms"][arm]}.keys() - allowed):
                    raise ValueError(f"the unknown fields {unknown}: allowed are those of GriffinConfig")
                make_config(task["model"], sweep["arms"][arm], vocab_size=2)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}: arm {arm!r} of task {name!r}: {reason}") from error


def select_tasks(sweep: dict, only: list[str]) -> dict:
    if unknown := set(only) - set(sweep["tasks"]):
        raise ValueError(f"--only {' '.join(sorted(unknown))}: allowed are {' '.join(sweep['tasks'])}")
    return {**sweep, "tasks": {name: task for name, task in sweep["tasks"].items() if not only or name in only}}


def plan(sweep: dict, records: dict[str, dict], device: str) -> list[dict]:
    """All runs in their order. `learning_rate` is None while the runs that choose it are not finished."""
    runs = []
    for name, task in sweep["tasks"].items():
        settings = {key: value for key, value in task.items() if key not in SCHEDULING}
        arms = task.get("arms", list(sweep["arms"]))
        base = [{"task": name, "arm": arm, "arm_settings": sweep["arms"][arm]} for arm in arms]
        base = [{**each, "settings": settings, "device": device} for each in base]
        tuning = {"measured": False, "seed": sweep["tuning_seed"], "steps": task.get("tuning_steps", task["steps"])}
        measured = {"measured": True, "steps": task["steps"]}
        for rate in task["learning_rates"]:
            runs += [_with_key({**each, **tuning, "learning_rate": float(rate)}) for each in base]
        for seed in sweep["seeds"]:
            for each in base:
                rate = chosen_rate(name, each["arm"], task["learning_rates"], sweep["tuning_seed"], records)
                runs.append(_with_key({**each, **measured, "seed": seed, "learning_rate": rate}))
    return runs


def _with_key(run: dict) -> dict:
    return {"key": run_key(run["task"], run["arm"], run["learning_rate"], run["seed"]), **run}


def run_key(task: str, arm: str, rate: float | None, seed: int) -> str:
    return f"{task}/{arm}/lr{rate:g}/seed{seed}" if rate is not None else f"{task}/{arm}/lr?/seed{seed}"


def chosen_rate(task: str, arm: str, rates: list, tuning_seed: int, records: dict[str, dict]) -> float | None:
    """The learning rate with the lowest validation loss at the end; None while one of its runs is missing."""
    losses = {}
    for rate in map(float, rates):
        record = records.get(run_key(task, arm, rate, tuning_seed))
        if record is None:
            return None
        losses[rate] = record["curve"][-1]["loss"] if record["status"] == "finished" else math.inf
    return min(losses, key=losses.get)


# The file of finished runs


def read_records(path: Path) -> dict[str, dict]:
    """Finished runs by key. A last line that was cut off while it was written, or is being written, is left out.

    Raises ValueError, with the file and the line, where another one is no record.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    records = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is no record of a run") from error
    return records


def drop_unfinished_line(path: Path) -> None:
    """Takes a last line that was cut off out of the file, so that the next one is not appended to it."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def append_record(path: Path, record: dict) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_settings(runs: list[dict], records: dict[str, dict], path: Path) -> None:
    """A finished run of the same name but with other settings must not pass for this one."""
    for run in (run for run in runs if run["key"] in records):
        found, wanted = (_flat(each) for each in (records[run["key"]], json.loads(json.dumps(run))))
        for name in found.keys() | wanted.keys():
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path} holds {run['key']} with {name} = {found.get(name)}, the sweep wants {wanted.get(name)}: "
                    "give another --output, or restore the file's settings"
                )


def _flat(run: dict) -> dict:
    return {"device": run["device"], "steps": run["steps"], **run["arm_settings"], **run["settings"]}


# Running


class InThisProcess(concurrent.futures.Executor):
    """--jobs 1."""

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def make_executor(jobs: int) -> concurrent.futures.Executor:
    if jobs == 1:
        return InThisProcess()
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def expected_seconds(run: dict, records: dict[str, dict]) -> float:
    """From finished runs of its task, by their steps; 0 while there is none."""
    of_task = [record for record in records.values() if record["task"] == run["task"]]
    of_task = [record for record in of_task if record["measured"] == run["measured"]] or of_task
    steps = sum(record["steps"] for record in of_task)
    return run["steps"] * sum(record["seconds"] for record in of_task) / steps if steps else 0.0


def next_run(sweep: dict, records: dict[str, dict], device: str, skipped: set[str]) -> dict | None:
    """The first run that is missing and whose learning rate is known."""
    runs = plan(sweep, records, device)
    ready = (run for run in runs if run["learning_rate"] is not None and run["key"] not in records)
    return next((run for run in ready if run["key"] not in skipped), None)


def run_all(sweep: dict, records: dict[str, dict], path: Path, facts: dict, jobs: int, deadline: float) -> list[str]:
    """Runs what is missing, `jobs` at a time, and appends each to `path`; returns what failed, a line each."""
    failed, in_flight = {}, {}
    runs = plan(sweep, records, facts["device"])
    finished = sum(run["key"] in records for run in runs)
    with make_executor(jobs) as executor, tqdm(total=len(runs), initial=finished, unit="run", disable=None) as progress:
        while True:
            while len(in_flight) < jobs:
                started = {run["key"] for run in in_flight.values()}
                run = next_run(sweep, records, facts["device"], started | failed.keys())
                if run is None or time.time() + SLACK * expected_seconds(run, records) > deadline:
                    break
                in_flight[executor.submit(run_one, run)] = run
            if not in_flight:
                return [f"{key}: {error}" for key, error in failed.items()]
            for future in concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED).done:
                key = in_flight.pop(future)["key"]
                if error := future.exception():
                    failed[key] = repr(error)
                    continue
                records[key] = {**future.result(), **facts, "finished": now()}
                append_record(path, records[key])
                end = records[key]["curve"][-1]
                progress.update()
                progress.write(f"{key}: loss {end['loss']:.4f} after {end['step']} steps")


def origin(device: str, commit: str | None) -> dict:
    """Where and from what the runs come; each adds the moment at which it finished."""
    birth = birth_certificate(device, commit)
    return {
        "device": device,
        "hardware": birth["hardware"] if device == "cuda" else f"{platform.machine()}, 1 thread a run",
        "versions": {"python": birth["python"], **birth["versions"]},
        "commit": birth["commit"],
        "command": birth["command"],
    }


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("config", help="a YAML file, or a ready-made one: compare_lambda_inits/cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs.jsonl; an old one is continued")
    parser.add_argument("--only", nargs="+", default=[], metavar="TASK", help="tasks of the file to run (default: all)")
    parser.add_argument(
        "--text", nargs="+", default=[], help="more text for language tasks: files, folders, globs (default: none)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, sharing the device (default: 1)")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, help="seconds after which no run is to end (default: none)"
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual, help="where it runs; default: a GPU where there is one")
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    parser.add_argument("--list", action="store_true", help="print all runs and which are finished; run nothing")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, jobs=1)
    return arguments


def main(argv: list[str] | None = None) -> None:
    start, arguments = time.time(), read_arguments(argv)
    path = arguments.output / "runs.jsonl"
    try:
        if not arguments.list:
            check_folder("--output", arguments.output)
        sweep = select_tasks(
            read_sweep(Path(find_preset(arguments.config, "training")), arguments.text), arguments.only
        )
        for name, task in sweep["tasks"].items():
            if task["kind"] == TEXT:
                sweep["tasks"][name] = prepare_text(task, Path("build/compare_lambda_inits") / name)
        records = read_records(path)
        check_settings(plan(sweep, records, arguments.device), records, path)
    except ValueError as error:
        spoken.stop(__file__, error)
    if arguments.list:
        for run in plan(sweep, records, arguments.device):
            print(f"{'finished' if run['key'] in records else '        '}  {run['key']}")
        return
    drop_unfinished_line(path)
    facts = origin(arguments.device, arguments.commit)
    failed = run_all(sweep, records, path, facts, arguments.jobs, start + arguments.time_limit)
    runs = plan(sweep, records, arguments.device)
    finished = sum(run["key"] in records for run in runs)
    print(f"{finished} of {len(runs)} runs are in {path}; {time.time() - start:.0f} s")
    if failed:
        raise SystemExit(f"{spoken.name(__file__)}: error: these runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
