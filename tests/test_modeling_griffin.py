"""The model classes: attention implementations, heads, losses, dtypes, initial weights, compilation."""

import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_griffin import (
    GriffinForCausalLM,
    GriffinForSequenceClassification,
    GriffinForTokenClassification,
    GriffinModel,
    decay_parameter_names,
)
from tests.tolerances import assert_close


VOCABULARY, WINDOW = 29, 8
KINDS = ("griffin", "hawk")
AUTO_CLASSES = {
    AutoModel: GriffinModel,
    AutoModelForCausalLM: GriffinForCausalLM,
    AutoModelForSequenceClassification: GriffinForSequenceClassification,
    AutoModelForTokenClassification: GriffinForTokenClassification,
}


def random_ids(rows, length):
    return torch.randint(VOCABULARY, (rows, length))


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


def assert_gradients(actual, expected, tolerance="gradient"):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(tolerance, actual[name], expected[name], name)


# Attention


@pytest.mark.parametrize("length", [1, 5, 8, 9, 31])
@pytest.mark.parametrize("key_value_heads", [1, 2])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@torch.no_grad()
def test_eager_is_sdpa(length, key_value_heads, layout, small_model):
    ids = random_ids(2, length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    kwargs = {
        "plain": {},
        "padded": {"attention_mask": mask},
        "packed": {"position_ids": (torch.arange(length) % 6)[None]},
    }[layout]
    logits = [
        small_model(attention=name, num_key_value_heads=key_value_heads)(ids, **kwargs).logits
        for name in ("eager", "sdpa")
    ]
    real = mask.bool() if layout == "padded" else torch.ones_like(mask).bool()
    assert_close("logits", logits[1][real], logits[0][real])


def test_eager_in_float64(small_model):
    """Padding sees nothing: its scores are the lowest numbers there are, which float32 has not."""
    ids, mask = random_ids(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :4], mask[0, 17:] = 0, 0
    losses = {}
    for name in ("eager", "sdpa"):
        model = small_model(attention=name).double()
        logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        losses[name] = logits[mask.bool()].square().sum()
        losses[name].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert abs(losses["eager"] - losses["sdpa"]) <= 1e-5 * losses["sdpa"]


@torch.no_grad()
def test_flex_is_eager(small_model):
    """Padded and packed at once, longer than the window. (On a CPU flex attention has no backward pass.)"""
    ids, mask = random_ids(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :4] = 0
    kwargs = {"attention_mask": mask, "position_ids": ((torch.arange(21) - 4) % 12)[None]}
    eager, flex = (small_model(attention=name)(ids, **kwargs).logits for name in ("eager", "flex_attention"))
    assert_close("logits", flex[mask.bool()], eager[mask.bool()])


@pytest.mark.parametrize("window", [2, 3, 8])
def test_window_counts_the_query_itself(window, small_model):
    """One attention layer: token t sees tokens t - W + 1 to t, and no more."""
    model = small_model(layer_types=["sliding_attention"], attention_window_size=window)
    embeds = torch.randn(1, 12, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, 10].sum(), embeds)
    seen = gradient[0].abs().sum(-1) > 0
    assert seen.tolist() == [10 - window < t <= 10 for t in range(12)]


def test_memory_reaches_past_the_window(small_model):
    """The recurrence sees all tokens before, none after."""
    embeds = torch.randn(1, 3 * WINDOW, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(small_model("griffin")(inputs_embeds=embeds).logits[0, 20].sum(), embeds)
    assert ((gradient[0].abs().sum(-1) > 0) == (torch.arange(3 * WINDOW) <= 20)).all()


@torch.no_grad()
def test_half_of_each_head_is_rotated(small_model):
    model = small_model()
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[0, 3, 100_000]]))
    assert cos.shape == (1, 3, 4)  # head_dim 8
    frequencies = torch.tensor([1.0, 10000.0**-0.5]).repeat(2)
    expected = torch.tensor([0.0, 3.0, 100_000.0])[:, None] * frequencies
    assert_close("rotation", cos[0], expected.cos())
    assert_close("rotation", sin[0], expected.sin())


