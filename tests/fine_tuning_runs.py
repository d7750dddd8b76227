"""For the tests of fine-tuning: documents, what training on each of them alone gives, and one step of a trainer."""

import warnings
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from tolerances import assert_close
from transformers import TrainerCallback

from modeling_griffin import LORA_TARGETS


warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
datasets.disable_progress_bars()

VOCABULARY = 258  # bytes, end of text, padding
LINEAR = LORA_TARGETS["recurrent"] + LORA_TARGETS["attention"] + LORA_TARGETS["mlp"]
LENGTHS = (1, 9, 23, 4, 2, 17)  # shorter than the convolution, longer than two windows, and one token alone


def make_documents(prompts: bool = False) -> list[dict]:
    """Random documents, `input_ids` and `labels`; with `prompts`, the first half of each is not learnt.

    A first token is a label here as stock collators leave it, except with `prompts`: in a left-padded row it would be
    predicted from padding, by the shift that every causal model of Transformers applies.
    """
    generator = torch.Generator().manual_seed(2)
    documents = []
    for length in LENGTHS:
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        masked = max(1, length // 2) if prompts else 0
        documents.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return documents


def alone(model, documents: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(loss, gradients, log-probabilities (N, V), learnt tokens (N,)) of documents by themselves, without masks.

    The loss is the mean over the N learnt tokens of all documents.
    """
    count = sum(label != -100 for document in documents for label in document["labels"][1:])
    log_probabilities, learnt = [], []
    for document in documents:
        labels = torch.tensor(document["labels"][1:], dtype=torch.long)
        logits = model(torch.tensor([document["input_ids"]]), use_cache=False).logits[0, :-1]
        log_probabilities.append(logits.log_softmax(-1)[labels != -100])
        learnt.append(labels[labels != -100])
    log_probabilities, learnt = torch.cat(log_probabilities), torch.cat(learnt)
    total = -log_probabilities.gather(-1, learnt[:, None]).sum() / count
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return total.detach(), dict(zip(parameters, gradients)), log_probabilities.detach(), learnt


def lora_everywhere(**changes) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEAR,
        target_parameters=LORA_TARGETS["gates"],
        modules_to_save=LORA_TARGETS["decay"],
        task_type="CAUSAL_LM",
        **changes,
    )


def disturb(model) -> None:
    """New adapters do nothing (lora_B is 0); these do."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class KeepGradients(TrainerCallback):
    """The gradients as the optimizer is about to see them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def arguments(folder: Path, **changes) -> dict:
    """Of one optimizer step on a CPU in float32, over everything, as stock as can be."""
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "max_grad_norm": 0.0,  # no clipping
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def assert_step_equals_documents_alone(trainer, documents: list[dict]) -> None:
    """One step of `trainer` over all `documents`: the loss it logs and the gradients are those of each one alone."""
    loss, gradients, _, _ = alone(trainer.model, documents)
    kept = KeepGradients()
    trainer.add_callback(kept)
    trainer.train()
    assert_close("loss", torch.tensor(trainer.state.log_history[0]["loss"]), loss, "loss")
    assert kept.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.abs().max() > 0, name
        assert_close("gradient", kept.gradients[name], expected, name)


def losses(trainer) -> list[float]:
    """Trains, and returns the logged losses."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
