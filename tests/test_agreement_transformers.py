"""Agreement with RecurrentGemma in Transformers where that is right: one document, no padding, within its window.

Where it is wrong there is one test each that records it. When one of those fails, Transformers has been mended: turn it
into a test of agreement, and correct docs/recurrent_gemma.md.
"""

import pytest
import torch
from recurrent_gemma_models import PORT_WINDOW, small_recurrent_gemma, small_recurrent_gemma_config
from transformers import DynamicCache, RecurrentGemmaForCausalLM

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.conversion.recurrent_gemma import griffin_name


TOLERANCE = 2e-5  # of the largest number compared
CLEARLY_DIFFERENT = 1e-2  # of the largest number compared

MODELS = {
    "griffin": {},
    "hawk": {"block_types": ["recurrent"], "num_hidden_layers": 2},
    "wider recurrence": {"lru_width": 48},
    "grouped key-value heads": {"num_key_value_heads": 2},
    "untied head, another cap": {"tie_word_embeddings": False, "logits_soft_cap": 5.0},
}
HAWK = MODELS["hawk"]


def make_pair(**kwargs):
    theirs = small_recurrent_gemma(**kwargs)
    return theirs, GriffinForCausalLM.from_recurrent_gemma(theirs)


def tokens(batch: int, length: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 61, (batch, length))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest error as a share of the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


# Where it is right


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_up_to_its_window(name):
    theirs, ours = make_pair(**MODELS[name])
    for length in range(1, PORT_WINDOW + 1):
        ids = tokens(2, length)
        assert difference(ours(ids).logits, theirs(ids, use_cache=False).logits) <= TOLERANCE, length


@torch.no_grad()
def test_logits_of_a_hawk_at_any_length():
    theirs, ours = make_pair(**HAWK)
    ids = tokens(2, 4 * PORT_WINDOW)
    assert difference(ours(ids).logits, theirs(ids, use_cache=False).logits) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name):
    theirs, ours = make_pair(**MODELS[name])
    ids = tokens(2, PORT_WINDOW)
    their_loss, our_loss = theirs(ids, labels=ids, use_cache=False).loss, ours(ids, labels=ids).loss
    assert difference(our_loss, their_loss) <= TOLERANCE
    their_loss.backward()
    our_loss.backward()
    ours = dict(ours.named_parameters())
    for their_name, parameter in theirs.named_parameters():
        assert difference(ours[griffin_name(their_name)].grad, parameter.grad) <= TOLERANCE, their_name


@pytest.mark.parametrize("name", [name for name in MODELS if name != "hawk"])
def test_greedy_generation_with_its_cache(name):
    theirs, ours = make_pair(**MODELS[name])
    ids = tokens(2, 2)
    arguments = {"max_length": PORT_WINDOW + 1, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (model.generate(ids, eos_token_id=None, **arguments) for model in (ours, theirs))
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(torch.stack(found.logits), torch.stack(expected.logits)) <= TOLERANCE


# Where it is wrong


@torch.no_grad()
def test_port_sees_one_key_too_few():
    theirs, ours = make_pair()
    ids = tokens(2, 3 * PORT_WINDOW)
    expected = theirs(ids, use_cache=False).logits
    assert difference(ours(ids).logits, expected) > CLEARLY_DIFFERENT
    config = GriffinConfig.from_recurrent_gemma(theirs.config)
    config.attention_window_size -= 1
    narrowed = GriffinForCausalLM.from_pretrained(None, config=config, state_dict=ours.state_dict())
    assert difference(narrowed(ids).logits, expected) <= TOLERANCE  # and nothing else differs


@torch.no_grad()
def test_port_leaks_between_packed_documents():
    theirs, ours = make_pair(**HAWK)
    ids = tokens(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    alone = ours(ids[:, 5:]).logits
    assert difference(theirs(ids[:, 5:], use_cache=False).logits, alone) <= TOLERANCE
    assert difference(theirs(ids, position_ids=positions, use_cache=False).logits[:, 5:], alone) > CLEARLY_DIFFERENT
    assert difference(ours(ids, position_ids=positions).logits[:, 5:], alone) <= TOLERANCE


@torch.no_grad()
def test_port_reads_left_padding():
    theirs, ours = make_pair()
    ids = tokens(1, 4)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 0, 1, 2, 3]])
    alone = ours(ids).logits
    with_mask = theirs(padded, attention_mask=mask, use_cache=False).logits[:, 2:]
    with_both = theirs(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 2:]
    assert difference(with_mask, alone) > CLEARLY_DIFFERENT and difference(with_both, alone) > CLEARLY_DIFFERENT
    assert difference(ours(padded, attention_mask=mask).logits[:, 2:], alone) <= TOLERANCE


