# SPDX-License-Identifier: Apache-2.0
"""What a step needs, before anything is rented: compiled for chips that are not there."""
