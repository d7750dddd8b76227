"""What `test_sequence_mesh.py` runs in four processes: rows shared over ranks beside data parallelism, compiled, read
into states.

Leaves results.pt: case to the numbers "alone" and "parallel".
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_griffin import GriffinForCausalLM, GriffinForSequenceClassification, GriffinModel, keep_lambda_float32
from modeling_griffin.parallel import parallelize_sequence
from modeling_griffin.training.pieces import mlp_in_pieces
from tests.conftest import VOCABULARY, make_audible, make_config
from tests.parallel.sequence_program import tokens
from tests.ranks import gradients, join_group, save_for_all, start_ranks


TOKENS = tokens(2, 26)


def make_model(**fields) -> GriffinForCausalLM:
    model = GriffinForCausalLM._from_config(make_config("griffin", **fields), attn_implementation="sdpa")
    return make_audible(model).train()


def step(model, rows: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    output = model(rows, labels=rows, use_cache=False)
    output.loss.backward()
    return output.loss.detach()


def alone() -> dict:
    model = make_model()
    return {"loss": step(model, TOKENS), **gradients_of(model)}


def gradients_of(model) -> dict:
    return {f"gradient of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}


def with_ddp(mesh, in_pieces: bool = False) -> dict:
    """Each row on two ranks; DDP averages over all four."""
    data = mesh.get_local_rank("data")
    model = make_model()
    if in_pieces:
        mlp_in_pieces(model, 4)
    parallelize_sequence(model, mesh["sequence"])
    ddp = DistributedDataParallel(model)
    loss = step(ddp, TOKENS[data : data + 1])
    dist.all_reduce(loss)
    return {"loss": loss / 4, **gradients_of(model)}


def with_fsdp2(mesh, mixed: bool = False, checkpointing: bool = False, in_pieces: bool = False) -> dict:
    data = mesh.get_local_rank("data")
    model = make_model()
    if in_pieces:
        mlp_in_pieces(model, 4)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shards = init_device_mesh("cpu", (4,))
    keep_lambda_float32(model, mesh=shards)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=shards, mp_policy=policy)
    fully_shard(model, mesh=shards, mp_policy=policy)
    parallelize_sequence(model, mesh["sequence"])
    loss = step(model, TOKENS[data : data + 1])
    dist.all_reduce(loss)
    return {"loss": loss / 4, **gradients(model)}


def compiled() -> dict:
    """Two ranks share both rows; a recurrent and an attention layer are compiled."""
    model = make_model(layer_types=["linear_attention", "sliding_attention"])
    expected = {"loss": step(model, TOKENS), **gradients_of(model)}
    parallelize_sequence(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    loss = step(model, TOKENS)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    return {"alone": expected, "parallel": {"loss": loss, **gradients_of(model)}}


def read_prompts() -> dict:
    """States of several models and prompts, each read by one process and by all: every tensor of them."""
    results = {}
    for kind in ("griffin", "hawk"):
        model = make_audible(GriffinForCausalLM(make_config(kind)))
        prompt, more = tokens(2, 75), tokens(2, 40)
        shared = parallelize_sequence(model)
        parallel = {"state": shared.prefill(prompt, chunk_size=5)}
        parallel["one pass"] = shared.prefill(prompt)
        parallel["a short prompt"] = shared.prefill(prompt[:, :7])
        parallel["behind a state"] = shared.prefill(more, parallel["state"], chunk_size=6)
        shared.remove()
        single = {"state": model.prefill(prompt), "a short prompt": model.prefill(prompt[:, :7])}
        single["one pass"] = single["state"]
        single["behind a state"] = model.prefill(more, single["state"])
        for name in single:
            pair = {"alone": tensors_of(single[name]), "parallel": tensors_of(parallel[name])}
            results[f"{kind}, {name}"] = {**pair, "generated": generated(model, parallel[name], single[name])}
    return results


def tensors_of(state) -> dict:
    named = {f"layer {i}, {j}": tensor for i, pair in enumerate(state.layers) for j, tensor in enumerate(pair)}
    return {"logits": state.logits, "lengths": torch.tensor(state.lengths), **named}


def generated(model, *states) -> bool:
    from modeling_griffin import GenerationRequest

    first, second = (
        [model.generate_batch([GenerationRequest(state=state[row], max_new_tokens=8)])[0].tokens for row in (0, 1)]
        for state in states
    )
    return first == second


def hidden_states() -> dict:
    model = make_audible(GriffinModel(make_config("griffin")))
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).last_hidden_state
        with parallelize_sequence(model) as shared:
            chunk = model(inputs_embeds=model.embed_tokens(TOKENS)).last_hidden_state
            return {"alone": {"logits": expected}, "parallel": {"logits": shared.gather(chunk, TOKENS.shape[1])}}


def by_code_of_a_repository(folder: Path) -> dict:
    """A model whose classes are not the package's."""
    model = make_model()
    expected = {"loss": step(model, TOKENS), **gradients_of(model)}
    save_for_all(model, folder)
    for rank in range(4):
        if dist.get_rank() == rank:  # in turn, since all copy the code to one place
            own = get_class_from_dynamic_module("modeling_griffin.GriffinForCausalLM", folder)
        dist.barrier()
    assert own.__module__.startswith("transformers_modules")
    copy = own.from_pretrained(folder).train()
    parallelize_sequence(copy)
    loss = step(copy, TOKENS)
    for parameter in copy.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 4
    return {"alone": expected, "parallel": {"loss": loss, **gradients_of(copy)}}


