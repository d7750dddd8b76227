"""Trains with several initialisations of Λ to the end of a pretraining, over as many calls as it takes.

    python scripts/gather_text.py configuration/text/long.yaml --output build/text
    python scripts/study_lambda_long.py configuration/training/lambda_long/h200.yaml \
        --text build/text --output build/long
    python scripts/report_lambda_long.py build/long

One run at a time on each GPU, in the order of the file's phases; learning rates of a phase are chosen by an earlier
one. Finished runs are lines of OUTPUT/runs.jsonl and are not repeated. At --time-limit a run is saved under --state and
the same command goes on from there, to the same weights; its curve up to then is a line "paused", which a later one
replaces.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import time
from pathlib import Path

import spoken
import torch
from benchmarks.birth_certificate import now
from command_line import Parser, ShowDefaultsAndLines
from compare_lambda_inits import (
    InThisProcess,
    append_record,
    check_settings,
    drop_unfinished_line,
    origin,
    read_records,
)
from lambda_study.long_runs import SCALE_OF, plan, recorded_settings, run_long, settings_of
from lambda_study.long_text import prepare_shards
from yaml_file import check_shapes, read_yaml

from modeling_griffin.lambda_init import LAMBDA_INITS


SHORTEST = 60  # seconds that have to be left for a run to be started or continued


def read_study(path: Path) -> dict:
    """arms, common, sizes and phases of the YAML file, checked against each other."""
    study = read_yaml(path, "files of configuration/training/lambda_long/")
    named = dict.fromkeys(("arms", "sizes", "phases"), "names, each with a mapping")
    check_shapes(path, study, **named, text="a mapping", common="a mapping")
    for name, phase in study["phases"].items():
        lists = {"arms": "a list of names", "seeds": "a list of whole numbers, at least one"}
        rates = {"learning_rates": "a list of numbers, at least one"} if "learning_rates" in phase else {}
        check_shapes(path, phase, f" of phase {name!r}", **lists, **rates, tokens="a number")
        if not isinstance(phase.get("size"), str):
            raise ValueError(f"{path}: phase {name!r} has size = {phase.get('size')!r}: allowed is one of sizes")
    for name, arm in study["arms"].items():
        if (other := arm.get(SCALE_OF)) is not None and other not in LAMBDA_INITS:
            raise ValueError(f"{path}: arm {name!r} has {SCALE_OF} = {other!r}: allowed are {', '.join(LAMBDA_INITS)}")
    for name, phase in study["phases"].items():
        for what, allowed in (("arms", study["arms"]), ("size", study["sizes"])):
            chosen = phase[what] if isinstance(phase[what], list) else [phase[what]]
            if unknown := set(chosen) - set(allowed):
                raise ValueError(f"{path}: phase {name!r} has {what} = {sorted(unknown)}: allowed are {list(allowed)}")
        if ("learning_rates" in phase) == ("rates_of" in phase):
            raise ValueError(f"{path}: phase {name!r} needs either learning_rates or rates_of")
        if phase.get("rates_of", name) not in study["phases"]:
            raise ValueError(f"{path}: phase {name!r} has rates_of = {phase['rates_of']!r}: allowed are other phases")
    return study


def is_done(record: dict | None) -> bool:
    return record is not None and record["status"] != "paused"


def next_run(study: dict, records: dict[str, dict], in_flight: set[str], phases: list[str]) -> dict | None:
    """The first run that is neither done nor under way and whose learning rate is known."""
    for run in plan(study, records):
        wanted = run["key"] is not None and run["phase"] in phases and run["key"] not in in_flight
        if wanted and not is_done(records.get(run["key"])):
            return run
    return None


def _with_settings(study: dict, records: dict[str, dict], facts: dict) -> list[dict]:
    """The plan's runs with all that a record has of their settings."""
    runs = []
    for run in plan(study, records):
        settings = recorded_settings(settings_of(run, study))
        arm = {"arm_settings": study["arms"][run["arm"]], "device": facts["device"], "settings": settings}
        runs.append({**run, **arm, "steps": settings["steps"]})
    return runs


