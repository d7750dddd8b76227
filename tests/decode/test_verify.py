"""A step over a token and its drafts against as many single steps: what it finds, and all that it leaves.

On a GPU it runs in kernels, without one in plain PyTorch.
"""

import copy
import gc
import weakref

import pytest
import torch
from tolerances import assert_close

from modeling_griffin.decode.speculative.ops import PlainVerifyOps
from modeling_griffin.decode.speculative.verify import MOST_TOKENS, TOLERANCE, VerifyStep, disagreement
from modeling_griffin.decode.state import DecodeStep


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["griffin", "hawk", "attention", "attention_first"]


def filled_step(model, time: int, padding: int = 0) -> DecodeStep:
    """A step of one row that has read `time` tokens, the first `padding` of which are none."""
    step = DecodeStep(model.model, model.lm_head, 1)
    step.start(padding)
    step.clock.padding.fill_(padding)
    generator = torch.Generator().manual_seed(time)
    for token in torch.randint(0, 29, (time - padding, 1), generator=generator):
        step.token.copy_(token)
        step.step()
    step.token.fill_(7)
    return step


def state_of(step: DecodeStep) -> list[torch.Tensor]:
    tensors = [step.clock.time, step.clock.padding, step.token]
    return [tensor.clone() for tensor in (*tensors, *(tensor for layer in step.layers for tensor in layer))]


def set_state(step: DecodeStep, state: list[torch.Tensor]) -> None:
    tensors = [step.clock.time, step.clock.padding, step.token]
    for tensor, value in zip((*tensors, *(tensor for layer in step.layers for tensor in layer)), state, strict=True):
        tensor.copy_(value)


def single_steps(step: DecodeStep, number: int) -> tuple[list[int], list[list[torch.Tensor]], list[torch.Tensor]]:
    """The tokens that so many steps find one after the other, the states behind each and their logits."""
    tokens, states, logits = [], [], []
    for _ in range(number):
        logits.append(step.step().clone())
        tokens.append(step.token.item())
        states.append(state_of(step))
    return tokens, states, logits


def poison(drafts: VerifyStep) -> None:
    """What is read of an earlier pass is not a number."""
    for tensor in (drafts.logits, *drafts.new_rings, *drafts.new_memories):
        tensor.fill_(float("nan"))
    for tensor in (drafts.report, drafts.on_host, drafts.tokens):
        tensor.fill_(-9)


def assert_same_state(step: DecodeStep, expected: list[torch.Tensor], name: str = "logits") -> None:
    for number, (tensor, other) in enumerate(zip(state_of(step), expected, strict=True)):
        assert_close(name if tensor.is_floating_point() else "exact", tensor, other, f"tensor {number}")


def check_all_numbers(model, time: int, tokens: int, padding: int = 0, name: str = "logits") -> None:
    """For every number of accepted tokens: the first n - 1 drafts right, the next wrong, what follows right or not."""
    step = filled_step(model, time, padding)
    before = state_of(step)
    found, states, logits = single_steps(step, tokens)
    drafts = VerifyStep(step, tokens)
    for accepted in range(1, tokens + 1):
        guesses = list(found[:-1])
        if accepted < tokens:
            guesses[accepted - 1] = (guesses[accepted - 1] + 1) % 29
        for cut in {accepted - 1, tokens - 1}:  # without and with drafts behind the right ones
            set_state(step, before)
            poison(drafts)
            read = [7, *guesses[:cut], *[7] * (tokens - 1 - cut)]  # 7 again is a draft too, and may be right
            number = next((n for n in range(1, tokens) if read[n] != found[n - 1]), tokens)
            assert drafts.read(7, guesses[:cut]) == found[:number] and number >= accepted
            assert_close(name, drafts.logits[:number], torch.cat(logits[:number]))
            assert_same_state(step, states[number - 1], name)


@pytest.mark.parametrize("time", [0, 1, 3, 6, 8, 9, 29])
@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_right_drafts_leaves_what_single_steps_leave(kind, tokens, time, small_model):
    check_all_numbers(small_model(kind).to(DEVICE), time, tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_window_size": 11},
        {"attention_window_size": 40},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"conv1d_width": 2},
        {"conv1d_width": 6},
        {"scale_embeddings": True, "final_logit_softcapping": 5.0},
    ],
)
def test_other_configurations(changes, small_model):
    model = small_model("griffin", **changes).to(DEVICE)
    for time, tokens in ((2, 8), (13, 3), (25, min(17, model.config.attention_window_size))):
        check_all_numbers(model, time, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind, small_model):
    for time, padding in ((4, 3), (9, 9), (10, 4), (30, 5)):
        check_all_numbers(small_model(kind).to(DEVICE), time, 5, padding)


def test_as_many_tokens_as_there_are_kernels_for(small_model):
    check_all_numbers(small_model("hawk").to(DEVICE), 10, MOST_TOKENS)


