# SPDX-License-Identifier: Apache-2.0
"""Mutation of a file by its format: parsed to a tree, changed at one place, and written again.

A codec is a pair of functions: bytes to a tree of dicts, lists and scalars, and back. What a tree
says is written as it says it: counts, lengths, types and offsets are values of the tree like any
other, and may then contradict what follows them; only framing around them (the length of a header,
a checksum) is made to fit.
"""

import ast
import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import random
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import fuzz_grammars
from fuzz_binary import (
    parse_gguf,
    parse_ocdbt,
    parse_parquet,
    parse_protobuf,
    write_gguf,
    write_ocdbt,
    write_parquet,
    write_protobuf,
)
from fuzz_mutations import BYTES, NUMERALS, TEXT
from fuzz_trees import change_tree

Edit = Callable[[bytes, random.Random], bytes]
# What a JSON writer cannot write and a JSON reader may meet, in place of a value.
LITERALS = [*NUMERALS, *(100_000 * each for each in ("[", '{"a":')), 2000 * "[" + 2000 * "]"]
# A name that stands twice among very many.
LITERALS += ["{" + "".join(f'"{n}":0,' for n in range(50_000)) + '"49999":1}']
LITERALS += [
    "",
    '"\\ud800"',
    '"\\u0000"',
    '"\\x"',
    "'a'",
    "undefined",
    "// x\n1",
    "1,",
    "01",
    '"\t"',
]


class Codec(NamedTuple):
    """A format.

    Attributes:
      parse: bytes to a tree; raises an Exception for bytes of another format.
      write: a tree to bytes; raises an Exception for a tree that cannot be written.
    """

    parse: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


def parse_json(content: bytes) -> Any:
    """The tree of an object or a list."""
    if content[:1] not in (b"{", b"["):
        raise ValueError("neither an object nor a list")
    return json.loads(content)


def write_json(tree: Any) -> bytes:
    """JSON with infinities and lone surrogates as Python writes them."""
    return json.dumps(tree).encode()


def parse_lines(content: bytes) -> list:
    """The trees of JSON lines."""
    return [parse_json(line) for line in content.splitlines()]


def write_lines(tree: list) -> bytes:
    """JSON lines."""
    return b"".join(write_json(each) + b"\n" for each in tree)


def parse_table(delimiter: str, content: bytes) -> list:
    """Cells of the rows of a table."""
    return [*csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter)]


