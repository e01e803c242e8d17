# SPDX-License-Identifier: Apache-2.0
"""T5-like encoder-decoders and their GPT-like twins: train, adapt, decode and compare them."""

__version__ = "0.1.0"
