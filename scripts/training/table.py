"""What a run prints while it trains: a line of a table for every log step and every evaluation."""

import math
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback


HEADER = f"{'step':>8}  {'loss':>9}  {'bits/byte':>9}  {'tokens/s':>9}  {'time left':>9}"


class LogTable(TrainerCallback):
    """Loss in nats per token; bits per byte, exact for held-out text, for training text by the held-out text's bytes
    per token; tokens/s since the line before, evaluation aside; the time left at the pace of this session."""

    def __init__(self, bytes_per_token: float):
        self.bytes_per_token = bytes_per_token
        self.has_header = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin = self.last = time.monotonic()
        self.first_step, self.last_tokens = state.global_step, state.num_input_tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            now = time.monotonic()
            speed = (state.num_input_tokens_seen - self.last_tokens) / max(now - self.last, 1e-9)
            bits = logs["loss"] / math.log(2) / self.bytes_per_token
            self._print(state, logs["loss"], bits, f"{speed:,.0f}", self._time_left(state, now))
            self.last, self.last_tokens = now, state.num_input_tokens_seen
        elif "eval_loss" in logs:
            self._print(state, logs["eval_loss"], logs["eval_bits_per_byte"], "held out", "")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last, self.last_tokens = time.monotonic(), state.num_input_tokens_seen

    def _time_left(self, state, now: float) -> str:
        done = state.global_step - self.first_step
        return duration((now - self.begin) / done * (state.max_steps - state.global_step)) if done else ""

    def _print(self, state, loss: float, bits: float, speed: str, time_left: str) -> None:
        if not state.is_world_process_zero:
            return
        if not self.has_header:
            tqdm.write(HEADER)
            self.has_header = True
        line = f"{state.global_step:>8,}  {loss:>9.4f}  {bits:>9.4f}  {speed:>9}  {time_left:>9}"
        tqdm.write(line.rstrip())  # above the bar, where there is one


class QuietBar(ProgressCallback):
    """Trainer's bar without the dictionaries that it writes above itself."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        pass


def print_table(trainer: Trainer, bytes_per_token: float) -> None:
    """Puts the table in the place of the dictionaries that a Trainer prints."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(QuietBar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogTable(bytes_per_token))


def duration(seconds: float) -> str:
    """ "45 s", "12 min 5 s", "3 h 20 min" or "2 d 4 h"."""
    seconds = round(seconds)
    for unit, (name, smaller) in {86400: ("d", (3600, "h")), 3600: ("h", (60, "min")), 60: ("min", (1, "s"))}.items():
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // smaller[0]} {smaller[1]}"
    return f"{seconds} s"
