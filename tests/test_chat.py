"""Chat templates: rendered as transformers does, and kept from doing harm."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mxconv.chat import ChatTemplate
from mxconv.errors import MalformedInput, UsageError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüß dich, 世界!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  spaces  "},
]
TEMPLATES = [
    # in the manner of MiniMax-M1's own
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<begin_of_document>' + bos_token + 'system ai_setting=assistant\\n' + message['content'] + eos_token + '\\n' }}{% else %}"
    "{{ bos_token + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'ai name=assistant\\n' }}{% endif %}",
    # white space of blocks on lines of their own, loop controls, tojson, a namespace
    "{%- set ns = namespace(n=0) %}\n{% for message in messages %}\n    {% if message.role == 'system' %}\n    {% continue %}\n"
    "    {% endif %}\n    {% set ns.n = ns.n + 1 %}\n[{{ ns.n }}] {{ message | tojson }}\n"
    "{% if ns.n == 2 %}{% break %}{% endif %}\n{% endfor %}\n",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}{{ tools is none }}{{ nothing }}",
    "{{ messages | tojson(indent=2, sort_keys=True) }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ dict(a=1) }}",
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, Path("chat_template.jinja"), {"bos_token": "<bos>", "eos_token": "<eos>"})


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers_renders(source, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=prompt, bos_token="<bos>", eos_token="<eos>"
    )
    assert template(source).render(MESSAGES, generation_prompt=prompt) == rendered[0]


def test_the_prompt_is_asked_for():
    source = TEMPLATES[0]
    assert template(source).render(MESSAGES).endswith("<bos>ai name=assistant\n")
    assert not template(source).render(MESSAGES, generation_prompt=False).endswith("assistant\n")


def test_variables_reach_the_template():
    assert template("{{ tools | length }}{{ thinking }}").render(MESSAGES, tools=[{}], thinking=True) == "1True"


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.open(tmp_path, {}) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    found = ChatTemplate.open(tmp_path, {})
    assert found is not None and (found.render([]), found.where) == ("one", config)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.open(tmp_path, {})
    assert found is not None and found.render([]) == "two"
    (tmp_path / "chat_template.jinja").write_text("three ü")
    found = ChatTemplate.open(tmp_path, {})
    assert found is not None and found.render([]) == "three ü"


@pytest.mark.parametrize("stored", [3, {}, [], [{"name": "tool_use", "template": "x"}], [{"name": "default"}], ["default"]])
def test_a_wrong_chat_template_entry_is_malformed(tmp_path, stored):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    with pytest.raises(MalformedInput, match=r"tokenizer_config\.json"):
        ChatTemplate.open(tmp_path, {})


def test_a_template_that_is_no_text_is_malformed(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(MalformedInput, match="UTF-8"):
        ChatTemplate.open(tmp_path, {})


def test_a_template_may_refuse_messages():
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 99999 }}",
        "{% set ns = namespace(x=2 ** 60) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{% set big = 'x' * 1000000 %}{% for i in range(1000) %}{{ big }}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ messages.append({}) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{% include 'other' %}",
        "{{ '%s'.__mod__(1) }}",
    ],
)
def test_broken_and_hostile_templates_are_malformed_input(source):
    began = time.perf_counter()
    with pytest.raises(MalformedInput) as caught:
        template(source).render(MESSAGES)
    assert "chat_template.jinja" in str(caught.value)
    assert time.perf_counter() - began < 10


def test_time_is_there():
    assert template("{{ strftime_now('%Y') }}").render([]).isdigit()
