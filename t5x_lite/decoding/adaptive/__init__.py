# SPDX-License-Identifier: Apache-2.0
"""Draft lengths chosen while decoding, from acceptance rates and measured latencies."""