def run_all(
    study: dict, path: Path, state: Path, devices: list[str], deadline: float, facts: dict, phases: list[str]
) -> list[str]:
    """Runs what is missing, one on each device; returns what failed, a line each."""
    records, failed, in_flight = read_records(path), {}, {}
    spawn = multiprocessing.get_context("spawn")
    workers = {
        device: InThisProcess() if device == "cpu" else concurrent.futures.ProcessPoolExecutor(1, spawn)
        for device in devices
    }
    free = list(devices)
    while True:
        while free and time.time() + SHORTEST < deadline:
            busy = {run["key"] for run, _ in in_flight.values()} | failed.keys()
            run = next_run(study, records, busy, phases)
            if run is None:
                break
            device = free.pop(0)
            in_flight[workers[device].submit(run_long, run, study, state, device, deadline)] = (run, device)
        if not in_flight:
            break
        for future in concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED).done:
            run, device = in_flight.pop(future)
            free.append(device)
            if error := future.exception():
                failed[run["key"]] = repr(error)
                if isinstance(error, concurrent.futures.BrokenExecutor):  # its process was killed: another one goes on
                    workers[device] = concurrent.futures.ProcessPoolExecutor(1, spawn)
                continue
            records[run["key"]] = record = {**future.result(), **facts, "finished": now()}
            append_record(path, record)
            end = record["curve"][-1]
            tokens = end["step"] * record["tokens_a_step"] / 1e6
            print(f"{run['key']}: {record['status']}, loss {end['loss']:.4f} after {tokens:,.0f}M tokens", flush=True)
    for worker in workers.values():
        worker.shutdown()
    return [f"{key}: {error}" for key, error in failed.items()]


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("study", type=Path, help="a file of configuration/training/lambda_long/")
    parser.add_argument("--text", type=Path, required=True, help="the --output of gather_text.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs.jsonl; an old one is continued")
    parser.add_argument("--state", type=Path, default=None, help="folder for runs that are not finished, and tokens")
    parser.add_argument("--devices", nargs="+", default=gpus or ["cpu"], help="one run at a time on each")
    parser.add_argument("--phases", nargs="+", default=[], help="only these of the file's phases")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which runs are saved")
    parser.add_argument("--prepare", action="store_true", help="tokenise the text and run nothing")
    parser.add_argument("--list", action="store_true", help="print all runs and how far they are; run nothing")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    arguments.state = arguments.state or arguments.output / "state"
    return arguments


def cores() -> int:
    """That this process may use, which of a large machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> None:
    start, arguments = time.time(), read_arguments(argv)
    path = arguments.output / "runs.jsonl"
    try:
        study = read_study(arguments.study)
        phases = arguments.phases or list(study["phases"])
        if unknown := set(phases) - set(study["phases"]):
            raise ValueError(f"--phases {' '.join(sorted(unknown))}: allowed are {' '.join(study['phases'])}")
        if arguments.list:
            records = read_records(path)
            for run in plan(study, records):
                status = records[run["key"]]["status"] if run["key"] in records else "missing"
                print(f"{status:9} {run['key'] or run}")
            return
        text = prepare_shards(study["text"], arguments.text, arguments.state / "tokens", cores())
    except ValueError as error:
        spoken.stop(__file__, error)
    print(f"tokens: {text['data']}; {time.time() - start:.0f} s", flush=True)
    if arguments.prepare:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    drop_unfinished_line(path)
    facts = origin(arguments.devices[0].partition(":")[0], arguments.commit)
    deadline = start + arguments.time_limit
    study["text"] = text
    try:
        check_settings(_with_settings(study, read_records(path), facts), read_records(path), path)
    except ValueError as error:
        spoken.stop(__file__, error)
    failed = run_all(study, path, arguments.state, arguments.devices, deadline, facts, phases)
    records = read_records(path)
    done = sum(is_done(records.get(run["key"])) for run in plan(study, records))
    print(f"{done} of {len(plan(study, records))} runs are done in {path}; {time.time() - start:.0f} s")
    if failed:
        raise SystemExit(f"{spoken.name(__file__)}: error: these runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
