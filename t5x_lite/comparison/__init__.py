# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder or decoder-only? Twins matched, trained, measured and set side by side."""
