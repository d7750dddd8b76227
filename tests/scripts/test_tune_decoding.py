"""`scripts/tune_decoding.py`: which tile stays, and what is left behind. Times are made up; the steps are real."""

import pytest
import torch
import tune_decoding
from benchmark_training import _griffin_config

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.decode.state import DecodeStep
from modeling_griffin.kernels.device import decode as tables


def make_step(config, rows, weights="bfloat16"):
    model = GriffinForCausalLM(config).eval()
    return DecodeStep(model.model, model.lm_head, rows)


@pytest.fixture
def step():
    torch.manual_seed(0)
    return make_step(_griffin_config("tiny"), 1)


def test_the_fastest_right_tile_of_each_product_stays(step, monkeypatch):
    def milliseconds(_):
        taken = tables.PROJECT[0, 5120], tables.PROJECT[0, 0]
        return {(4, 2, 2): 0.5}.get(taken[0], 1.0) * {(2, 4, 3): 0.5, (1, 2, 5): 0.9}.get(taken[1], 1.0)

    monkeypatch.setattr(tune_decoding, "_milliseconds", milliseconds)
    before = {name: dict(tune_decoding._table(name, 1)) for name in tune_decoding.PRODUCTS}
    *_, together, again = tune_decoding.tune(step, ["down", "linear_out, o_proj", "q, k, v"], None)
    assert together.startswith("all together: 0.2500, {'down': '4x2x2', 'linear_out, o_proj': '2x4x3'}")
    assert again.endswith(": 1.0000")
    assert before == {name: tune_decoding._table(name, 1) for name in tune_decoding.PRODUCTS}
    assert all(line in before[name] for name, line in tune_decoding.PRODUCTS.items())  # a new line would come too late


def test_a_wrong_tile_is_named_and_never_stays(step, monkeypatch):
    logits = tune_decoding._logits

    def spoiled(step):
        return logits(step) * (2 if tables.GATED[0, 0] == (4, 4, 2) else 1)

    monkeypatch.setattr(tune_decoding, "_logits", spoiled)
    monkeypatch.setattr(tune_decoding, "_milliseconds", lambda _: 0.1 if tables.GATED[0, 0] == (4, 4, 2) else 1.0)
    lines = list(tune_decoding.tune(step, ["gate, up"], None))
    assert "gate, up: 4x4x2: 0.1000, wrong by 1" in lines and lines[-2] == "all together: 1.0000, {}"


def test_a_tile_that_fails_is_said_and_the_others_go_on(step, monkeypatch):
    def fails(_):
        if tables.RECURRENT_ROW == {"BLOCK_C": 16, "num_warps": 4}:
            raise RuntimeError("no such\ntile")
        return 1.0

    monkeypatch.setattr(tune_decoding, "_milliseconds", fails)
    lines = list(tune_decoding.tune(step, ["recurrence"], None))
    assert "recurrence: 16x4: RuntimeError: no such tile" in lines and "recurrence: 16x2: 1.0000" in lines


def test_rows_have_tables_of_their_own():
    assert tune_decoding._table("down", 64) is tables.MATMUL[64]
    assert tune_decoding._table("gate, up", 20) is tables.MATMUL_GATED[32]
    with tune_decoding.taking({"down": "64x128x4x4x1"}, 64):
        assert tables.matmul_tile(tables.MATMUL, [2560], 7680, 64, tables.GPU(multiprocessors=132))["STAGES"] == 4


def test_what_is_compiled_ahead_launches_every_kind_of_layer(monkeypatch):
    steps, ran = [], []
    monkeypatch.setattr(tune_decoding, "_step", lambda *given: steps.append(make_step(*given)) or steps[0])
    monkeypatch.setattr(tune_decoding, "_logits", lambda step: ran.append(tables.PROJECT[0, 5120]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tune_decoding._compile(_griffin_config("tiny"), 1, "bfloat16", [("down", "4x2x2"), ("down", "2x4x3")])
    assert ran == [(4, 2, 2), (2, 4, 3)] and sorted(map(len, steps[0].layers)) == [2, 3]


def test_packed_weights_have_tables_of_their_own():
    gpu = tables.GPU(multiprocessors=132)

    def of_one_row(outputs, inputs):
        tile = tables.product_tile(tables.PROJECT_BYTES, outputs, inputs, 1)
        return tile["BLOCK_N"], tile["num_warps"], tile["AHEAD"]

    before = {each: of_one_row(*each) for each in ((5120, 2560), (2560, 2560), (2816, 2560), (2560, 7680))}
    with tune_decoding.taking({"linear_x, linear_y": "16x2x2", "linear_out, o_proj": "4x4x2"}, 1, "torchao int8"):
        assert of_one_row(5120, 2560) == (16, 2, 2) and of_one_row(2560, 2560) == (4, 4, 2)
        for others in ((2816, 2560), (2560, 7680)):
            assert of_one_row(*others) == before[others]
    with tune_decoding.taking({"gate, up": "4x2x3"}, 1, "nf4, constants too"):
        assert tables.nf4_matvec_tile(tables.MATVEC_GATED_NF4, 15360, 2560, 1, gpu)["WARPS"] == 4
    with tune_decoding.taking({"q, k, v": "64x64x5x4x2"}, 64, "nf4"):
        assert tables.matmul_tile(tables.MATMUL_NF4, [2816], 2560, 64, gpu)["STAGES"] == 5
        assert tables.matmul_tile(tables.MATMUL_NF4, [2560], 2560, 64, gpu)["STAGES"] == 3
    with tune_decoding.taking({"gate, up": "64x128x6x8x1"}, 64, "torchao float8"):
        assert tables.matmul_tile(tables.MATMUL_GATED_BYTES, [7680], 2560, 64, gpu)["STAGES"] == 6
        assert tables.matmul_tile(tables.MATMUL_GATED, [7680], 2560, 64, gpu)["STAGES"] == 4
    assert before == {each: of_one_row(*each) for each in before}


@pytest.mark.parametrize(
    "words", [["--weights", "nf4", "--products", "head"], ["--rows", "64", "--products", "recurrence"]]
)
def test_products_without_tiles_of_their_own_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        tune_decoding.main(words)
    assert f"--products {words[-1]}: of " in capsys.readouterr().err
