"""What `test_float8.py` runs in two processes: float8 products in a model that accelerate shards, and in one process.

torchao emulates the products on a CPU. Leaves results.pt: case to gradients and what AdamW made of them, "alone" and
"parallel". Each rank sees one row of the batch; one process sees one behind the other, since a scale is that of what a
product reads.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling_griffin import GriffinForCausalLM, keep_lambda_float32
from tests.conftest import make_audible, make_config
from tests.parallel.fsdp2_program import accelerator_of_cpus, new_optimizer
from tests.ranks import ROOT, gradients, join_group, parameters, start_ranks


sys.path.insert(0, str(ROOT / "scripts"))
from training.float8 import convert  # noqa: E402


SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "lru_width": 32,
    "head_dim": 16,
    "num_gate_blocks": 4,
}
TOKENS = torch.randint(1, 48, (2, 16), generator=torch.Generator().manual_seed(3))
# name: recipe, gradient checkpointing, whether blocks are compiled
CASES = {
    "tensorwise": ("tensorwise", False, False),
    "rowwise": ("rowwise", False, False),
    "tensorwise, checkpointing": ("tensorwise", True, False),
    "rowwise, checkpointing, compiled": ("rowwise", True, True),
}


def make(recipe: str | None, checkpointing: bool, compiled: bool) -> GriffinForCausalLM:
    model = make_audible(GriffinForCausalLM._from_config(make_config("griffin", **SIZES), attn_implementation="sdpa"))
    if recipe is not None:
        assert convert(model, recipe, compiled=False, emulate=True) == 3 * 3 + 2 * 3 + 4
    if checkpointing:
        model.gradient_checkpointing_enable()
    if compiled:  # without code for a processor, which is not what is tested
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    return model.train()


def measure(model, optimizer, rows: list[int]) -> dict:
    """The gradients of these rows' mean loss, and what two steps make of the parameters."""
    results = {}
    for step in range(2):
        optimizer.zero_grad()
        for row in rows:
            ids = TOKENS[row : row + 1]
            (model(ids, labels=ids, use_cache=False).loss / len(rows)).backward()
        if step == 0:
            results |= gradients(model)
        optimizer.step()
    return {**results, **parameters(model)}


def run_case(recipe: str, checkpointing: bool, compiled: bool) -> dict:
    alone, plain = make(recipe, False, False), make(None, False, False)
    results = {"alone": measure(alone, new_optimizer(alone), [0, 1])}
    results["plain"] = measure(plain, new_optimizer(plain), [0, 1])
    model = make(recipe, checkpointing, compiled)
    keep_lambda_float32(model)
    model, optimizer = accelerator_of_cpus("no").prepare(model, new_optimizer(model))
    results["parallel"] = measure(model, optimizer, [dist.get_rank()])
    results["kinds"] = {type(module).__name__ for module in model.model.layers.modules()}
    return results


def main(rank: int, folder: Path) -> None:
    join_group(folder / "store", rank, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but the group is there already
    results = {name: run_case(*case) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    start_ranks(main, 2, Path(sys.argv[1]))
