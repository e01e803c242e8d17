# SPDX-License-Identifier: Apache-2.0
"""Comparison of encoder-decoder and decoder-only twins: matched, trained and measured."""
