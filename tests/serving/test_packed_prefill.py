"""Prompts that are read end to end leave the states and the logits that each leaves alone."""

import pytest
import torch

from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.serving.packed_prefill import read_packed
from tests.tolerances import assert_close


LENGTHS = (1, 3, 30, 2, 8, 17, 1)  # one token, shorter than the convolution, the window of 8, several windows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention_first"])
def test_each_prompt_leaves_what_it_leaves_alone(kind, attention, small_model):
    """The rows of a step too, at a time when its rings have wrapped, equal prompts in several rows."""
    options = {"final_logit_softcapping": 2.0, "scale_embeddings": True} if kind == "griffin" else {}
    model = small_model(kind, attention, **options)
    chance = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 29, (length,), generator=chance).tolist() for length in LENGTHS]
    packed = read_packed(model, prompts)
    steps = [DecodeStep(model.model, model.lm_head, 8) for _ in range(2)]
    rows, order = [6, 0, 3, 1, 2, 7, 5, 4], [0, 1, 2, 3, 4, 5, 6, 2]
    for step in steps:
        step.start(61)
        for buffer in (*step.rings, *step.memories):
            buffer.normal_()  # of rows that were there before
    for number, prompt in enumerate(prompts):
        state = model.prefill(torch.tensor([prompt]))
        assert_close("logits", packed.logits[number], state.logits[0])
        cache = state.to_cache()[0]
        for row in (row for row, of in zip(rows, order) if of == number):
            steps[0].load_rows(torch.tensor([row]), cache, len(prompt), None)
    steps[1].load_packed(rows, order, packed)
    assert torch.equal(steps[0].clock.padding, steps[1].clock.padding)
    tokens = torch.tensor([prompts[order[rows.index(row)]][-1] for row in range(8)])
    for _ in range(12):
        for step in steps:
            step.token.copy_(tokens)
        expected, found = (step.step() for step in steps)
        assert_close("logits", found, expected)
