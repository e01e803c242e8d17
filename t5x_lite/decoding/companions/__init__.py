# SPDX-License-Identifier: Apache-2.0
"""Companions: second logits of the same text, which a rule combines with the model's."""
