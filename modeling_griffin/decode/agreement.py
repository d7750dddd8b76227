"""A new step against the model's own forward pass: what it leaves is compared once, before anybody relies on it.

The two are different programs for one network, and nothing else keeps them from parting: a patch that eligibility does
not know, a GPU that the kernels have not met.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from transformers.cache_utils import DynamicCache

from .forward import ForwardStep
from .packed import exact_inputs
from .state import DecodeStep


# Of the largest logit: rounding, and TF32 in float32 on a GPU, stay far below, another network is far above
TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}
PROMPT, STEPS = 3, 2
CHECKING = threading.RLock()  # held while the model has hooks of ours, or forwards, for a moment


class Disagreement(RuntimeError):
    """A step computes something else than the model."""


@torch.no_grad()
def check_step(model: torch.nn.Module, step: DecodeStep | ForwardStep) -> None:
    """Raises Disagreement, which names the first layer that differs. Overwrites the step's state.

    Layers that round their inputs (LLM.int8()) are asked without that for a fused step, which does not: the rounding
    adds up to more than the tolerance, and would hide a wrong scale.
    """
    with CHECKING, contextlib.nullcontext() if isinstance(step, ForwardStep) else exact_inputs(model):
        _check(model, step)


def _check(model: torch.nn.Module, step: DecodeStep | ForwardStep) -> None:
    tokens = _tokens(model, len(step.token), step.device)
    cache = _start(model, step, tokens)
    for position in range(PROMPT, PROMPT + STEPS):
        step.token.copy_(tokens[:, position])
        step.run()
        found = step.logits.float()
        output = model(tokens[:, position, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        error = relative_error(found, output.logits[:, -1].float())
        if not error <= TOLERANCE.get(output.logits.dtype, 5e-2):
            where = first_difference(model, step, tokens)
            raise Disagreement(f"its logits differ by {error:.1e} of the largest from model(...), first in {where}")


def _tokens(model, rows: int, device) -> torch.Tensor:
    """Of a generator of its own: the check draws nothing from the user's."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = rows, PROMPT + STEPS
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)


def _start(model, step, tokens: torch.Tensor) -> DynamicCache:
    """The model reads the prompt; the step gets its state so late that its ring is about to begin anew."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    step.start(max(PROMPT, step.slots - 1))
    step.load_rows(torch.arange(len(tokens), device=step.device), cache, PROMPT, None)
    return cache


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def first_difference(model: torch.nn.Module, step: DecodeStep | ForwardStep, tokens: torch.Tensor) -> str:
    """The first layer that hands on another residual stream in the step than in the model."""
    cache, layers = _start(model, step, tokens), model.model.layers
    pairs = []
    for position in range(PROMPT, PROMPT + STEPS):
        step.token.copy_(tokens[:, position])
        with _streams(layers) as expected:
            model(tokens[:, position, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        with _streams(layers) as found:
            found += _trace(step)
        pairs += zip(found, expected)
    names = ["the embedding", *(f"model.layers.{i}, {kind}" for i, kind in enumerate(model.config.layer_types))]
    for name, (mine, theirs) in zip(names * STEPS, pairs):
        if not relative_error(mine.float(), theirs.float()) <= TOLERANCE.get(theirs.dtype, 5e-2):
            return name
    return "final_norm or lm_head"


def _trace(step: DecodeStep | ForwardStep) -> list[torch.Tensor]:
    """One token of the step, by its operations; what a fused one had before and behind each layer, which hooks miss."""
    if isinstance(step, ForwardStep):
        step._compute()
        return []
    step.trace = []
    try:
        step._compute()
        return step.trace
    finally:
        step.trace = None


@contextlib.contextmanager
def _streams(layers: torch.nn.ModuleList) -> Iterator[list[torch.Tensor]]:
    """(B, D) of the last token before the first layer and behind each, of what is called inside."""
    seen: list[torch.Tensor] = []

    def see(hidden: torch.Tensor | tuple) -> None:  # a tuple of layers that a user has put in
        seen.append((hidden[0] if isinstance(hidden, tuple) else hidden)[:, -1].clone())

    hooks = [layers[0].register_forward_pre_hook(lambda module, args: see(args))]
    hooks += [layer.register_forward_hook(lambda module, args, output: see(output)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