def layer_twice() -> dict:
    """A layer that stands twice in the model; alone again, it is what it was."""
    model = make_model()
    model.model.layers.insert(1, model.model.layers[0])
    expected = {"loss": step(model, TOKENS), **gradients_of(model)}
    with parallelize_sequence(model):
        loss = step(model, TOKENS)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 4
        shared = {"loss": loss, **gradients_of(model)}
    assert torch.equal(step(model, TOKENS), expected["loss"])
    return {"alone": expected, "parallel": shared}


def refusals(mesh) -> dict[str, str]:
    """What is said to arguments that cannot be honoured; all before anything is sent."""
    model = make_model()
    with_loss = make_model()
    with_loss.loss_function = lambda **arguments: None
    with_scan, older = make_model(), make_model()
    with_scan.model.layers[1].temporal_block.rg_lru.scan = "mine"
    older.model.layers[1].temporal_block.rg_lru = torch.nn.Identity()  # of code that asks for no other scan
    state = model.prefill(TOKENS)
    shared, without_head = parallelize_sequence(model), parallelize_sequence(GriffinModel(make_config("griffin")))
    calls = {
        "classifier": lambda: parallelize_sequence(GriffinForSequenceClassification(make_config("griffin"))),
        "mesh": lambda: parallelize_sequence(make_model(), mesh),
        "loss": lambda: parallelize_sequence(with_loss),
        "cache": lambda: model(TOKENS, use_cache=True),
        "time": lambda: model(TOKENS[:, :0]),
        "both": lambda: model(TOKENS, inputs_embeds=model.model.embed_tokens(TOKENS)),
        "chunk_size": lambda: shared.prefill(TOKENS, chunk_size=0),
        "logits_to_keep": lambda: model(TOKENS, labels=TOKENS, logits_to_keep=1),
        "labels": lambda: model(TOKENS, labels=TOKENS[:, :25]),
        "labels of a row": lambda: model(TOKENS, labels=TOKENS[:1]),
        "shift_labels": lambda: model(TOKENS, labels=TOKENS, shift_labels=TOKENS[:, 1:]),
        "labels in pieces": lambda: shared.loss_in_pieces(torch.zeros(2, 7, 16), TOKENS[:, :20]),
        "labels of losses": lambda: shared.token_losses(torch.zeros(2, 7, 16), TOKENS[:, :20]),
        "no head": lambda: without_head.token_losses(torch.zeros(2, 7, 16), TOKENS),
        "prompt": lambda: shared.prefill(TOKENS + VOCABULARY),
        "prompt of other rows": lambda: shared.prefill(tokens(1, 60), state),
        "state": lambda: shared.prefill(tokens(1, 60), "state"),
        "twice": lambda: parallelize_sequence(model),
        "scan": lambda: parallelize_sequence(with_scan),
        "older scan": lambda: parallelize_sequence(older),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    return found


def main(rank: int, folder: Path) -> None:
    join_group(folder / "store4", rank, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    expected = alone()
    runs = {
        "DDP": with_ddp(mesh),
        "FSDP2": with_fsdp2(mesh),
        "FSDP2, checkpointing": with_fsdp2(mesh, checkpointing=True),
        "FSDP2, mixed": with_fsdp2(mesh, mixed=True),
        "DDP, MLPs in pieces": with_ddp(mesh, in_pieces=True),
        "FSDP2, checkpointing, MLPs in pieces": with_fsdp2(mesh, checkpointing=True, in_pieces=True),
    }
    results = {name: {"alone": expected, "parallel": found} for name, found in runs.items()}
    results["hidden states"] = hidden_states()
    results["code of a repository"] = by_code_of_a_repository(folder / "repository")
    results["layer twice"] = layer_twice()
    results["prefill"] = read_prompts()
    results["refusals"] = refusals(mesh)
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    if rank < 2:
        results["compiled"] = compiled()
    join_group(folder / f"store1.{rank}", 0, 1)
    model = make_model()
    parallelize_sequence(model)
    results["one rank"] = {"alone": expected, "parallel": {"loss": step(model, TOKENS), **gradients_of(model)}}
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    start_ranks(main, 4, Path(sys.argv[1]))
