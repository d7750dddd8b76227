"""The torch backend as a PyTorch operator where a compiler traces: one node each way, whatever the length.

Traced itself, the scan is halved once a level, and every level is a guard on the length: another length compiles again,
and a length that is marked as dynamic cannot be compiled at all. An exported graph has no operators of ours: it is
loaded where this package is not, and turned into other formats. There a dynamic length takes `export/scan.py`.
"""

import hashlib
from types import SimpleNamespace

import torch

from ..export.scan import rg_lru_scan_any_length
from ..rg_lru_scan_torch import RGLRUScan, rg_lru_scan_torch


def rg_lru_scan_torch_or_operator(
    x: torch.Tensor,
    recurrence_gate: torch.Tensor,
    input_gate: torch.Tensor,
    log_decay: torch.Tensor,
    initial_state: torch.Tensor | None,
    reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `rg_lru_scan`. Exported, it is PyTorch's own operators."""
    arguments = (x, recurrence_gate, input_gate, log_decay, initial_state, reset)
    if torch.compiler.is_exporting() and not isinstance(x.shape[1], int):
        return rg_lru_scan_any_length(*arguments)
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return rg_lru_scan_torch(*arguments)
    return _OPERATORS.scan(*arguments)


def _forward_shapes(x, recurrence_gate, input_gate, log_decay, initial_state, reset):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=dtype)


def _backward(d_hidden, d_last_state, x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden):
    inputs = (x, recurrence_gate, input_gate, log_decay, initial_state, reset)
    if x.shape[1] == 0:
        gradients = [torch.zeros_like(tensor) for tensor in inputs[:4]] + [d_last_state.clone()]
    else:
        gradients = RGLRUScan.backward(SimpleNamespace(saved_tensors=(*inputs, hidden)), d_hidden, d_last_state)
    shapes = _backward_shapes(d_hidden, d_last_state, *inputs, hidden)
    return tuple(empty if found is None else found.contiguous() for found, empty in zip(gradients, shapes))


def _backward_shapes(d_hidden, d_last_state, x, recurrence_gate, input_gate, log_decay, initial_state, reset, hidden):
    state = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return *(tensor.new_empty(tensor.shape) for tensor in (x, recurrence_gate, input_gate, log_decay)), state


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


def _differentiate(ctx, d_hidden, d_last_state):
    *inputs, hidden = ctx.saved_tensors
    *gradients, d_state = _OPERATORS.scan_backward(d_hidden, d_last_state, *inputs, hidden)
    return *gradients, None if inputs[4] is None else d_state, None


def _register():
    """A namespace of its own for each execution of this file: a process may hold several copies of it."""
    base = "griffin_scan_" + hashlib.sha256(__name__.encode()).hexdigest()[:8]
    count = 0
    while hasattr(getattr(torch.ops, f"{base}_{count}"), "scan"):
        count += 1
    name = f"{base}_{count}"
    gates = "Tensor recurrence_gate, Tensor input_gate, Tensor log_decay"
    inputs = f"Tensor x, {gates}, Tensor? initial_state, Tensor? reset"
    library = torch.library.Library(name, "FRAGMENT")
    library.define(f"scan({inputs}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
    library.define(
        f"scan_backward(Tensor d_hidden, Tensor d_last_state, {inputs}, Tensor hidden) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("scan", rg_lru_scan_torch, "CompositeExplicitAutograd")
    library.impl("scan_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{name}::scan", _forward_shapes, lib=library)
    torch.library.register_fake(f"{name}::scan_backward", _backward_shapes, lib=library)
    torch.library.register_autograd(f"{name}::scan", _differentiate, setup_context=_save, lib=library)
    return library, getattr(torch.ops, name)


_LIBRARY, _OPERATORS = _register()  # the library must live as long as its operators
