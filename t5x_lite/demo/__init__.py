# SPDX-License-Identifier: Apache-2.0
"""A local page to try models: python -m t5x_lite.demo --help."""
