# SPDX-License-Identifier: Apache-2.0
"""Laws of chat templates: prompts exactly as transformers writes them, errors that explain."""

import json
import random

import pytest
from conftest import mark_exhaustive

from t5x_lite.tokenizers import chat

CHATML = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant<|im_end|>
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

INST = """\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}
{%- for message in messages -%}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""

TURNS = """\
{{ bos_token }}{% for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

TOOLS = """\
{%- macro header(role) -%}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro -%}
{{- bos_token }}
{%- if tools is not none %}{{ header('system') }}Today: {{ strftime_now('%d %b %Y') }}
{%- for tool in tools %}

{{ tool | tojson(indent=4) }}{% endfor %}<|eot_id|>{% endif %}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages %}
  {%- if message.role == 'skip' %}{% continue %}{% endif %}
  {%- if message.role == 'stop' %}{% break %}{% endif %}
{{ header(message.role) }}
  {%- if message.tool_calls is defined %}{{ message.tool_calls[0].function | tojson }}
  {%- elif message.content is string %}{{ message.content }}
  {%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif -%}
  {%- if loop.index0 == ns.last %} (last){% endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""

THINKING = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set given = message.reasoning_content %}
        {%- set reasoning = given if given is string else '' %}
{% generation %}{{ '<think>' + reasoning + '</think>' + message.content }}{% endgeneration %}
    {%- else %}
{{ '<|' + message.role + '|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not (enable_thinking is defined and not enable_thinking) %}
<think>
{% endif %}"""

TEMPLATES = {"chatml": CHATML, "inst": INST, "turns": TURNS, "tools": TOOLS, "think": THINKING}

TALK = [
    {"role": "user", "content": "  Grüße 東京 <b>&amp;</b> \n"},
    {"role": "assistant", "content": "👩‍👩‍👧 ok", "thinking": "hm"},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TALKS = {
    "one": TALK[:1],
    "three": TALK,
    "system": [{"role": "system", "content": "Be brief."}, *TALK],
    "empty": [{"role": "user", "content": "", "name": None}],
}
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"<x>": [1, 2.5, None]}}}
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "skip", "content": "never"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}]},
    {"role": "stop", "content": "never"},
    {"role": "user", "content": "never"},
]


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def both(tokenizer, template, messages, prompt, **more):
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **more
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | more
    return chat.render_chat(template, messages, add_generation_prompt=prompt, **tokens), theirs


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(tokenizer, name, talk, prompt):
    ours, theirs = both(tokenizer, TEMPLATES[name], TALKS[talk], prompt)
    assert ours == theirs
    assert any(message["content"].strip() in ours for message in TALKS[talk])


def test_tools_calls_and_parts_are_those_of_transformers(tokenizer):
    ours, theirs = both(tokenizer, TOOLS, CALLS, True, tools=[TOOL])
    assert ours == theirs
    assert "größe" in ours and "never" not in ours


def test_what_a_template_asks_for_is_passed_on(tokenizer):
    ours, theirs = both(tokenizer, THINKING, TALK, True, enable_thinking=False)
    assert ours == theirs
    assert not ours.endswith("<think>\n")


@pytest.mark.parametrize(
    "template, messages, error",
    [
        (CHATML, [], "at least one message"),
        (CHATML, ["hello"], "A chat message is"),
        (CHATML, [{"role": "user", "content": b"bytes"}], "plain JSON values"),
        (CHATML, [{"role": "user", "content": 7}], "fails on these messages: TypeError"),
        (INST, 2 * TALK[:1], "refuses these messages: Conversation roles must alternate"),
        ("\n{% if messages %}", TALK, "broken, line 2"),
        ("{% nonsense %}", TALK, "broken, line 1"),
        ("{{ messages.append(1) }}", TALK, "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", TALK, "refuses these messages"),
        ("{{ cycler.__init__.__globals__ }}", TALK, "refuses these messages"),
        ("{% for x in range(10**9) %}{% endfor %}", TALK, "fails on these messages: Overflow"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TALK, "RecursionError"),
    ],
)
def test_an_error_says_what_is_wrong(template, messages, error):
    with pytest.raises(ValueError, match=error):
        chat.render_chat(template, messages, bos_token="<s>", eos_token="</s>")


