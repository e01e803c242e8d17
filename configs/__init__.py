# SPDX-License-Identifier: Apache-2.0
"""The .gin files that ship with the package."""
