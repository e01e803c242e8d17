# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats of other libraries: Hugging Face, T5X, GGUF, safetensors."""