@torch.no_grad()
def test_rotation_survives_a_cast(small_model):
    """Frequencies rounded to bfloat16 would turn the far end of a window by another angle than in training."""
    model, positions = small_model(head_dim=16), torch.tensor([[1000]])
    expected = model.model.rotary_emb(torch.zeros(1), positions)[0]
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        assert_close("exact", model.to(cast).model.rotary_emb(torch.zeros(1), positions)[0], expected)


@torch.no_grad()
def test_attention_dropout_only_while_training(small_model):
    model, ids = small_model(attention_dropout=0.5), random_ids(1, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# What comes out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_and_attentions(kind, small_model):
    model, ids = small_model(kind), random_ids(2, 11)
    layers = model.config.num_hidden_layers
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == layers + 1
    assert all(hidden.shape == (2, 11, 16) for hidden in output.hidden_states)
    assert_close("exact", output.hidden_states[0], model.get_input_embeddings()(ids))
    assert_close("exact", output.hidden_states[-1], model.model(ids).last_hidden_state)
    assert len(output.attentions) == model.config.layer_types.count("sliding_attention")
    for weights in output.attentions:
        assert weights.shape == (2, 2, 11, 11)
        assert_close("layer", weights.sum(-1), torch.ones(2, 2, 11))
        band = torch.ones(11, 11).tril().triu(1 - WINDOW).bool()
        assert ((weights > 0) == band).all()
    assert_close("exact", model(ids).logits, output.logits)
    assert model(ids).hidden_states is None and model(ids).attentions is None


@torch.no_grad()
def test_return_dict_and_use_cache(small_model):
    model, ids = small_model(), random_ids(1, 5)
    logits, cache = model(ids, return_dict=False)
    assert_close("exact", logits, model(ids).logits)
    assert cache.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None
    assert len(model(ids, use_cache=False, return_dict=False)) == 1
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@torch.no_grad()
def test_logits_to_keep(small_model):
    model, ids = small_model(final_logit_softcapping=3.0), random_ids(2, 9)
    logits = model(ids).logits
    assert_close("layer", model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_close("layer", model(ids, logits_to_keep=4).logits, logits[:, -4:])
    assert_close("layer", model(ids, logits_to_keep=0).logits, logits)
    index = torch.tensor([7, 0, 3])
    assert_close("layer", model(ids, logits_to_keep=index).logits, logits[:, index])


@torch.no_grad()
def test_logits_are_capped(small_model):
    ids = random_ids(1, 9)
    plain, capped = (small_model(final_logit_softcapping=cap)(ids).logits for cap in (None, 2.0))
    assert plain.abs().max() > 2 > capped.abs().max()
    assert_close("logits", capped, 2.0 * torch.tanh(plain / 2.0))


@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_inputs_embeds_are_treated_as_embeddings(scaled, small_model):
    model, ids = small_model(scale_embeddings=scaled, hidden_size=24, num_attention_heads=3), random_ids(1, 9)
    embeds = model.get_input_embeddings()(ids)
    output = model(inputs_embeds=embeds, output_hidden_states=True)
    assert_close("exact", output.logits, model(ids).logits)
    scale = torch.tensor(math.sqrt(24)).bfloat16().float() if scaled else 1.0
    assert scaled == (scale != math.sqrt(24)) or not scaled
    assert_close("exact", output.hidden_states[0], embeds * scale)


def test_tied_embeddings(small_model):
    tied = small_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = small_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCABULARY * 16
    loss = tied(random_ids(1, 9), labels=random_ids(1, 9)).loss
    assert torch.autograd.grad(loss, tied.lm_head.weight)[0].abs().sum(-1).min() > 0  # from both ends


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [20, 40])
def test_resize_token_embeddings(tied, size, small_model):
    model, ids = small_model(tie_word_embeddings=tied), torch.randint(20, (1, 9))
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    output = model(ids, labels=ids)
    kept = min(size, VOCABULARY)
    assert output.logits.shape == (1, 9, size) and output.loss.isfinite()
    assert_close("layer", output.logits[..., :kept], before[..., :kept])
    model(torch.tensor([[size - 1]]))


def test_input_gradient_of_the_padding_token(small_model):
    """pad_token_id is often the end-of-text token: its embedding learns as any other."""
    model = small_model(pad_token_id=3)
    (gradient,) = torch.autograd.grad(
        model(torch.tensor([[3, 1]])).logits[0, 0].sum(), model.get_input_embeddings().weight
    )
    assert gradient[3].abs().min() > 0


# Loss


def test_loss(small_model):
    model, ids = small_model(), random_ids(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = -100
    logits = model(ids).logits
    flat = logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
    mean = torch.nn.functional.cross_entropy(*flat)
    total = torch.nn.functional.cross_entropy(*flat, reduction="sum")
    assert_close("loss", model(ids, labels=labels).loss, mean)
    assert_close("loss", model(ids, labels=labels, num_items_in_batch=50).loss, total / 50)
    assert_close("loss", model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, total / 50)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert_close("loss", model(ids, labels=labels, shift_labels=shifted).loss, mean)
    # shift_labels win: the last token of a shard predicts the first one of the next
    shifted = shifted.clone()
    shifted[:, -1] = 5
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), shifted.reshape(-1))
    assert_close("loss", model(ids, labels=labels, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize(
    "problem, labels",
    [
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
        ("regression", torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, 1.0]])),
    ],
)
def test_sequence_classification(problem, labels, small_model):
    model = small_model(cls=GriffinForSequenceClassification, num_labels=3, problem_type=problem, pad_token_id=0)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    output = model(ids, labels=labels)  # the last token that is not the padding token
    hidden = [model.model(ids[:1]).last_hidden_state[0, -1], model.model(ids[1:, :2]).last_hidden_state[0, -1]]
    logits = torch.stack(hidden) @ model.score.weight.T
    assert_close("logits", output.logits, logits)
    losses = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }
    assert_close("loss", output.loss, losses[problem](logits, labels))
    assert gradients(model, output.loss)["score.weight"].abs().min() > 0


