# SPDX-License-Identifier: Apache-2.0
"""Every reader of the product that takes bytes which another party could have written."""

import fuzz_checkpoint_targets
import fuzz_record_targets
import fuzz_text_targets

TARGETS = fuzz_text_targets.TARGETS | fuzz_checkpoint_targets.TARGETS | fuzz_record_targets.TARGETS
