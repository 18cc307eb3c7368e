#!/usr/bin/env python3
"""Loads what `trainer --export` wrote into the programs it is for, and compares what they compute.

    check_export.py --compact DIR --expanded DIR [--ctranslate2]

--compact is an `--export hf`, --expanded an `--export hf-expanded` of the same checkpoint, both fp32. Checks:
1. a stock T5ForConditionalGeneration loads the expanded export with no tensor missing or left over;
2. the compact export, run by the code beside it, gives the same logits (eager and SDPA attention), and its cache
   holds as many heads as it has groups;
3. both generate the same tokens greedily, with and without a cache;
4. the tokenizer that came along reads text and back;
5. CTranslate2's converter reads the expanded export, and its translator generates the same tokens with the same
   log-probabilities.

Needs torch, transformers, sentencepiece (and ctranslate2): none of them is needed to train.
"""

import argparse
import os
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

TEXT = ["The kernel keeps a list of all <extra_id_0> that are waiting for the lock.",
        "Functions return a value; see the <extra_id_0> of the module."]
TOLERANCE = 1e-5  # of the largest logit


def load(folder, attention, stock):
    if stock:
        model, info = T5ForConditionalGeneration.from_pretrained(folder, attn_implementation=attention,
                                                                 output_loading_info=True)
    else:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation=attention, trust_remote_code=True,
                                                            output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], f"{folder}: {what}: {info[what]}"
    return model.eval()


def cached_heads(model, inputs):
    """The key/value heads of the first decoder layer's caches: self, cross."""
    output = model(**inputs, decoder_input_ids=torch.zeros((len(TEXT), 1), dtype=torch.long), use_cache=True)
    cache = getattr(output, "past_key_values", None) or output.cache
    try:
        return [part.layers[0].keys.shape[1] for part in (cache.self_attention_cache, cache.cross_attention_cache)]
    except AttributeError:  # before transformers 5
        return [cache[0][0].shape[1], cache[0][2].shape[1]]


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=24, do_sample=False, num_beams=1, **options).tolist()


def until_end(ids):
    """Without the start, and what follows eos."""
    ids = ids[1:]
    return ids[:ids.index(1)] if 1 in ids else ids


def scores_of(model, inputs, ids):
    """Log-probabilities of what was generated, of each row until its end."""
    ids = torch.tensor(ids)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
    scores = logits.gather(2, ids[:, 1:, None])[:, :, 0].tolist()
    return [row[:len(until_end(i))] for row, i in zip(scores, ids.tolist())]


def check_ctranslate2(folder, tokenizer, model, inputs, expected):
    import ctranslate2

    with tempfile.TemporaryDirectory() as work:
        target = os.path.join(work, "model")
        ctranslate2.converters.TransformersConverter(folder).convert(target)
        translator = ctranslate2.Translator(target, device="cpu", compute_type="float32")
        tokens = [tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask) if m])
                  for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist())]
        results = translator.translate_batch(tokens, beam_size=1, max_decoding_length=24)
        targets = [tokenizer.convert_ids_to_tokens(until_end(ids)) for ids in expected]
        scores = [result.log_probs for result in translator.score_batch(tokens, targets)]
    found = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    for ours, theirs in zip(expected, found):
        assert until_end(ours)[:len(theirs)] == theirs, f"CTranslate2 generates {theirs}, transformers {until_end(ours)}"
    print(f"CTranslate2 {ctranslate2.__version__}: the same {sum(map(len, found))} tokens", end="")
    # Its converter goes by config.tie_word_embeddings, which transformers 5 sets for every T5.
    if model.config.tie_word_embeddings != getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings):
        print("; scores are not comparable: converted with transformers 5, its logits are scaled as a tied T5's")
        return
    difference = max(abs(a - b) for ours, theirs in zip(scores_of(model, inputs, expected), scores)
                     for a, b in zip(ours, theirs))
    assert difference <= 1e-4, f"log-probabilities differ by {difference}"
    print(f", log-probabilities differ by {difference:.1e}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compact", required=True)
    parser.add_argument("--expanded", required=True)
    parser.add_argument("--ctranslate2", action="store_true")
    arguments = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.expanded)
    inputs = tokenizer(TEXT, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = inputs["input_ids"]
    vocabulary = tokenizer.get_vocab()
    sentinel = vocabulary.get("<extra_id_0>", vocabulary.get("\u2581<extra_id_0>"))  # mT5's is a piece of its model
    assert sentinel in ids[0].tolist(), "the sentinels are not in the tokenizer"
    decoder_ids = torch.cat([torch.zeros((len(TEXT), 1), dtype=torch.long), ids[:, :9]], dim=1)

    with torch.no_grad():
        stock = load(arguments.expanded, "eager", stock=True)
        reference = stock(**inputs, decoder_input_ids=decoder_ids).logits
        tokens = generate(stock, inputs)
        for attention in ("eager", "sdpa"):
            try:
                model = load(arguments.compact, attention, stock=False)
            except ValueError as error:  # transformers 4's T5 knows no SDPA
                if attention == "eager" or "scaled_dot_product_attention" not in str(error):
                    raise
                print(f"transformers {transformers.__version__} has no {attention} attention for T5")
                continue
            logits = model(**inputs, decoder_input_ids=decoder_ids).logits
            difference = ((logits - reference).abs().max() / reference.abs().max()).item()
            assert difference <= TOLERANCE, f"{attention}: logits differ by {difference:.2e} of the largest"
            assert generate(model, inputs) == tokens, f"{attention}: other tokens"
            assert generate(model, inputs, use_cache=False) == tokens, f"{attention}: other tokens without a cache"
            print(f"transformers {transformers.__version__}, {attention}: logits differ by {difference:.2e} of the largest, "
                  f"the same tokens; heads in the cache (self, cross): {cached_heads(model, inputs)}")
    print("text:", tokenizer.decode(ids[0], skip_special_tokens=True))
    if arguments.ctranslate2:
        check_ctranslate2(arguments.expanded, tokenizer, stock, inputs, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
