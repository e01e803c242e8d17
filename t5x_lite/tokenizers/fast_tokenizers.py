# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the tokenizers library, loaded from a tokenizer.json that may be hostile.

The library is Rust: where it runs out of memory it ends the process, so that what a file can make
of a text is bounded before it sees one. Its panics become ValueErrors where it is called.
"""

import base64
import json
import re
from typing import Any

from t5x_lite.tokenizers.errors import panics_as_errors

# The largest vocabularies have some hundred thousand.
MAX_IDS = 10**7
# Characters that the rules of a file may make of one, and ids that it may put around a text. Those
# of published tokenizers stay below a hundred.
MAX_GROWTH = 1000
# Bytes that Unicode itself makes of one character at most (NFKC of U+FDFA has 33).
UNICODE_GROWTH = 33
TABLE = b'"precompiled_charsmap"'
# An ASCII character written as an escape, which no JSON writer does: a name may hide in it.
ESCAPED = re.compile(rb"\\u00[2-7]")


def load_fast_tokenizer(content: bytes) -> Any:
    """Loads a tokenizer.json as a tokenizers.Tokenizer that neither pads nor truncates.

    Raises:
      ValueError: it is not one, or its rules make too much of a text.
    """
    import tokenizers

    check_tables(content)
    with panics_as_errors():
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer_size(tokenizer)
    check_growth(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def drop_tokens_from(text: bytes, ids: int) -> bytes:
    """A tokenizer.json without added tokens from id `ids` on, which the model has no weights for.

    Gemma 3's tokenizer has a token for images, which its smallest model, for text alone, lacks.
    """
    content = json.loads(text)
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < ids]
    return json.dumps(content, ensure_ascii=False).encode()


def check_tables(content: bytes) -> None:
    """Checks the sizes that a tokenizer.json says of its normalizers' tables: the library allocates
    them before it compares them with what is there.

    Raises:
      ValueError: a table is cut off, or the file is not JSON.
    """
    if TABLE not in content and not ESCAPED.search(content):
        return  # large vocabularies take a second to parse

    def check_table(value: dict[str, Any]) -> None:
        table = normalizer_table(value)
        if table and 4 + int.from_bytes(table[:4], "little") > len(table):
            raise ValueError("the table of its normalizer is cut off")

    try:
        json.loads(content, object_hook=check_table)
    except RecursionError as error:
        raise ValueError(f"it is nested too deep ({error})") from error


def normalizer_table(rule: dict[str, Any]) -> bytes:
    """The table of SentencePiece's normalizer: the size of a trie, the trie, then texts, each ended
    by a zero byte; empty for another rule, or for what the library does not read."""
    try:
        return base64.b64decode(rule.get("precompiled_charsmap") or "", validate=True)
    except (TypeError, ValueError):
        return b""


def tokenizer_size(tokenizer: Any) -> int:
    """One more than the highest id of a tokenizer of the tokenizers library.

    Raises:
      ValueError: no vocabulary has this size. When it writes such a tokenizer, the library would
        allocate a place for each id below it, and end the process where memory does not suffice.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > MAX_IDS:
        raise ValueError(f"a token has id {size - 1:,}; no vocabulary has {MAX_IDS:,} ids")
    return size


def check_growth(tokenizer: Any) -> None:
    """Checks that the rules of a tokenizer make no more of a text than MAX_GROWTH times itself.

    Raises:
      ValueError: they may.
    """
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    factors = {
        "normalizer": rule_growth(component(tokenizer.normalizer)),
        "decoder": rule_growth(component(tokenizer.decoder)),
        "model": rule_growth({name: getattr(tokenizer.model, name, None) for name in affixes}),
        "post_processor": ids_around(component(tokenizer.post_processor)),
    }
    for name, factor in factors.items():
        if factor > MAX_GROWTH:
            raise ValueError(
                f"its {name} may make a text {min(factor, 10**12):,.0f} times as long, more than "
                f"{MAX_GROWTH:,} times: no published tokenizer does"
            )


def component(part: Any) -> Any:
    """A part of a tokenizer as JSON values; None where it has none."""
    return None if part is None else json.loads(part.__getstate__())


def rule_growth(rule: Any) -> float:
    """Bound on the characters that a rule, or all rules in it, make of one."""
    if not isinstance(rule, dict):
        return 1.0
    factor = 1.0
    for part in ("normalizers", "decoders"):
        for each in rule.get(part) or ():
            factor = min(factor * rule_growth(each), 1e300)
    for name in ("prepend", "continuing_subword_prefix", "end_of_word_suffix"):
        factor *= 1 + text_length(rule.get(name))
    if rule.get("type") == "Precompiled":
        factor *= max(1.0, longest_replacement(rule) / UNICODE_GROWTH)
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        fixed = text_length(pattern.get("String")) if isinstance(pattern, dict) else 0
        content = text_length(rule.get("content"))
        # An expression may match nothing, before every character.
        factor *= max(1.0, content / fixed) if fixed else content + 1
    return factor


def text_length(value: Any) -> int:
    """Characters of a text; 0 of anything else."""
    return len(value) if isinstance(value, str) else 0


def longest_replacement(rule: dict[str, Any]) -> int:
    """Bytes of the longest text in the table of a normalizer."""
    table = normalizer_table(rule)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0)


def ids_around(rule: Any) -> int:
    """Ids that a post-processor puts around a text."""
    if not isinstance(rule, dict):
        return 0
    count = sum(ids_around(each) for each in rule.get("processors") or ())
    special, pieces = rule.get("special_tokens"), rule.get("single")
    if not isinstance(special, dict) or not isinstance(pieces, list):
        return count
    for piece in pieces:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        entry = special.get(token.get("id")) if isinstance(token, dict) else None
        ids = entry.get("ids") if isinstance(entry, dict) else None
        count += len(ids) if isinstance(ids, list) else 0
    return count
