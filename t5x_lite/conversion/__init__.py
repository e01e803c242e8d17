# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other makes, in and out: Hugging Face, T5X and GGUF."""
