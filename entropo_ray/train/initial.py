"""Where fitting starts when there is no model: a tokenizer trained on the corpus and a random Qwen3."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from entropo_ray import config, store

END_OF_TEXT, TURN_START, TURN_END = CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
_BYTES = 256
_POSITIONS = 32_768
_THETA = 1e6
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
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        bos_token_id=CONTROL.index(END_OF_TEXT),
        eos_token_id=CONTROL.index(TURN_END),
        pad_token_id=CONTROL.index(END_OF_TEXT),
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is its own
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(settings)
    give_copying(model, seed=seed)
    ends = [CONTROL.index(TURN_END), CONTROL.index(END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, bos_token_id=0, do_sample=True)
    return model


_FAST = 4  # rotary frequencies by which one position is told from the next
_SHARP = (2.6, 2.8)  # query and key gains of the two layers: attention on one token, not on many
_EMBEDDING, _COPY = 0.15, 3.0  # spread of embeddings; weight of what is copied


def give_copying(model: Qwen3ForCausalLM, *, seed: int) -> None:
    """Start the first two layers with an induction circuit: "what followed this token the last time?".

    A random model of this size needs millions of tokens to find copying by itself (Olsson et al., arXiv 2209.11895),
    more than two cores read in minutes; the weights below hold it from the start and are trained like all others.
    Layer 0, head 0 writes a projection of the previous token into a quarter of the residual stream (a constant in the
    last dimension makes its query and key, rotary phases put its peak one position back). Layer 1, one head for each of
    two key-value groups, looks for positions whose previous token is the current one, by the slow rotary frequencies,
    and copies half of the token found there.
    """
    cfg, rng = model.config, torch.Generator().manual_seed(seed)
    width, size, half = cfg.hidden_size, cfg.head_dim, cfg.head_dim // 2
    token, store_, one = width // 2, width // 4, width - 1  # dimensions of tokens, of previous tokens, of the constant
    if cfg.num_hidden_layers < 2 or cfg.num_key_value_heads < 2 or size < store_ or half <= 2 * _FAST:
        return  # too small to hold it
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(_EMBEDDING * torch.randn(embedding.shape, generator=rng))
        embedding[:, token : token + store_] = 0
        embedding[:, one] = 2 * _EMBEDDING
        seen = _previous_token(first, rng, token=token, store_=store_, one=one, half=half)
        slow = [*range(half // 2, half), *range(half + half // 2, size)]
        share = min(size, token // 2)
        for group in range(2):
            head = group * (cfg.num_attention_heads // cfg.num_key_value_heads) * size
            key = torch.randn(len(slow), store_, generator=rng) / store_**0.5
            for projection, start in (
                (second.q_proj, head),
                (second.k_proj, group * size),
                (second.v_proj, group * size),
            ):
                projection.weight[start : start + size] = 0
            second.q_proj.weight[[head + dim for dim in slow], :token] = key @ seen
            second.k_proj.weight[[group * size + dim for dim in slow], token : token + store_] = key
            copied = slice(group * share, (group + 1) * share)
            second.v_proj.weight[group * size : group * size + share, copied] = torch.eye(share)
            second.o_proj.weight[:, head : head + size] = 0
            second.o_proj.weight[copied, head : head + share] = _COPY * _EMBEDDING * torch.eye(share)
        for norm in (second.q_norm, second.k_norm):
            norm.weight[slow] = _SHARP[1]


def _previous_token(layer: Any, rng: torch.Generator, *, token: int, store_: int, one: int, half: int) -> torch.Tensor:
    """Head 0 of a layer attends one position back; [store_, token] the projection of the token that it writes."""
    size = 2 * half
    phase = _THETA ** (-torch.arange(_FAST) / half)
    seen = torch.randn(size, token, generator=rng) / token**0.5
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.weight[:size] = 0
    layer.k_proj.weight[:_FAST, one] = 1
    layer.q_proj.weight[:_FAST, one] = torch.cos(phase)
    layer.q_proj.weight[half : half + _FAST, one] = -torch.sin(phase)
    layer.v_proj.weight[:size, :token] = seen
    layer.o_proj.weight[:, :size] = 0
    layer.o_proj.weight[token : token + store_, :store_] = _EMBEDDING * torch.eye(store_)
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight[:_FAST] = _SHARP[0]
        norm.weight[half : half + _FAST] = _SHARP[0]
    return seen[:store_]
