"""Long runs of language modelling: their order, and one run, which stops at a deadline and goes on from there exactly.

A run is an arm, a seed, a size of model, a length in tokens and a learning rate; everything else is the study's. It is
recorded at token counts that grow by the root of two, the same for all arms.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from lambda_study.long_text import ResidentTextTask
from lambda_study.recall import recall_by_distance
from lambda_study.run import Watch, _round_figures, make_config, make_model, make_optimizer, train
from modeling_griffin.lambda_init import LAMBDA_INITS
from modeling_griffin.rg_lru import RGLRU
from modeling_griffin.rg_lru_scan import rg_lru_scan


FIRST_POINT = 1_000_000  # tokens
RATES = "rate"  # what the names of phases begin with whose runs choose or check learning rates
LOOKS = 50  # steps between two looks at the clock
SCALE_OF = "input_scale_of"  # of an arm: the initialisation whose input scale it has


def run_key(run: dict) -> str:
    return f"{run['phase']}/{run['size']}/{run['arm']}/lr{run['learning_rate']:g}/seed{run['seed']}"


def plan(study: dict, records: dict[str, dict]) -> list[dict]:
    """All runs of the study in their order; those whose learning rate is not chosen yet have None for it."""
    runs = []
    for name, phase in study["phases"].items():
        for seed in phase["seeds"]:
            for arm in phase["arms"]:
                rates = phase.get("learning_rates") or [_chosen_rate(study, phase, arm, records)]
                for rate in rates:
                    run = {"phase": name, "size": phase["size"], "arm": arm, "seed": seed}
                    run |= {"learning_rate": None if rate is None else float(rate)}
                    run |= {"tokens": round(float(phase["tokens"]))}  # YAML reads 7.0e8 as a text
                    runs.append(run)
    return [{"key": None if run["learning_rate"] is None else run_key(run), **run} for run in runs]


def _chosen_rate(study: dict, phase: dict, arm: str, records: dict[str, dict]) -> float | None:
    """The arm's rate with the lowest final loss in the phase `rates_of`; None while a run of it is missing."""
    source = study["phases"][phase["rates_of"]]
    losses = {}
    for rate in map(float, source["learning_rates"]):
        run = {"phase": phase["rates_of"], "size": source["size"], "arm": arm, "seed": source["seeds"][0]}
        record = records.get(run_key({**run, "learning_rate": rate}))
        if record is None or record["status"] == "paused":
            return None
        losses[rate] = record["curve"][-1]["loss"] if record["status"] == "finished" else math.inf
    return min(losses, key=losses.get)


def points(tokens: int, tokens_a_step: int) -> set[int]:
    """Steps to record at: FIRST_POINT tokens, growing by the root of two, and the last."""
    steps = {round(tokens / tokens_a_step)}
    count = FIRST_POINT
    while count < tokens:
        steps.add(max(1, round(count / tokens_a_step)))
        count *= math.sqrt(2)
    return steps


class ScaledScan:
    """rg_lru_scan with its input times a factor for each channel: another input scale with the same decay.

    factor: sqrt((1 - b^2) / (1 - a^2)), a the channel's own decay at the start and at r = 0.5, b that of another
    initialisation, in which the channel has the same rank. The recurrence is linear in its input: h is that of
    h_t = a_t h_{t-1} + factor sqrt(1 - a_t^2) (i_t x_t).
    """

    def __init__(self, log_decay: torch.Tensor, other_log_decay: torch.Tensor):
        """log(a^c) and log(b^c), (C,) each, in any order of channels."""
        other = other_log_decay.sort().values[log_decay.argsort().argsort()]
        self.factor = (torch.expm1(other) / torch.expm1(log_decay)).sqrt()  # a^2 at r = 0.5 is exp(log(a^c))

    def __call__(
        self,
        x: torch.Tensor,
        recurrence_gate: torch.Tensor,
        input_gate: torch.Tensor,
        log_decay: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rg_lru_scan(x * self.factor.to(x.dtype), recurrence_gate, input_gate, log_decay, **others)


@torch.no_grad()
def change_input_scale(model: torch.nn.Module, init: str, seed: int) -> None:
    """Gives every RG-LRU of the model the input scale that it would have with the initialisation `init`."""
    config, generator_state = model.config, torch.get_rng_state()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RGLRU):
            own = module.decay()
            stored = LAMBDA_INITS[init](config.lru_width, config.rg_lru_c, *config.lambda_init_bounds).to(own)
            module.scan = ScaledScan(own, -config.rg_lru_c * torch.nn.functional.softplus(stored))
    torch.set_rng_state(generator_state)


def settings_of(run: dict, study: dict) -> dict:
    """All that a run depends on beside its own fields and its arm; `folder`, where the tokens lie, is no matter."""
    settings = {**study["common"], **study["text"], **study["sizes"][run["size"]]}
    return {**settings, "steps": round(run["tokens"] / (settings["rows"] * settings["length"]))}


def recorded_settings(settings: dict) -> dict:
    """As a record has them."""
    return {name: value for name, value in settings.items() if name != "folder"}


