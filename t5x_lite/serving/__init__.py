# SPDX-License-Identifier: Apache-2.0
"""Serving of texts to many clients: a server with OpenAI's routes, over rows of one decoding loop
that requests join and leave."""
