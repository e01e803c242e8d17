# SPDX-License-Identifier: Apache-2.0
"""A user's files of two fields, and what is read from them."""

from t5x_lite import config
from t5x_lite.data import files
from t5x_lite.data.corpora import TextExample

BYTES = config.Vocabulary("bytes")
GOOD = '{"de": "the dog", "en": "the cat"}'
# Texts that are quoted in a table, and some that are not.
CELLS = ['She said "yes"', "a\tb", "two\nlines", "plain", '"', '""', "", " 'a', b"]


def described(pattern, **changes) -> config.Files:
    fields = dict(name="toy", train=str(pattern), vocabulary=BYTES, inputs="de", targets="en")
    return config.Files(**(fields | changes))


def read(cfg: config.Files, counts=None) -> list[TextExample]:
    return list(files.read_rows(cfg, "train", counts))
