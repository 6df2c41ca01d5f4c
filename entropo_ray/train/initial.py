"""Where fitting starts when there is no model: a tokenizer trained on the corpus and a random Qwen3."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from entropo_ray import config, store

END_OF_TEXT, TURN_START, TURN_END = CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
_BYTES = 256
_POSITIONS = 32_768
# Tags of calls and line numbers of views are one word each, which saves a quarter of an episode's tokens; the rest is
# Qwen's own pattern: words with the space before them, single digits, runs of punctuation, runs of white space.
_WORDS = (
    r"</?(?:function|parameter)[=\w]*>\s*| *\d+\t *|"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def start(texts: Iterable[str], shape: config.Model, *, seed: int, to: Path) -> dict[str, float]:
    """A Hugging Face model directory at `to`: byte-level BPE learnt from `texts`, random weights drawn by `seed`.

    The vocabulary is smaller than asked for where the texts hold fewer words. Raises ValueError if there are no texts,
    or if the vocabulary asked for has no room for all bytes.
    """
    corpus = list(texts)
    if not any(corpus):
        raise ValueError(
            "sft.base is empty and there is no text to learn a tokenizer from: the teacher left no episode"
        )
    if shape.vocab < _BYTES + len(CONTROL):
        raise ValueError(
            f"sft.shape.vocab={shape.vocab}: must be at least {_BYTES + len(CONTROL)} (bytes and controls)"
        )
    tokenizer = _tokenizer(corpus, shape.vocab)
    model = _model(shape, tokenizer.get_vocab_size(), seed)
    partial = store.fresh(to)
    tokenizer.save(str(partial / "tokenizer.json"))
    (partial / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(), indent=2) + "\n")
    model.save_pretrained(partial)
    store.publish(partial, to, seed=seed)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(corpus))
    return {
        "parameters": float(model.num_parameters()),
        "vocab": float(tokenizer.get_vocab_size()),
        "bytes_per_token": sum(len(text.encode()) for text in corpus) / max(1, tokens),
    }


def _tokenizer(corpus: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _POSITIONS,
        "chat_template": (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }


def _model(shape: config.Model, vocab: int, seed: int) -> Qwen3ForCausalLM:
    settings = Qwen3Config(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=CONTROL.index(END_OF_TEXT),
        eos_token_id=CONTROL.index(TURN_END),
        pad_token_id=CONTROL.index(END_OF_TEXT),
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is its own
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(settings)
    ends = [CONTROL.index(TURN_END), CONTROL.index(END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, bos_token_id=0, do_sample=True)
    return model
