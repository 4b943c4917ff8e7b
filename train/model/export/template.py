"""A run's prompt as a chat template (Jinja), which goes into `chat_template.jinja`."""

from __future__ import annotations

import json
import re

from train.model.export.markers import SEAM, SPEECH

# In a user's turn the instruction is its first part, or else its last, if that is text; what it is
# about stands between seams. An instruction that holds "{input}" itself has it in its own place
# (see `data.prompts`).
_TEMPLATE = """\
{%- set speech, seam = <SPEECH>, <SEAM> -%}
{%- macro plain(text) -%}
    {%- if speech in text or seam in text -%}
        {{- raise_exception('a text may not hold ' ~ speech ~ ' or ' ~ seam) -}}
    {%- endif -%}
    {{- text -}}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('messages must alternate between user and assistant, beginning with \
user: message ' ~ loop.index0 ~ ' is of ' ~ message.role) -}}
    {%- endif -%}
    {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string \
else message.content -%}
    {%- if message.role == 'assistant' -%}
        {%- for part in parts -%}{{- plain(part.text) -}}{%- endfor -%}{{- eos_token ~ seam -}}
    {%- else -%}
        {%- if parts and parts[0].type == 'text' -%}
            {%- set instruction, about = parts[0].text, parts[1:] -%}
        {%- elif parts and parts[-1].type == 'text' -%}
            {%- set instruction, about = parts[-1].text, parts[:-1] -%}
        {%- else -%}
            {%- set instruction, about = '', parts -%}
        {%- endif -%}
        {%- set input -%}
            {{- seam -}}
            {%- for part in about -%}
                {%- if part.type == 'audio' -%}{{- speech -}}
                {%- elif part.type == 'text' -%}{{- plain(part.text) -}}
                {%- else -%}
                    {{- raise_exception('a part must be text or audio, found ' ~ part.type) -}}
                {%- endif -%}
                {{- seam -}}
            {%- endfor -%}
        {%- endset -%}
        {%- set own = plain(instruction).split('{input}') -%}
        {%- if own | length > 2 -%}
            {{- raise_exception('an instruction may hold {input} once') -}}
        {%- endif -%}
        {{- <HEAD> -}}
        {%- if own | length == 2 -%}{{- own[0] ~ input ~ own[1] -}}
        {%- else -%}{{- <FIRST> ~ <BETWEEN> ~ <SECOND> -}}{%- endif -%}
        {{- <TAIL> ~ (seam if not loop.last else '') -}}
    {%- endif -%}
    {%- if loop.last and message.role == 'assistant' -%}
        {{- raise_exception('the last message must be of user') -}}
    {%- endif -%}
{%- endfor -%}
"""


def chat_template(prompt: str) -> str:
    """The template of conversations for a run's `prompt`, with `{instruction}` and `{input}`."""
    places = sorted(("instruction", "input"), key=lambda name: prompt.index(f"{{{name}}}"))
    head, rest = prompt.split(f"{{{places[0]}}}")
    between, tail = rest.split(f"{{{places[1]}}}")
    texts = {"HEAD": head, "BETWEEN": between, "TAIL": tail, "SPEECH": SPEECH, "SEAM": SEAM}
    written = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    variables = {"instruction": "own[0]", "input": "input"}
    written |= {"FIRST": variables[places[0]], "SECOND": variables[places[1]]}
    return re.sub("<([A-Z]+)>", lambda found: written[found[1]], _TEMPLATE)
