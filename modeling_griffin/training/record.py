"""Recorded training: forward and backward of a training step as CUDA graphs, replayed by two calls of the host.

A small step is bound by the host: it launches thousands of kernels, each of which the GPU finishes before the next one
comes. Recorded, the host makes two calls. What is recorded has fixed shapes and fixed addresses, hence:

- Rows of one length are one shape. Others are padded on the right to the nearest bucket, exactly: padding becomes a
  document of its own, whose labels are ignored.
- Gradients come out of the graph through autograd, as of any model: accumulation, clipping, hooks and optimizers see
  what they always see. They lie in the graph's memory; a gradient that is still being accumulated when the next step
  comes is copied out of it first.
- So does DDP: its own buckets, `no_sync` and communication hooks run behind the replay, when all gradients are there.
  Each process records, replays or runs as before by itself, since none of the graphs communicates. The price is that
  the all-reduce no longer hides behind the backward pass.
- Whatever a recorded step depends on (addresses of weights, what is trained, modules, hooks, autocast, dtype) is its
  key. A change of it records anew; what cannot be recorded runs as before, and one line says why.
- A replay leaves Python out: a hook inside of the model that counts, collects or prints makes steps run as before.

Legend: B rows, T tokens of a row, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..decode.host_effects import effect_of, global_effect, host_effect
from ..kernels.capture import capture
from ..kernels.hooks import backward_hooks, global_forward_hooks, hook_numbers
from .batch import Batch, read_batch


logger = logging.get_logger(__name__)

WARM_UP = 2  # steps before the recording: kernels compile, cuBLAS takes its workspace
KEPT_SHAPES = 4  # shapes whose graphs and gradients stay; the one that was used longest ago goes
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch")
IGNORED = ("use_cache", "return_dict")
WRITTEN_BY_SAVING = ("architectures", "auto_map", "dtype")  # fields of the configuration that no step reads


def record_training(model: nn.Module, lengths: Sequence[int] | None = None, kept: int = KEPT_SHAPES) -> None:
    """Records the training steps of a `GriffinForCausalLM`, for a loop of your own and for stock `Trainer`.

    From now on a call with `labels`, in training mode and with gradients, replays a CUDA graph where it can; every
    other call, and every call on a CPU, runs as before. Call it again to change the settings.

    Args:
        model: the model itself, or what PEFT, DDP or accelerate made of it; FSDP2 is refused.
        lengths: tokens that rows are padded to, for example (512, 1024, 2048); longer rows run as before. None: the
            next multiple of 256.
        kept: shapes (rows, tokens) whose graphs stay. Each holds a gradient of every trained parameter.

    Raises:
        ValueError: for a model without a `GriffinForCausalLM` in it, a sharded one, and for bad settings.
    """
    inner = _griffin_of(model)
    if (shards := _what_shards(model.modules())) is not None:
        raise ValueError(
            f"model is sharded by {shards}, which gathers weights at each step: allowed are one GPU and DDP"
        )
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise ValueError(f"lengths = {lengths!r}: allowed are whole numbers from 1, or None")
    if kept < 1:
        raise ValueError(f"kept = {kept}: allowed are whole numbers from 1")
    inner.training_recorder = TrainingRecorder(sorted(lengths) if lengths else None, kept)


def stop_recording(model: nn.Module) -> None:
    """The model's training steps run as before `record_training`; the graphs' memory is free again."""
    _griffin_of(model).training_recorder = None


def _griffin_of(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(type(module), "training_recorder"):
            return module
    raise ValueError(f"model is a {type(model).__name__}: allowed are models with a GriffinForCausalLM in them")


class TrainingRecorder:
    """The recorded steps of one model. `run` returns None for a call that has to run as before."""

    def __init__(self, lengths: list[int] | None, kept: int):
        self.lengths, self.kept = lengths, kept
        self.steps: OrderedDict[tuple, RecordedTrainingStep] = OrderedDict()
        self.key: tuple | None = None
        self.modules: list[nn.Module] = []  # of the key: walking through the tree anew would take as long as a step
        self.pool = None  # of memory, shared by all shapes: their activations are never needed at the same time
        self.effect: str | None = None  # of Python inside of the model: a replay would leave it out
        self.refused: set[tuple] = set()
        self.in_plain_forward = False
        self.serial = 0  # of forward passes

    def run(self, model: nn.Module, **arguments: Any) -> CausalLMOutputWithPast | None:
        """Loss and logits of a recorded step; the logits are valid up to the next step."""
        if self.in_plain_forward or not model.training or not torch.is_grad_enabled():
            return None
        reason = self._ineligible_reason(model, arguments)
        batch = None if reason else read_batch(arguments, self.lengths)
        if batch is None or reason:
            self._say(reason or "rows are too long, or have padding that is not on the right with labels of -100")
            return None
        self._keep_what_is_accumulated()
        step = self._step(model, batch)
        return None if step is None else step(batch)

    def _keep_what_is_accumulated(self) -> None:
        """Copies gradients out of the graphs' memory, which the next replay writes anew, activations and all."""
        for step in self.steps.values():
            for parameter, gradient in zip(step.parameters, step.gradients):
                grad = parameter.grad
                if grad is not None and gradient is not None and grad.data_ptr() == gradient.data_ptr():
                    parameter.grad = grad.clone()

    def _ineligible_reason(self, model: nn.Module, arguments: dict) -> str | None:
        given = {name: value for name, value in arguments.items() if value is not None and name not in IGNORED}
        if given.get("labels") is None or given.get("input_ids") is None:
            return "the call has no input_ids or no labels"
        if others := sorted(set(given) - set(ARGUMENTS)):
            return f"the call has {', '.join(others)}"
        if not given["input_ids"].is_cuda and not self.can_record_on_a_cpu:
            return f"the tokens are on {given['input_ids'].device}, and CUDA graphs are a GPU's"
        if torch.compiler.is_compiling() or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "something else traces or records the call"
        if model.config.output_hidden_states or model.config.output_attentions:
            return "hidden states or attentions are asked for"
        return None

    can_record_on_a_cpu = False  # the tests set it: "graphs" are then functions that are called again

    def _step(self, model: nn.Module, batch: "Batch") -> "RecordedTrainingStep | None":
        if self.key is None or _key(model, self.modules) != self.key:
            if self.steps:
                logger.warning_once("Recorded training: the model has changed, its steps are recorded anew")
            self.steps.clear()
            self.refused.clear()
            self.modules = list(model.modules())
            self.key, self.pool = _key(model, self.modules), None
            self.effect = _what_leaves_out(self.modules, model)
        if self.effect is not None:
            self._say(self.effect)
            return None
        shape = batch.shape_key()
        if shape in self.refused:
            return None
        if shape not in self.steps:
            while len(self.steps) >= self.kept:
                self.steps.popitem(last=False)
            try:
                self.steps[shape] = RecordedTrainingStep(self, model, batch)
            except Exception as error:
                self.refused.add(shape)
                self._say(f"a step of {tuple(batch.input_ids.shape)} tokens cannot be recorded: {error!r}")
                return None
        self.steps.move_to_end(shape)
        return self.steps[shape]

    def _say(self, reason: str) -> None:
        logger.warning_once(f"Recorded training: some steps run without a recording: {reason}")

    @contextmanager
    def plain_forward(self) -> Iterator[None]:
        self.in_plain_forward = True
        try:
            yield
        finally:
            self.in_plain_forward = False


