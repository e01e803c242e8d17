# SPDX-License-Identifier: Apache-2.0
"""A row decoded alone on one device writes what it writes in a batch: greedy, sampled, filtered.

From jax 0.11 on, a slice whose every dimension is 1 loses its sharding, so one row of one token
meets shardings that no larger batch has.
"""

import numpy as np
import pytest
from conftest import mark_exhaustive
from decoding_laws import GREEDY, SAMPLED, decode_rows, use_one_device

from t5x_lite import config, decoding
from t5x_lite.decoding.acceptance import approximate, exact, speculative
from t5x_lite.decoding.drafters import lookup
from t5x_lite.decoding.protocol import chain

WARM = config.Decode(max_new_tokens=24, temperature=0.7, seed=5)
SCORED = config.Decode(max_new_tokens=24, logprobs=2)
BEAMS = config.Decode(max_new_tokens=24, beams=2)
ACCEPTANCES = {
    "exact": exact.Exact(),
    "speculative": speculative.Speculative(),
    "block": speculative.BlockVerification(),
    "typical": approximate.Typical(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"])
)
@pytest.mark.parametrize("decode", [GREEDY, SAMPLED, WARM, SCORED, BEAMS], ids=str)
def test_plain_decoding_of_one_row(kind, decode):
    use_one_device()
    alone, batch = decode_rows(kind, decode, order=(1,)), decode_rows(kind, decode)
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[1])


@pytest.mark.slow
# Sampled text accepts by all of a rule, greedy text by the first choice.
@pytest.mark.parametrize(
    "decode, accept, width",
    mark_exhaustive(
        [
            (decode, accept, width)
            for decode in (GREEDY, SAMPLED)
            for accept in ACCEPTANCES
            for width in (2, 4)
        ],
        kept=[
            (GREEDY, "exact", 2),
            *((SAMPLED, accept, 4) for accept in ACCEPTANCES),
        ],
    ),
)
def test_drafts_of_one_row(decode, accept, width):
    use_one_device()
    drafting = decoding.Drafting(lookup.Lookup(tree=chain(width)), None, ACCEPTANCES[accept])
    alone = decode_rows("decoder_only", decode, drafting, order=(1,))
    batch = decode_rows("decoder_only", decode, drafting)
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[1])
