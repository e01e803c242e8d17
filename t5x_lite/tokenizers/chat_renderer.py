# SPDX-License-Identifier: Apache-2.0
"""Rendering of chat templates, as a program: a request per line in, a reply per line out.

A template may loop for ever or fill the memory in ways that no sandbox can stop from inside, so
that `chat` runs this file as a process whose CPU time and memory the system limits. It imports
nothing of t5x_lite.

Beyond Jinja, templates may use what transformers offers them: tojson without HTML escapes,
raise_exception, strftime_now, {% generation %}, {% break %}, {% continue %}.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

# Of one template; published ones take milliseconds.
CPU_SECONDS = 5
MEMORY = 2**30  # bytes of address space
MAX_CHARACTERS = 10_000_000  # of a prompt


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> Any:
    """Compiles a template in a sandbox: it cannot change its variables or reach Python itself."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's part for training; in a prompt it does nothing."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    offered = {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template, globals=offered)


def reply_to(request: dict[str, Any]) -> dict[str, str]:
    """Renders a template with variables; whatever goes wrong is an error of the template."""
    import jinja2

    try:
        text = compile_template(request["template"]).render(request["variables"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"The chat template is broken, line {error.lineno}: {str(error)[:500]}"}
    except jinja2.TemplateError as error:
        return {"error": f"The chat template refuses these messages: {str(error)[:500]}"}
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:500]}"
        return {"error": f"The chat template fails on these messages: {text}"}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"The chat template writes more than {MAX_CHARACTERS:,} characters"}
    return {"text": text}


def limit_resources() -> None:
    """Limits the memory of this process, and its CPU time from now on."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Replies to every request until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    for line in sys.stdin.buffer:
        limit_resources()
        reply = reply_to(json.loads(line))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
