# SPDX-License-Identifier: Apache-2.0
"""Utilities: suggestions for unknown names, atomic files, exit statuses of commands."""
