"""A Griffin as a `torch.export` program or an ONNX file: tokens and state in, logits and state out."""

import os

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from .stateful import StatefulGriffin


ANY_ROWS, ANY_TOKENS = Dim("rows", min=1), Dim("tokens", min=1)


@torch.no_grad()
def export_program(
    model: nn.Module,
    rows: int | None = None,
    tokens: int | None = None,
    padded: bool = False,
    logits_to_keep: int = 0,
) -> ExportedProgram:
    """A program of PyTorch's own operators that needs neither this package nor Transformers to run.

    Its arguments and results are those of `StatefulGriffin.forward`; with `padded` it takes `attention_mask` too.

    Args:
        model: a `GriffinForCausalLM` in eval mode on the CPU, with attention "sdpa" or "eager".
        rows, tokens: B and T, fixed; None: any, from 1 on. A program of one token, `tokens=1`, is the one to generate
            with: for any T the recurrence is made of many small operators.
        padded: whether rows may begin with padding.
        logits_to_keep: logits of the last so many tokens only; 0: of all.

    Raises:
        ValueError: for a model that `StatefulGriffin` refuses or on a GPU, where it runs by kernels of its own that no
            other runtime has, and for rows or tokens below 1.
    """
    for name, value in (("rows", rows), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: allowed are whole numbers from 1, or None")
    stateful = StatefulGriffin(model, logits_to_keep)
    if model.device.type != "cpu":
        raise ValueError(f'model is on {model.device}: allowed is the CPU, model.to("cpu")')
    # A size of 1 would be taken for a fixed one.
    example, state = torch.zeros(rows or 2, tokens or 2, dtype=torch.long), stateful.empty_state(rows or 2)
    along_rows = {} if rows else {0: ANY_ROWS}
    along_tokens = along_rows | ({} if tokens else {1: ANY_TOKENS})
    arguments = {"input_ids": example, "state": state}
    shapes = {"input_ids": along_tokens, "state": dict.fromkeys(state, along_rows)}
    if padded:
        arguments["attention_mask"], shapes["attention_mask"] = torch.ones_like(example), along_tokens
    return torch.export.export(stateful, (), arguments, dynamic_shapes=shapes, strict=False)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    rows: int | None = None,
    tokens: int | None = 1,
    padded: bool = False,
    logits_to_keep: int = 0,
) -> None:
    """Writes an ONNX file, and its weights beside it where they are large: a step of one token, or for any number.

    Its inputs are `input_ids` (rows, tokens), the names of the state, and with `padded` `attention_mask`; its outputs
    `logits` and, for each name of the state, `new_` and that name.

    Args:
        model, rows, padded, logits_to_keep: as of `export_program`.
        tokens: T, fixed; None: any, from 1 on, which takes a graph of several times the size.

    Raises:
        ValueError: as `export_program`.
        ImportError: without the packages onnx and onnxscript.
    """
    program = export_program(model, rows, tokens, padded, logits_to_keep)
    names = list(StatefulGriffin(model).empty_state())
    torch.onnx.export(
        program,
        input_names=["input_ids", *names, *(["attention_mask"] if padded else [])],
        output_names=["logits", *(f"new_{name}" for name in names)],
        optimize=True,
        verbose=False,
    ).save(path, external_data=_is_large(model))


def _is_large(model: nn.Module) -> bool:
    """Whether the weights have to lie beside the graph: protobuf takes 2 GB."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > 1.5 * 2**30
