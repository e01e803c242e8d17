# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over a cache: TPU and Triton kernels."""
