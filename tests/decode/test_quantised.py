"""Decoding with the weights of bitsandbytes and torchao: which step runs, and that its tokens are those of the scheme's
own numbers."""

import copy

import pytest
import torch
from quantised_models import SCHEMES, SIZES, dequantised, dequantised_weight, linears_of, load_quantised
from test_generation_paths import by_transformers, random_ids, run
from tolerances import assert_close

from modeling_griffin.decode import agreement, fused_model, packed
from modeling_griffin.decode.eligibility import forward_obstacles, waits_for_outliers
from modeling_griffin.decode.fingerprint import forward_fingerprint, fused_fingerprint
from modeling_griffin.decode.fused_model import fused_obstacles
from modeling_griffin.decode.host_effects import host_effect
from modeling_griffin.decode.state import DecodeStep


@pytest.fixture
def base(small_model, tmp_path):
    small_model("griffin", "sdpa", **SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def packed_on_a_cpu(monkeypatch):
    """The fused step's own arithmetic, in the plain operations that define it, over packed weights."""
    monkeypatch.setattr(packed, "ON", ("cuda", "cpu"))
    monkeypatch.setattr(fused_model, "MATVEC_NF4_DTYPES", (torch.float32,))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_recorded_forward_pass_decodes(base, scheme, paths, monkeypatch):
    """What a CPU runs, and what a GPU records: nothing in the layers has to run on the host at each token."""
    model, ids = load_quantised(base, scheme), random_ids(2, 6)
    found = run(model, ids)
    assert {path[:2] for path in paths} == {("forward", True)}
    assert {effect for module in model.modules() if (effect := host_effect(module))} == set()
    assert list(forward_obstacles(model)) == []
    assert torch.equal(found, by_transformers(monkeypatch, model, ids))
    if scheme != "int8":
        assert torch.equal(found, run(dequantised(model), ids))
    assert (waits_for_outliers(model) is not None) == (scheme == "int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_read_is_what_the_library_means(base, scheme):
    model = load_quantised(base, scheme)
    for name, module in linears_of(model).items():
        expected, held = dequantised_weight(module), packed.unpack(module)
        assert_close("layer", held.dequantised(torch.float32), expected, name)
        places = {tensor.untyped_storage().data_ptr() for tensor in packed.tensors_of(module)}
        theirs = module.weight.qdata if scheme.startswith("torchao") else module.weight.data
        assert theirs.untyped_storage().data_ptr() in places  # read where it lies
    assert packed.unpack(model.lm_head) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fused_step_decodes_with_the_schemes_own_numbers(base, scheme, packed_on_a_cpu, paths):
    model, ids = load_quantised(base, scheme), random_ids(2, 6)
    found = run(model, ids)
    assert {path[:2] for path in paths} == {("fused", True)}
    assert torch.equal(found, run(dequantised(model), ids))
    step, plain = (DecodeStep(each.model, each.lm_head, 1) for each in (model, dequantised(model)))
    assert_close("logits", step.step(), plain.step())


def test_rounded_inputs_do_not_hide_another_network(base, packed_on_a_cpu):
    """LLM.int8() is asked without its rounding when a step is checked, so that a scale that is off stands out."""
    model = load_quantised(base, "int8")
    run(model, random_ids(1, 4))  # which moves what bitsandbytes holds to where it stays
    other = copy.deepcopy(model)
    other.model.layers[1].mlp_block.up_proj.state.SCB.mul_(1.1)
    agreement.check_step(model, DecodeStep(model.model, model.lm_head, 1))
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    with pytest.raises(agreement.Disagreement, match="model.layers.1"):
        agreement.check_step(model, DecodeStep(other.model, other.lm_head, 1))


def test_what_the_fused_step_refuses(base, packed_on_a_cpu):
    assert next(fused_obstacles(load_quantised(base, "nf4")), None) is None
    model = load_quantised(base, "nf4")
    layer = model.model.layers[0].mlp_block
    layer.up_proj.register_forward_hook(lambda module, args, output: output * 2)
    assert next(fused_obstacles(model)) == "layers.0.mlp_block.up_proj has a hook"
    model = load_quantised(base, "nf4")
    layer = model.model.layers[0].mlp_block.up_proj
    layer.forward = lambda x: x
    assert next(fused_obstacles(model)) == "layers.0.mlp_block.up_proj has a forward of its own"
    model = load_quantised(base, "nf4")
    model.model.layers[0].mlp_block.up_proj = model.model.layers[1].mlp_block.down_proj
    assert next(fused_obstacles(model)) == "layers.0.mlp_block.up_proj has a weight of shape (64, 128)"
    model = load_quantised(base, "nf4")
    model.model.layers[0].mlp_block.up_proj.weight.quant_state.blocksize = 128  # packed in a way that no kernel reads
    assert next(fused_obstacles(model)) == "layers.0.mlp_block.up_proj is a Linear4bit, not a Linear"


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_biases_that_the_library_casts_at_its_first_call(base, scheme, packed_on_a_cpu, paths, monkeypatch):
    """As it does where 4 bits are computed in another dtype than the model's: a recording reads where they lie then."""
    model, ids, places = load_quantised(base, scheme), random_ids(2, 6), []
    bias, prepare = model.model.layers[0].mlp_block.up_proj.bias, DecodeStep.prepare
    bias.data = bias.data.double()
    monkeypatch.setattr(DecodeStep, "prepare", lambda *given: (places.append(bias.data_ptr()), prepare(*given))[1])
    found = [run(model, ids) for _ in range(2)]
    assert places == [bias.data_ptr()] and bias.dtype == torch.float32
    assert {path.step for path in paths} == {"fused"} and torch.equal(*found)


def test_four_bits_without_fast_kernels_are_read_by_the_library(base, monkeypatch, paths):
    monkeypatch.setattr(packed, "ON", ("cuda", "cpu"))
    model, ids = load_quantised(base, "nf4"), random_ids(2, 6)
    for dtype in (torch.float32, torch.float16):
        said = f"gate_proj has NF4 weights and its model is in {dtype}, for which they have no fast kernels"
        assert next(fused_obstacles(load_quantised(base, "nf4", dtype))) == f"layers.0.mlp_block.{said}"
    assert next(fused_obstacles(load_quantised(base, "nf4", torch.bfloat16)), None) is None
    assert torch.equal(run(model, ids), run(dequantised(model), ids))
    assert [path.step for path in paths] == ["forward", "fused"]


def test_on_a_cpu_the_library_multiplies(base):
    reason = next(fused_obstacles(load_quantised(base, "torchao int8")))
    assert reason == "layers.0.mlp_block.gate_proj has packed weights, which have kernels on an NVIDIA GPU alone"


@pytest.mark.parametrize("scheme", ["nf4, constants too", "int8", "torchao int8"])
def test_other_weights_are_another_step(base, scheme, packed_on_a_cpu):
    """A recording reads packed weights where they lie: others in their place, and it is made anew."""
    model, other, ids = load_quantised(base, scheme), load_quantised(base, scheme), random_ids(1, 5)
    before = run(model, ids)
    prints = fused_fingerprint(model), forward_fingerprint(model)
    assert prints == (fused_fingerprint(model), forward_fingerprint(model))
    block, theirs = model.model.layers[0].mlp_block, other.model.layers[1].mlp_block
    run(other, ids)
    if scheme == "torchao int8":
        block.up_proj.weight = theirs.up_proj.weight
    else:
        block.up_proj.weight.data = theirs.up_proj.weight.data
        block.up_proj.weight.__dict__.update(theirs.up_proj.weight.__dict__)
        if scheme == "int8":
            block.up_proj.state = theirs.up_proj.state
    assert fused_fingerprint(model) != prints[0] and forward_fingerprint(model) != prints[1]
    after = run(model, ids)
    assert torch.equal(after, run(dequantised(model), ids)) and not torch.equal(after, before)


def test_outliers_that_the_host_waits_for(base):
    model = load_quantised(base, "int8")
    assert waits_for_outliers(model) == "model.layers.0.temporal_block.linear_x"
    for module in linears_of(model).values():
        module.state.threshold = 0.0
    assert waits_for_outliers(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fused_step_on_a_gpu(base, scheme, rows, paths):
    model, ids = load_quantised(base, scheme, torch.bfloat16, "cuda"), random_ids(rows, 6).cuda()
    found = run(model, ids, return_dict_in_generate=True, output_logits=True)
    assert {path.step for path in paths} == {"fused"}
    expected = dequantised(model)(found.sequences[:, :-1], use_cache=False).logits[:, 5:]
    # What reads the prompt is LLM.int8()'s own forward pass, which rounds inputs to 8 bits.
    tolerance = "LLM.int8 logits" if scheme == "int8" else "bfloat16 logits"
    assert_close(tolerance, torch.stack(found.logits, 1), expected)
