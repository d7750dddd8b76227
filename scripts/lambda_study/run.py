"""One training run of the comparison of Λ initialisations: model, loop, and what is recorded on the way.

Arms differ in Λ and in nothing else: with the same seed, all other initial weights and the order of the data are the
same, so that runs can be compared in pairs.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from lambda_study.tasks import LanguageTask, SyntheticTask, make_task
from modeling_griffin import (
    LAMBDA_INITS,
    GriffinConfig,
    GriffinForCausalLM,
    decay_parameter_names,
    register_lambda_init,
)
from modeling_griffin.lambda_init import LambdaInit, lambda_from_decay
from modeling_griffin.rg_lru import Decay


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LAYER_TYPES = {
    "hawk": ["linear_attention"],
    "attention": ["sliding_attention"],
    "griffin": ["linear_attention", "linear_attention", "sliding_attention"],
    # The paper's small model: one local attention, in the middle of five blocks (section 6.2).
    "griffin_middle": ["linear_attention", "linear_attention", "sliding_attention"] + ["linear_attention"] * 2,
}


def depth_ladder(recurrent_layers: int) -> LambdaInit:
    """An example of `register_lambda_init`: later layers remember longer (as in HGRN and RWKV-4).

    The range of memory lengths 1 / (1 - a^c) is cut into `recurrent_layers` rungs of equal ratio; the k-th call, which
    is the k-th recurrent layer, draws log-uniformly from the k-th. Over all layers it is `log_uniform_memory`.
    """
    calls = 0

    def draw(width: int, c: float, low: float, high: float) -> torch.Tensor:
        nonlocal calls
        rung, calls = calls % recurrent_layers, calls + 1
        shortest, longest = -math.log1p(-low), -math.log1p(-high)
        step = (longest - shortest) / recurrent_layers
        log_memory = shortest + step * (rung + torch.rand(width, dtype=torch.float64))
        return lambda_from_decay(-torch.expm1(-log_memory), c)

    return draw


def register_depth_ladder(recurrent_layers: int) -> str:
    """Registers it for that depth, once; returns the name."""
    name = f"depth_ladder_{recurrent_layers}"
    if name not in LAMBDA_INITS:
        register_lambda_init(name, depth_ladder(recurrent_layers))
    return name


def make_config(model: dict, arm: dict, vocab_size: int) -> GriffinConfig:
    """From the sweep's settings. `layout` names a pattern of LAYER_TYPES, repeated over num_hidden_layers."""
    fields = {"num_gate_blocks": 16, "bos_token_id": None, "eos_token_id": None, **model, **arm}
    pattern, layers = LAYER_TYPES[fields.pop("layout")], fields["num_hidden_layers"]
    layer_types = [pattern[i % len(pattern)] for i in range(layers)]
    if fields.get("lambda_init") == "depth_ladder":
        fields["lambda_init"] = register_depth_ladder(layer_types.count("linear_attention"))
    return GriffinConfig(vocab_size=vocab_size, layer_types=layer_types, **fields)


def make_model(config: GriffinConfig, seed: int) -> GriffinForCausalLM:
    """The arm's Λ; all other weights are those of every arm with this seed, whatever its Λ takes from the generator."""
    torch.manual_seed(seed)
    model = GriffinForCausalLM(config)
    torch.manual_seed(seed)
    others = GriffinForCausalLM(GriffinConfig(**{**config.to_dict(), "lambda_init": "constant"})).state_dict()
    model.load_state_dict({name: tensor for name, tensor in others.items() if "lambda_bias" not in name}, strict=False)
    return model


def make_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """On a GPU ready to be recorded: the rate is a tensor, and all state exists before the first step."""
    decayed, recorded = set(decay_parameter_names(model)), model.device.type == "cuda"
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) is decays], "weight_decay": amount}
        for decays, amount in ((True, weight_decay), (False, 0.0))
    ]
    rate = torch.tensor(learning_rate, device=model.device) if recorded else learning_rate
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=recorded)
    if recorded:
        _make_state(optimizer, model)
    return optimizer


