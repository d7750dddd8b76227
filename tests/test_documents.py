"""Padding, packing and chunking are exact: a document gives the numbers it gives alone, and so do its gradients."""

import random
from dataclasses import dataclass

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from modeling_griffin import GriffinForSequenceClassification, GriffinForTokenClassification
from tests.tolerances import assert_close


VOCABULARY, WINDOW = 29, 8
KINDS = ("griffin", "hawk", "attention", "attention_first")


@dataclass
class Layout:
    """A batch of rows of documents and padding. documents: (row, slots of its tokens), in order."""

    ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    seq_idx: torch.Tensor
    documents: list[tuple[int, list[int]]]

    def alone(self, index):
        row, slots = self.documents[index]
        return self.ids[row, slots][None]

    def cu_seq_lens(self):
        ends = [slots[-1] + 1 for _, slots in self.documents]
        return torch.tensor([0, *ends], dtype=torch.int32)


def random_layout(rng, rows, length, packed=True, padding="none", interior_limit=None):
    """padding: none, left, right, both or interior; interior padding only in the last `interior_limit` slots."""
    layout = Layout(
        torch.tensor([[rng.randrange(VOCABULARY) for _ in range(length)] for _ in range(rows)]),
        torch.zeros(rows, length, dtype=torch.long),
        torch.zeros(rows, length, dtype=torch.long),
        torch.zeros(rows, length, dtype=torch.long),
        [],
    )
    for row in range(rows):
        first = rng.randint(0, length) if padding in ("left", "both") else 0
        last = rng.randint(first, length) if padding in ("right", "both") else length
        slots = list(range(first, last))
        if padding == "interior":
            slots = [slot for slot in slots[-(interior_limit or length) :] if rng.random() < 0.6]
        layout.mask[row, slots] = 1
        number = 0
        while slots:
            size = rng.choice([1, 1, 2, 3, 5, 12]) if packed else len(slots)
            document, slots = slots[:size], slots[size:]
            layout.documents.append((row, document))
            layout.seq_idx[row, document[0] :] = number
            for position, slot in enumerate(document):
                layout.position_ids[row, slot] = position
            number += 1
        for slot in range(length):
            if not layout.mask[row, slot]:  # whatever stands at padding
                layout.position_ids[row, slot] = rng.choice([0, 1, 7])
    return layout


def arguments(layout, style):
    """How a caller hands the layout over: by position_ids, seq_idx, cu_seq_lens_q, or the mask alone."""
    padded = bool((layout.mask == 0).any())
    kwargs = {"attention_mask": layout.mask} if padded or style == "mask" else {}
    if style == "position_ids":
        kwargs["position_ids"] = layout.position_ids
    elif style == "seq_idx":
        kwargs["seq_idx"] = layout.seq_idx
    elif style == "cu_seq_lens_q":
        kwargs["cu_seq_lens_q"] = layout.cu_seq_lens()
    return kwargs


def run_in_chunks(model, layout, kwargs, chunks, cache, **more):
    outputs, begin = [], 0
    for size in chunks:
        part = dict(kwargs)
        if len(chunks) > 1:
            part = {name: value[:, begin * (name != "attention_mask") : begin + size] for name, value in kwargs.items()}
        output = model(layout.ids[:, begin : begin + size], past_key_values=cache, use_cache=True, **part, **more)
        cache = output.past_key_values
        outputs.append(output.logits)
        begin += size
    return torch.cat(outputs, dim=1)


def assert_documents_as_alone(model, layout, logits):
    assert logits.isfinite().all()
    for index, (row, slots) in enumerate(layout.documents):
        assert_close(
            "logits", logits[row, slots], model(layout.alone(index), use_cache=False).logits[0], f"{row} {slots}"
        )


