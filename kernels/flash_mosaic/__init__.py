# SPDX-License-Identifier: Apache-2.0
"""Attention with T5's bias for GPUs from Hopper on, as kernels of Pallas Mosaic GPU."""
