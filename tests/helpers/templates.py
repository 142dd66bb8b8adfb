"""Tokenizers with the special tokens of every template, and templates as models bring them."""

from pathlib import Path

from helpers.bpe import content_of, write_bpe

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
ROLES = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SMOLLM_SYSTEM = "You're a made-up helper, trained by nobody"
SMOLLM = (  # in the manner of SmolLM2's
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou\\'re a made-up helper, trained by nobody<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA30 = (  # of Llama 3.0's
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA31 = (  # of Llama 3.1's and 3.2's
    '{{- bos_token }}\n{%- set date = date_string or "26 Jul 2024" %}'
    "{#- There's a system message: always #}"
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}'
    '{{- "Cutting Knowledge Date: December 2023\\n" }}{{- "Today Date: " + date + "\\n\\n" }}'
    '{{- system }}{{- "<|eot_id|>" }}{%- for message in messages %}'
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
FOREIGN = {"smollm": SMOLLM, "llama-3.0": LLAMA30, "llama-3.1": LLAMA31}


def write_chat_tokenizer(folder: Path, kind: str = "smollm", **config) -> Path:
    """A tokenizer.json and its config; `kind` llama-bpe puts BOS before a text."""
    content = content_of(kind)
    content["added_tokens"] += [
        {"id": 600 + i, "content": name, "special": True, **dict.fromkeys(FLAGS, False)}
        for i, name in enumerate(ROLES[:1] + ROLES[2:])
    ]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    write_bpe(folder, content, add_bos_token=kind == "llama-bpe", **config)
    return folder