def random_chunks(rng, length):
    chunks = []
    while length:
        chunks.append(min(length, rng.choice([1, 1, 2, 3, length])))
        length -= chunks[-1]
    return chunks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_random_layouts(kind, taps, attention, small_model):
    """Rows, padding, documents, ways to say so, caches and chunk sizes at random, each against the documents alone."""
    rng = random.Random(f"{kind} {taps} {attention}")
    model = small_model(kind, attention, conv1d_width=taps)
    for _ in range(12):
        style = rng.choice(["mask", "position_ids", "position_ids", "seq_idx", "cu_seq_lens_q"])
        rows = 1 if style == "cu_seq_lens_q" else rng.choice([1, 2, 3])
        paddings = ["none"] if style == "cu_seq_lens_q" else ["none", "left", "right", "both", "interior"]
        length = rng.choice([1, 2, 3, 5, 9, 14, 23])
        limit = None if kind == "hawk" else WINDOW
        layout = random_layout(rng, rows, length, style != "mask", rng.choice(paddings), limit)
        kwargs = arguments(layout, style)
        if rng.random() < 0.3:
            logits = model(layout.ids, use_cache=False, **kwargs).logits
        else:
            chunks = [length] if style in ("seq_idx", "cu_seq_lens_q") else random_chunks(rng, length)
            static = StaticCache(config=model.config, max_cache_len=length + rng.choice([0, 3]))
            cache = rng.choice([None, DynamicCache(config=model.config), static])
            logits = run_in_chunks(model, layout, kwargs, chunks, cache)
        assert_documents_as_alone(model, layout, logits)


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "both", "interior"])
@pytest.mark.parametrize("style", ["position_ids", "seq_idx"])
def test_gradients_of_random_layouts(kind, padding, style, small_model):
    """The gradient of a batch is the sum of the gradients of its documents alone, for weights and for embeddings."""
    rng = random.Random(f"{kind} {padding} {style}")
    model = small_model(kind, "sdpa")
    parameters = dict(model.named_parameters())
    for use_cache in (False, True):
        layout = random_layout(rng, 2, 19, True, padding, None if kind == "hawk" else WINDOW)
        embeds = torch.randn(2, 19, 16, requires_grad=True)
        upstream = torch.randn(2, 19, VOCABULARY) * layout.mask[..., None]
        logits = model(inputs_embeds=embeds, use_cache=use_cache, **arguments(layout, style)).logits
        wanted = [embeds, *(p for name, p in parameters.items() if "embed" not in name)]
        packed = torch.autograd.grad((logits * upstream).sum(), wanted)
        assert (packed[0][layout.mask == 0] == 0).all()
        loss = sum(
            (model(inputs_embeds=embeds[row, slots][None], use_cache=False).logits[0] * upstream[row, slots]).sum()
            for row, slots in layout.documents
        )
        for actual, expected in zip(packed, torch.autograd.grad(loss, wanted), strict=True):
            assert_close("gradient", actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_a_boundary(kind, small_model):
    model = small_model(kind)
    embeds = torch.randn(1, 12, 16, requires_grad=True)
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]])
    logits = model(inputs_embeds=embeds, position_ids=position_ids).logits
    for first, end in ((0, 3), (3, 4), (4, 9), (9, 12)):
        (gradient,) = torch.autograd.grad(logits[0, first:end].sin().sum(), embeds, retain_graph=True)
        assert (gradient[0, first:end] != 0).all()
        assert (gradient[0, :first] == 0).all() and (gradient[0, end:] == 0).all()
    (gradient,) = torch.autograd.grad(logits[0, 8].sin().sum(), embeds)
    assert (gradient[0, 4:9] != 0).all()  # within the document it does reach back


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_stands_at_padding_does_not_matter(kind, side, small_model):
    """Bit for bit, whatever the pad tokens and their positions are."""
    model, rng = small_model(kind), random.Random(3)
    layout = random_layout(rng, 3, 14, False, side)
    real = layout.mask.bool()
    results = []
    for token in (0, 5, VOCABULARY - 1):
        ids = torch.where(real, layout.ids, token)
        results.append(model(ids, attention_mask=layout.mask).logits[real])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@torch.no_grad()
def test_a_row_of_padding_only(kind, small_model):
    model = small_model(kind)
    ids, mask = torch.randint(VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert_close("logits", logits[1:], model(ids[1:]).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32], ids=str)
