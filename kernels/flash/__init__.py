# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPU, with T5's relative position bias inside the kernels."""
