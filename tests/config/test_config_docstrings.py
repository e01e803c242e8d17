# SPDX-License-Identifier: Apache-2.0
"""Law of the config's docstrings: each names the fields that there are, in their order."""

import dataclasses
import inspect
import re

import pytest

from t5x_lite import config
from t5x_lite.config import gin_check


@pytest.mark.parametrize("name", gin_check.dataclass_names())
def test_a_docstring_names_every_field(name):
    owner = getattr(config, name)
    fields = [field.name for field in dataclasses.fields(owner)]
    text = inspect.getdoc(owner)
    if len(fields) < 3 and "Attributes:" not in text:
        assert all(f"`{field}`" in text for field in fields)
        return
    attributes = text.partition("Attributes:\n")[2]
    assert re.findall(r"^  (\w+): \S", attributes, re.MULTILINE) == fields
