# SPDX-License-Identifier: Apache-2.0
"""Models as StableHLO programs with their weights, which run without this package."""
