"""Tiny models of many architectures with random weights, each with a tokenizer over the words of conftest.py."""

from pathlib import Path
from typing import Any

import torch
from conftest import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHORT = {"max_position_embeddings": 40}
BEHIND = {"max_position_embeddings": 42}  # of which the first two are padding's
ROTARY = {"num_key_value_heads": 2, **SHORT}

# kind -> (how its tokenizer marks a text, the sizes of its config)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", COMMON | SHORT),
    "roberta": ("roberta", COMMON | BEHIND | {"type_vocab_size": 1}),
    "xlm-roberta": ("roberta", COMMON | BEHIND | {"type_vocab_size": 1}),
    "camembert": ("roberta", COMMON | BEHIND | {"type_vocab_size": 1}),
    "distilbert": ("bert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} | SHORT),
    "electra": ("bert", COMMON | SHORT | {"embedding_size": 8}),
    "mpnet": ("roberta", COMMON | BEHIND),
    "albert": ("bert", COMMON | SHORT | {"embedding_size": 8}),
    "deberta": ("bert", COMMON | SHORT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (
        "bert",
        COMMON | SHORT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                          "position_biased_input": False, "share_att_key": True, "type_vocab_size": 0},
    ),
    "modernbert": ("roberta", COMMON | SHORT | {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}),
    "xlnet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "gpt2": ("gpt", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}),
    "llama": ("gpt", COMMON | ROTARY),
    "mistral": ("gpt", COMMON | ROTARY),
    "qwen2": ("gpt", COMMON | ROTARY),
    "opt": ("gpt", COMMON | SHORT | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "funnel": ("bert", {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 32}),
    "xmod": (
        "roberta",
        COMMON | BEHIND | {"type_vocab_size": 1, "languages": ["en_XX"], "default_language": "en_XX"},
    ),
    "esm": ("roberta", COMMON | BEHIND | {"mask_token_id": 4, "position_embedding_type": "absolute"}),
    "longformer": ("roberta", COMMON | BEHIND | {"attention_window": 4, "type_vocab_size": 1}),
    "big_bird": ("bert", COMMON | SHORT | {"attention_type": "original_full"}),
    "roformer": ("bert", COMMON | SHORT | {"embedding_size": 16}),
    "nystromformer": ("bert", COMMON | SHORT | {"num_landmarks": 40, "segment_means_seq_len": 40}),
    "convbert": ("bert", COMMON | SHORT | {"embedding_size": 16, "head_ratio": 1}),
    "bart": (
        "roberta",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2,
         **SHORT},
    ),
}  # fmt: skip
NAMES = {  # where the special tokens stand in the vocabulary: the first five
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}


def save_tokenizer(kind: str, folder: Path, **settings: Any) -> None:
    """A tokenizer of whole words that marks texts and pairs as the architecture's own does."""
    style = KINDS[kind][0]
    names = NAMES.get(style, NAMES["roberta"])
    first, last = (names[2], names[3]) if style == "bert" else (names[0], names[2])
    vocabulary = {word: i for i, word in enumerate((*names, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=names[1] if style == "bert" else names[3]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    between = f"{last} {last}" if style == "roberta" else last
    one, two = {
        "bert": (f"{first} $A {last}", f"{first} $A {last} $B:1 {last}:1"),
        "roberta": (f"{first} $A {last}", f"{first} $A {between} $B {last}"),
        "xlnet": (f"$A {last} {first}:2", f"$A {last} $B:1 {last}:1 {first}:2"),
        "gpt": ("$A", "$A $B"),
    }[style]
    inner.post_processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=[(name, vocabulary[name]) for name in (first, last)]
    )
    given: dict[str, Any] = {"unk_token": names[1] if style == "bert" else names[3]}
    if style == "gpt":
        given |= {"eos_token": last}
    else:
        given |= {"cls_token": first, "sep_token": last, "pad_token": names[0] if style == "bert" else names[1]}
        if style != "bert":
            given |= {"bos_token": first, "eos_token": last}
    inputs = ["input_ids", *(["token_type_ids"] if style in ("bert", "xlnet") else []), "attention_mask"]
    given |= {"padding_side": "left" if style == "xlnet" else "right", "model_input_names": inputs}
    PreTrainedTokenizerFast(tokenizer_object=inner, **(given | settings)).save_pretrained(folder)


def save_model(kind: str, folder: Path, padding: int | None = -1, **settings: Any) -> None:
    """An encoder of the kind without a head, as pretrained ones are, and its tokenizer."""
    style, sizes = KINDS[kind]
    numbers = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": {"bert": 0, "gpt": None}.get(style, 1)}
    if padding != -1:
        numbers["pad_token_id"] = padding
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=32, **(numbers | sizes | settings))
    config.architectures = ["FunnelModel"]  # of two, for the one kind that asks
    AutoModel.from_config(config).save_pretrained(folder)
    save_tokenizer(kind, folder)
