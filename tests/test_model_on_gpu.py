"""The whole model on a GPU: the numbers of the CPU, and the same tokens by every way of generating."""

import pytest
import torch

from modeling_griffin import GriffinConfig, GriffinForCausalLM


pytestmark = pytest.mark.gpu
LAYOUTS = ["plain", "padded", "packed"]


def make_model(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 300,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_gate_blocks": 8,
        "attention_window_size": 16,
        "lru_width": 160,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return GriffinForCausalLM(GriffinConfig(**{**settings, **changes})).eval()


def make_inputs(layout):
    ids = torch.randint(0, 300, (3, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if layout == "padded":
        mask[0, :9], mask[1, 40:] = 0, 0
        return ids, mask, {"attention_mask": mask}
    positions = torch.tensor([[*range(17), 0, *range(20), *range(12)]] * 3)
    return ids, mask, {"position_ids": positions} if layout == "packed" else {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_the_cpus(layout):
    """Measured on an H100: 9e-6 in logits, 3e-6 of the norm in gradients."""
    on_cpu, on_gpu = make_model(), make_model().cuda()
    ids, mask, layout_arguments = make_inputs(layout)
    labels = ids.masked_fill(mask == 0, -100)
    expected = on_cpu(ids, labels=labels, **layout_arguments)
    moved = {name: tensor.cuda() for name, tensor in layout_arguments.items()}
    actual = on_gpu(ids.cuda(), labels=labels.cuda(), **moved)
    expected.loss.backward()
    actual.loss.backward()
    assert (actual.logits.cpu() - expected.logits)[mask.bool()].abs().max() < 4e-5
    for (name, e), a in zip(on_cpu.named_parameters(), on_gpu.parameters()):
        assert (a.grad.cpu() - e.grad).norm() < 2e-5 * (e.grad.norm() + 1e-6), name


@pytest.mark.parametrize("changes", [{}, {"layer_types": ["linear_attention"] * 6}], ids=["griffin", "hawk"])
def test_every_way_of_generating_gives_the_same_tokens(changes):
    """The static cache compiles the step and replays CUDA graphs; Hawk ignores it."""
    model = make_model(**changes).cuda()
    ids, mask, _ = make_inputs("padded")
    options = {"attention_mask": mask[:, :20].cuda(), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    prompt = ids[:, :20].cuda()
    expected = model.generate(prompt, **options)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompt, **options, **other), expected), other
    beams = model.generate(prompt, num_beams=3, **options)
    assert torch.equal(model.generate(prompt, num_beams=3, use_cache=False, **options), beams)
