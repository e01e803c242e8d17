# SPDX-License-Identifier: Apache-2.0
"""Rules that accept draft tokens, and statistics of what they accept."""
