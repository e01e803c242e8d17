# SPDX-License-Identifier: Apache-2.0
"""Edits of languages: statements that a grammar allows, written into .gin files, chat templates
and HTTP requests. What they say is extreme; how they say it mostly parses."""

import random
import re

from fuzz_mutations import NUMERALS, TEXTS, replace_span

# A grammar names its parts in capitals; each is replaced by one of its forms, drawn anew. Below
# DEEPEST only first forms are drawn, which have no part of their own kind.
Grammar = dict[str, tuple[str, ...]]
DEEPEST = 4


def write_part(part: str, grammar: Grammar, draw: random.Random, depth: int = 0) -> str:
    """A form of a part of a grammar, its own parts written out.

    Args:
      part: name of the part.
      grammar: the forms of every part.
      draw: random generator.
      depth: parts around it.
    """
    forms = grammar[part]
    form = draw.choice(forms) if depth < DEEPEST else forms[0]

    def write_inner(match: re.Match) -> str:
        return write_part(match[0], grammar, draw, depth + 1)

    return re.sub(rf"\b({'|'.join(grammar)})\b", write_inner, form)


# ---- Gin ----

GIN: Grammar = {
    "VALUE": ("NUMERAL", "TEXT", "NAME", "REFERENCE", "BRACKETS", "LITERAL"),
    "NUMERAL": tuple(NUMERALS),
    "TEXT": tuple(map(repr, TEXTS)),
    "NAME": ("%NAMED", "%A", "%a/A", "%config.Run"),
    "REFERENCE": (
        "@config.CLASS()",
        "@a/b/config.CLASS()",
        "@config.CLASS",
        "@os.system()",
        "@config.CLASS(VALUE)",
    ),
    "CLASS": (
        "Stack",
        "Model",
        "Run",
        "Data",
        "Schedule",
        "Files",
        "Train",
        "Optimizer",
        "Nothing",
    ),
    "BRACKETS": (
        "[]",
        "(VALUE,)",
        "[VALUE, VALUE]",
        "(VALUE, VALUE, VALUE)",
        "{NUMERAL: VALUE, TEXT: VALUE}",
        "{VALUE: VALUE}",
        *(deep * "[" + "VALUE" + deep * "]" for deep in (30, 90, 5000)),
        *(deep * "(" + "VALUE" + deep * ")" for deep in (30, 90, 5000)),
    ),
    "LITERAL": ("None", "True", "'a' 'b'", "'a' " * 3000, "'''a\nb'''", "--1", "1 + 1", "1j")
    + ("-" * 300 + "1", "2 ** 9", "()", "b'a'", "f'{1}'", "...", "lambda: 1", "a.b", "\\\n1"),
    "FILE": ("run.gin", "part.gin", ".", "..", "/etc/passwd", "runs/g2p.gin", "", "a" * 5000),
    "STATEMENT": (
        "NAMED = VALUE",
        "SCOPE/NAMED = VALUE",
        "config.CLASS.name = VALUE",
        "include 'FILE'",
        'include "FILE" # x',
        "import os",
        "from __gin__ import dynamic_registration",
        "A = %B\nB = %C\nC = (%B, %A)\nNAMED = %A",
        "\n".join(f"M{n} = [%M{n + 1}, %M{n + 1}, %M{n + 1}]" for n in range(40)),
        "config.CLASS:\n  a = VALUE\n  b = VALUE",
        "NAMED = " + "\\\n" * 500 + "1",
        "# TEXT",
        "\n" * 5000,
        "config.CLASS()",
        "config.CLASS.seed =",
    ),
    "SCOPE": ("a", "a/b", "encoder", "", "a" * 5000),
}


def change_gin(content: bytes, draw: random.Random) -> bytes:
    """Inserts a statement of Gin, or replaces the value of one."""
    names = re.findall(r"^[ \t]*([\w/.]+)[ \t]*=", content.decode(errors="replace"), re.MULTILINE)
    grammar = GIN | {"NAMED": (draw.choice(names or ["X"]),)}
    values = list(re.finditer(rb"=[ \t]*([^\n]+)", content))
    if values and draw.random() < 0.4:
        value = write_part("VALUE", grammar, draw).encode("utf-8", "surrogatepass")
        return replace_span(content, slice(*draw.choice(values).span(1)), value)
    lines = content.split(b"\n")
    at = draw.choice((0, draw.randrange(len(lines) + 1), len(lines)))
    lines[at:at] = [write_part("STATEMENT", grammar, draw).encode("utf-8", "surrogatepass")]
    return b"\n".join(lines)


# ---- Jinja ----

