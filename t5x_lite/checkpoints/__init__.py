# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk, ours and those of Hugging Face, T5X and GGUF: read, written, converted."""
