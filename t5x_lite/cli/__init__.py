# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands: options, .gin arguments, lines in and out, progress."""
