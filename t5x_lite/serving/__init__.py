# SPDX-License-Identifier: Apache-2.0
"""Serving of texts to many clients: rows of one decoding loop that requests join and leave."""