class LongRun:
    """A run between its checkpoints: model, optimiser, place in the data, and what was recorded so far."""

    def __init__(self, run: dict, study: dict, device: torch.device):
        self.run, self.device, self.settings = run, device, settings_of(run, study)
        self.steps, settings = self.settings["steps"], self.settings
        tokens_a_step = settings["rows"] * settings["length"]
        self.task = ResidentTextTask(self.settings, run["seed"], device)
        arm = dict(study["arms"][run["arm"]])
        scale_of = arm.pop(SCALE_OF, None)
        config = make_config(settings["model"], arm, self.task.vocab_size)
        self.model = make_model(config, run["seed"]).to(device).train()
        if scale_of is not None:
            change_input_scale(self.model, scale_of, run["seed"])
        self.optimizer = make_optimizer(self.model, run["learning_rate"], settings["weight_decay"])
        self.watch = Watch(self.model, self.task, points(run["tokens"], tokens_a_step))
        self.done, self.seconds = 0, 0.0
        self.loss_sum, self.losses = torch.zeros((), device=device), 0  # since the last point of the curve

    def save(self, path: Path) -> None:
        state = {
            "settings": recorded_settings(self.settings),
            "model": self.model.state_dict(),
            "optimizer": [self.optimizer.state[parameter] for parameter in self.model.parameters()],
            "first": self.watch.first,
            "curve": self.watch.curve,
            "memory": self.watch.memory,
            "losses": (self.loss_sum, self.losses),
            "done": self.done,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != recorded_settings(self.settings):
            raise ValueError(f"{path} is of a run with other settings: give another --state, or restore the study's")
        self.model.load_state_dict(state["model"])
        for parameter, saved in zip(self.model.parameters(), state["optimizer"], strict=True):
            if self.optimizer.state[parameter]:  # in place: a recorded step knows the addresses
                for name, value in self.optimizer.state[parameter].items():
                    value.copy_(saved[name])
            else:
                self.optimizer.state[parameter] = saved
        self.watch.first, self.watch.curve, self.watch.memory = state["first"], state["curve"], state["memory"]
        (self.loss_sum, self.losses), self.done, self.seconds = state["losses"], state["done"], state["seconds"]
        self.task.step = self.done

    def go_on(self, deadline: float) -> str:
        """Trains to the end or to the deadline: "finished", "paused" or "diverged"."""
        begin = time.time()
        if not self.watch.curve:
            self.watch.take(0, None)
        try:
            for step, loss in train(self.model, self.optimizer, self.task, {**self.run, **self._sizes()}, self.done):
                self.done = step
                self.loss_sum += loss
                self.losses += 1
                if step in self.watch.steps:
                    finite = self.watch.take(step, (self.loss_sum / self.losses).item())
                    self.loss_sum.zero_()
                    self.losses = 0
                    if not finite:
                        return "diverged"
                if step % LOOKS == 0 and step < self.steps and _late(self.device, deadline):
                    return "paused"
            return "finished"
        finally:
            self.seconds += time.time() - begin

    def _sizes(self) -> dict:
        return {"settings": self.settings, "steps": self.steps}

    def evaluate(self) -> dict:
        """evaluations: loss by position in long rows; recall: of passages, by distance."""
        self.model.eval()
        settings, task = self.settings, self.task
        rows = [
            task.held_out_rows[i]["input_ids"] for i in range(min(len(task.held_out_rows), settings["recall_rows"]))
        ]
        text = torch.cat(rows).to(self.device)
        with task._autocast():
            recall = recall_by_distance(self.model, text, settings["distances"], task.vocab_size)
        by_position = task.evaluate(self.model)
        return {"evaluations": by_position, "recall": [_round_figures(entry) for entry in recall]}


def _late(device: torch.device, deadline: float) -> bool:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else steps are laid in advance, and the host is ahead of the clock
    return time.time() > deadline


def run_long(run: dict, study: dict, state: Path, device: str, deadline: float) -> dict:
    """The run's record; `status` "paused" where the deadline came first, and then `state` holds what goes on from."""
    torch.set_num_threads(1)
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    path = state / f"{run['key'].replace('/', '_')}.pt"
    long_run = LongRun(run, study, device)
    if path.is_file():
        long_run.load(path)
    status = long_run.go_on(deadline)
    found = {"evaluations": [], "recall": []}
    if status == "finished":
        found = long_run.evaluate()
    if status == "paused":
        long_run.save(path)
    else:
        path.unlink(missing_ok=True)
    return {
        **run,
        "measured": not run["phase"].startswith(RATES),
        "status": status,
        "parameters": long_run.model.num_parameters(),
        "steps": long_run.steps,
        "seconds": round(long_run.seconds, 2),
        "tokens_a_step": long_run.settings["rows"] * long_run.settings["length"],
        "settings": recorded_settings(long_run.settings),
        "arm_settings": study["arms"][run["arm"]],
        "curve": [_round_figures(entry) for entry in long_run.watch.curve],
        "memory": long_run.watch.memory,
        **found,
    }