def test_sequence_classification_needs_to_know_the_last_token(small_model):
    model = small_model(cls=GriffinForSequenceClassification)
    with pytest.raises(ValueError, match="pad_token_id"):
        model(random_ids(2, 5))
    ids = random_ids(2, 5)
    assert_close("exact", model(ids[:1]).logits, model(ids[:1], attention_mask=torch.ones(1, 5)).logits)
    embeds = model.get_input_embeddings()(ids)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    assert_close("exact", model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    assert_close("logits", expected[:1], model(ids[:1, :1]).logits)


def test_token_classification(small_model):
    model, ids = small_model(cls=GriffinForTokenClassification, num_labels=3), random_ids(2, 5)
    labels = torch.randint(3, (2, 5))
    labels[0, 2:] = -100
    output = model(ids, labels=labels)
    logits = model.model(ids).last_hidden_state @ model.score.weight.T + model.score.bias
    assert_close("layer", output.logits, logits)
    assert_close("loss", output.loss, torch.nn.functional.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1)))


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "cls",
    [GriffinForCausalLM, GriffinForSequenceClassification, GriffinForTokenClassification],
    ids=lambda c: c.__name__,
)
def test_gradient_accumulation_in_the_stock_trainer(cls, small_model, tmp_path):
    """Four steps of one row are one step of four rows."""
    rows = [{"input_ids": random_ids(1, 6)[0], "attention_mask": torch.ones(6, dtype=torch.long)} for _ in range(4)]
    for index, row in enumerate(rows):
        labels = torch.tensor(index % 2) if cls is GriffinForSequenceClassification else row["input_ids"] % 2
        row["labels"] = labels
    results = []
    for batch, steps in ((4, 1), (1, 4)):
        keep = KeepGradients()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        Trainer(small_model(cls=cls, num_labels=2), arguments, train_dataset=rows, callbacks=[keep]).train()
        results.append(keep.gradients)
    assert_gradients(results[1], results[0])


