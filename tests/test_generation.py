"""Every way to generate, judged by plain forward passes without a cache: searches by hand, rows alone, all outputs."""

import inspect

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer


KINDS = ["griffin", "hawk"]
TOLERANCE = 2e-5  # of the largest number compared
PROMPT, NEW = 5, 12  # tokens; together past the window
EOS = 3


def random_ids(batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(5, 29, (batch, length), generator=torch.Generator().manual_seed(2))


def generate(model, ids, **kwargs):
    torch.manual_seed(3)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**defaults, **kwargs})


def plain_logits(model, sequences: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) without a cache."""
    with torch.no_grad():
        return model(sequences, use_cache=False).logits


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= TOLERANCE * other.abs().max()


def beam_search_by_hand(model, ids, beams: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `beams` best continuations of one prompt, and the mean log-probability of their tokens."""
    sequences, scores = ids, torch.zeros(1)
    for _ in range(new):
        candidates = scores[:, None] + plain_logits(model, sequences)[:, -1].log_softmax(-1)
        scores, index = candidates.flatten().topk(beams)
        rows, tokens = index // candidates.shape[1], index % candidates.shape[1]
        sequences = torch.cat([sequences[rows], tokens[:, None]], dim=1)
    return sequences, scores / new


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search(kind, cache, small_model):
    model, ids = small_model(kind), random_ids(2)
    kwargs = {} if cache == "dynamic" else {"cache_implementation": "static"}
    kwargs |= {"num_beams": 4, "num_return_sequences": 4, "return_dict_in_generate": True, "output_scores": True}
    found = generate(model, ids, **kwargs)
    for row, (sequences, scores) in enumerate(zip(found.sequences.split(4), found.sequences_scores.split(4))):
        expected, expected_scores = beam_search_by_hand(model, ids[row : row + 1], 4, NEW)
        assert torch.equal(sequences, expected)
        assert_close(scores, expected_scores)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_a_left_padded_row_are_those_of_the_row_alone(kind, small_model):
    model, ids = small_model(kind), random_ids(2)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    found = generate(model, ids, attention_mask=mask, num_beams=3)
    assert torch.equal(found[:1, PROMPT:], generate(model, ids[:1, 3:], num_beams=3)[:, 2:])
    assert torch.equal(found[1:], generate(model, ids[1:], num_beams=3))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_from_the_models_own_distribution(kind, num_beams, small_model):
    """Each token's warped scores are those of a plain forward pass, and the draw is reproducible under a seed."""
    model, ids = small_model(kind), random_ids(2)
    kwargs = {"do_sample": True, "temperature": 0.8, "top_k": 10, "num_beams": num_beams}
    found = generate(model, ids, return_dict_in_generate=True, output_logits=True, **kwargs)
    assert torch.equal(found.sequences, generate(model, ids, **kwargs))
    assert torch.equal(found.sequences, generate(model, ids, use_cache=False, **kwargs))
    if num_beams == 1:
        expected = plain_logits(model, found.sequences)[:, PROMPT - 1 : -1]
        assert_close(torch.stack(found.logits, dim=1), expected)
        kept = expected.topk(10, dim=-1).indices
        assert (kept == found.sequences[:, PROMPT:, None]).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_output(kind, small_model):
    model, ids = small_model(kind), random_ids(2)
    options = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    found = generate(model, ids, **dict.fromkeys(options, True))
    config, layers = model.config, model.config.num_hidden_layers
    attentions = config.layer_types.count("sliding_attention")
    assert found.sequences.shape == (2, PROMPT + NEW)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == len(found.attentions) == NEW
    assert {score.shape for score in (*found.scores, *found.logits)} == {(2, config.vocab_size)}
    for step, (hidden, weights) in enumerate(zip(found.hidden_states, found.attentions)):
        tokens = PROMPT if step == 0 else 1
        assert [tuple(h.shape) for h in hidden] == [(2, tokens, config.hidden_size)] * (layers + 1)
        assert len(weights) == attentions
        assert all(w.shape[:3] == (2, config.num_attention_heads, tokens) for w in weights)
        assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in weights)
    with torch.no_grad():
        plain = model(found.sequences, use_cache=False, output_hidden_states=True)
    assert_close(torch.stack(found.logits, dim=1), plain.logits[:, PROMPT - 1 : -1])
    for layer in range(layers + 1):
        ours = torch.cat([hidden[layer] for hidden in found.hidden_states], dim=1)
        assert_close(ours, plain.hidden_states[layer][:, :-1])
    scores = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    expected = plain.logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(2, found.sequences[:, PROMPT:, None])
    assert_close(scores, expected[..., 0])
    assert isinstance(found.past_key_values, DynamicCache)


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_of_beam_search(kind, small_model):
    model, ids = small_model(kind), random_ids(2)
    options = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    found = generate(model, ids, num_beams=3, **dict.fromkeys(options, True))
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == len(found.attentions) == NEW
    assert {score.shape for score in (*found.scores, *found.logits)} == {(6, model.config.vocab_size)}
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    assert_close(scores.sum(-1) / NEW, found.sequences_scores)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_early_do_not_disturb_the_others(kind, small_model):
    model, ids = small_model(kind), random_ids(4)
    alone = [generate(model, row[None], eos_token_id=None)[0] for row in ids]
    eos = alone[0][PROMPT + 2].item()
    found = generate(model, ids, eos_token_id=eos)
    for row, whole in zip(found, alone):
        ends = (whole[PROMPT:] == eos).nonzero()
        length = PROMPT + (ends[0].item() + 1 if len(ends) else NEW)
        assert torch.equal(row[:length], whole[:length])
        assert (row[length:] == 0).all()
    longer = generate(model, ids[:1], eos_token_id=eos, min_new_tokens=8)
    assert longer.shape[1] >= PROMPT + 8 and eos not in longer[0, PROMPT : PROMPT + 8]


