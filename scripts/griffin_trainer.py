"""Stock Trainer with what Griffin and several processes need: decay, exact last batches, whole saves, loud failures."""

from pathlib import Path

import torch
from non_finite import find_in_gradients, find_in_loss
from transformers import Trainer

from modeling_griffin import decay_parameter_names


class GriffinTrainer(Trainer):
    """Any number of processes give the numbers of one; what is not finite stops the run.

    data_ranks, data_rank: of those that have rows of their own; None: all processes, see `train_sequence`.
    """

    data_ranks = data_rank = None

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Not the RG-LRU's, norms, biases and embeddings; stock Trainer would decay gate weights and embeddings."""
        return decay_parameter_names(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
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

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
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
            "step. Lower learning_rate, lengthen warmup_steps, or look at the data; --resume continues from the newest "
            "checkpoint"
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

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of what each process writes; rank 0 then writes the state that marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
