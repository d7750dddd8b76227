"""Recorded training: the losses and gradients of plain steps, whatever the rows look like and whatever changes.

On a CPU a "graph" is the same functions called again, which write into the same tensors: all but CUDA's own part runs.
On a GPU the same tests record graphs.
"""

import pytest
import torch
import transformers

from modeling_griffin import GriffinForCausalLM, record_training, stop_recording
from modeling_griffin.training.record import RecordedTrainingStep, TrainingRecorder
from tests.conftest import make_audible, make_config
from tests.tolerances import assert_close


VOCABULARY = 29
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(TrainingRecorder, "can_record_on_a_cpu", True)


@pytest.fixture
def recordings(monkeypatch):
    """Shapes in the order in which they were recorded."""
    seen, record = [], RecordedTrainingStep._record

    def counted(step, model):
        seen.append(tuple(step.batch.input_ids.shape))
        record(step, model)

    monkeypatch.setattr(RecordedTrainingStep, "_record", counted)
    return seen


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_griffin.training.record.logger.warning_once", messages.append)
    return messages


def make_model(device="cpu", kind="griffin", **fields):
    return make_audible(GriffinForCausalLM(make_config(kind, **fields))).train().to(device)


def rows(device, batch=2, length=21, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).to(device)


def batches(device):
    ids = rows(device)
    mask = torch.ones_like(ids)
    mask[0, 15:], mask[1, 9:] = 0, 0
    packed = (torch.arange(21, device=device) % 8).expand(2, -1)
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {
        "plain": {"input_ids": ids, "labels": ids},
        "packed": {"input_ids": ids, "labels": ids, "position_ids": packed},
        "right-padded": padded,
        "packed and right-padded": {**padded, "position_ids": packed},
        "mask of ones": {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)},
        "items": {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(97, device=device)},
    }


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close("gradient", found[name], gradient, name)


def step(model, batch, scale=1.0):
    output = model(**batch)
    (output.loss * scale).backward()
    return output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [None, [21], [24, 40]])
@pytest.mark.parametrize("name", batches("cpu"))
@pytest.mark.parametrize("kind", ["griffin", "hawk"])
def test_a_step(kind, name, lengths, device, recordings):
    batch, model = batches(device)[name], make_model(device, kind)
    expected = step(model, batch, 0.25)
    right = gradients(model)
    model.zero_grad()
    record_training(model, lengths)
    for _ in range(2):
        found = step(model, batch, 0.25)
        assert_close("logits", found.loss, expected.loss)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert_close("logits", found.logits[real], expected.logits[real])
        assert_same(gradients(model), right)
        model.zero_grad()
    assert recordings == [(2, {None: 256, 21: 21, 24: 24}[lengths if lengths is None else lengths[0]])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_over_shapes(device, set_to_none, recordings):
    """Gradients that a later replay would overwrite are kept; the scale of each loss counts."""
    model = make_model(device)
    parts = [{"input_ids": ids, "labels": ids} for ids in (rows(device, length=n, seed=n) for n in (21, 12, 20, 21))]

    def accumulate():
        model.zero_grad(set_to_none=set_to_none)
        for number, part in enumerate(parts):
            step(model, part, 1.0 + number)
        return gradients(model)

    expected = accumulate()
    record_training(model, [16, 24])
    for _ in range(3):
        assert_same(accumulate(), expected)
    assert recordings == [(2, 24), (2, 16)]


def test_gradients_take_no_second_memory():
    """What autograd puts into .grad is the graph's own tensor."""
    model = make_model()
    record_training(model, [21])
    step(model, batches("cpu")["plain"])
    (recorded,) = model.training_recorder.steps.values()
    where = {gradient.data_ptr() for gradient in recorded.gradients if gradient is not None}
    assert where == {parameter.grad.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_trainer(tmp_path, checkpointing, recordings):
    """The same losses and weights with rows of several lengths, accumulation and clipping."""
    texts = [rows("cpu", 1, n, n)[0] for n in (9, 21, 15, 16, 11, 20, 8, 21)]
    data = [{"input_ids": ids, "labels": ids} for ids in texts]

    def collate(examples):
        longest = max(len(each["labels"]) for each in examples)
        pad = {"input_ids": 0, "labels": -100}
        batch = {
            key: torch.stack([torch.nn.functional.pad(each[key], (0, longest - len(each[key])), value=value)
                              for each in examples])
            for key, value in pad.items()
        }  # fmt: skip
        return {**batch, "attention_mask": (batch["labels"] != -100).long()}

    def train(recorded: bool):
        model = make_model()
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, max_grad_norm=0.1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        if recorded:
            record_training(model, [16, 24])
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line], model

    losses, plain = train(False)
    found, recorded = train(True)
    assert found == pytest.approx(losses, rel=1e-5) and len(losses) == 6
    for (name, right), actual in zip(plain.named_parameters(), recorded.parameters(), strict=True):
        assert_close("golden training", actual, right, name)
    assert set(recordings) == {(2, 16), (2, 24)} and len(recordings) == 2


def replace_weights(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() + 0.01


def freeze(model):
    model.model.layers[0].requires_grad_(False)


def cap(model):
    model.config.final_logit_softcapping = 2.0


def hook(model):
    model.model.layers[1].mlp_block.register_forward_hook(lambda module, inputs, output: output * 0.5)


def replace_forward(model):
    norm = model.model.final_norm
    norm.forward = lambda hidden, residual=None: hidden * 0.25


def add_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["linear_x", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("change", [replace_weights, freeze, cap, hook, replace_forward, add_adapters])
def test_what_changes_is_recorded_anew(change, recordings, said):
    batch, model = batches("cpu")["plain"], make_model()
    record_training(model, [21])
    step(model, batch)
    model.zero_grad()
    changed = change(model) or model
    found = step(changed, batch)
    actual = gradients(changed)
    changed.zero_grad()
    stop_recording(changed)
    expected = step(changed, batch)
    assert_close("logits", found.loss, expected.loss)
    assert_same(actual, gradients(changed))
    assert len(recordings) == 2 and "has changed" in said[0]


def test_weights_changed_in_place_need_no_new_recording(recordings):
    batch, model, other = batches("cpu")["plain"], make_model(), GriffinForCausalLM(make_config())
    record_training(model, [21])
    step(model, batch)
    model.load_state_dict(other.state_dict())
    assert_close("logits", model(**batch).loss, other.train()(**batch).loss)
    assert len(recordings) == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"labels": None}, "no labels"),
        ({"attention_mask": torch.tensor([[0, 0] + [1] * 19] * 2)}, "not on the right"),
        ({"attention_mask": torch.tensor([[1] * 19 + [0, 0]] * 2)}, "labels of -100"),
        ({"shift_labels": rows("cpu")}, "shift_labels"),
        ({"seq_idx": torch.zeros(2, 21, dtype=torch.long)}, "seq_idx"),
    ],
)
def test_what_runs_as_before(change, reason, recordings, said):
    batch, model = {**batches("cpu")["plain"], **change}, make_model()
    expected = model(**batch)
    record_training(model, [21])
    found = model(**batch)
    assert torch.equal(found.logits, expected.logits) and recordings == [] and reason in said[0]