@pytest.mark.parametrize("kind", KINDS)
def test_continue_from_the_cache_of_a_forward_pass(kind, small_model):
    """As a shared system prompt: one prefill, its cache handed to generate."""
    model, ids = small_model(kind), random_ids(2, 11)
    expected = generate(model, ids)
    with torch.no_grad():
        cache = model(ids[:, :7]).past_key_values
    tokens = ids
    for t in range(NEW):  # by forward passes, which works for both kinds
        with torch.no_grad():
            output = model(tokens[:, 7 + (t > 0) * (4 + t - 1) :], past_key_values=cache)
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)
    if kind == "griffin":
        with torch.no_grad():
            cache = model(ids[:, :7]).past_key_values
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_from_embeddings_with_and_without_ids(kind, small_model):
    model, ids = small_model(kind), random_ids(2)
    embeds, expected = model.get_input_embeddings()(ids), generate(model, ids)
    assert torch.equal(generate(model, ids, inputs_embeds=embeds), expected)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), expected[:, PROMPT:])
    beams = generate(model, ids, num_beams=3)[:, PROMPT:]
    assert torch.equal(generate(model, None, inputs_embeds=embeds, num_beams=3), beams)


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_first_token_alone(kind, small_model):
    model = small_model(kind, bos_token_id=1)
    assert torch.equal(generate(model, None), generate(model, torch.tensor([[1]])))


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class Forbid(LogitsProcessor):
    """Removes one token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize("kind", KINDS)
def test_streamer_and_logits_processor(kind, small_model):
    model, ids, streamer = small_model(kind), random_ids(1), Recorder()
    found = generate(model, ids, streamer=streamer)
    assert streamer.ended and streamer.tokens == found[0].tolist()
    forbidden = found[0, PROMPT].item()
    other = generate(model, ids, logits_processor=LogitsProcessorList([Forbid(forbidden)]))
    assert forbidden not in other[0, PROMPT:].tolist()


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}],
    ids=["contrastive", "group beam"],
)
def test_searches_that_transformers_moved_to_the_hub_are_refused(options, small_model):
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(small_model(), random_ids(1), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_a_cache_is_refused(kind, small_model):
    cache = small_model(kind)(random_ids(1)).past_key_values
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        cache.crop(2)


def test_compiled_generation_with_a_static_cache(small_model):
    """100 steps over the edge of the window, no graph break, three graphs, and none for the next prompt.

    The stock attention layer of a static cache counts its tokens in a Python integer too: PyTorch compiles for its
    first value, for any value while the window fills, and for a full window. PyTorch 2.9 guards the addresses of a
    static cache (pytorch#162208), which is made anew for each prompt: the last two are then compiled again.
    """
    guards_addresses = inspect.signature(torch._dynamo.mark_static_address).parameters["guard"].default
    model, ids = small_model("attention_first", "sdpa"), random_ids(2)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    compile_config = CompileConfig(backend="eager", fullgraph=True)
    compile_config._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": compile_config, "max_new_tokens": 100}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for prompt, graphs in ((ids, 3), (ids.flip(1), 5 if guards_addresses else 3)):
        expected = generate(model, prompt, attention_mask=mask, max_new_tokens=100)
        assert torch.equal(generate(model, prompt, attention_mask=mask, **kwargs), expected)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_compiled_forward_pass(small_model):
    model, ids = small_model(attention="sdpa"), random_ids(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def letters() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(ord("a") + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left")


@pytest.mark.parametrize("kind", KINDS)
def test_text_generation_pipeline_batches_exactly(kind, small_model):
    generator = pipeline("text-generation", model=small_model(kind), tokenizer=letters())
    prompts = ["a b c", "d", "e f g h i j k l m n o p"]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = [each[0]["generated_text"] for each in generator(prompts, batch_size=3, **kwargs)]
    alone = [generator(prompt, **kwargs)[0]["generated_text"] for prompt in prompts]
    assert together == alone and all(text for text in together)
