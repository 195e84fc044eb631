"""Models of Hugging Face transformers, with small random configurations: exact against the definition."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from test_zoo import check
from zoo import BOUND, LENGTH, N_CLASSES, VOCABULARY, WIDTH, Entry, batches, classes, lengths, padding, token_loss

with warnings.catch_warnings():  # of what it imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers import (
        BatchEncoding,
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

HEADS = 2
SIZES = 3, 1, 4
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BERT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "max_position_embeddings": 8}  # fmt: skip


def build(kind: Any, config: Any, attention: str = "sdpa") -> Callable[[], nn.Module]:
    config._attn_implementation = attention

    def make() -> nn.Module:
        model = kind(config).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model

    return make


def text(n: int, encoding: type = dict, longest: int = LENGTH, left: bool = False) -> tuple[Any, Tensor]:
    """Padded token ids, the mask that says so, and labels: -100 where nothing is asked."""
    ids, ignored = torch.randint(VOCABULARY, (n, longest)), padding(lengths(n, longest), longest)
    ignored = ignored.flip(1) if left else ignored
    labels = torch.randint(VOCABULARY, (n, longest)).masked_fill(ignored, -100)
    return encoding({"input_ids": ids, "attention_mask": (~ignored).long()}), labels


def next_token(output: Any, labels: Tensor) -> Tensor:  # logits [N, T, V], [N, T] -> [N]
    return token_loss(output.logits[:, :-1], labels[:, 1:])


def each_token(output: Any, labels: Tensor) -> Tensor:
    return token_loss(output["logits"], labels)


def one_class(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels, reduction="none")


def without_padding(n: int) -> tuple[Any, Tensor]:
    ids = torch.randint(VOCABULARY, (n, LENGTH))
    return {"input_ids": ids}, ids


def sentences(n: int) -> tuple[Any, Tensor]:
    inputs, _ = text(n, BatchEncoding)
    inputs["token_type_ids"] = torch.randint(2, (n, LENGTH))
    return inputs, classes(n)


def translation(n: int) -> tuple[Any, Tensor]:
    inputs, labels = text(n)
    return {**inputs, "decoder_input_ids": torch.randint(VOCABULARY, (n, 4))}, labels[:, :4]


GPT2 = GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=HEADS, **NO_TOKENS)
LLAMA = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8, **NO_TOKENS)  # fmt: skip
VIT = ViTConfig(image_size=4, patch_size=2, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
                intermediate_size=12, num_labels=N_CLASSES)  # fmt: skip
T5 = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=12, num_layers=1,
              num_heads=HEADS, relative_attention_num_buckets=4, decoder_start_token_id=0,
              pad_token_id=0, eos_token_id=None)  # fmt: skip

ENTRIES = [
    Entry("GPT-2", build(GPT2LMHeadModel, GPT2), batches(without_padding, SIZES), next_token, None),
    Entry("GPT-2, padded", build(GPT2LMHeadModel, GPT2), batches(text, SIZES), next_token, None),
    Entry("GPT-2, eager, padded on the left", build(GPT2LMHeadModel, GPT2, "eager"),
          batches(lambda n: text(n, left=True), SIZES), next_token, None),
    Entry("GPT-2, lengths that change", build(GPT2LMHeadModel, GPT2),
          lambda: [text(n, longest=t) for n, t in ((3, 5), (4, 3), (2, 6))], next_token, None),
    Entry("BERT, classification", build(BertForSequenceClassification, BertConfig(num_labels=N_CLASSES, **BERT)),
          batches(sentences, SIZES), one_class, None),
    Entry("BERT, masked tokens", build(BertForMaskedLM, BertConfig(**BERT)), batches(text, SIZES), each_token, None),
    Entry("BERT, eager", build(BertForMaskedLM, BertConfig(**BERT), "eager"), batches(text, SIZES), each_token, None),
    Entry("Llama", build(LlamaForCausalLM, LLAMA), batches(text, SIZES), next_token, None),
    Entry("T5", build(T5ForConditionalGeneration, T5, "eager"), batches(translation, SIZES), each_token, None),
    Entry("ViT", build(ViTForImageClassification, VIT), batches(lambda n: (torch.randn(n, 3, 4, 4), classes(n)), SIZES),
          one_class, None),
]  # fmt: skip


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_agrees_with_the_definition(entry: Entry, dtype: torch.dtype) -> None:
    check(entry, dtype)
