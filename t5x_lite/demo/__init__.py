# SPDX-License-Identifier: Apache-2.0
"""A page on this machine to play with models: python -m t5x_lite.demo --help."""
