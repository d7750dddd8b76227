"""Griffins turned into folders for mlx-lm: its logits, on MLX's CPU build, against the model's own."""

import convert_recurrent_gemma
import numpy as np
import pytest
import torch

from tests.tolerances import assert_close


pytestmark = pytest.mark.tools
# Every field in which mlx-lm has no choice, and an epsilon that it has in its layers.
FOR_MLX = {"lru_width": 16, "num_gate_blocks": 2, "rms_norm_eps": 1e-5}


def convert(model, tmp_path) -> tuple:
    """The model as mlx-lm loads it from the converted folder, as it is."""
    from mlx_lm.utils import load_model

    model.save_pretrained(tmp_path / "griffin")
    convert_recurrent_gemma.main([str(tmp_path / "griffin"), str(tmp_path / "mlx"), "--reverse", "--for", "mlx"])
    return load_model(tmp_path / "mlx")


def logits_of(theirs, ids: torch.Tensor, pieces: tuple[int, ...]) -> torch.Tensor:
    """By pieces behind mlx-lm's own cache; one piece: without a cache."""
    import mlx.core as mx

    cache, found = theirs.make_cache() if len(pieces) > 1 else None, []
    for piece in ids.split(list(pieces), dim=1):
        found.append(torch.from_numpy(np.array(theirs(mx.array(piece.numpy()), cache=cache).astype(mx.float32))))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_embeddings": True, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},  # as RecurrentGemma
        {},
    ],
    ids=["as_recurrent_gemma", "plain"],
)
@torch.no_grad()
def test_logits(fields, small_model, tmp_path, capsys):
    """Within a window and over five of them; whole, and token by token behind mlx-lm's cache."""
    model = small_model("griffin", "sdpa", **FOR_MLX, **fields)
    theirs, config = convert(model, tmp_path)
    assert config["attention_window_size"] == model.config.attention_window_size
    assert "mlx-lm differs" not in capsys.readouterr().out
    ids = torch.randint(1, 29, (1, 40))
    expected = model(ids).logits
    for pieces in ((40,), (6, *[1] * 34)):
        assert_close("mlx logits", logits_of(theirs, ids, pieces), expected, str(pieces))


@torch.no_grad()
def test_greedy_tokens_by_its_own_generator(small_model, tmp_path):
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    model = small_model("griffin", "sdpa", **FOR_MLX)
    theirs, _ = convert(model, tmp_path)
    ids = torch.randint(1, 29, (1, 12))
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0, 12:].tolist()
    assert [int(token) for token, _ in generate_step(mx.array(ids[0].numpy()), theirs, max_tokens=30)] == expected


@torch.no_grad()
def test_another_epsilon_is_said_and_small(small_model, tmp_path, capsys):
    model = small_model("griffin", "sdpa", **{**FOR_MLX, "rms_norm_eps": 1e-6})
    theirs, _ = convert(model, tmp_path)
    assert "mlx-lm differs: the norms of its layers add 1e-05, not rms_norm_eps = 1e-06" in capsys.readouterr().out
    ids = torch.randint(1, 29, (1, 12))
    assert_close("mlx epsilon", logits_of(theirs, ids, (12,)), model(ids).logits)


@torch.no_grad()
def test_bfloat16_folder_loads_and_runs(small_model, tmp_path, capsys):
    """mlx-lm asks for one dtype, so that Λ loses its float32: said, and it runs."""
    model = small_model("griffin", "sdpa", **FOR_MLX).bfloat16()
    theirs, _ = convert(model, tmp_path)
    assert "mlx-lm differs: Λ is in bfloat16, as all weights are" in capsys.readouterr().out
    ids = torch.randint(1, 29, (1, 12))
    assert_close("mlx bfloat16", logits_of(theirs, ids, (12,)), model(ids).logits.float())