@torch.no_grad()
def test_mask_of_any_dtype(dtype, small_model):
    model, ids = small_model(), torch.randint(VOCABULARY, (1, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    assert_close("logits", model(ids, attention_mask=mask.to(dtype)).logits[:, 2:], model(ids[:, 2:]).logits)


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [3, 1, 4, 2], [20, 1, 11]])
def test_flattened_documents_of_the_stock_collator(kind, sizes, small_model):
    """DataCollatorWithFlattening with everything it can return: the loss is the mean over the documents' tokens."""
    model = small_model(kind, "sdpa")
    documents = [torch.randint(VOCABULARY, (size,)).tolist() for size in sizes]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": document} for document in documents])
    assert {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"} <= set(batch)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    alone = [model(torch.tensor([document])).logits[0] for document in documents]
    assert_close("logits", logits, torch.cat(alone))
    if max(sizes) > 1:
        losses = [
            torch.nn.functional.cross_entropy(one[:-1], torch.tensor(document[1:]), reduction="sum")
            for one, document in zip(alone, documents)
            if len(document) > 1
        ]
        expected = sum(losses) / sum(size - 1 for size in sizes)
        loss = model(**batch).loss
        assert_close("loss", loss, expected)
        parameters = list(model.parameters())
        gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
        for actual, wanted in gradients:
            assert_close("gradient", actual, wanted)


@torch.no_grad()
def test_a_mask_of_ones_and_a_cache_do_not_hide_the_packing(small_model):
    """Stock masks ignore position_ids in both cases."""
    model, ids = small_model(), torch.randint(VOCABULARY, (1, 7))
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    alone = model(ids[:, 4:]).logits
    for kwargs in ({}, {"attention_mask": torch.ones(1, 7)}, {"use_cache": False}):
        assert_close("logits", model(ids, position_ids=position_ids, **kwargs).logits[:, 4:], alone)


@torch.no_grad()
def test_positions_may_start_anywhere_and_have_any_batch_shape(small_model):
    """Rotary attention sees differences only, and the first token of a row starts a document whatever its position."""
    model, ids = small_model(), torch.randint(VOCABULARY, (2, 11))
    expected = model(ids).logits
    for position_ids in (torch.arange(11), torch.arange(11)[None], torch.arange(11).expand(2, -1)):
        assert_close("exact", model(ids, position_ids=position_ids).logits, expected)
    assert_close("logits", model(ids, position_ids=torch.arange(5, 16)[None]).logits, expected)


BAD_LAYOUTS = {
    "4-D mask": ({"attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask has shape"),
    "3-D mask": ({"attention_mask": torch.ones(2, 9, 9)}, "attention_mask has shape"),
    "narrow mask": ({"attention_mask": torch.ones(2, 8)}, "attention_mask has shape"),
    "wide mask": ({"attention_mask": torch.ones(2, 10)}, "attention_mask has shape"),
    "mask of another batch": ({"attention_mask": torch.ones(3, 9)}, "attention_mask has shape"),
    "narrow position_ids": ({"position_ids": torch.arange(8)[None]}, "position_ids has shape"),
    "seq_idx of another shape": ({"seq_idx": torch.zeros(2, 8, dtype=torch.long)}, "seq_idx has shape"),
    "cu_seq_lens_q of two rows": ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q"),
    "contradiction": (
        {"position_ids": torch.arange(9)[None], "seq_idx": torch.tensor([[0] * 4 + [1] * 5] * 2)},
        "position_ids contradict",
    ),
    "no tokens": ({"input_ids": None}, "input_ids and inputs_embeds"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(2, 9, 16)}, "input_ids and inputs_embeds"),
}


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_what_cannot_be_honoured_raises(kind, case, small_model):
    kwargs, message = BAD_LAYOUTS[case]
    with pytest.raises(ValueError, match=f"{message}.*allowed"):
        small_model(kind)(**({"input_ids": torch.zeros(2, 9, dtype=torch.long)} | kwargs))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_minus_100_and_padding_train_nothing(side, small_model):
    """The gradient of a padded batch with masked labels is that of the rows alone."""
    model = small_model("griffin", "sdpa")
    layout = random_layout(random.Random(5), 3, 14, False, side)
    labels = torch.where(layout.mask.bool(), layout.ids, -100)
    labels[:, 4:6] = -100
    for row, slots in layout.documents:
        labels[row, slots[0]] = -100  # stock losses let the padding to its left predict it
    parameters = list(model.parameters())
    loss = model(layout.ids, attention_mask=layout.mask, labels=labels, num_items_in_batch=7).loss
    alone = sum(
        model(layout.alone(i), labels=labels[row, slots][None], num_items_in_batch=7).loss
        for i, (row, slots) in enumerate(layout.documents)
    )
    assert_close("loss", loss, alone)
    for actual, expected in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(alone, parameters)):
        assert_close("gradient", actual, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classification_of_padded_rows(side, small_model):
    layout = random_layout(random.Random(2), 4, 14, False, side)
    layout.mask[:, 7] = 1
    layout.documents = [(row, layout.mask[row].nonzero()[:, 0].tolist()) for row in range(4)]
    layout.mask = torch.zeros_like(layout.mask)
    for row, slots in layout.documents:
        layout.mask[row, slots] = 1
    sequences = small_model(cls=GriffinForSequenceClassification, num_labels=3)
    tokens = small_model(cls=GriffinForTokenClassification, num_labels=3)
    pooled, each = (model(layout.ids, attention_mask=layout.mask).logits for model in (sequences, tokens))
    for index, (row, slots) in enumerate(layout.documents):
        assert_close("logits", pooled[row], sequences(layout.alone(index)).logits[0])
        assert_close("logits", each[row, slots], tokens(layout.alone(index)).logits[0])


@pytest.mark.parametrize("offsets", [[0, 3], [2, 10], [0, 8, 3, 10], [0, 3, 40], [[0, 8, 10]]])
def test_offsets_that_are_no_packing_raise(offsets, small_model):
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        small_model()(torch.ones(1, 10, dtype=torch.long), cu_seq_lens_q=torch.tensor(offsets))


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (3,)])
def test_inputs_of_another_shape_raise(shape, small_model):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds has shape"):
        small_model()(torch.zeros(shape, dtype=torch.long))
