"""The name of a model behind `torch.compile`, by which stock `Trainer` decides whether smoothed labels are shifted.

`torch_compile` wraps a model in a module of another class, whose name is in no table, so that `Trainer` with
`label_smoothing_factor` trains any causal model, a Llama too, to repeat each token. A Griffin's wrapper answers as it.
"""

import functools

from torch import nn

from ..causal_lm_loss import CausalLMName


def name_compiled(wrapper: nn.Module, name: str, model: nn.Module) -> None:
    """A hook of PyTorch's, called for each module that gets a child: that of `torch.compile(model)` is the model."""
    if name == "_orig_mod":
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's
        if type(inner._get_name()).__name__ == CausalLMName.__name__:  # a copy from the Hub has a class of its own
            wrapper._get_name = functools.partial(CausalLMName, type(wrapper).__name__)
