# SPDX-License-Identifier: Apache-2.0
"""Binary formats as trees: GGUF, protocol buffers, Parquet's footer (Thrift), TensorStore's OCDBT.

Written by hand, because a library that writes them refuses what is to be tried: a count that lies,
a type that is unknown, a length past the end.
"""

import struct
from typing import Any

# ---- GGUF (ggml's docs/gguf.md) ----

GGUF_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
GGUF_TEXT, GGUF_ARRAY = 8, 9
WIDEST = 2**64


class Cursor:
    """Position in bytes that are read from the front."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes; raises ValueError past the end."""
        if size < 0 or self.position + size > len(self.content):
            raise ValueError("past the end")
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, code: str) -> Any:
        """The next number, its format as `struct` has it."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def varint(self) -> int:
        """The next number of seven bits a byte."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def ended(self) -> bool:
        """True at the end."""
        return self.position == len(self.content)


def pack_number(code: str, value: Any) -> bytes:
    """A number as bytes, wrapped round where it does not fit."""
    if code in "fd?":
        return struct.pack(f"<{code}", value)
    size = struct.calcsize(f"<{code}")
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


def parse_gguf(content: bytes) -> dict:
    """Header, metadata and table of a .gguf file; the tensors are left as bytes."""
    cursor = Cursor(content)
    tree = {"magic": cursor.take(4), "version": cursor.number("I")}
    tree |= {"tensor_count": cursor.number("Q"), "field_count": cursor.number("Q")}
    tree["fields"] = [parse_gguf_field(cursor) for _ in range(tree["field_count"])]
    tree["tensors"] = [parse_gguf_tensor(cursor) for _ in range(tree["tensor_count"])]
    return tree | {"data": content[cursor.position :]}


def parse_gguf_text(cursor: Cursor) -> dict:
    """A text with its length."""
    length = cursor.number("Q")
    return {"length": length, "text": cursor.take(length)}


def parse_gguf_field(cursor: Cursor) -> dict:
    """A field of the metadata."""
    name, kind = parse_gguf_text(cursor), cursor.number("I")
    return {"name": name, "kind": kind, "value": parse_gguf_value(cursor, kind)}


def parse_gguf_value(cursor: Cursor, kind: int) -> Any:
    """A value of a field of this type."""
    if kind == GGUF_TEXT:
        return parse_gguf_text(cursor)
    if kind == GGUF_ARRAY:
        inner, count = cursor.number("I"), cursor.number("Q")
        values = [parse_gguf_value(cursor, inner) for _ in range(count)]
        return {"kind": inner, "count": count, "values": values}
    return cursor.number(GGUF_SCALARS[kind])


def parse_gguf_tensor(cursor: Cursor) -> dict:
    """A line of the table of tensors."""
    name, dimensions = parse_gguf_text(cursor), cursor.number("I")
    tensor = {"name": name, "dimensions": dimensions}
    tensor["shape"] = [cursor.number("Q") for _ in range(dimensions)]
    return tensor | {"kind": cursor.number("I"), "offset": cursor.number("Q")}


def write_gguf(tree: dict) -> bytes:
    """A .gguf file as its tree says; tensors begin at the next multiple of 32."""
    parts = [tree["magic"], pack_number("I", tree["version"])]
    parts += [pack_number("Q", tree[name]) for name in ("tensor_count", "field_count")]
    for field in tree["fields"]:
        parts += [write_gguf_text(field["name"]), pack_number("I", field["kind"])]
        parts.append(write_gguf_value(field["kind"], field["value"]))
    for tensor in tree["tensors"]:
        parts += [write_gguf_text(tensor["name"]), pack_number("I", tensor["dimensions"])]
        parts += [pack_number("Q", size) for size in tensor["shape"]]
        parts += [pack_number("I", tensor["kind"]), pack_number("Q", tensor["offset"])]
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + tree["data"].lstrip(b"\0")


def write_gguf_text(text: Any) -> bytes:
    """A text, or bytes where the tree has them in its place."""
    if isinstance(text, dict):
        return pack_number("Q", text["length"]) + as_bytes(text["text"])
    return pack_number("Q", len(as_bytes(text))) + as_bytes(text)


def write_gguf_value(kind: int, value: Any) -> bytes:
    """A value, written as its own type says rather than as `kind` where the two differ."""
    if isinstance(value, dict) and "values" in value:
        head = pack_number("I", value["kind"]) + pack_number("Q", value["count"])
        inner = value["kind"]
        return head + b"".join(write_gguf_value(inner, each) for each in value["values"])
    if isinstance(value, dict | str | bytes):
        return write_gguf_text(value)
    return pack_number(GGUF_SCALARS.get(kind, "Q"), value)


