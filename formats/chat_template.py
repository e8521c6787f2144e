"""The chat template of exported models in Jinja; no message can spell a control token.

It renders what `Tokenizer.encode_chat` encodes and refuses what `check_messages` refuses. Two
variants differ in how they escape a control token that is spelled in a message:

- For transformers, "<|" is rendered with U+FDD0 and "1" in between, so that the tokenizer finds no
  control token there, and the normalizer in tokenizer.json removes them again: the ids are exactly
  those of `encode_chat`.
- A GGUF has no normalizer, and llama.cpp parses every control token in the rendered text, so a
  space splits it ("< |user|>"). Nothing else is changed. transformers.js has it too, where a text
  that equals a control token after the normalizer is one, and onnxruntime-genai, whose engine
  cannot replace: it splits and joins.
"""

from string import Template

from common.byte_level import TEMPLATE_MARK
from tokenizer import ASSISTANT, CONTROL_TOKENS, END_OF_TEXT, START_OF_TEXT, USER

# Unicode reserves this code point as a noncharacter. In rendered text it is written MARK + "0", and
# "<" + MARK + "1|" stands for "<|".
MARK = TEMPLATE_MARK
COMMENT = """\
{#- U+FDD0 keeps text from spelling a control token; the normalizer in tokenizer.json undoes it. -#}
"""
TEMPLATE = Template("""\
{%- macro text(content) -%}
{{- $escaped_content -}}
{%- endmacro -%}
{%- if not messages -%}
{{- raise_exception("a conversation is a non-empty list of messages") -}}
{%- endif -%}
{{- "$start_of_text" -}}
{%- for message in messages -%}
{%- set expected = "user" if loop.index0 % 2 == 0 else "assistant" -%}
{%- if message["role"] != expected or message["content"] is not string -%}
{{- raise_exception("roles alternate user and assistant, starting with user, each with text") -}}
{%- endif -%}
{%- if expected == "user" -%}
{{- "$user" + text(message["content"]) -}}
{%- else -%}
{{- "$assistant" -}}
$begin_answer{{- text(message["content"]) + "$end_of_text" -}}
$end_answer{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]["role"] != "user" -%}
{{- raise_exception("add_generation_prompt needs a user turn at the end") -}}
{%- endif -%}
{{- "$assistant" -}}
{%- endif -%}
""")


CONTROL_TOKEN_NAMES = {
    "start_of_text": START_OF_TEXT,
    "end_of_text": END_OF_TEXT,
    "user": USER,
    "assistant": ASSISTANT,
}


def hf_chat_template() -> str:
    """The template for transformers; generation tags enclose answers, for training masks."""
    return COMMENT + TEMPLATE.substitute(
        CONTROL_TOKEN_NAMES,
        escaped_content=f'content | replace("{MARK}", "{MARK}0") | replace("<|", "<{MARK}1|")',
        begin_answer="{%- generation -%}\n",
        end_answer="{%- endgeneration -%}\n",
    )


def plain_chat_template() -> str:
    """The template for llama.cpp, transformers.js and others, without generation tags."""
    content = "content"
    for name in CONTROL_TOKENS:
        content = f'({content}.split("{name}") | join("< {name[1:]}"))'
    return TEMPLATE.substitute(
        CONTROL_TOKEN_NAMES, escaped_content=content, begin_answer="", end_answer=""
    )
