# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over the vocabulary without an array of all logits: TPU kernels and plain XLA."""
