# SPDX-License-Identifier: Apache-2.0
"""Data: tasks, vocabularies, objectives and packed batches. Knows no model and imports no jax."""

from t5x_lite.data.batches import Batches, Statistics, open_batches
from t5x_lite.data.checks import check_examples
from t5x_lite.data.datasets import Dataset, open_dataset, open_vocabularies
from t5x_lite.data.derived import load_run
from t5x_lite.data.prefetching import prefetch
from t5x_lite.data.tasks import (
    check_run_vocabulary,
    find_chat_template,
    in_vocabulary,
    run_vocabulary,
    with_run_vocabulary,
)
from t5x_lite.tokenizers.vocabularies import encode_with_ends, load_pair, save_pair

__all__ = [
    "Batches",
    "Dataset",
    "Statistics",
    "check_examples",
    "check_run_vocabulary",
    "encode_with_ends",
    "find_chat_template",
    "in_vocabulary",
    "load_pair",
    "load_run",
    "open_batches",
    "open_dataset",
    "open_vocabularies",
    "prefetch",
    "run_vocabulary",
    "save_pair",
    "with_run_vocabulary",
]