# Training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant, small_model):
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    results = []
    for checkpointing in (False, True):
        model = small_model(kind, "sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_gradients(results[1], results[0], "exact")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind, small_model):
    model, ids = small_model(kind), random_ids(2, 13)
    for name, gradient in gradients(model, model(ids, labels=ids).loss).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_decay_parameter_names(small_model):
    names = decay_parameter_names(small_model())
    decayed = {name.split(".", 3)[-1] for name in names if "layers" in name}
    linears = ("linear_x", "linear_y", "linear_out", "q_proj", "k_proj", "v_proj", "o_proj")
    expected = {f"temporal_block.{name}.weight" for name in (*linears, "conv_1d")}
    assert decayed == expected | {f"mlp_block.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert [name for name in names if "layers" not in name] == ["lm_head.weight"]
    assert set(names) <= {name for name, _ in small_model().named_parameters()}
    assert not any(
        "embed" in name or "lm_head" in name for name in decay_parameter_names(small_model(tie_word_embeddings=True))
    )


def test_stock_trainer_does_not_decay_lambda(small_model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(small_model(), arguments)
    names = trainer.get_decay_parameter_names(trainer.model)
    assert "lm_head.weight" in names
    assert not any("lambda" in name or "norm" in name or name.endswith("bias") for name in names)


# Dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind, dtype, small_model):
    """Near the float32 model with the same (rounded) weights; gradients finite, Λ's in float32."""
    model, ids = small_model(kind, "sdpa"), random_ids(2, 13)
    lambdas = {name: p.detach().clone() for name, p in model.named_parameters() if "lambda" in name}
    half = small_model(kind, "sdpa").to(dtype)
    for name, parameter in half.named_parameters():
        if name in lambdas:
            parameter.data = lambdas[name]
    model.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    output = half(ids, labels=ids)
    assert output.logits.dtype == dtype
    assert_close(f"{str(dtype).split('.')[1]} logits", output.logits, model(ids).logits)
    for name, gradient in gradients(half, output.loss).items():
        assert gradient.isfinite().all() and gradient.dtype == (torch.float32 if "lambda" in name else dtype)


def test_autocast(small_model):
    model, ids = small_model(attention="sdpa"), random_ids(2, 13)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
        cache = model(ids[:, :6], use_cache=True).past_key_values
        continued = model(ids[:, 6:], past_key_values=cache).logits
    assert_close("bfloat16 logits", output.logits, expected)
    assert_close("bfloat16 logits", continued, expected[:, 6:])
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers[:2])
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, output.loss).values())


@torch.no_grad()
def test_norm_is_float32_inside(small_model):
    norm = small_model().model.final_norm
    x = torch.randn(3, 16) * 1e3
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    assert_close("layer", norm(x), expected)
    assert_close("float16 logits", norm(x.half() * 10), expected)  # its squares overflow float16


# Initial weights

VARIANCES = {
    "embed_tokens.weight": lambda c: 1 / c.hidden_size,
    "linear_x.weight": lambda c: 1 / c.hidden_size,
    "linear_y.weight": lambda c: 1 / c.hidden_size,
    "linear_out.weight": lambda c: 2 / c.num_hidden_layers / c.lru_width,
    "conv_1d.weight": lambda c: 0.01 / c.conv1d_width,
    "input_gate.weight": lambda c: c.num_gate_blocks / c.lru_width,
    "recurrence_gate.weight": lambda c: c.num_gate_blocks / c.lru_width,
    "q_proj.weight": lambda c: 1 / c.hidden_size,
    "k_proj.weight": lambda c: 1 / c.hidden_size,
    "v_proj.weight": lambda c: 1 / c.hidden_size,
    "o_proj.weight": lambda c: 2 / c.num_hidden_layers / (c.num_attention_heads * c.head_dim),
    "gate_proj.weight": lambda c: 1 / c.hidden_size,
    "up_proj.weight": lambda c: 1 / c.hidden_size,
    "down_proj.weight": lambda c: 2 / c.num_hidden_layers / c.intermediate_size,
    "lm_head.weight": lambda c: 1 / c.hidden_size,
    "score.weight": lambda c: 1 / c.hidden_size,
}


def assert_initial_weights(model):
    """Mean 0 and DeepMind's variance within 5 standard errors for each group of weights; norms and biases 0."""
    groups = {}
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            continue
        if name.endswith("bias") or "norm" in name:
            assert (parameter == 0).all(), name
            continue
        groups.setdefault(".".join(name.split(".")[-2:]), []).append(parameter.detach().double().flatten())
    for group, parts in groups.items():
        values, variance = torch.cat(parts), VARIANCES[group](model.config)
        count = len(values)
        assert abs(values.mean()) < 5 * (variance / count) ** 0.5, group
        assert abs(values.var() / variance - 1) < 5 * (2 / count) ** 0.5 + 1e-3 * (model.dtype != torch.float32), group
        assert abs((values**4).mean() / (3 * variance**2) - 1) < 5 * (96 / 9 / count) ** 0.5 + 0.01, group  # normal
    return set(groups)