def _make_state(optimizer: torch.optim.AdamW, model) -> None:
    """A step that changes nothing, taken back: state made within a recording would be made anew at each replay."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rate = optimizer.param_groups[0]["lr"]
    value = rate.clone()
    rate.zero_()
    optimizer.step()
    rate.copy_(value)
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)


class Watch:
    """Curve and Λ of a run: `take` at step 0 and at each of `steps`."""

    def __init__(self, model: torch.nn.Module, task: SyntheticTask | LanguageTask, steps: set[int]):
        self.model, self.task, self.steps = model, task, steps
        self.decays = [module for module in model.modules() if isinstance(module, Decay)]
        self.first = [decay.lambda_bias.detach().clone() for decay in self.decays]
        self.curve: list[dict] = []
        self.memory: list[dict] = []

    @torch.no_grad()
    def take(self, step: int, train_loss: float | None) -> bool:
        """Records; returns whether the loss is finite."""
        self.model.eval()
        figures = self.task.validate(self.model)
        self.model.train()
        self.curve.append({"step": step, "train_loss": train_loss, **figures})
        self.memory.append({"step": step, "layers": [self._layer(*pair) for pair in zip(self.decays, self.first)]})
        return math.isfinite(figures["loss"])

    def _layer(self, decay: Decay, first: torch.Tensor) -> dict:
        """Quantiles of the memory length at r = 0.5, tokens, and the mean absolute change of Λ since the start."""
        memory = -1 / torch.expm1(0.5 * decay())
        quantiles = torch.quantile(memory, torch.tensor(QUANTILES, device=memory.device)).tolist()
        moved = (decay.lambda_bias - first).abs().mean().item()
        return {"memory": [_short(value) for value in quantiles], "moved": _short(moved)}


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    task: SyntheticTask | LanguageTask,
    run: dict,
    done: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (steps taken, loss of the last one), and reads no value off the device itself.

    done: steps that model, optimizer and task have behind them.
    """
    settings, steps = run["settings"], run["steps"]
    warmup = max(1, round(settings["warmup"] * steps))
    if done:
        for group in optimizer.param_groups:
            group["initial_lr"] = run["learning_rate"]
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=done - 1)

    def gradients(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model, batch)
        loss.backward()
        return loss.detach()

    def take_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = gradients(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        return loss

    if model.device.type == "cuda":
        take_step = Recorded(take_step, warm_up=gradients)
    for step in range(done + 1, steps + 1):
        loss = take_step(task.batch())
        schedule.step()
        yield step, loss


class Recorded:
    """A function of a batch as a CUDA graph, one for each shape of batch: models this small wait for launches only.

    function: batch -> a tensor; warm_up: what can run before without changing anything, so that kernels are compiled.
    """

    def __init__(self, function: Callable, warm_up: Any):
        self.function, self.warm_up = function, warm_up
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle()  # shared: recordings are replayed one after the other

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes = tuple((name, tensor.shape) for name, tensor in batch.items())
        if shapes not in self.recordings:
            self.recordings[shapes] = self._record({name: tensor.clone() for name, tensor in batch.items()})
        graph, inputs, output = self.recordings[shapes]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return output.clone()

    def _record(self, inputs: dict[str, torch.Tensor]) -> tuple:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.warm_up(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # relaxed: a kernel that only the recording uses may still have to be loaded.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="relaxed"):
            output = self.function(inputs)
        return graph, inputs, output


def run_one(run: dict) -> dict:
    """The record of one run; `status` is "diverged" when a validation loss was not finite, else "finished".

    run: key, task, arm, seed, learning_rate, steps, measured (False: for the choice of the learning rate only), device,
    settings (of the task) and arm_settings (fields of GriffinConfig).
    """
    start, device = time.time(), torch.device(run["device"])
    torch.set_num_threads(1)  # runs go side by side
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: products in float32 took four tenths of a step
    task = make_task(run["settings"], run["seed"], device)
    config = make_config(run["settings"]["model"], run["arm_settings"], task.vocab_size)
    model = make_model(config, run["seed"]).to(device).train()
    optimizer = make_optimizer(model, run["learning_rate"], run["settings"]["weight_decay"])
    points = run["settings"]["points"]
    watch = Watch(model, task, {round(run["steps"] * k / points) for k in range(points + 1)})
    finite, losses = watch.take(0, None), []
    for step, loss in train(model, optimizer, task, run):
        losses.append(loss)
        if step in watch.steps:
            finite, losses = watch.take(step, torch.stack(losses).mean().item()), []
            if not finite:
                break
    evaluated = task.evaluate(model.eval()) if finite and run["measured"] else []
    return {
        **run,
        "status": "finished" if finite else "diverged",
        "parameters": model.num_parameters(),
        "seconds": round(time.time() - start, 2),
        "curve": [_round_figures(entry) for entry in watch.curve],
        "memory": watch.memory,
        "evaluations": [_round_figures(entry) for entry in evaluated],
    }


def _round_figures(entry: dict) -> dict:
    return {name: _short(value) if isinstance(value, float) else value for name, value in entry.items()}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