JINJA: Grammar = {
    "STATEMENT": (
        "{{ VALUE }}",
        "{{ VALUE }}",
        "{% for a in range(SIZE) %}STATEMENT{% endfor %}",
        "{% for a in VALUE %}STATEMENT{% endfor %}",
        "{% for a in range(SIZE) %}{% for b in range(SIZE) %}{% endfor %}{% endfor %}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}STATEMENT{% endmacro %}{{ f(1) }}",
        "{% set a = VALUE %}STATEMENT",
        "{% set n = namespace(a='x') %}{% for i in range(40) %}{% set n.a = 2 * n.a %}{% endfor %}",
        "{% if VALUE %}STATEMENT{% elif VALUE %}{% else %}STATEMENT{% endif %}",
        "{% filter FILTER %}STATEMENT{% endfilter %}",
        "{% call(x) f() %}STATEMENT{% endcall %}",
        "{% generation %}STATEMENT{% endgeneration %}",
        *(f"{{% {tag} %}}" for tag in ("break", "continue", "raw", "block b", "nothing", "do x")),
        *(f"{{% {tag} 'a' %}}" for tag in ("include", "extends", "import", "from")),
        "{{ raise_exception(VALUE) }}",
        *(f"{{{{ strftime_now('{form}') }}}}" for form in ("%Y", "%", "%9999999Y", 100_000 * "x")),
        *("{{ " + deep * "(" + "1" + deep * ")" + " }}" for deep in (300, 50_000)),
        "{% " + 3000 * "if 1 %}{% ",
    ),
    "VALUE": (
        "SIMPLE",
        "SIMPLE",
        "(VALUE OPERATOR VALUE)",
        "('a' * SIZE)",
        "([VALUE] * SIZE)",
        "(VALUE|FILTER)",
        "(VALUE|FILTER|FILTER)",
        "(VALUE is TEST)",
        "VALUE[VALUE]",
        "VALUE[::SIZE]",
        "VALUE.METHOD",
        "(VALUE if VALUE else VALUE)",
        *(f"'{{:>{width}}}'.format(VALUE)" for width in ("9", "99999999999")),
        *(f"('%{width}d' % VALUE)" for width in ("9", "99999999999", ".99999999999")),
        "SIMPLE(VALUE)",
    ),
    "SIMPLE": tuple(
        "messages|messages[0]|messages[0].role|1|'a'|none|nothing|[1, 'a']|{'a': 1, 2: 'b'}|true|"
        "add_generation_prompt|bos_token|loop|self|1.5|lipsum|cycler('a')|joiner()|dict(a=1)|tools|"
        "range(SIZE)|lipsum(n=SIZE)|''.__class__.__mro__|namespace|caller()|raise_exception".split(
            "|"
        )
    ),
    "SIZE": (
        "3",
        "0",
        "-1",
        "10**3",
        "10**5",
        "10**7",
        "10**10",
        "9**9**9",
        "2**64",
        "1e308",
        "none",
    ),
    "OPERATOR": ("+", *"- * / // % ** ~ == < in and or".split()),
    "TEST": ("defined", *"none string mapping iterable number callable divisibleby(0) odd".split()),
    "METHOD": tuple(
        "a items() append(1) join(messages) __init__ pop() center(SIZE) ljust(SIZE) zfill(SIZE) "
        "expandtabs(SIZE) split(VALUE) replace('a',VALUE) encode() translate(VALUE) update(VALUE) "
        "format_map(VALUE) index(VALUE) splitlines() bit_length() __class__.__base__".split(" ")
    ),
    "FILTER": tuple(
        "length abs attr('__class__') batch(SIZE,'x') capitalize center(SIZE) default('') dictsort "
        "escape filesizeformat first float forceescape format(SIZE) groupby('role') indent(SIZE) "
        "int(base=SIZE) items join('x') last list lower map('upper') map(attribute='role') max min "
        "pprint random reject('none') rejectattr('a') replace('a','b'*SIZE) reverse round(SIZE) "
        "safe select selectattr('a') slice(SIZE) sort(attribute='x') string striptags sum title "
        "tojson(indent=SIZE) tojson trim truncate(SIZE) unique upper urlencode urlize wordcount "
        "wordwrap(SIZE) wordwrap xmlattr nothing".split(" ")
    ),
}


def change_template(content: bytes, draw: random.Random) -> bytes:
    """Inserts a statement of Jinja between two others."""
    places = [match.end() for match in re.finditer(rb"[%}]}|\n", content)] or [0]
    at = draw.choice((0, len(content), draw.choice(places)))
    inserted = write_part("STATEMENT", JINJA, draw).encode("utf-8", "surrogatepass")
    return replace_span(content, slice(at, at), inserted)


# ---- HTTP ----

METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "PRI", "get", "G" * 9000, "")
TARGETS = (
    "/",
    "/write",
    "/models",
    "/%00",
    "/" + "a" * 70_000,
    "*",
    "http://evil/",
    "/../../etc",
    "",
)
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "", "HTTP/1.1\x00")
HEADERS = (
    "Content-Length: 0",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: 5, 6",
    "Content-Length: +5",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 3",
    "Host: evil.example",
    "Host: localhost:99999999",
    "Host: [::1",
    "Host:",
    "Content-Type: application/json; charset=utf-16",
    "Content-Type: text/plain",
    "Expect: 100-continue",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    "Connection: keep-alive, close",
    "X: " + "a" * 70_000,
    "\r\n".join(f"X{n}: 1" for n in range(3000)),
    "X-\xff: \xfe",
    " folded: line",
    "no colon",
    "Range: bytes=0-99999999999",
    "Cookie: " + ";" * 5000,
)
CHUNKS = (
    b"5\r\nhello\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFF\r\nx",
    b"-1\r\n",
    b"5;a=b\r\nhello\r\n",
    b"zz\r\n",
)


def change_request(content: bytes, draw: random.Random) -> bytes:
    """Changes the first line, the headers or the framing of a request; its body is JSON."""
    head, _, body = content.partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    kind = draw.randrange(6)
    if kind == 0:
        words = (draw.choice(METHODS), draw.choice(TARGETS), draw.choice(VERSIONS))
        first = " ".join(words).encode("latin-1")
    elif kind == 1 and headers:
        headers.pop(draw.randrange(len(headers)))
    elif kind == 2:
        headers = [each for each in headers if not each.lower().startswith(b"content-length")]
        headers.append(b"Transfer-Encoding: chunked")
        body = draw.choice((*CHUNKS, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)))
    elif kind == 3:
        return draw.choice((content * 20, content + b"x", head, content.replace(b"\r\n", b"\n")))
    else:
        at = draw.randrange(len(headers) + 1)
        headers.insert(at, draw.choice(HEADERS).encode("latin-1"))
    return b"\r\n".join([first, *headers]) + b"\r\n\r\n" + body
