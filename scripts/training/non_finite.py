"""Where a loss or a gradient that is not finite comes from: the first tensor that is not, and the rows it belongs to.

Runs only after a failure: the pass over the batch once more, with a hook on every module.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer


SNIPPET_TOKENS, SNIPPET_CHARACTERS, MOST_ROWS = 64, 60, 8


def find_in_loss(trainer: Trainer, batches: list[dict]) -> str:
    """One line about the one batch in `batches`, whose loss is not finite."""
    if spoiled := first_spoiled((*trainer.model.named_parameters(), *trainer.model.named_buffers())):
        return f"first not finite: {spoiled}, so an earlier step spoiled it; {describe_rows(trainer, *batches)}"
    return find_in_pass(trainer, batches, backward=False)


def find_in_gradients(trainer: Trainer, batches: list[dict]) -> str:
    """One line about this process's first batch of the step whose gradients are not finite."""
    return find_in_pass(trainer, batches, backward=True)


def find_in_pass(trainer: Trainer, batches: list[dict], backward: bool) -> str:
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        # One process alone cannot repeat a pass for which all of them gather the weights.
        return f"run this batch in one process to see in which tensor; {describe_rows(trainer, *batches)}"
    for batch in batches:
        if first := first_in_pass(trainer.model, trainer._prepare_inputs(batch), backward):
            what, rows = first
            return f"first not finite: {what}; {describe_rows(trainer, batch, rows=rows)}"
    return f"on this process the pass once more is finite; {describe_rows(trainer, *batches)}"


def first_spoiled(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that is not finite; of a sharded tensor this process's part."""
    for name, tensor in named_tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if bad := int((~own.isfinite()).sum()):
            return f"{name}, {bad} of {own.numel()} values"
    return None


def first_in_pass(model: torch.nn.Module, batch: dict, backward: bool) -> tuple[str, list[int]] | None:
    """(what, rows of the batch) of the first tensor, in the order of computation, that is not finite, or None."""
    found = []

    def look(what, tensor):
        if tensor is not None and not found and not tensor.isfinite().all():  # None: a gradient of nothing
            by_row = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else torch.zeros(0)
            rows = by_row.nonzero().flatten().tolist() if len(by_row) == len(batch["input_ids"]) else []
            found.append((what, rows))

    def watch(name):
        def after(module, inputs, output):
            for tensor in tensors_in(output):
                look(f"the output of {name}", tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: look(f"the gradient at the output of {name}", gradient))

        return after

    handles = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with torch.set_grad_enabled(backward):
            loss = model(**batch, num_items_in_batch=torch.tensor(1)).loss  # a sum: a batch may have no label
        if backward and not found:  # not .backward(): it would wake the all-reduce of DDP
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients):
                if gradient is not None and not found and not gradient.isfinite().all():
                    found.append((f"the gradient of {name}", []))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def tensors_in(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a module's output, whatever they are nested in."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [tensor for part in output for tensor in tensors_in(part)]


def describe_rows(trainer: Trainer, *batches: dict, rows: list[int] | None = None) -> str:
    """Which rows of the training data, and how the first of them begins."""
    input_ids = torch.cat([batch["input_ids"] for batch in batches]).cpu()
    input_ids = input_ids[rows] if rows else input_ids
    numbers = [trainer.train_dataset.find(row) for row in input_ids[:MOST_ROWS]]
    more = f" and {len(input_ids) - MOST_ROWS} more" if len(input_ids) > MOST_ROWS else ""
    text = trainer.processing_class.decode(input_ids[0, :SNIPPET_TOKENS], skip_special_tokens=True)
    return f"training rows {numbers}{more}, the first begins {text[:SNIPPET_CHARACTERS]!r}"
