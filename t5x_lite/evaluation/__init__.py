# SPDX-License-Identifier: Apache-2.0
"""What a model's texts are worth: predictions, metrics, losses, and the files they are kept in."""
