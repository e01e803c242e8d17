# SPDX-License-Identifier: Apache-2.0
"""From batches to trained weights: step, losses, optimizer, schedules, checkpoints, progress."""
