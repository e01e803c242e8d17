# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: text to ids and back, their files, special tokens and chat templates."""
