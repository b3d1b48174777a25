"""Dialogue in gptlab's special tokens, as the Jinja template by which other programs render it.

A turn is its role's token, the content, and `<|end|>`; the first turn comes after the end of the text before.
"""

from collections.abc import Sequence

from gptlab.tokenizer import SPECIAL_TOKENS

END = "<|end|>"
# {% generation %} marks what a model is to learn, for whoever trains with the template (trl's assistant_only_loss)
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- message['content'] or '' -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '<tool_call>' + ((call['function'] or call) | tojson) + '</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endgeneration -%}
{%- elif message['role'] == 'tool' -%}
{{- '<|tool|><tool_response>' + message['content'] + '</tool_response><|end|>' -}}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>' + message['content'] + '<|end|>' -}}
{%- elif message['role'] == 'system' -%}
{{- '<|system|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('a role is one of system, user, assistant, tool; not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def chat_template(names: Sequence[str], generation: bool = True) -> str | None:
    """The template for a vocabulary in which the special tokens are called `names`; None where it has none for turns.

    Without `generation` it has no tag but Jinja's own.
    """
    if len(names) < len(SPECIAL_TOKENS):
        return None
    template = TEMPLATE
    for token, name in zip(SPECIAL_TOKENS, names, strict=True):
        template = template.replace(token, name)
    if not generation:
        template = template.replace("{%- generation -%}\n", "").replace("{%- endgeneration -%}\n", "")
    return template