def test_messages_are_not_changed():
    before = json.dumps(TALK)
    chat.render_chat(THINKING, TALK)
    assert json.dumps(TALK) == before


def test_a_folder_keeps_its_template_in_either_place(tmp_path):
    assert chat.read_chat_template(tmp_path) is None
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TURNS}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(settings))
    assert chat.read_chat_template(tmp_path) == chat.ChatTemplate(
        TURNS, {"bos_token": "<s>", "eos_token": "</s>"}
    )
    several = [{"name": "default", "template": TURNS}, {"name": "tool_use", "template": TOOLS}]
    config.write_text(json.dumps(settings | {"chat_template": several}))
    assert chat.read_chat_template(tmp_path, "tool_use").template == TOOLS
    with pytest.raises(ValueError, match="has no chat template 'rag'; it has default, tool_use"):
        chat.read_chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert chat.read_chat_template(tmp_path).template == CHATML


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}"
    ),
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a wide text": "{{ 'a'.ljust(10**10) }}",
    "a doubled text": "{% set ns = namespace(x='ab') %}"
    "{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a filled list": "{{ [1] | batch(10**9, 'x') | list }}",
    "a long prompt": "{{ 'a' * 3 * 10**7 }}",
    "another error": "{{ 1 | dictsort }}",
    "no attribute": "{{ messages | map(attribute='x.y') | sort | first | batch }}",
    "a format": "{{ '%s %d' | format(1) }}",
    "a deep expression": "{{ " + "(" * 500 + ")" * 500 + " }}",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # A macro is another loop to its limit of time.
    mark_exhaustive(HOSTILE, kept=HOSTILE.keys() - {"a macro that calls itself twice"}),
)
def test_no_template_outlasts_or_outgrows_its_process(name):
    with pytest.raises(ValueError, match="^The chat template "):
        chat.render_chat(HOSTILE[name], TALK)
    assert chat.render_chat("{{ messages[0].content }}", TALK) == TALK[0]["content"]


def hostile_templates():
    """Every filter and test on every kind of value, and templates of models cut and spliced."""
    from jinja2 import defaults

    for value in ("1", "'a'", "none", "[]", "{}", "messages", "x", "x.y", "1.5", "true"):
        yield from ("{{ " + value + " | " + name + " }}" for name in defaults.DEFAULT_FILTERS)
        yield from ("{{ " + value + " is " + name + " }}" for name in defaults.DEFAULT_TESTS)
    draw, texts = random.Random(7), list(TEMPLATES.values())
    for _ in range(400):
        first, second = draw.choice(texts), draw.choice(texts)
        cuts = draw.randrange(len(first)), draw.randrange(len(second))
        yield first[: cuts[0]] + second[cuts[1] :]


def test_whatever_goes_wrong_is_an_error_of_the_template():
    refused = 0
    for template in hostile_templates():
        try:
            chat.render_chat(template, TALK, bos_token="<s>", eos_token="</s>")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("The chat template "), template
    assert refused > 300


def test_the_process_of_templates_is_started_anew_when_it_is_gone():
    chat.render_chat("a", TALK)
    chat.RENDERER.process.kill()
    chat.RENDERER.process.wait()
    with pytest.raises(ValueError, match="does not come to an end"):
        chat.render_chat("a", TALK)
    assert chat.render_chat("a", TALK) == "a"


def test_what_ends_a_turn_is_found_by_rendering_one():
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def ending(template):
        return chat.end_of_turn(chat.ChatTemplate(template, tokens)).strip()

    assert ending(CHATML) == "<|im_end|>"
    assert ending(INST) == "</s>"
    assert ending(TURNS) == "<end_of_turn>"
    assert ending("{{ raise_exception('never') }}") == ending("{{ x.y.z }}") == ""
