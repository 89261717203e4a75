"""A small byte-level BPE tokenizer that stands in for Qwen's: same special tokens, same chat template, few merges."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
FOLDER = "tokenizer"
FILES = (f"{FOLDER}/tokenizer.json", f"{FOLDER}/tokenizer_config.json")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's template for plain turns: no think block unless thinking is switched off."""

_LARGEST = 1000
_BYTES = 256
_CORPUS = (
    "user assistant system",
    "a photorealistic portrait of a young woman with long flowing black hair, soft natural lighting, gentle smile, "
    "sitting in a coffee shop, depth of field, highly detailed eyes",
    "a photograph of an old man and a small dog walking along the quiet street of a mountain village at sunrise",
    "an oil painting of a red sailing boat on a stormy sea, dramatic clouds, thick brush strokes, golden hour",
    "a close-up of a glass of water on a wooden table, shallow depth of field, studio light, high resolution",
    'a wide shot of a futuristic city at night, neon signs, rain, reflections, the text "open" above a door',
)


def write_tokenizer(root: Path, vocab_size: int) -> None:
    """Write `FILES` below `root`; no token id reaches `vocab_size`, and any text survives the way there and back.

    Raises `ValueError` if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    largest = min(vocab_size, _LARGEST)
    if largest < _BYTES + len(SPECIAL_TOKENS):
        raise ValueError(f"a vocabulary of {vocab_size} has no room for {_BYTES} bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=largest - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    texts = (tokenizer.to_str(pretty=True), json.dumps(config, indent=2))
    for path, text in zip(FILES, texts, strict=True):
        (root / path).write_text(text + "\n", encoding="utf-8")
