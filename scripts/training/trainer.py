"""Stock Trainer with what Griffin and several processes need: decay, exact last batches, whole saves, loud failures."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import rotate_checkpoints

from modeling_griffin import decay_parameter_names
from training.checkpoint import saving, write_manifest
from training.hub_push import make_repo
from training.interruption import is_evaluated, take_up, write_unlogged
from training.non_finite import find_in_gradients, find_in_loss


class GriffinTrainer(Trainer):
    """Any number of processes give the numbers of one; what is not finite stops the run; a resumed run is exact.

    data_ranks, data_rank: of those that have rows of their own; None: all processes, see `train_sequence`.
    fingerprint: of settings and data, kept in every checkpoint: `--resume` compares it.
    checkpoint: the one that `train` is told to continue from.
    """

    processing_class: Any  # stock Trainer's: the tokenizer
    data_ranks = data_rank = None
    fingerprint: dict = {}
    checkpoint: str | None = None
    last_step: dict = {}  # grad_norm and learning_rate, as the log has them
    begun_at: int | None = None  # the step of that checkpoint

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        make_repo(self, super().init_hf_repo, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Not the RG-LRU's, norms, biases and embeddings; stock Trainer would decay gate weights and embeddings."""
        return decay_parameter_names(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], torch.Tensor | int | None]:
        batches = map(self._without_repeated_rows, epoch_iterator)
        self.batches_of_step, num_items = super().get_batch_samples(batches, num_batches, device)
        return self.batches_of_step, num_items

    def _without_repeated_rows(self, batch: dict) -> dict:
        """Takes the labels off the rows that accelerate repeats, so that each row of an epoch counts once.

        It fills the last global batch of an epoch, an equal part for each process, with rows of the epoch's start; one
        process alone would go on with fewer rows.
        """
        ranks = self.data_ranks or self.args.world_size
        rank = self.args.process_index if self.data_rank is None else self.data_rank
        rows_left = len(self.train_dataset) % (self._train_batch_size * ranks)
        repeats = ranks > 1 and rows_left and not self.args.dataloader_drop_last
        if repeats and self.accelerator.gradient_state.end_of_dataloader:
            batch["labels"][max(0, rows_left - rank * len(batch["labels"])) :] = -100
        return batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Leaves the random state as it was: when a run evaluates changes nothing of its training.

        Reading the held-out rows draws a number, which a resumed run, or other `eval_steps`, would draw elsewhere.
        """
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _take_up(self) -> None:
        """Once, when stock Trainer has read the checkpoint: what it leaves there, and an epoch's end that is missing.

        A checkpoint of the last step of an epoch may be older than the evaluation and the log line of the epoch.
        """
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        self.last_step, self.begun_at = take_up(self, checkpoint), self.state.global_step
        if not self.last_step or self.state.epoch % 1:
            return
        self.control: TrainerControl = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self.control.should_save = False
        if is_evaluated(self.state):
            self.control.should_evaluate = False
        self._maybe_log_save_evaluate(
            self._tr_loss, self.last_step["grad_norm"], self.model, None, self.state.epoch, None, time.time(),
            learning_rate=self.last_step["learning_rate"],
        )  # fmt: skip

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs) -> None:
        self.last_step = {"grad_norm": grad_norm, "learning_rate": learning_rate}
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Nothing, where the checkpoint is the run's end; stock Trainer looks only after a step, and would take one."""
        self._take_up()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> Any:
        """Without deleting the newest checkpoint beside the best one: the model that this run ends with is not saved.

        Stock Trainer does with save_total_limit = 1; a run that is killed then had to be trained again from the best.
        """
        self._take_up()  # where nothing was left to train, no epoch was run
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        output = super()._finalize_training(*args, **kwargs)
        self.args.save_total_limit = limit
        return output

    def training_step(
        self, model: torch.nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):  # read at every step, as stock Trainer's own filter of such losses would
            raise FloatingPointError(self._describe(f"the training loss is {loss.item()}", find_in_loss, [inputs]))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Before the step: weights that a gradient has spoiled would show only in the next loss."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16: its scaler skips such steps itself
        if grad_norm is not None and not scaled and not torch.isfinite(torch.as_tensor(grad_norm)):
            what = f"the norm of the gradients is {float(grad_norm)}"
            raise FloatingPointError(self._describe(what, find_in_gradients, self.batches_of_step))
        return grad_norm

    def _describe(self, what: str, find, batches: list[dict]) -> str:
        return (
            f"{what} at step {self.state.global_step + 1}; {find(self, batches)}. The weights are those before this "
            "step. Look at the data, or start anew with a lower learning_rate or more warmup_steps; --resume continues "
            "from the newest checkpoint with the settings it has"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A plain folder under any launcher; stock Trainer writes no weights at all where FSDP's state is sharded.

        Checkpoints (`_internal_call`) keep FSDP's shards, from which training resumes, and get what is not weights.
        Nothing is pushed to the Hub here: `hub_push` does when the whole folder is there.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "SHARDED" not in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call=True)
        elif not _internal_call:
            plugin.set_state_dict_type("FULL_STATE_DICT")
            super().save_model(output_dir, _internal_call=True)
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The tokenizer's files take the places of older ones when all are written, as the model's do."""
        folder = Path(output_dir or self.args.output_dir)
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer
        if not self.args.should_save:
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix="tokenizer.half.") as beside:
            tokenizer.save_pretrained(beside)
            for path in Path(beside).iterdir():
                if path.is_dir():  # of chat templates
                    shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
                else:
                    path.replace(folder / path.name)

    def _save_checkpoint(self, model, trial) -> None:
        """Whole or not there: the manifest comes last, and only when it is on the disk do older checkpoints go."""
        if self.state.global_step == self.begun_at:
            return  # from which the run goes on: nothing may befall it, and nothing was trained since
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving(folder):
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # what an interrupted save has left
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            write_unlogged(self, folder, self.last_step)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder, only_model=self.args.save_only_model, **self.fingerprint)
        self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of what each process writes; rank 0 then writes the state, and the manifest of them all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result) -> None:
        """A tied head is stored once, under the embedding's name: that it is missing under its own alarms nobody."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)
