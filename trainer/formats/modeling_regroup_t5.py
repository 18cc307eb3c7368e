"""A T5 with grouped-query attention for transformers: what `trainer --export hf` puts beside its weights.

    AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)

Every attention has a number of key/value heads of its own (config.json: num_key_value_heads,
encoder_num_key_value_heads, decoder_num_key_value_heads); query head h reads key/value head h // (H / G). Everything
else is transformers' T5. Where its attention takes key/value heads as they come (since transformers 5), the cache
holds G heads; before, heads are repeated as they are projected: the same numbers, but a cache of H heads.
"""

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

_CACHE_IS_GROUPED = hasattr(modeling_t5, "eager_attention_forward")


class RegroupT5Config(T5Config):
    model_type = "regroup_t5"

    def key_value_heads(self, stack, layer, attention):
        """The key/value heads of an attention: "self" or "cross" of a layer of the "encoder" or "decoder"."""
        if stack == "encoder":
            return getattr(self, "encoder_num_key_value_heads", None) or self.num_heads
        uneven = getattr(self, "decoder_num_key_value_heads", None)
        if uneven:
            return uneven[attention][layer]
        return getattr(self, "num_key_value_heads", None) or self.num_heads


class _RepeatedHeads(nn.Linear):
    """Projects to grouped heads and repeats each for the query heads that read it."""

    def __init__(self, inputs, heads, width, repeats):
        super().__init__(inputs, heads * width, bias=False)
        self.heads, self.repeats = heads, repeats

    def forward(self, x):
        heads = super().forward(x).unflatten(-1, (self.heads, -1))
        return heads.repeat_interleave(self.repeats, dim=-2).flatten(-2)


def _repeat(heads, repeats):
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=1)


def _grouped(attend):
    """transformers' plain attention, which wants as many key/value heads as query heads."""

    def attention(module, query, key, value, attention_mask, **options):
        repeats = getattr(module, "num_key_value_groups", 1)
        return attend(module, query, _repeat(key, repeats), _repeat(value, repeats), attention_mask, **options)

    attention.is_grouped = True
    return attention


if _CACHE_IS_GROUPED and not hasattr(modeling_t5.eager_attention_forward, "is_grouped"):
    modeling_t5.eager_attention_forward = _grouped(modeling_t5.eager_attention_forward)


class RegroupT5ForConditionalGeneration(T5ForConditionalGeneration):
    config_class = RegroupT5Config

    def __init__(self, config):
        super().__init__(config)
        for layer, block in enumerate(self.encoder.block):
            self._group(block.layer[0].SelfAttention, config.key_value_heads("encoder", layer, "self"))
        for layer, block in enumerate(self.decoder.block):
            self._group(block.layer[0].SelfAttention, config.key_value_heads("decoder", layer, "self"))
            self._group(block.layer[1].EncDecAttention, config.key_value_heads("decoder", layer, "cross"))
        self.post_init()

    @staticmethod
    def _group(attention, heads):
        repeats = attention.n_heads // heads
        if heads < 1 or heads * repeats != attention.n_heads:
            raise ValueError(f"{heads} key/value heads do not divide {attention.n_heads} heads")
        if repeats == 1:
            return
        width = attention.key_value_proj_dim
        attention.num_key_value_groups = repeats  # read by transformers' attention functions
        for name in ("k", "v"):
            if _CACHE_IS_GROUPED:
                projection = nn.Linear(attention.d_model, heads * width, bias=False)
            else:
                projection = _RepeatedHeads(attention.d_model, heads, width, repeats)
            nn.init.normal_(projection.weight, std=attention.d_model**-0.5)
            setattr(attention, name, projection.to(torch.get_default_dtype()))
