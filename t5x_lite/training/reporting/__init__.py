# SPDX-License-Identifier: Apache-2.0
"""Progress and results of a training run: metrics, curves, overview, dry run."""
