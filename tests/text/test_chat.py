from pathlib import Path

import pytest

from paceline.errors import CheckpointError, PromptError
from paceline.text import ChatTemplate

# The shape of Gemma 4's own template, in short.
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- "<|turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
    {{- message.content | trim }}{{ "<turn|>\\n" }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ "<|turn>model\\n" }}{% endif %}
"""
MESSAGES = [{"role": "user", "content": " Hi <b> & é "}]


def test_render() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "<bos>"})
    assert template.render(MESSAGES) == "<bos><|turn>user\nHi <b> & é<turn|>\n<|turn>model\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<bos><|turn>user\nHi <b> & é<turn|>\n"


def test_helpers_agree_with_transformers() -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        TEMPLATE
        + "{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}\n    {{ x }}\n    {% endfor %}\n{{ extra }}"
    )
    tools = [{"name": "größe", "parameters": {"a": "<1>"}}]
    theirs, _ = chat.render_jinja_template([MESSAGES], tools=tools, chat_template=source, bos_token="<bos>", extra="x")
    ours = ChatTemplate(source, {"bos_token": "<bos>"})
    assert ours.render(MESSAGES, add_generation_prompt=False, tools=tools, extra="x") == theirs[0]


def test_the_template_can_refuse() -> None:
    with pytest.raises(PromptError, match="unknown role robot") as caught:
        ChatTemplate(TEMPLATE, {}).render([{"role": "robot", "content": ""}])
    assert "\n" not in str(caught.value)


def test_a_failing_template_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="--raw"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render(MESSAGES)


def test_templates_cannot_reach_python() -> None:
    with pytest.raises(PromptError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render(MESSAGES)


def test_invalid_jinja() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("\n{% if %}", {}).check()


def test_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES).isdigit()


def test_open(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    assert ChatTemplate.open(path, {}) is None
    in_settings = {"chat_template": "S{{ bos_token }}", "bos_token": {"content": "<bos>"}}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for settings, expected in ((in_settings, "S<bos>"), ({"chat_template": named}, "D")):
        template = ChatTemplate.open(path, settings)
        assert template is not None
        assert template.render(MESSAGES) == expected
    path.write_text("F{{ bos_token }}")
    template = ChatTemplate.open(path, in_settings)
    assert template is not None
    assert template.render(MESSAGES) == "F<bos>"  # the file of its own wins
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        ChatTemplate.open(path, {})
