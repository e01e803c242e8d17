# SPDX-License-Identifier: Apache-2.0
"""Messages of the config of masked blocks: what does not go with them is refused by name."""

import dataclasses

import pytest

from t5x_lite import config
from t5x_lite.config.canvas import check_canvas_decode, parse_commit

STACK = config.Stack(layers=1, embed=8, heads=1, head_dim=8, mlp=8)
CANVAS = config.Canvas(4)
MODEL = config.Model(vocab=64, encoder=STACK, decoder=STACK, canvas=CANVAS)
LONE = dataclasses.replace(MODEL, encoder=None)
RUN = config.Run("runs/sample", MODEL)


@pytest.mark.parametrize(
    "owner, fields, words",
    [
        (CANVAS, {"rates": (0.5,)}, "Canvas.rates are two shares, least and greatest"),
        (CANVAS, {"rates": (0.9, 0.2)}, "Canvas.rates are two shares"),
        (CANVAS, {"drawn_blocks": (2, 3)}, r"Canvas.drawn_blocks has \[3\], which does not divide"),
        (MODEL, {"decoder": None}, "Model.canvas is for a decoder"),
        (MODEL, {"draft_heads": config.DraftHeads(2)}, "Model.canvas goes with no Model.draft_he"),
        (MODEL, {"readout": config.Readout("number")}, "goes with no Model.readout"),
        (LONE, {"prefix_lm": True}, "goes with no Model.prefix_lm"),
        (
            LONE,
            {"decoder": dataclasses.replace(STACK, causal=(False,))},
            "goes with no Stack.causal",
        ),
        (
            MODEL,
            {"decoder": dataclasses.replace(STACK, positions="rotary", random_positions=9)},
            "goes with no Stack.random_positions",
        ),
        (
            MODEL,
            {"canvas": config.Canvas(4, mask_token_id=64)},
            "Canvas.mask_token_id must be below Model.vocab 64",
        ),
        (
            MODEL,
            {"canvas": config.Canvas(4, mask_token_id=0)},
            "Canvas.mask_token_id 0 is Model.decoder_start_token_id",
        ),
        (MODEL, {"attention": "pallas"}, "Model.canvas has no kernel"),
        (
            RUN,
            {"train": config.Train(steps=4, batch_size=4, layer_skip=config.LayerSkip())},
            "Train.layer_skip",
        ),
        (RUN, {"distillation": config.Distillation("teacher")}, "which Run.distillation is not"),
        (RUN, {"mesh": config.Mesh(context=2)}, "which Mesh.context is not for"),
        (config.Decode(), {"commit": "best"}, "Decode.commit 'best' is not one of top:M"),
        (config.Decode(), {"commit": "top:0"}, r"write it as top:M, M in 1\.\.65,536"),
        (config.Decode(), {"commit": "threshold:1.5"}, r"write it as threshold:P, P in \(0, 1\]"),
        (config.Decode(), {"commit": "threshold:nan"}, "write it as threshold:P"),
        (config.Decode(), {"commit": "top:2:3"}, "write it as top:M"),
        (
            config.Decode(),
            {"commit": "neighbors:0.9:0.5"},
            r"write it as neighbors:P:Q:W, P in \(0, 1\], Q in \(0, 1\], W in 1",
        ),
    ],
)
def test_what_does_not_go_with_masked_blocks_is_refused_by_name(owner, fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(owner, **fields)


def test_a_model_that_writes_from_left_to_right_has_no_policy():
    plain = dataclasses.replace(MODEL, canvas=None)
    check_canvas_decode(plain, config.Decode(beams=2))
    for fields in ({"commit": "top:2"}, {"canvas_block": 2}):
        with pytest.raises(ValueError, match="is for models that fill masked blocks"):
            check_canvas_decode(plain, config.Decode(**fields))
        check_canvas_decode(MODEL, config.Decode(drafter="plain", **fields))


def test_policies():
    assert parse_commit("") == parse_commit("threshold:0.9") == ("threshold", 1, 0.9, 1, 0)
    assert parse_commit("order:3") == ("order", 3, 1.0, 1.0, 0)
    assert parse_commit("neighbors:0.9:0.75:4") == ("neighbors", 1, 0.9, 0.75, 4)
    blocks = dataclasses.replace(CANVAS, drawn_blocks=(1, 2)).blocks
    assert (CANVAS.blocks, blocks) == ((4,), (1, 2))
    assert MODEL.mask_token_id == 63 and MODEL.reads_ahead
    assert not dataclasses.replace(MODEL, canvas=config.Canvas(1)).reads_ahead
