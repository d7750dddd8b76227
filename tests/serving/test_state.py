"""A state is what the model knows: picked, joined, forked, saved and resumed it gives the numbers of the whole text."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from modeling_griffin import GenerationRequest, GenerationState
from modeling_griffin.serving.state import _checksum
from tests.tolerances import assert_close


ROOT = Path(__file__).resolve().parents[2]
KINDS = ("griffin", "hawk", "attention_first")
VOCABULARY, WINDOW = 29, 8


def random_ids(rows, length, seed=2):
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_behind(model, state, texts):
    """The state is the one behind these texts: the same next logits, and after three more tokens too."""
    more = random_ids(len(texts), 3, seed=7)
    after = model.prefill(more, state)
    assert state.lengths == tuple(len(text) for text in texts)
    for row, text in enumerate(texts):
        whole = torch.cat([text, more[row]])[None]
        with torch.no_grad():
            logits = model(whole, use_cache=False).logits[0]
        assert_close("logits", state.logits[row], logits[len(text) - 1])
        assert_close("logits", after.logits[row], logits[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40])
def test_prefill_in_chunks_of_any_size(kind, length, small_model):
    model, ids = small_model(kind, "sdpa"), random_ids(2, length)
    for chunk_size in (1, 3, WINDOW, 100):
        assert_behind(model, model.prefill(ids, chunk_size=chunk_size), list(ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_lengths_together(kind, attention, small_model):
    """Joined, picked in another order, picked apart, forked, forks of forks; nothing changes what it was made from."""
    model = small_model(kind, attention)
    texts = [random_ids(1, length, seed=length)[0] for length in (1, 3, 7, 8, 20)]
    alone = [model.prefill(text[None]) for text in texts]
    joined = GenerationState.concatenate(alone)
    assert_behind(model, joined, texts)
    assert_behind(model, joined[[4, 0, 0, 2]], [texts[i] for i in (4, 0, 0, 2)])
    assert_behind(model, joined[1:3], texts[1:3])
    assert_behind(model, joined[-1], texts[-1:])
    assert_behind(model, joined[0].fork(2), [texts[0]] * 2)
    assert_behind(model, joined[:2].fork(2)[1:].fork(2)[::2], [texts[0], texts[1], texts[1]])
    assert_behind(
        model, GenerationState.concatenate([joined[1], alone[4], joined[:2]]), [texts[i] for i in (1, 4, 0, 1)]
    )
    assert_behind(model, joined, texts)
    assert len(joined) == 5 and len(joined.fork(3)) == 15


def test_no_rows(small_model):
    """What is left when all rows have ended."""
    model = small_model()
    state = model.prefill(random_ids(2, 3))
    none = state[[]]
    assert len(none) == 0 and none.to_cache()[1] is None
    assert_behind(model, GenerationState.concatenate([none, state]), list(random_ids(2, 3)))


def test_a_row_is_named_by_any_whole_number(small_model):
    state = small_model().prefill(random_ids(3, 4))
    assert torch.equal(state[np.int64(1)].logits, state.logits[1:2])
    assert torch.equal(state[np.array([2, 0])].logits, state[torch.tensor([2, 0])].logits)


def test_a_short_row_carries_no_empty_slots(small_model):
    model = small_model()
    joined = GenerationState.concatenate([model.prefill(random_ids(1, 2)), model.prefill(random_ids(1, 30))])
    assert joined.layers[2][0].shape[2] == WINDOW - 1
    assert joined[0].layers[2][0].shape[2] == 2


def test_size_does_not_depend_on_the_length(small_model):
    """Whole storages, not views of a long prefill."""
    model = small_model()
    sizes = set()
    for length in (WINDOW, 50, 500):
        state = model.prefill(random_ids(1, length))
        tensors = [tensor for pair in state.layers for tensor in pair]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_bit_for_bit(kind, dtype, small_model, tmp_path):
    model = small_model(kind).to(dtype)
    state = GenerationState.concatenate([model.prefill(random_ids(1, n)) for n in (1, 5, 30)])
    model.save_state(state, tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    assert loaded.lengths == state.lengths and torch.equal(loaded.logits, state.logits)
    for pair, expected in zip(loaded.layers, state.layers, strict=True):
        for one, other in zip(pair, expected, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_states_under_autocast(small_model, tmp_path):
    """Made, continued, saved and resumed: bfloat16 states of a float32 model, which only belong under autocast."""
    model, ids, path = small_model(), random_ids(1, 20), tmp_path / "state.safetensors"
    with torch.autocast("cpu", torch.bfloat16):
        model.save_state(model.prefill(ids[:, :12]), path)
        state = model.load_state(path)
        logits = model.prefill(ids[:, 12:], state).logits
        assert logits.dtype == torch.bfloat16
        assert_close("bfloat16 logits", logits, model(ids).logits[:, -1])
    with pytest.raises(ValueError, match="state is torch.bfloat16 on cpu: allowed is the model's torch.float32"):
        model.prefill(ids[:, 12:], state)


RESUME = """
import sys, torch
from modeling_griffin import GenerationRequest, GriffinForCausalLM
torch.set_num_threads(1)
model = GriffinForCausalLM.from_pretrained(sys.argv[1]).eval()
state = model.load_state(sys.argv[2])
queue = [GenerationRequest(state=state[row], max_new_tokens=12, eos_token_id=()) for row in (0, 1, 0)]
print([result.tokens for result in model.generate_batch(queue)])
"""


def test_resume_in_another_process_and_at_another_batch_size(small_model, tmp_path):
    model = small_model()
    texts = [random_ids(1, n)[0] for n in (3, 30)]
    state = GenerationState.concatenate([model.prefill(text[None]) for text in texts])
    model.save_pretrained(tmp_path / "model")
    model.save_state(state, tmp_path / "state.safetensors")
    command = [sys.executable, "-c", RESUME, str(tmp_path / "model"), str(tmp_path / "state.safetensors")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    queue = [GenerationRequest(texts[row], max_new_tokens=12, eos_token_id=()) for row in (0, 1, 0)]
    expected = [result.tokens for result in model.generate_batch(queue, max_rows=1)]
    assert result.stdout.strip().splitlines()[-1] == str(expected)


@pytest.fixture
def saved(small_model, tmp_path):
    """(model, path) with a state on disk."""
    model, path = small_model(), tmp_path / "state.safetensors"
    model.save_state(model.prefill(random_ids(1, 12)), path)
    return model, path


@pytest.mark.parametrize(
    "field, value",
    [
        ("attention_window_size", 9),
        ("hidden_size", 32),
        ("num_gate_blocks", 4),
        ("rg_lru_c", 4.0),
        ("final_logit_softcapping", 30.0),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_a_state_of_another_configuration_is_refused(field, value, saved, small_model):
    _, path = saved
    with pytest.raises(ValueError, match=rf"state\.safetensors: {field} = .*allowed is this model's"):
        small_model(**{field: value}).load_state(path)


def test_a_state_of_other_layers_is_refused(saved, small_model):
    _, path = saved
    with pytest.raises(ValueError, match="num_hidden_layers = 3: allowed is this model's, 2"):
        small_model("hawk").load_state(path)


def test_a_folder_is_no_file_of_a_state(small_model, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: not a readable state file"):
        small_model().load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        small_model().load_state(tmp_path / "nothing")


def test_a_state_of_no_rows_is_saved_too(small_model, tmp_path):
    model = small_model()
    model.save_state(model.prefill(random_ids(1, 4))[[]], tmp_path / "state")
    assert len(model.load_state(tmp_path / "state")) == 0


def test_another_dtype_is_refused(saved):
    model, path = saved
    with pytest.raises(ValueError, match="dtype = float32: allowed is this model's, bfloat16"):
        model.to(torch.bfloat16).load_state(path)


@pytest.mark.parametrize("name", ["model.layers.0.temporal_block.rg_lru.decay.lambda_bias", "lm_head.weight"])
def test_other_weights_are_refused(name, saved):
    """A step of training moves all of a parameter."""
    model, path = saved
    model.get_parameter(name).data.mul_(1.001)
    with pytest.raises(ValueError, match="weights = [0-9a-f]{64}: allowed is this model's"):
        model.load_state(path)


def test_a_damaged_file_is_refused(saved):
    model, path = saved
    whole = path.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "not a readable state file"),
        (whole[:5], "not a readable state file"),
        (b"", "not a readable state file"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "the file is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            model.load_state(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="format = None"):
        model.load_state(path)
    with pytest.raises(FileNotFoundError):
        model.load_state(path.with_name("absent"))


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()
    state = model.prefill(random_ids(1, 3))

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_state(state, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_the_file_holds_what_it_says(saved):
    """One file of safetensors, with the configuration's fields in plain text."""
    _, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["attention_window_size"] == "8" and metadata["dtype"] == "float32"
    assert metadata["layer_types"] == '["linear_attention", "linear_attention", "sliding_attention"]'


