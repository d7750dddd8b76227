"""What stock Trainer forgets of an interrupted run: losses not logged yet, an epoch's end, where the best model lies.

And a save on SIGTERM (`enable_jit_checkpoint`) from which --resume is exact, as from any other.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from training.checkpoint import best_of


UNLOGGED = "unlogged.json"  # of a checkpoint: the steps since the last line of the log


class Stopped(Exception):
    """The run was told to stop and has saved what --resume continues from, in one line."""


def write_unlogged(trainer: Trainer, folder: Path, last_step: dict) -> None:
    """Keeps the losses since the last log line, each rank's sum. All ranks call it.

    last_step: what the log would say of the last step besides: grad_norm, learning_rate.
    """
    sums = trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist()
    if trainer.args.should_save:
        last_step = {name: None if value is None else float(value) for name, value in last_step.items()}
        facts = {"losses": sums, "logged_step": trainer._globalstep_last_logged, **last_step}
        (folder / UNLOGGED).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def take_up(trainer: Trainer, checkpoint: str) -> dict:
    """Goes on from what is in the checkpoint, when the trainer has its state; returns the `last_step` kept there."""
    if (best := best_of(checkpoint)) is not None and best.is_dir():
        if trainer.state.best_model_checkpoint is None and trainer.is_world_process_zero():
            print(f"the best model so far is {best}, beside the checkpoint")  # stock has said that it is gone
        trainer.state.best_model_checkpoint = str(best)
    path = Path(checkpoint) / UNLOGGED
    if not path.is_file():  # of an earlier version
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    sums = facts.pop("losses")
    mean = sum(sums) / len(sums)
    own = sums[trainer.args.process_index] if len(sums) == trainer.args.world_size else mean
    trainer._tr_loss.fill_(own)
    trainer._total_loss_scalar = -mean  # the mean at the end is that of the steps since the resume
    trainer._globalstep_last_logged = facts.pop("logged_step")
    return facts


def is_evaluated(state: TrainerState) -> bool:
    """Whether the log has an evaluation of the step that the run is at."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


class SaveAfterStep(JITCheckpointCallback):
    """On SIGTERM the step is ended, logged and saved, and nothing else is done.

    Stock saves inside of the step, whose random numbers and tokens --resume would then take twice; of several ranks
    each would stop at a step of its own, and wait for the others.
    """

    is_stopped = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pass

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pass

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_asked() and state.global_step < state.max_steps:
            self.is_stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Which stock Trainer calls behind any stop."""
        if self.is_stopped:
            control.should_log = control.should_evaluate = control.should_save = False

    def _is_asked(self) -> bool:
        asked = self.jit_manager.is_checkpoint_requested
        if self.trainer.args.world_size == 1:
            return asked
        device = self.trainer.args.device
        return bool(self.trainer.accelerator.reduce(torch.tensor(float(asked), device=device), "sum"))


def save_after_step(trainer: Trainer) -> None:
    """Puts `SaveAfterStep` in the place of stock Trainer's callback, where there is one."""
    stock = trainer.pop_callback(JITCheckpointCallback)
    if stock is not None:
        ours = SaveAfterStep()
        ours.trainer, ours.jit_manager = stock.trainer, stock.jit_manager
        trainer.add_callback(ours)


def check_ended(trainer: Trainer) -> None:
    """Raises Stopped where the run was told to stop before its end."""
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Stopped(
            f"stopped by SIGTERM after step {state.global_step} of {state.max_steps}; --resume continues from "
            f"checkpoint-{state.global_step}"
        )
