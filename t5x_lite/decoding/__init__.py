# SPDX-License-Identifier: Apache-2.0
"""Ids to ids: one loop for plain and drafted decoding, beam search, scoring of targets."""

from t5x_lite.decoding.generation import Drafting, generate
from t5x_lite.decoding.request import Request, bucket_length, make_request, pad_rows
from t5x_lite.decoding.result import Result
from t5x_lite.decoding.scoring import Scores, score
from t5x_lite.decoding.streaming import stream
from t5x_lite.decoding.target import prepare_params

__all__ = [
    "Drafting",
    "Request",
    "Result",
    "Scores",
    "bucket_length",
    "generate",
    "make_request",
    "pad_rows",
    "prepare_params",
    "score",
    "stream",
]
