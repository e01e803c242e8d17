# SPDX-License-Identifier: Apache-2.0
"""Decoding of models that fill masked blocks (Model.canvas): passes over a block, over a cache."""