def test_bad_arguments(small_model):
    model, other = small_model(), small_model(attention_window_size=12)
    state = model.prefill(random_ids(1, 4))
    for call, message in (
        (lambda: model.prefill(random_ids(1, 4)[0]), r"input_ids has shape \(4,\)"),
        (lambda: model.prefill(random_ids(1, 0)), r"input_ids has shape \(1, 0\)"),
        (lambda: model.prefill(random_ids(1, 4), chunk_size=0), "chunk_size = 0"),
        (lambda: model.prefill(random_ids(1, 4), chunk_size=10**30), "chunk_size = 1000"),
        (lambda: model.prefill(random_ids(1, 4).to(torch.uint16)), "input_ids is torch.uint16"),
        (lambda: model.prefill(random_ids(1, 4).to(torch.complex64)), "input_ids is torch.complex64"),
        (lambda: model.prefill(random_ids(2, 4), state), "input_ids has 2 rows: allowed are 1"),
        (lambda: other.prefill(random_ids(1, 4), state), "attention_window_size = 8: allowed is this model's, 12"),
        (lambda: other.save_state(state, "x"), "attention_window_size = 8"),
        (lambda: state.fork(0), "copies = 0"),
        (lambda: GenerationState.concatenate([]), "states is empty"),
        (lambda: GenerationState.concatenate([state, other.prefill(random_ids(1, 4))]), "attention_window_size = 12"),
        (lambda: model.to(torch.bfloat16).prefill(random_ids(1, 4), state), "torch.float32 on cpu: allowed is"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError):
        state[1]


def test_forged_files_are_refused(small_model, tmp_path):
    """A right checksum over contents that are no state of this model."""
    model, path = small_model(), tmp_path / "state"
    model.save_state(model.prefill(random_ids(2, 5)), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    forgeries = {
        r"lengths = \(-1, 5\): allowed are 1 to": {"lengths": torch.tensor([-1, 5])},
        r"lengths = \(4611686018427387904, 5\)": {"lengths": torch.tensor([2**62, 5])},
        "logits has shape .*: allowed is .* for lengths": {"lengths": torch.tensor([5])},
        "lengths is .*: allowed are whole numbers": {"lengths": torch.tensor([5.0, 5.0])},
        r"layers.2.0 has shape \(2, 1, 5, 8\): allowed is \(2, 1, 7, 8\)": {"lengths": torch.tensor([9, 5])},
        "layers.0.1 has shape": {"layers.0.1": torch.zeros(2, 3)},
        "extra: allowed are logits": {"extra": torch.zeros(1)},
        "layers.0.0 is torch.float64: allowed is torch.float32": {"layers.0.0": state["layers.0.0"].double()},
        "layers.0.1 is torch.int8: allowed is torch.float32": {"layers.0.1": state["layers.0.1"].to(torch.int8)},
        "layers.2.0 is torch.bfloat16: allowed is torch.float32": {"layers.2.0": state["layers.2.0"].bfloat16()},
        "logits is torch.bool: allowed is": {"logits": state["logits"].bool()},
    }
    for message, changes in forgeries.items():
        tensors = {**state, **changes}
        safetensors.torch.save_file(tensors, path, {**metadata, "checksum": _checksum(tensors)})
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            model.load_state(path)


def test_rows_are_named_by_numbers(small_model):
    state = small_model().prefill(random_ids(3, 5))
    assert state[torch.tensor([2, 0])].lengths == (5, 5) and torch.equal(state[-1].logits, state[2].logits)
    for rows in ([True, False], torch.tensor([True, False, True]), True, [0.5], "0", None, 1.5, ...):
        with pytest.raises(TypeError, match="rows has"):
            state[rows]
    for rows in (3, [0, -4]):
        with pytest.raises(IndexError, match="rows has"):
            state[rows]


def test_states_that_are_none_are_refused(small_model):
    model = small_model()
    state = model.prefill(random_ids(1, 5))
    assert len(GenerationState.concatenate(each for each in (state, state))) == 2
    for states in ([state, 1], [None], [[state]]):
        with pytest.raises(ValueError, match=r"states\[\d\] is a .*: allowed is a GenerationState"):
            GenerationState.concatenate(states)
    for copies in (True, 1.5, "a", None, 0):
        with pytest.raises(ValueError, match="copies = .*: allowed are whole numbers from 1"):
            state.fork(copies)
    for broken in ({"layers": state.layers[:1]}, {"lengths": (5, 5)}, {"logits": state.logits[:0]}):
        broken = dataclasses.replace(state, **broken)
        with pytest.raises(ValueError, match="state has .* layers with rows .*: allowed are 3 layers"):
            broken.check(model)
    ids = random_ids(1, 5)
    assert torch.equal(model.prefill(ids.to(torch.uint8)).logits, model.prefill(ids).logits)


def test_states_of_two_dtypes_are_not_joined(small_model):
    states = [model.prefill(random_ids(1, 5)) for model in (small_model(), small_model().to(torch.bfloat16))]
    with pytest.raises(ValueError, match="states has torch.bfloat16 on cpu: allowed is that of the first"):
        GenerationState.concatenate(states)


@pytest.mark.parametrize("nonsense", [None, 3, "state", {}])
def test_what_is_no_state_is_not_saved(nonsense, small_model, tmp_path):
    with pytest.raises(ValueError, match="state is a .*: allowed is a GenerationState"):
        small_model().save_state(nonsense, tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())