def watch_forward(model, seen):
    model.model.layers[1].mlp_block.register_forward_hook(lambda module, inputs, output: seen.append("forward"))


def watch_backward(model, seen):
    model.model.layers[1].mlp_block.register_full_backward_hook(lambda *arguments: seen.append("backward"))


def watch_every_module(model, seen):
    head = model.lm_head
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append("every") if module is head else None
    )


@pytest.mark.parametrize("watch", [watch_forward, watch_backward, watch_every_module])
def test_hooks_that_collect_see_each_step(watch, recordings, said):
    """Also where they come after steps that were recorded."""
    batch, model, seen = batches("cpu")["plain"], make_model(), []
    record_training(model, [21])
    step(model, batch)
    handle = watch(model, seen)
    try:
        for _ in range(3):
            step(model, batch)
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == 3 and len(recordings) == 1 and "hook" in said[-1]


def test_longer_rows_evaluation_and_generation_run_as_before(recordings, said):
    model, ids = make_model(), rows("cpu")
    record_training(model, [16])
    step(model, {"input_ids": ids, "labels": ids})
    assert "too long" in said[0]
    model.eval()
    model(ids[:, :10], labels=ids[:, :10])
    model.generate(ids[:, :10], max_new_tokens=3)
    with torch.no_grad():
        model.train()(ids[:, :10], labels=ids[:, :10])
    assert recordings == []


def test_another_forward_in_between_is_refused():
    model, batch = make_model(), batches("cpu")["plain"]
    record_training(model, [21])
    first = model(**batch)
    model(**batch)
    with pytest.raises(RuntimeError, match="one at a time"):
        first.loss.backward()


def test_a_step_that_cannot_be_recorded_runs_as_before(monkeypatch, said):
    model, batch = make_model(), batches("cpu")["plain"]
    expected = model(**batch).loss
    record_training(model, [21])
    monkeypatch.setattr(RecordedTrainingStep, "_record", lambda *arguments: 1 / 0)
    for _ in range(2):
        assert_close("logits", step(model, batch).loss, expected)
    assert "ZeroDivisionError" in said[0] and len(said) == 1


def test_few_shapes_are_kept(recordings):
    model = make_model()
    record_training(model, [8, 16, 24], kept=2)
    for length in (8, 16, 24, 8, 24):
        step(model, {"input_ids": rows("cpu", 1, length), "labels": rows("cpu", 1, length)})
    assert recordings == [(1, 8), (1, 16), (1, 24), (1, 8)] and len(model.training_recorder.steps) == 2


@pytest.mark.parametrize("settings", [{"lengths": []}, {"lengths": [0]}, {"kept": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        record_training(make_model(), **settings)
    with pytest.raises(ValueError, match="GriffinForCausalLM"):
        record_training(torch.nn.Linear(2, 2))
