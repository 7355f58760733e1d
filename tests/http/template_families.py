"""Small chat templates of our own that imitate what families of models have."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

_LOOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>{% endfor %}"
)
_TOLD = "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
_NEXT = "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"

HERMES = _TOLD + _LOOP + _NEXT
THINKING = (
    _TOLD + "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant "
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    "{# <tool_call> #}"
)
OPENING = _LOOP + "{% if add_generation_prompt %}<|im_start|>assistant <think>\n{% endif %}{# </think> #}"
EFFORT = "{{ reasoning_effort or 'medium' }} " + _LOOP + _NEXT
TEXT_ARGUMENTS = (
    _TOLD + "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}<|im_end|>{% endfor %}" + _NEXT
)
LLAMA3 = (
    "{% if tools %}<|start_header_id|>tools {{ tools | tojson }}, as "
    '{"name": ..., "parameters": ...}<|eot_id|>{% endif %}'
    "{% for m in messages %}<|start_header_id|>{{ m.role }} "
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant {% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have length 9') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.tool_call_id }} {{ m.content }}{% elif m.tool_calls %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{{ c.id }}{% endfor %}]"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system "
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' + m['content'] }}<|im_end|>{% endfor %}" + _NEXT
)
SMOLLM3 = (
    "{% if xml_tools %}<|im_start|>system "
    "<tools>{% for t in xml_tools[:] %}{{ t | string }}{% endfor %}</tools><tool_call><|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}" + _NEXT
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """The same tokenizer with another chat template."""
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    other.chat_template = template
    return other