def write_table(delimiter: str, tree: list) -> bytes:
    """A table whose cells are quoted where they need it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(tree)
    return text.getvalue().encode("utf-8", "surrogatepass")


def parse_card(content: bytes) -> dict:
    """Front matter and text of a card of the hub."""
    import yaml

    _, front, text = content.decode().split("---\n", 2)
    return {"front": yaml.safe_load(front), "text": text}


def write_card(tree: dict) -> bytes:
    """A card of the hub."""
    import yaml

    front = yaml.safe_dump(tree["front"])
    return f"---\n{front}---\n{tree['text']}".encode("utf-8", "surrogatepass")


def parse_safetensors(content: bytes) -> dict:
    """The header of a safetensors file, and its numbers."""
    length = int.from_bytes(content[:8], "little")
    return {"header": json.loads(content[8 : 8 + length]), "data": content[8 + length :]}


def write_safetensors(tree: dict) -> bytes:
    """A safetensors file whose first length fits its header."""
    header = write_json(tree["header"])
    return len(header).to_bytes(8, "little") + header + tree["data"]


def parse_npy(content: bytes) -> dict:
    """The header of a .npy file, and its numbers."""
    if not content.startswith(b"\x93NUMPY"):
        raise ValueError("no .npy file")
    end = 10 + int.from_bytes(content[8:10], "little")
    return {"header": ast.literal_eval(content[10:end].decode()), "data": content[end:]}


def write_npy(tree: dict) -> bytes:
    """A .npy file whose header is written as Python writes it."""
    header = f"{tree['header']!r}\n".encode("latin-1", "replace")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header + tree["data"]


def parse_msgpack(content: bytes) -> Any:
    """The tree of a msgpack file of Flax, extensions opened."""
    import msgpack

    def open_extension(code: int, data: bytes) -> dict:
        return {"extension": code, "content": msgpack.unpackb(data, raw=True)}

    return msgpack.unpackb(content, ext_hook=open_extension, raw=False, strict_map_key=False)


def write_msgpack(tree: Any) -> bytes:
    """msgpack; {"extension": ..., "content": ...} is an extension."""
    import msgpack

    def close_extensions(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"extension", "content"}:
            data = msgpack.packb(close_extensions(value["content"]), use_bin_type=False)
            return msgpack.ExtType(value["extension"] % 128, data)
        if isinstance(value, dict):
            return {key: close_extensions(each) for key, each in value.items()}
        return [*map(close_extensions, value)] if isinstance(value, list) else value

    return msgpack.packb(close_extensions(tree))


def pack_zstd(content: bytes) -> bytes:
    """Content as a .zst file."""
    import pyarrow

    return pyarrow.compress(content, "zstd", asbytes=True)


def unpack_zstd(content: bytes) -> bytes:
    """Content of a .zst file."""
    import pyarrow

    packed = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")
    return packed.read(MOST_UNPACKED)


JSON = Codec(parse_json, write_json)
CODECS = [
    (r"\.jsonl$", Codec(parse_lines, write_lines)),
    *(
        (ending, Codec(functools.partial(parse_table, each), functools.partial(write_table, each)))
        for ending, each in ((r"\.tsv$", "\t"), (r"\.csv$", ","))
    ),
    (r"(^|/)README\.md$", Codec(parse_card, write_card)),
    (r"\.safetensors$", Codec(parse_safetensors, write_safetensors)),
    (r"\.npy$", Codec(parse_npy, write_npy)),
    (r"\.gguf$", Codec(parse_gguf, write_gguf)),
    (r"\.model$", Codec(parse_protobuf, write_protobuf)),
    (r"\.parquet$", Codec(parse_parquet, write_parquet)),
    (r"(^|/)manifest\.ocdbt$", Codec(parse_ocdbt, write_ocdbt)),
    (r"^checkpoint$", Codec(parse_msgpack, write_msgpack)),
    (r"", JSON),
]
MOST_UNPACKED = 2**24
# By ending: functions that unpack and pack.
PACKED: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.decompress, functools.partial(gzip.compress, mtime=0)),
    ".bz2": (bz2.decompress, bz2.compress),
    ".xz": (lzma.decompress, lzma.compress),
    ".zst": (unpack_zstd, pack_zstd),
}
GRAMMARS = [
    (r"\.gin$|^bindings\.txt$", fuzz_grammars.change_gin),
    (r"\.jinja$", fuzz_grammars.change_template),
    (r"\.http$", fuzz_grammars.change_request),
]


def mutate_file(path: str, content: bytes, draw: random.Random) -> bytes:
    """A file with one to four things wrong; never the file itself.

    Args:
      path: its path, which with the content says what format it has.
      content: its bytes.
      draw: random generator.
    """
    changed = content
    while changed == content:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            changed = draw.choice(list_edits(path, changed, draw))(changed, draw)
    return changed


def list_edits(path: str, content: bytes, draw: random.Random) -> list[Edit]:
    """The edits of a file, those that know its format more often than others.

    Args:
      path: its path.
      content: its bytes.
      draw: random generator.
    """
    is_text = bool(content) and b"\x00" not in content[:4096]
    edits = [draw.choice(BYTES), *([draw.choice(TEXT)] if is_text else [])]
    edits += 3 * [edit for pattern, edit in GRAMMARS if re.search(pattern, path)]
    if path.endswith(tuple(PACKED)):
        edits += 2 * [functools.partial(change_compressed, path)]
    if path.endswith(".http"):
        edits.append(change_body)
    codec = find_codec(path)
    try:
        tree = codec.parse(content)
    except Exception:  # mutated before, or another format
        return edits
    return edits + 4 * [functools.partial(rewrite, codec, tree)]


def find_codec(path: str) -> Codec:
    """The format of a file by its path; JSON for any that no other is known by."""
    return next(codec for pattern, codec in CODECS if re.search(pattern, path))


def rewrite(codec: Codec, tree: Any, content: bytes, draw: random.Random) -> bytes:
    """Changes one place of a parsed file.

    Args:
      codec: its format.
      tree: its tree.
      content: its bytes, which stay where the changed tree cannot be written.
      draw: random generator.
    """
    if codec is JSON and draw.random() < 0.2:
        return replace_literal(content, draw)
    try:
        return codec.write(change_tree(tree, draw))
    except Exception:  # a value that this format cannot express
        return draw.choice(BYTES)(content, draw)


def replace_literal(content: bytes, draw: random.Random) -> bytes:
    """Writes what is no JSON, or what no writer writes, in place of a value."""
    values = list(re.finditer(rb'(?<=[:\[,])\s*("[^"]*"|[\d.eE+-]+|true|false|null)', content))
    if not values:
        return draw.choice(TEXT)(content, draw)
    where = draw.choice(values).span()
    return content[: where[0]] + draw.choice(LITERALS).encode() + content[where[1] :]


def change_compressed(path: str, content: bytes, draw: random.Random) -> bytes:
    """Changes what a packed file contains, by its own format; or packs it in two parts, or again.

    Args:
      path: path of the file, "data.jsonl.gz".
      content: its bytes.
      draw: random generator.
    """
    ending = next(each for each in PACKED if path.endswith(each))
    unpack, pack = PACKED[ending]
    try:
        inner = unpack(content)
    except Exception:  # mutated before; each library raises its own classes
        return draw.choice(BYTES)(content, draw)
    changed = mutate_file(path.removesuffix(ending), inner, draw)
    middle = draw.randrange(len(changed) + 1)
    parts = pack(changed[:middle]) + pack(changed[middle:])
    return draw.choice((pack(changed), pack(changed), parts, pack(pack(changed))))


def change_body(content: bytes, draw: random.Random) -> bytes:
    """Changes the JSON of a request, whose Content-Length then fits."""
    head, _, body = content.partition(b"\r\n\r\n")
    body = mutate_file("body.json", body or b"{}", draw)
    length = b"Content-Length: %d" % len(body)
    head = re.sub(rb"(?i)content-length:[^\r]*", length, head)
    return head + b"\r\n\r\n" + body
