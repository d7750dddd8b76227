"""What `test_fsdp2.py` runs in four processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_griffin import GriffinForCausalLM
from tests.conftest import make_audible, make_config
from tests.ranks import gradients, join_group, start_ranks, whole


def batch(model, rows):
    tokens = torch.randint(1, model.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(3))
    return tokens[rows]


def measure(model, rows=slice(None), steps=3):
    tokens = batch(model, rows)
    with torch.no_grad():
        results = {"logits": model(batch(model, slice(None)), use_cache=False).logits}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        if step == 0:
            results |= {f"gradient of {name}": gradient for name, gradient in gradients(model).items()}
        optimizer.step()
    results |= {f"trained {name}": whole(parameter).clone() for name, parameter in model.named_parameters()}
    results["dtypes"] = {
        n: (p.dtype, optimizer.state[p]["exp_avg"].dtype if p in optimizer.state else None)
        for n, p in model.named_parameters()
        if "lambda" in n
    }
    return results


def run(name, config, fields, folder, dtype=None):
    folder = folder / name
    alone = make_audible(
        GriffinForCausalLM(make_config("griffin", vocab_size=32, num_attention_heads=4, num_gate_blocks=4, **fields))
    )
    if dist.get_rank() == 0:
        alone.save_pretrained(folder)
    dist.barrier()
    model = GriffinForCausalLM.from_pretrained(folder, distributed_config=config, dtype=dtype)
    seen = []
    for m in model.modules():
        if "lambda_bias" in m._parameters:
            f = m.forward

            def fw(m=m, f=f):
                seen.append(str(m.lambda_bias.dtype))
                return f()

            m.forward = fw
    row = dist.get_rank() // config.tp_size
    r = {"alone": measure(alone), "parallel": measure(model, slice(row, row + 1))}
    if dist.get_rank() == 0:
        print(name, set(seen), r["parallel"].pop("dtypes"), r["alone"].pop("dtypes"))
    return r


def main(rank, folder):
    logging.disable_progress_bar()
    results = {}
    join_group(folder / "store4", rank, 4)
    results["2x2"] = run("2x2", DistributedConfig(tp_size=2, fsdp_size=2), {}, folder)
    results["2x2 tied bf16"] = run(
        "2x2b",
        DistributedConfig(tp_size=2, fsdp_size=2, fsdp_mixed_precision=True),
        {"tie_word_embeddings": True},
        folder,
    )
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    if rank < 2:
        for n, c, f, d in [
            ("fsdp", DistributedConfig(fsdp_size=2), {}, None),
            ("fsdp tied", DistributedConfig(fsdp_size=2), {"tie_word_embeddings": True}, None),
            ("fsdp mp", DistributedConfig(fsdp_size=2, fsdp_mixed_precision=True), {}, None),
            ("fsdp bf16", DistributedConfig(fsdp_size=2), {}, torch.bfloat16),
        ]:
            results[n] = run(n, c, f, folder, d)
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    start_ranks(main, 4, Path(sys.argv[1]))