class RecordedTrainingStep:
    """Forward and backward of one shape: two graphs, and the tensors that they read and write."""

    def __init__(self, recorder: TrainingRecorder, model: nn.Module, batch: Batch):
        self.recorder = recorder
        self.batch = Batch._make([*(None if x is None else x.clone() for x in batch[:4]), 0])
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.serial, self.on_gpu = 0, batch.input_ids.is_cuda
        device = batch.input_ids.device
        self.d_loss = torch.ones((), dtype=torch.float32, device=device)
        self.autocast = partial(
            torch.autocast,
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,  # what is cast once would not be cast again at a replay, when weights have changed
        )
        # Random numbers of the warm-up are drawn again: a run draws what it would draw unrecorded, and resumes so.
        random = torch.random.fork_rng([device] if self.on_gpu else [])
        with random, recorder.plain_forward(), _checkpoints_without_random_state(model), torch.enable_grad():
            self._record(model)

    def _record(self, model: nn.Module) -> None:
        if not self.on_gpu:
            self._record_on_a_cpu(model)
            return
        stream = torch.cuda.Stream(self.batch.input_ids.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                loss, _ = self._forward(model)
                self._backward(loss)
            del loss
        torch.cuda.current_stream().wait_stream(stream)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        if self.recorder.pool is None:
            self.recorder.pool = torch.cuda.graph_pool_handle()
        options = {"pool": self.recorder.pool, "stream": stream, "capture_error_mode": "thread_local"}
        with capture(self.forward_graph, **options):
            loss, logits = self._forward(model)
        with capture(self.backward_graph, **options):
            self.gradients = self._backward(loss)
        self.loss, self.logits = loss.detach(), logits.detach()

    def _record_on_a_cpu(self, model: nn.Module) -> None:
        """The same tensors in the same places, written by calling the functions again."""
        loss, logits = self._forward(model)
        self.gradients = self._backward(loss)
        self.loss, self.logits, graph = loss.detach(), logits.detach(), []
        step, recorder = self, self.recorder

        class Forward:
            def replay(self):
                for each in recorder.steps.values():  # as on a GPU, where activations take the same memory
                    torch._foreach_mul_([gradient for gradient in each.gradients if gradient is not None], torch.nan)
                with recorder.plain_forward(), torch.enable_grad():
                    loss, logits = step._forward(model)
                step.loss.copy_(loss.detach()), step.logits.copy_(logits.detach())
                graph[:] = [loss]

        class Backward:
            def replay(self):
                for kept, new in zip(step.gradients, step._backward(graph.pop())):
                    if kept is not None:
                        kept.copy_(new)

        self.forward_graph, self.backward_graph = Forward(), Backward()

    def _forward(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch
        more = {} if batch.num_items is None else {"num_items_in_batch": batch.num_items}
        with self.autocast():
            output = type(model).forward(  # the instance's, which accelerate has put around it, runs around each replay
                model,
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                use_cache=False,
                **more,
            )
        return output.loss, output.logits

    def _backward(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        d_loss = self.d_loss.to(loss.dtype)
        return list(torch.autograd.grad(loss, self.parameters, grad_outputs=d_loss, allow_unused=True))

    def __call__(self, batch: Batch) -> CausalLMOutputWithPast:
        for kept, new in zip(self.batch.tensors(), batch.tensors()):
            kept.copy_(new, non_blocking=True)
        self.recorder.serial = self.serial = self.recorder.serial + 1
        loss = _Replay.apply(self, *self.parameters)
        return CausalLMOutputWithPast(loss=loss, logits=self.logits[:, : batch.real_length])


class _Replay(torch.autograd.Function):
    """The recorded step to autograd: parameters in, loss out; and backward their gradients."""

    @staticmethod
    def forward(ctx, step: RecordedTrainingStep, *parameters):
        ctx.step, ctx.serial = step, step.serial
        step.forward_graph.replay()
        return step.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        step = ctx.step
        if ctx.serial != step.recorder.serial:
            raise RuntimeError("backward of a recorded step after another one's forward: allowed is one at a time")
        step.d_loss.copy_(d_loss)
        step.backward_graph.replay()
        # Detached: autograd may then take them as they are for `.grad`, without a copy of all gradients.
        return None, *(None if gradient is None else gradient.detach() for gradient in step.gradients)


def _key(model: nn.Module, modules: list[nn.Module]) -> tuple:
    """All that a recorded step depends on besides its inputs; modules: all of the model when it was recorded."""
    config = {name: value for name, value in vars(model.config).items() if name not in WRITTEN_BY_SAVING}
    return [_state_of(module) for module in modules], repr(config), type(model).forward, global_forward_hooks()


def _what_shards(modules: Iterable[nn.Module]) -> str | None:
    """Who has split the weights over processes, where no one process can record them; by name, since copies differ."""
    for module in modules:
        name = type(module).__name__
        if name.startswith(("FSDP", "FullyShardedDataParallel")):
            return "FSDP2" if name.startswith("FSDP") else "FSDP"
        if any(type(parameter).__name__ == "DTensor" for parameter in module._parameters.values()):
            return "tensor parallelism"
    return None


def _what_leaves_out(modules: list[nn.Module], model: nn.Module) -> str | None:
    """Why steps of these modules, all of the model, run without a recording, or None."""
    if (shards := _what_shards(modules)) is not None:
        return f"the model is sharded by {shards}"
    return _host_effect(module for module in modules if module is not model)


def _host_effect(modules: Iterable[nn.Module]) -> str | None:
    """What Python of the user's has to run at each step inside of a recorded one, or None."""
    if (effect := global_effect()) is not None:
        return f"a hook on every module {effect}"
    for module in modules:
        if (effect := host_effect(module)) is not None:
            return effect
        for hook in backward_hooks(module):
            if (effect := effect_of(hook, type(module))) is not None:
                return f"a backward hook {effect}"
    return None


def _state_of(module: nn.Module) -> tuple:
    inside = vars(module)
    return (
        inside["training"],
        inside.get("gradient_checkpointing"),
        inside.get("forward"),
        *map(id, inside["_modules"].values()),
        *(None if p is None else (p.data_ptr(), p.dtype, p.requires_grad) for p in inside["_parameters"].values()),
        *hook_numbers(module),
    )


@contextmanager
def _checkpoints_without_random_state(model: nn.Module):
    """Activation checkpointing reads the random state, which nothing may do during a recording; nothing is drawn."""
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    if not layers or model.config.attention_dropout:
        yield
        return
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer, function in zip(layers, before):
        layer._gradient_checkpointing_func = partial(function, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, function in zip(layers, before):
            layer._gradient_checkpointing_func = function