@torch.no_grad()
def test_port_forgets_the_last_chunk_in_its_convolution():
    theirs, ours = make_pair()
    first, second = tokens(1, PORT_WINDOW).split(3, dim=1)
    whole = ours(torch.cat([first, second], dim=1)).logits[:, 3:]

    def second_chunk(model):
        cache = DynamicCache(config=model.config)
        model(first, use_cache=True, past_key_values=cache)
        return model(second, use_cache=True, past_key_values=cache, position_ids=torch.arange(3, 6)[None]).logits

    assert difference(second_chunk(theirs), whole) > CLEARLY_DIFFERENT
    assert difference(second_chunk(ours), whole) <= TOLERANCE


def test_port_does_not_reorder_its_state_for_beams():
    theirs, ours = make_pair()
    arguments = {"max_length": PORT_WINDOW + 1, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 4}

    def scores(model, **kwargs):
        return model.generate(tokens(2, 2), **arguments, **kwargs).sequences_scores

    right = scores(ours, use_cache=False)
    assert difference(scores(theirs, use_cache=False), right) <= TOLERANCE
    assert difference(scores(ours), right) <= TOLERANCE
    assert difference(scores(theirs), right) > 10 * TOLERANCE


def test_port_cannot_generate_with_the_cache_of_a_hawk():
    theirs, ours = make_pair(**HAWK)
    ids = tokens(2, 3)
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    right = theirs.generate(ids, use_cache=False, **arguments)
    assert torch.equal(ours.generate(ids, **arguments), right)
    with pytest.raises(ValueError, match="get_seq_length|attention"):
        theirs.generate(ids, use_cache=True, **arguments)


@torch.no_grad()
def test_port_mixes_two_generations_that_run_in_turn():
    theirs, ours = make_pair()
    rows = tokens(2, PORT_WINDOW).split(1)
    right = ours(rows[0]).logits[:, -1:]

    def in_turn(model):
        """The last logits of the first row."""
        caches = [DynamicCache(config=model.config) for _ in rows]
        for row, cache in zip(rows, caches):
            model(row[:, :3], use_cache=True, past_key_values=cache)
        for t in range(3, PORT_WINDOW):
            position = torch.tensor([[t]])
            logits = [
                model(row[:, t : t + 1], use_cache=True, past_key_values=cache, position_ids=position).logits
                for row, cache in zip(rows, caches)
            ]
        return logits[0]

    assert difference(in_turn(theirs), right) > CLEARLY_DIFFERENT
    assert difference(in_turn(ours), right) <= TOLERANCE


def test_port_starts_its_gates_ten_times_too_small():
    torch.manual_seed(0)
    shapes = {"hidden_size": 256, "lru_width": 256, "num_attention_heads": 2, "num_hidden_layers": 1}
    theirs = RecurrentGemmaForCausalLM(small_recurrent_gemma_config(**shapes))
    ours = GriffinForCausalLM(GriffinConfig.from_recurrent_gemma(theirs.config))
    right = 128**-0.5  # DeepMind's code: variance 1 / block width
    their_gates, our_gates = theirs.model.layers[0].temporal_block.rg_lru, ours.model.layers[0].temporal_block.rg_lru
    for gate in (their_gates.input_gate_weight, their_gates.recurrent_gate_weight):
        assert gate.std().item() == pytest.approx(right / 10, rel=0.05)
    for gate in (our_gates.input_gate.weight, our_gates.recurrence_gate.weight):
        assert gate.std().item() == pytest.approx(right, rel=0.05)
