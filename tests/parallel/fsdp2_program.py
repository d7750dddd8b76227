"""What `test_fsdp2.py` runs in four processes: models sharded by Transformers and by accelerate, and in one process.

Leaves results.pt: case to the numbers "alone" and "parallel", what Λ was in the forward pass and in the optimizer, and
what a save left. Each data-parallel rank sees one row of the batch, one process sees both.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.distributed import DistributedConfig

from modeling_griffin import GriffinForCausalLM, keep_lambda_float32
from tests.conftest import make_audible, make_config
from tests.ranks import (
    drawn_lambda,
    files_and_tensors,
    gradients,
    join_group,
    parameters,
    save_for_all,
    saved_alone,
    start_ranks,
    watch_lambda,
)


SHAPES = {"vocab_size": 32, "num_attention_heads": 4, "num_gate_blocks": 4, "lru_width": 24}
TOKENS = torch.randint(1, 32, (2, 13), generator=torch.Generator().manual_seed(3))
TIED = {"tie_word_embeddings": True}
# name: fields of the model, fields of DistributedConfig, arguments of from_pretrained
ON_FOUR = {
    "tensor parallel": ({}, {"tp_size": 2, "fsdp_size": 2}, {}),
    "tensor parallel, tied, mixed": (TIED, {"tp_size": 2, "fsdp_size": 2, "fsdp_mixed_precision": True}, {}),
}
if hasattr(DistributedConfig, "dp_replicate_size"):  # newer than Transformers 5.17, as is tensor parallelism with FSDP2
    ON_FOUR["replicated"] = ({}, {"dp_replicate_size": 2, "fsdp_size": 2}, {})
else:
    ON_FOUR = {}
ON_TWO = {
    "float32": ({}, {"fsdp_size": 2}, {}),
    "tied": (TIED, {"fsdp_size": 2}, {}),
    "mixed": ({}, {"fsdp_size": 2, "fsdp_mixed_precision": True}, {}),
    "bfloat16": ({}, {"fsdp_size": 2}, {"dtype": torch.bfloat16}),
}
# name: accelerate's mixed_precision, whether keep_lambda_float32 is called, gradient checkpointing, dtype of the model
WITH_ACCELERATE = {
    "accelerate": ("no", True, False),
    "accelerate, checkpointing": ("no", True, True),
    "accelerate, mixed": ("bf16", True, False),
    "accelerate, mixed, not kept": ("bf16", False, False),
    "accelerate, bfloat16, by name": ("no", False, False, torch.bfloat16),
}


def new_optimizer(model) -> torch.optim.Optimizer:
    # With the usual eps, AdamW's first steps turn the rounding of a gradient near 0 into a step of full size.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, foreach=False)


def measure(model, rows: slice, optimizer=None, steps: int = 3) -> dict:
    """Logits of the batch, then the gradients of these rows and what AdamW makes of them."""
    with torch.no_grad():
        results = {"logits": model(TOKENS, use_cache=False).logits}
    optimizer = optimizer or new_optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(TOKENS[rows], labels=TOKENS[rows], use_cache=False).loss.backward()
        if step == 0:
            results |= gradients(model)
        optimizer.step()
    return {**results, **parameters(model)}


def dtypes_of_lambda(model, optimizer) -> set[str]:
    """In storage, gradient and optimizer."""
    lambdas = [parameter for name, parameter in model.named_parameters() if "lambda" in name]
    states = [state for parameter in lambdas for state in optimizer.state[parameter].values() if state.dim()]
    return {str(tensor.dtype) for tensor in (*lambdas, *(parameter.grad for parameter in lambdas), *states)}


def run_case(folder: Path, fields: dict, sharding: dict, loading: dict) -> dict:
    alone = make_audible(GriffinForCausalLM(make_config("griffin", **SHAPES, **fields)))
    save_for_all(alone, folder)
    config = DistributedConfig(**sharding)
    model = GriffinForCausalLM.from_pretrained(folder, distributed_config=config, **loading)
    return compare(alone, model, new_optimizer(model), dist.get_rank() // config.tp_size % 2, folder)


def accelerator_of_cpus(precision: str, wrapped: list[str] | None = None) -> Accelerator:
    """accelerate's own FSDP2, of which only the refusal of CPUs is taken away.

    Its state says so by `distributed_type`, which it sets from the launcher's environment.
    wrapped: the classes that get groups, `fsdp_transformer_layer_cls_to_wrap`; None: as the model says.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=wrapped,
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
    accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def run_accelerate_case(folder: Path, precision: str, keep: bool, checkpointing: bool, dtype=torch.float32) -> dict:
    wrapped = None if dtype == torch.float32 else ["GriffinDecoderLayer", "Decay"]  # docs/distributed.md
    accelerator = accelerator_of_cpus(precision, wrapped)
    alone = make_audible(GriffinForCausalLM(make_config("griffin", **SHAPES, **TIED)))
    model = GriffinForCausalLM.from_pretrained(save_for_all(alone, folder), dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    if keep:
        keep_lambda_float32(model)
        keep_lambda_float32(model)  # again does nothing
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    assert type(model).__name__ == "FSDPGriffinForCausalLM"
    return compare(alone, model, optimizer, dist.get_rank(), folder)


def compare(alone, model, optimizer, row: int, folder: Path) -> dict:
    seen = watch_lambda(model)
    results = {"parallel": measure(model, slice(row, row + 1), optimizer), "alone": measure(alone, slice(None))}
    kept = dtypes_of_lambda(model, getattr(optimizer, "optimizer", optimizer))
    results |= {"forward": seen, "kept": kept, "trained": parameters(model), "files": files_and_tensors(folder)}
    return {**results, "saved": saved_alone(model, folder / "saved")}


def resume(folder: Path, trained: Path) -> dict:
    """Parameters saved and loaded again as shards, by the ranks that hold them."""
    config = DistributedConfig(fsdp_size=2)
    model = GriffinForCausalLM.from_pretrained(trained, distributed_config=config)
    model.save_pretrained(folder, distributed_checkpoint=True)
    return parameters(GriffinForCausalLM.from_pretrained(folder, distributed_config=config))


def main(rank: int, folder: Path) -> None:
    join_group(folder / "store4", rank, 4)
    results = {name: run_case(folder / name, *case) for name, case in ON_FOUR.items()}
    if ON_FOUR:
        both = DistributedConfig(tp_size=2, fsdp_size=2)
        results["drawn by four"] = drawn_lambda(folder / "drawn by four", SHAPES, both)
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    if rank < 2:
        results |= {name: run_case(folder / name, *case) for name, case in ON_TWO.items()}
        results["drawn"] = drawn_lambda(folder / "drawn", SHAPES, DistributedConfig(fsdp_size=2))
        results["resumed"] = resume(folder / "shards", folder / "float32" / "saved")
    else:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but the group is there already
        results |= {name: run_accelerate_case(folder / name, *case) for name, case in WITH_ACCELERATE.items()}
    if rank % 2 == 0:
        torch.save(results, folder / f"results{rank // 2}.pt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    start_ranks(main, 4, out)
    torch.save(torch.load(out / "results0.pt") | torch.load(out / "results1.pt"), out / "results.pt")
