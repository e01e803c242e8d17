# SPDX-License-Identifier: Apache-2.0
"""Flash attention for GPU, in Triton."""
