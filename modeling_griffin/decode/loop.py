"""Transformers' own loops with a step as their model: what they do between two tokens stays theirs.

So a logits processor or a criterion of the user's runs as ever, on the host and with a memory if it likes, scores and
logits are collected, and beams are searched, reordered and scored by the code whose results they have to equal. Only
reading a token is the step's: one replay, and one wait a token, which is the loop's.
"""

from contextlib import nullcontext
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..cache_name import CACHE_NAME
from .forward import ForwardStep
from .state import DecodeStep


def run_loop(
    name: str,
    model: torch.nn.Module,
    step: DecodeStep | ForwardStep,
    prompt_output: ModelOutput,
    input_ids: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """`GenerationMixin`'s method of this name. prompt_output: of the model behind the prompt, which is in the step."""
    stepped = SteppedModel(model, step, prompt_output, input_ids.shape[1])
    result = getattr(GenerationMixin, name)(stepped, input_ids, **kwargs)
    if not isinstance(result, torch.Tensor):
        result[CACHE_NAME] = step.to_cache(stepped.length)
    return result


class StepCache:
    """To a loop a cache: the rows of the step, which beams reorder."""

    is_croppable = is_compileable = False

    def __init__(self, step: DecodeStep | ForwardStep):
        self.step = step

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.step.reorder(beam_idx.to(self.step.device))


class SteppedModel(GenerationMixin):
    """To a loop a model. length: tokens that the step has read. Everything else is asked of the model itself."""

    def __init__(self, model: torch.nn.Module, step: DecodeStep | ForwardStep, prompt_output: ModelOutput, length: int):
        self.model, self.step, self.prompt_output, self.length = model, step, prompt_output, length
        self.cache = StepCache(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs) -> CausalLMOutputWithPast:
        output = self.prompt_output
        return self._output(output.logits[:, -1:], output.hidden_states)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict:
        return {"input_ids": input_ids[:, -1]}

    def __call__(self, input_ids: torch.Tensor, return_dict: bool = True) -> CausalLMOutputWithPast:
        self.step.token.copy_(input_ids)
        logits = self.step.step()
        self.length += 1
        return self._output(logits[:, None], self._hidden_states())

    def _hidden_states(self) -> tuple[torch.Tensor | None, ...] | None:
        """(B, 1, D) each, of the token that was read; None for those that were not asked for, as of the prompt."""
        of_prompt, hidden = self.prompt_output.hidden_states, self.step.hidden_states
        if of_prompt is None or hidden is None:
            return None
        kept = hidden[len(hidden) - len(of_prompt) :].clone()  # the embeddings are none of a list in Transformers 5.17
        return tuple(None if asked is None else each for each, asked in zip(kept, of_prompt))

    def _output(self, logits, hidden_states) -> CausalLMOutputWithPast:
        """The loop copies logits before the next step."""
        return CausalLMOutputWithPast(logits=logits, hidden_states=hidden_states, **{CACHE_NAME: self.cache})

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **kwargs) -> dict:
        return {**model_kwargs, CACHE_NAME: self.cache}

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        return False

    def _optimize_model_for_decode(self):
        return nullcontext()
