# SPDX-License-Identifier: Apache-2.0
"""Evaluation: predictions, metrics and losses of a split, embeddings, reports on drafting."""
