"""What `test_tensor_parallel.py` runs in four processes: models of every kind, split over ranks and in one process.

Leaves results.pt: for every case a dictionary with the numbers of both, under "parallel" and "alone".
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from tests.conftest import make_audible, make_config
from tests.ranks import gradients, join_group, start_ranks, whole


SHAPES = {"vocab_size": 32, "num_attention_heads": 4, "num_gate_blocks": 4, "lru_width": 24}
CASES = {
    "griffin": {"tie_word_embeddings": True},
    "untied": {},
    "hawk": {"kind": "hawk"},
    "grouped heads": {"kind": "attention_first", "num_key_value_heads": 2},
    "all heads": {"kind": "attention_first", "num_key_value_heads": 4},
    "recurrentgemma": {"scale_embeddings": True, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
}
CASES_OF_SIZE = {4: ["griffin", "hawk", "all heads"], 2: list(CASES)}


def case_config(name: str) -> GriffinConfig:
    fields = dict(CASES[name])
    return make_config(fields.pop("kind", "griffin"), **{**SHAPES, **fields})


def measure(model: GriffinForCausalLM, attention: str = "sdpa") -> dict:
    """Loss, logits, gradients, generated tokens and the logits on the way, and a cache's widths."""
    model.set_attn_implementation(attention)
    tokens = torch.randint(1, model.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    outputs = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), use_cache=False)
    outputs.loss.backward()
    results = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach()}
    results |= {f"gradient of {name}": gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    for cache in ("dynamic", "static"):
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
        if cache == "static":
            settings["disable_compile"] = True
        made = model.generate(
            tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
        )
        results[f"{cache} tokens"], results[f"{cache} logits"] = made.sequences, torch.stack(made.logits)
    return results


def run_case(name: str, size: int, folder: Path) -> dict:
    folder = folder / f"{name} {size}"
    alone = make_audible(GriffinForCausalLM(case_config(name)))
    if dist.get_rank() == 0:
        alone.save_pretrained(folder)
    dist.barrier()
    model = GriffinForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size))
    return {"alone": measure(alone), "parallel": measure(model)}


def main(rank: int, folder: Path) -> None:
    results = {}
    join_group(folder / "store4", rank, 4)
    for name in CASES_OF_SIZE[4]:
        results[name, 4] = run_case(name, 4, folder)
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    for name in CASES_OF_SIZE[2][rank // 2 :: 2]:
        results[name, 2] = run_case(name, 2, folder)
    if rank % 2 == 0:
        torch.save(results, folder / f"results{rank // 2}.pt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    start_ranks(main, 4, out)
    torch.save(torch.load(out / "results0.pt") | torch.load(out / "results1.pt"), out / "results.pt")