@pytest.fixture
def medium_config(small_config):
    """Wide enough for statistics, and no two widths the same."""
    return lambda **fields: small_config(
        vocab_size=307,
        hidden_size=64,
        intermediate_size=96,
        lru_width=80,
        num_gate_blocks=5,
        num_attention_heads=3,
        head_dim=16,
        layer_types=["linear_attention", "sliding_attention"] * 3,
        conv1d_width=5,
        **fields,
    )


@pytest.mark.parametrize("cls", AUTO_CLASSES.values(), ids=lambda cls: cls.__name__)
def test_initial_weights(cls, medium_config):
    groups = assert_initial_weights(cls(medium_config(tie_word_embeddings=cls is not GriffinForCausalLM)))
    assert len(groups) == 14 + (cls is not GriffinModel)


@pytest.mark.parametrize("how", ["bfloat16", "meta", "meta bfloat16"])
def test_initial_weights_made_otherwise(how, medium_config):
    config = medium_config()
    if how == "bfloat16":
        model = GriffinForCausalLM._from_config(config, dtype=torch.bfloat16)
    else:
        with torch.device("meta"):
            model = GriffinForCausalLM(config)
        model = model.to_empty(device="cpu")
        if "bfloat16" in how:
            model = model.to(torch.bfloat16)
        model.init_weights()
    assert_initial_weights(model)
    cos, _ = model.model.rotary_emb(torch.zeros(1), torch.tensor([[1000]]))
    expected = (1000 * 10000 ** -(torch.arange(4.0) / 4)).cos().repeat(2)
    assert_close("rotation", cos[0, 0], expected)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda cls: cls.__name__)
def test_auto_classes(auto_class, small_config):
    assert type(auto_class.from_config(small_config())) is AUTO_CLASSES[auto_class]


# Compilation and transforms


@pytest.mark.parametrize("kind, length, use_cache, padded", [("griffin", 9, True, True), ("hawk", 5, False, False)])
def test_compiles_without_a_graph_break(kind, length, use_cache, padded, small_model):
    torch._dynamo.reset()
    model, ids = small_model(kind, "sdpa"), random_ids(2, length)
    kwargs, labels = {}, ids
    if padded:  # and packed
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        position_ids = torch.tensor([[0, 0, 0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0, 1, 2]])
        kwargs, labels = (
            {"attention_mask": mask, "position_ids": position_ids},
            ids.masked_fill(position_ids == 0, -100),
        )
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(
        ids, labels=labels, use_cache=use_cache, **kwargs
    )
    expected = model(ids, labels=labels, use_cache=use_cache, **kwargs)
    assert_close("loss", actual.loss, expected.loss)
    assert_gradients(gradients(model, actual.loss), gradients(model, expected.loss))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_with_inductor(kind, small_model):
    """The default backend, forward and backward; on a CPU it takes a minute of C++ compilation."""
    torch._dynamo.reset()
    model, ids = small_model(kind, "sdpa").cuda(), random_ids(2, 65).cuda()
    loss = torch.compile(model, fullgraph=True)(ids, labels=ids).loss
    expected = model(ids, labels=ids).loss
    assert_close("loss", loss, expected)
    assert_gradients(gradients(model, loss), gradients(model, expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind, small_model):
    """Gradients as a function of the parameters, and one gradient for each row of a batch."""
    model, ids = small_model(kind), random_ids(3, 9)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],), {"use_cache": False}).logits.sin().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for row in range(3):
        expected = gradients(model, model(ids[row : row + 1], use_cache=False).logits.sin().sum())
        assert_gradients({name: gradient[row] for name, gradient in each.items()}, expected)
        assert_gradients(torch.func.grad(loss)(parameters, ids[row]), expected)


def test_norms_of_another_copy_of_the_code_do_not_decay():
    """A model loaded from the Hub has classes of its own, under the same names."""
    copy = type("GriffinRMSNorm", (torch.nn.Module,), {})()
    copy.weight = torch.nn.Parameter(torch.zeros(3))
    model = torch.nn.ModuleDict({"norm": copy, "linear": torch.nn.Linear(3, 3)})
    assert decay_parameter_names(model) == ["linear.weight"]
