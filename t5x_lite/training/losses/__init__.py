# SPDX-License-Identifier: Apache-2.0
"""Training losses: cross entropy, distillation, draft heads, early exit."""