def test_one_pass_after_another(small_model):
    """Drafts of all lengths between single steps, past the window several times: nothing is left of a pass."""
    model = small_model(attention_window_size=11).to(DEVICE)
    step = filled_step(model, 5)
    start = state_of(step)
    found, states, _ = single_steps(step, 90)
    set_state(step, start)
    drafts, generator, read, token = VerifyStep(step, 6), torch.Generator().manual_seed(1), 0, 7
    while read < 80:
        right, length, wrong = torch.randint(0, 6, (3,), generator=generator).tolist()
        if length == 0:
            step.step()
            new = [step.token.item()]
        else:
            guesses = [*found[read : read + right], *[(token + wrong) % 29] * 5][:length]
            new = drafts.read(token, guesses)
        assert new == found[read : read + len(new)]
        read, token = read + len(new), new[-1]
        assert_same_state(step, states[read - 1], "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_that_stands_in_for_drafts_is_kept_where_it_is_right(kind, small_model):
    """Of a model that repeats its last token."""
    model = small_model(kind).to(DEVICE)
    table = model.model.embed_tokens.weight.data
    model.lm_head.weight.data.copy_(torch.nn.functional.normalize(table))
    table.copy_(1000 * model.lm_head.weight.data)  # next to which layers add little
    step = filled_step(model, 10)
    before = state_of(step)
    found, states, _ = single_steps(step, 6)
    drafts = VerifyStep(step, 6)
    for guesses in ([], [7], [7, 7, 7]):
        set_state(step, before)
        poison(drafts)
        assert drafts.read(7, guesses) == found == [7] * 6
        assert_same_state(step, states[-1])


def test_a_step_that_is_let_go_takes_its_passes_along(small_model):
    """At once, with all their memory, and not when Python next looks for circles."""
    model = small_model().to(DEVICE)
    step = DecodeStep(model.model, model.lm_head, 1)
    step.drafts[3] = VerifyStep(step, 3)
    known = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert known() is None
    finally:
        gc.enable()


def test_a_draft_that_is_wrong_in_the_middle_hides_what_follows(small_model):
    """Even where the later ones are again the argmax."""
    step = filled_step(small_model("hawk").to(DEVICE), 3)
    drafts = VerifyStep(step, 4)
    drafts.read(7, [])
    for largest, tokens, accepted in (
        ([3, 4, 5, 6], [7, 3, 9, 5], 2),
        ([3, 4, 5, 6], [7, 9, 4, 5], 1),
        ([3, 4, 5, 6], [7, 3, 4, 5], 4),
        ([0, 0, 0, 0], [7, 0, 7, 0], 2),
    ):
        drafts.report[1:], time = torch.tensor(largest), step.clock.time.item()
        drafts.ops.accept(torch.tensor(tokens, pin_memory=DEVICE == "cuda"), drafts.report, step.token, step.clock)
        assert drafts.report.tolist() == [accepted, *largest]
        assert step.token.tolist() == [largest[accepted - 1]] and step.clock.time.item() == time + accepted


@pytest.mark.parametrize("rows, tokens, message", [(2, 3, "has 2 rows"), (1, 1, "allowed is 2 to 8"), (1, 9, "2 to 8")])
def test_what_cannot_be_read_raises(rows, tokens, message, small_model):
    model = small_model().to(DEVICE)
    with pytest.raises(ValueError, match=message):
        VerifyStep(DecodeStep(model.model, model.lm_head, rows), tokens)


def test_a_pass_keeps_no_graph_of_weights_that_train(small_model):
    model = small_model().to(DEVICE)
    drafts = VerifyStep(DecodeStep(model.model, model.lm_head, 1), 3)
    with torch.inference_mode(), torch.inference_mode(False):
        drafts._compute()
    assert not any(tensor.requires_grad for tensor in (drafts.logits, *(t for layer in drafts.layers for t in layer)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 4, 5, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_passes_are_those_that_are_not_recorded(kind, tokens, dtype, small_model):
    """Replayed many times: a kernel that did not wait for the one before it would show."""
    model = small_model(kind, attention_window_size=150).to(DEVICE, dtype)
    step = DecodeStep(model.model, model.lm_head, 1)
    drafts = VerifyStep(step, tokens)
    drafts.record()
    graph, ends = drafts.graph, []
    for each in (None, graph):
        drafts.graph = each
        step.start(0)
        for tensor in (step.token, *(tensor for layer in step.layers for tensor in layer[:2])):
            tensor.zero_()
        found = [0]
        for length in range(200):
            found += drafts.read(found[-1], copy.copy(found[-2:-6:-1])[: length % tokens])
        ends.append((found, state_of(step)))
    assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))


@pytest.mark.parametrize("number", [2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_agrees_with_single_steps(kind, number, small_model):
    """On a step that is new, and on one that has read something."""
    model = small_model(kind)
    for step in (DecodeStep(model.model, model.lm_head, 1), filled_step(model, time=13, padding=3)):
        assert disagreement(step, VerifyStep(step, number)) < 1e-4


@pytest.mark.parametrize("what", ["attend", "recurrent", "keep_recurrent", "keep_attention", "accept"])
def test_a_pass_that_is_wrong_disagrees(what, small_model, monkeypatch):
    """Whatever it is that does nothing."""
    nothing = {"attend": lambda ops, q, *others: q, "recurrent": lambda ops, x, *others: x}
    monkeypatch.setattr(PlainVerifyOps, what, nothing.get(what, lambda *arguments: None))
    model = small_model()
    step = DecodeStep(model.model, model.lm_head, 1)
    drafts = VerifyStep(step, 6)
    drafts.report.fill_(4)  # as if so many were accepted
    error = disagreement(step, drafts)
    assert not error <= TOLERANCE[torch.float32], error


def test_a_recurrence_that_is_slightly_wrong_disagrees(small_model, monkeypatch):
    """Without its decay: what a step shows only once it knows Λ."""
    right = PlainVerifyOps.recurrent

    def recurrent(ops, x, y, block, past, state, log_decay, *others):
        return right(ops, x, y, block, past, state, log_decay / 2, *others)

    monkeypatch.setattr(PlainVerifyOps, "recurrent", recurrent)
    model = small_model()
    step = DecodeStep(model.model, model.lm_head, 1)
    error = disagreement(step, VerifyStep(step, 6))
    assert not error <= TOLERANCE[torch.float32], error
