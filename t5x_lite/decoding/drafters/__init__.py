# SPDX-License-Identifier: Apache-2.0
"""Drafters: each is one file and one implementation of `protocol.Drafter`."""