def as_bytes(value: Any) -> bytes:
    """A text or bytes as bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


# ---- Protocol buffers (protobuf.dev/programming-guides/encoding) ----


def parse_protobuf(content: bytes) -> list:
    """Fields of a message; those of messages inside it too, as far as they look like some."""
    cursor, fields = Cursor(content), []
    while not cursor.ended():
        key = cursor.varint()
        field = {"number": key >> 3, "wire": key & 7}
        if field["number"] > 10_000 or field["wire"] not in (0, 1, 2, 5):
            raise ValueError("no message")
        match field["wire"]:
            case 0:
                field["value"] = cursor.varint()
            case 1:
                field["value"] = cursor.take(8)
            case 5:
                field["value"] = cursor.take(4)
            case _:
                field["length"] = cursor.varint()
                field["value"] = parse_protobuf_inside(cursor.take(field["length"]))
        fields.append(field)
    return fields


def parse_protobuf_inside(content: bytes) -> Any:
    """A message inside another one, or its bytes."""
    try:
        return parse_protobuf(content) or content
    except ValueError:
        return content


def write_protobuf(tree: list) -> bytes:
    """A message as its tree says; a length is the real one unless the tree changed it."""
    parts = []
    for field in tree:
        parts.append(write_varint(field["number"] << 3 | field["wire"] % 8))
        value = field["value"]
        if "length" in field:
            content = write_protobuf(value) if isinstance(value, list) else as_bytes(value)
            length = field["length"]
            grown = isinstance(length, int) and abs(length - len(content)) <= 2
            parts += [write_varint(len(content) if grown else length), content]
        else:
            parts.append(write_varint(value) if isinstance(value, int) else as_bytes(value))
    return b"".join(parts)


def write_varint(value: int) -> bytes:
    """A number of seven bits a byte; a negative one in ten bytes."""
    value, parts = int(value) % WIDEST, []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


# ---- Parquet (Thrift's compact protocol in the footer) ----

THRIFT_STOP, THRIFT_TRUE, THRIFT_FALSE, THRIFT_BYTE, THRIFT_DOUBLE = 0, 1, 2, 3, 7
THRIFT_BINARY, THRIFT_LIST, THRIFT_SET, THRIFT_STRUCT = 8, 9, 10, 12


def parse_parquet(content: bytes) -> dict:
    """Pages and footer of a Parquet file."""
    if content[-4:] != b"PAR1":
        raise ValueError("no Parquet file")
    length = int.from_bytes(content[-8:-4], "little")
    cursor = Cursor(content[-8 - length : -8])
    return {"pages": content[: -8 - length], "footer": parse_thrift_struct(cursor)}


def write_parquet(tree: dict) -> bytes:
    """A Parquet file whose last length fits its footer."""
    footer = write_thrift_struct(tree["footer"])
    return as_bytes(tree["pages"]) + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def parse_thrift_struct(cursor: Cursor) -> list:
    """Fields of a struct."""
    fields, number = [], 0
    while head := cursor.take(1)[0]:
        number = number + (head >> 4) if head >> 4 else unzigzag(cursor.varint())
        kind = head & 15
        fields.append({"number": number, "kind": kind, "value": parse_thrift(cursor, kind)})
    return fields


def parse_thrift(cursor: Cursor, kind: int) -> Any:
    """A value of this type."""
    match kind:
        case 1 | 2:
            return kind == THRIFT_TRUE
        case 3:
            return cursor.number("b")
        case 7:
            return cursor.number("d")
        case 8:
            return cursor.take(cursor.varint())
        case 9 | 10:
            head = cursor.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else cursor.varint()
            values = [parse_thrift(cursor, head & 15) for _ in range(count)]
            return {"kind": head & 15, "count": count, "values": values}
        case 12:
            return parse_thrift_struct(cursor)
    return unzigzag(cursor.varint())


def write_thrift_struct(fields: list) -> bytes:
    """A struct whose fields are numbered in the long form."""
    parts = []
    for field in fields:
        kind, value = field["kind"] % 16, field["value"]
        if isinstance(value, bool):
            kind = THRIFT_TRUE if value else THRIFT_FALSE
        parts += [bytes([kind]), write_varint(zigzag(field["number"])), write_thrift(kind, value)]
    return b"".join(parts) + bytes(1)


def write_thrift(kind: int, value: Any) -> bytes:
    """A value, written as its own type says rather than as `kind` where the two differ."""
    match value:
        case bool():
            return b""
        case {"kind": inner, "count": count, "values": values}:
            head = bytes([0xF0 | inner % 16]) + write_varint(count)
            return head + b"".join(write_thrift(inner, each) for each in values)
        case list():
            return write_thrift_struct(value)
        case str() | bytes():
            return write_varint(len(as_bytes(value))) + as_bytes(value)
        case float() if kind == THRIFT_DOUBLE:
            return struct.pack("<d", value)
    return pack_number("b", value) if kind == THRIFT_BYTE else write_varint(zigzag(int(value)))


def zigzag(value: int) -> int:
    """A signed number as an unsigned one: 0, -1, 1, -2 are 0, 1, 2, 3."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value // 2 if value % 2 == 0 else -(value // 2) - 1


# ---- OCDBT (tensorstore's kvstore/ocdbt/format) ----


def parse_ocdbt(content: bytes) -> dict:
    """Payload of a manifest or a node between its header and its checksum."""
    if content[:2] != b"\x0c\xdb" or len(content) < 20:
        raise ValueError("not of OCDBT")
    return {"magic": content[:4], "payload": [*content[12:-4]]}


def write_ocdbt(tree: dict) -> bytes:
    """A file whose length and CRC-32C fit its payload."""
    payload = bytes(value % 256 for value in tree["payload"])
    head = tree["magic"] + (len(payload) + 16).to_bytes(8, "little") + payload
    return head + checksum(head).to_bytes(4, "little")


def checksum(content: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes."""
    value = 2**32 - 1
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
    return value ^ (2**32 - 1)
