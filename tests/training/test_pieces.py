"""The MLP in pieces: values and gradients of the whole MLP, each piece made twice, and one of them at a time."""

import pytest
import torch

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.decode.fused_model import fused_obstacles
from modeling_griffin.training.pieces import mlp_in_pieces
from tests.conftest import make_audible, make_config
from tests.tolerances import assert_close


TOKENS = torch.randint(1, 29, (2, 25), generator=torch.Generator().manual_seed(0))


def make_model(**fields) -> GriffinForCausalLM:
    return make_audible(GriffinForCausalLM(make_config(**fields))).train()


def step(model, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


def assert_same(found: dict, expected: dict, tolerance: str = "gradient") -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(
            "loss" if name == "loss" and tolerance == "gradient" else tolerance, found[name], expected[name], name
        )


@pytest.mark.parametrize("piece", [1, 7, 25, 49, 50])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_numbers_of_the_whole_mlp(piece, checkpointing):
    model = make_model()
    expected = step(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    mlp_in_pieces(model, piece)
    assert_same(step(model), expected)
    assert_same(step(model), expected)


def test_each_piece_is_made_twice_and_alone():
    """As checkpointing alone would make it; what is computed of a piece is gone before the next one comes."""
    model, sizes = make_model(), []
    model.gradient_checkpointing_enable()
    mlp_in_pieces(model, 16)
    projection = model.model.layers[1].mlp_block.up_proj
    projection.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    step(model)
    assert sizes == [16, 16, 16, 2] * 2


def test_nothing_wide_is_kept_without_checkpointing():
    def kept(model) -> set[int]:
        seen = set()

        def pack(tensor):
            seen.update(tensor.shape[2:])  # of (B, T, D): weights have fewer dimensions
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return seen

    model = make_model(intermediate_size=40)
    assert 40 in kept(model)
    mlp_in_pieces(model, 16)
    assert 40 not in kept(model)


def test_autocast():
    model = make_model()
    expected = step(model, autocast=True)
    mlp_in_pieces(model, 16)
    assert_same(step(model, autocast=True), expected, "bfloat16 layer")
    with torch.autocast("cpu", torch.bfloat16):  # backward inside of autocast, whose casts are kept until its end
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        model.zero_grad()
        loss.backward()
    for name, parameter in model.named_parameters():
        assert_close("bfloat16 layer", parameter.grad, expected[name], name)


def test_frozen_weights():
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp_block.up_proj" in name or "layers.2.mlp_block" in name)
    expected = step(model)
    mlp_in_pieces(model, 16)
    assert_same(step(model), expected)


def test_without_gradients():
    model = make_model().eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        mlp_in_pieces(model, 16)
        assert_close("logits", model(TOKENS).logits, expected)


def test_dropout_runs_whole(caplog):
    """As LoRA puts it into a block: a piece would draw other numbers on the way back."""
    model = make_model()
    block = model.model.layers[0].mlp_block
    block.up_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), block.up_proj)
    mlp_in_pieces(model, 16)
    sizes = []
    block.up_proj.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    step(model)
    assert sizes == [50]
    model.eval()(TOKENS)
    assert sizes == [50, 16, 16, 16, 2]


def test_refused():
    with pytest.raises(ValueError, match="piece = 0: allowed are whole numbers from 1"):
        mlp_in_pieces(make_model(), 0)
    with pytest.raises(ValueError, match="model is a Linear without a GriffinMLP: allowed are Griffin's models"):
        mlp_in_pieces(torch.nn.Linear(2, 2))


def test_the_model_is_a_griffin_as_before(tmp_path):
    """To decoding, which takes all its tokens at once, and to pickle."""
    model = make_model().eval()
    mlp_in_pieces(model, 16)
    assert list(fused_obstacles(model)) == []
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.model.layers[0].mlp_block.piece == 16
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
