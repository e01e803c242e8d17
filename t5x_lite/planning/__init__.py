# SPDX-License-Identifier: Apache-2.0
"""Cost of a step before anything is rented: compiled for chips that are not there."""
