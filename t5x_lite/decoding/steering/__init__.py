# SPDX-License-Identifier: Apache-2.0
"""Logits processors: what the text so far changes about the choice of the next token."""
