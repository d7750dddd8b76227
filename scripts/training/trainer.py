"""Stock Trainer with what Griffin and several processes need: decay, exact last batches, whole saves, loud failures."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from modeling_griffin import decay_parameter_names
from training.checkpoint import saving, write_manifest
from training.non_finite import find_in_gradients, find_in_loss


class GriffinTrainer(Trainer):
    """Any number of processes give the numbers of one; what is not finite stops the run.

    data_ranks, data_rank: of those that have rows of their own; None: all processes, see `train_sequence`.
    """

    data_ranks = data_rank = None

    fingerprint: dict = {}  # of settings and data, kept in every checkpoint: `--resume` compares it

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

    def _run_epoch(self, *args, **kwargs) -> None:
        """Nothing, where the checkpoint is the run's end; stock Trainer looks only after a step, and would take one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "SHARDED" not in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            plugin.set_state_dict_type("FULL_STATE_DICT")
            super().save_model(output_dir, _internal_call)
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Whole or not there: the manifest comes last, and only when it is on the disk do older checkpoints go."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving(folder):
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # what an interrupted save has left
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
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
