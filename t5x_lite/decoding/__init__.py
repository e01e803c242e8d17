# SPDX-License-Identifier: Apache-2.0
"""Ids to ids: one loop for plain and drafted decoding, beam search, scoring of given targets."""

from t5x_lite.decoding.generation import Drafting, Result, generate
from t5x_lite.decoding.request import Request, bucket, pad, request
from t5x_lite.decoding.scoring import Scores, score
from t5x_lite.decoding.streaming import stream
from t5x_lite.decoding.target import precise, prepare

__all__ = [
    "Drafting",
    "Request",
    "Result",
    "Scores",
    "bucket",
    "generate",
    "pad",
    "precise",
    "prepare",
    "request",
    "score",
    "stream",
]
