"""What `test_tensor_parallel.py` runs in four processes: models of every kind, split over ranks and in one process.

Leaves results.pt: (case, tp_size) to the numbers "alone" and "parallel", and what the checks at the end of a group saw.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_griffin import GriffinConfig, GriffinForCausalLM
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
CASES = {
    "griffin": {"tie_word_embeddings": True},
    "untied": {},
    "hawk": {"kind": "hawk"},
    "grouped heads": {"kind": "attention_first", "num_key_value_heads": 2},
    "all heads": {"kind": "attention_first", "num_key_value_heads": 4},
    "recurrentgemma": {"scale_embeddings": True, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
}
CASES_OF_SIZE = {4: ["griffin", "hawk", "all heads"], 2: list(CASES)}
TOKENS = torch.randint(1, 32, (2, 13), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[0, :4] = 0


def case_config(name: str, **changes) -> GriffinConfig:
    fields = {**SHAPES, **CASES[name], **changes}
    return make_config(fields.pop("kind", "griffin"), **fields)


def split(folder: Path, cls=GriffinForCausalLM, **kwargs):
    config = DistributedConfig(tp_size=dist.get_world_size())
    return cls.from_pretrained(folder, distributed_config=config, **kwargs)


def train(model) -> dict:
    outputs = model(TOKENS, attention_mask=MASK, labels=TOKENS.masked_fill(MASK == 0, -100), use_cache=False)
    outputs.loss.backward()
    results = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **gradients(model)}
    model.zero_grad()
    return results


def generate(model, cache: str) -> dict:
    made = model.generate(
        TOKENS,
        attention_mask=MASK,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {f"{cache} tokens": made.sequences, f"{cache} logits": torch.stack(made.logits)}


def measure(model) -> dict:
    return {**train(model), **generate(model, "dynamic"), **generate(model, "static")}


def run_case(name: str, folder: Path) -> dict:
    alone = make_audible(GriffinForCausalLM(case_config(name)))
    model = split(save_for_all(alone, folder / f"{name} {dist.get_world_size()}"))
    return {"alone": measure(alone), "parallel": measure(model)}


def widths(folder: Path) -> dict:
    """Of what a rank caches and of the parameters it holds."""
    model = split(folder)
    with torch.no_grad():
        layers = model(TOKENS).past_key_values.layers
    local = model.model.layers[0].temporal_block.rg_lru.recurrence_gate.weight.to_local()
    states = {"convolution": layers[0].conv_states[0], "recurrence": layers[0].recurrent_states[0]}
    shapes = {"keys": layers[2].keys, "gate": local, **states}
    return {name: tuple(tensor.shape) for name, tensor in shapes.items()}


def checkpointing(folder: Path, alone) -> dict:
    """Eager attention, and layers that run again in the backward pass."""
    results = {}
    for name, model in (("alone", alone), ("parallel", split(folder))):
        model.set_attn_implementation("eager")
        model.gradient_checkpointing_enable()
        results[name] = train(model.train())
        model.gradient_checkpointing_disable()
        model.eval().set_attn_implementation("sdpa")
    return results


def bfloat16(folder: Path) -> dict:
    """Logits of both, and every dtype that Λ and the recurrent state have."""
    model, alone = split(folder, dtype=torch.bfloat16), GriffinForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = watch_lambda(model)
    with torch.no_grad():
        outputs = model(TOKENS, attention_mask=MASK)
        expected = alone(TOKENS, attention_mask=MASK).logits
    dtypes.add(str(outputs.past_key_values.layers[0].recurrent_states[0].dtype))
    dtypes |= {str(parameter.dtype) for name, parameter in model.named_parameters() if "lambda" in name}
    others = {str(parameter.dtype) for name, parameter in model.named_parameters() if "lambda" not in name}
    return {"dtypes": dtypes, "others": others, "logits": outputs.logits, "expected": expected}


def code_from_a_folder(folder: Path) -> dict:
    """The shipped code, loaded beside the package: its styles are registered a second time."""
    if dist.get_rank() == 0:
        get_class_from_dynamic_module("modeling_griffin.GriffinForCausalLM", str(folder))
    dist.barrier()
    cls = get_class_from_dynamic_module("modeling_griffin.GriffinForCausalLM", str(folder))
    assert cls is not GriffinForCausalLM
    with torch.no_grad():
        return {"shipped": split(folder, cls)(TOKENS).logits, "package": split(folder)(TOKENS).logits}


def failing_save(model, folder: Path) -> dict:
    """Rank 0 has no space left: what every rank raises, and the files of before and after."""
    before = sorted((path.name, path.stat().st_size) for path in folder.iterdir())

    def no_space(tensors, filename, metadata=None):
        raise OSError("No space left on device")

    stock, transformers.modeling_utils.safe_save_file = transformers.modeling_utils.safe_save_file, no_space
    try:
        model.save_pretrained(folder)
        own = "nothing"
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
    finally:
        transformers.modeling_utils.safe_save_file = stock
    raised = [None] * dist.get_world_size()
    dist.all_gather_object(raised, own)
    return {"raised": raised, "same": before == sorted((path.name, path.stat().st_size) for path in folder.iterdir())}


def refusals(folder: Path) -> dict:
    """What is raised for shapes that two ranks cannot share, and how often loading had begun by then."""
    wrong = {"num_gate_blocks": 3, "num_attention_heads": 3, "intermediate_size": 25}
    begun, messages = [], {}
    load = GriffinForCausalLM._load_pretrained_model
    GriffinForCausalLM._load_pretrained_model = staticmethod(lambda *args, **kwargs: begun.append(1))
    for field, value in wrong.items():
        model = GriffinForCausalLM(case_config("griffin", **{field: value}))
        try:
            split(save_for_all(model, folder / field))
        except ValueError as error:
            messages[field] = str(error)
    GriffinForCausalLM._load_pretrained_model = load
    return {"messages": messages, "begun": len(begun)}


def main(rank: int, folder: Path) -> None:
    join_group(folder / "store4", rank, 4)
    results = {(name, 4): run_case(name, folder) for name in CASES_OF_SIZE[4]}
    griffin = folder / "griffin 4"
    alone = GriffinForCausalLM.from_pretrained(griffin)
    results["widths"], results["checkpointing"] = widths(griffin), checkpointing(griffin, alone)
    results["source"], results["saved"] = parameters(alone), saved_alone(split(griffin), folder / "saved")
    results["files"] = files_and_tensors(griffin)
    results["drawn"] = drawn_lambda(folder / "drawn", SHAPES, DistributedConfig(tp_size=4))
    results["failing save"] = failing_save(split(griffin), folder / "saved")

    half = rank // 2
    join_group(folder / f"store2.{half}", rank % 2, 2)
    results |= {(name, 2): run_case(name, folder) for name in CASES_OF_SIZE[2][half::2]}
    if half == 0:
        results["bfloat16"] = bfloat16(griffin)
        results["code"] = code_from_a_folder(griffin)
    else:
        results["refusals"] = refusals(folder)
    if rank % 2 == 0:
        torch.save(results, folder / f"results{half}.pt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    start_ranks(main, 4, out)
    torch.save(torch.load(out / "results0.pt") | torch.load(out / "results1.pt"), out / "results.pt")
