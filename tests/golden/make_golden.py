#!/usr/bin/env python3
"""Writes the golden fixtures of this folder with Hugging Face transformers' T5.

Grouped-query attention does not exist there, so a case with G < H gives the reference model its
key/value head matrices repeated, query head h reading group h // (H / G), and stores the compact
[G * d_kv, d_model] weight with the gradients of the repeated heads summed over each group.
See README.md for the layout of the files.
"""

import argparse
import json
import math
import pathlib
import re

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

SHAPE = dict(vocab_size=96, d_model=20, d_kv=12, d_ff=40, num_heads=6, num_layers=3,
             num_decoder_layers=3, kv_groups=6, encoder_kv_groups=6, z_loss=0.0)
T5_1_0 = dict(feed_forward_proj="relu", tie_word_embeddings=True)
LONG = dict(num_layers=1, num_decoder_layers=1)
# Self, cross of layer 0, self, cross of layer 1.
UNEVEN = dict(num_layers=1, num_decoder_layers=2, kv_groups=3, encoder_kv_groups=2,
              site_kv_groups=[6, 1, 2, 3])

# name -> (overrides of SHAPE, input lengths, target lengths); rows are padded to the longest.
PADDED = ([11, 8, 5], [7, 4, 6])
CASES = {
    "mha": (dict(), *PADDED),
    "gqa3": (dict(kv_groups=3), *PADDED),
    "gqa2": (dict(kv_groups=2), *PADDED),
    "mqa": (dict(kv_groups=1), *PADDED),
    "gqa2_encoder": (dict(kv_groups=2, encoder_kv_groups=3), *PADDED),
    "uneven": (UNEVEN, *PADDED),
    "zloss": (dict(z_loss=1e-4), *PADDED),
    "long": (LONG, [200], [150]),
    "t5_1_0": (T5_1_0, *PADDED),
    "t5_1_0_gqa2": (dict(kv_groups=2, **T5_1_0), *PADDED),
}
SEED = 20230522
NUM_BUCKETS = 32
MAX_DISTANCE = 128


def build_model(shape):
    """A T5 1.1 with its own lm_head, or a T5 1.0. transformers 5 ties lm_head.weight to shared.weight
    even under tie_word_embeddings=False, which then only turns the d_model^-0.5 scaling off."""
    tied = shape.get("tie_word_embeddings", False)
    config = T5Config(
        vocab_size=shape["vocab_size"], d_model=shape["d_model"], d_kv=shape["d_kv"],
        d_ff=shape["d_ff"], num_heads=shape["num_heads"], num_layers=shape["num_layers"],
        num_decoder_layers=shape["num_decoder_layers"],
        feed_forward_proj=shape.get("feed_forward_proj", "gated-gelu"),
        relative_attention_num_buckets=NUM_BUCKETS,
        relative_attention_max_distance=MAX_DISTANCE, dropout_rate=0.0,
        layer_norm_epsilon=1e-6, tie_word_embeddings=tied, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, use_cache=False, attn_implementation="eager")
    if hasattr(config, "scale_decoder_outputs"):
        config.scale_decoder_outputs = tied
    model = T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight
    return model.train()


def groups_of(name, shape):
    """Key/value groups of a k or v parameter, None for every other parameter."""
    if not re.search(r"Attention\.[kv]\.weight$", name):
        return None
    if name.startswith("encoder."):
        return shape["encoder_kv_groups"]
    if "site_kv_groups" not in shape:
        return shape["kv_groups"]
    layer = int(name.split(".")[2])
    return shape["site_kv_groups"][2 * layer + (".EncDecAttention." in name)]


def expand(compact, shape, groups):
    heads = compact.reshape(groups, shape["d_kv"], -1)
    return heads.repeat_interleave(shape["num_heads"] // groups, dim=0).flatten(0, 1)


def contract(gradient, shape, groups):
    width = shape["num_heads"] // groups
    return gradient.reshape(groups, width, shape["d_kv"], -1).sum(dim=1).flatten(0, 1)


def draw_weight(name, reference_shape, shape, generator):
    """Initialization at the scale of T5X; norms are spread around 1 so that they are exercised."""
    d, h, d_kv = shape["d_model"], shape["num_heads"], shape["d_kv"]
    groups = groups_of(name, shape)
    size = (groups * d_kv, d) if groups else tuple(reference_shape)
    if "relative_attention_bias" in name:
        bound = math.sqrt(6 / (h + NUM_BUCKETS))
        return (2 * torch.rand(size, generator=generator) - 1) * bound
    normal = torch.randn(size, generator=generator)
    if "layer_norm" in name:
        return 1 + 0.1 * normal
    std = {"shared": 1.0, "q": (d * d_kv) ** -0.5, "o": (h * d_kv) ** -0.5,
           "wo": shape["d_ff"] ** -0.5}.get(name.split(".")[-2], d ** -0.5)
    return normal * std


def draw_tokens(lengths, shape, generator):
    """Token ids in [2, V), each row closed by eos = 1 and padded on the right with 0."""
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(rows, lengths):
        row[:length - 1] = torch.randint(2, shape["vocab_size"], (length - 1,),
                                         generator=generator)
        row[length - 1] = 1
    return rows


def load_weights(model, weights, shape):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            groups = groups_of(name, shape)
            value = weights[name]
            parameter.copy_(expand(value, shape, groups) if groups else value)


def run_model(model, input_ids, labels, shape):
    """(logits, loss); checks that nothing hides between the decoder and lm_head, but the scaling
    of a tied one."""
    decoded = []
    hook = model.decoder.register_forward_hook(lambda *call: decoded.append(call[-1][0]))
    output = model(input_ids=input_ids, attention_mask=(input_ids != 0).long(),
                   labels=labels.masked_fill(labels == 0, -100))
    hook.remove()
    scale = shape["d_model"] ** -0.5 if shape.get("tie_word_embeddings") else 1
    assert torch.equal(output.logits, nn.functional.linear(decoded[0] * scale, model.lm_head.weight))
    logits = output.logits[labels != 0]
    log_z = logits.logsumexp(dim=-1)
    cross_entropy = log_z - logits.gather(-1, labels[labels != 0][:, None])[:, 0]
    torch.testing.assert_close(cross_entropy.mean(), output.loss)
    loss = (cross_entropy + shape["z_loss"] * log_z.square()).mean()
    return output.logits, loss


def gradients_of(model, loss, shape):
    model.zero_grad()
    loss.backward()
    result = {}
    for name, parameter in model.named_parameters():
        groups = groups_of(name, shape)
        gradient = parameter.grad.detach()
        result[name] = contract(gradient, shape, groups) if groups else gradient.clone()
    return result


def norm_without_rounding(self, x):
    """T5LayerNorm.forward with its statistics in the type of x rather than in fp32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)
                                          + self.variance_epsilon))


def check_in_double(weights, input_ids, labels, shape, gradients, generator):
    """Compares the gradients with the float64 ones, and one random element of every parameter
    of those with a central difference. Returns the largest error of an fp32 gradient relative
    to the largest element of its tensor."""
    original = modeling_t5.T5LayerNorm.forward
    modeling_t5.T5LayerNorm.forward = norm_without_rounding
    try:
        model = build_model(shape).double()
        weights = {name: value.double() for name, value in weights.items()}
        load_weights(model, weights, shape)
        _, loss = run_model(model, input_ids, labels, shape)
        exact = gradients_of(model, loss, shape)
        worst = 0.0
        for name, gradient in gradients.items():
            error = (gradient.double() - exact[name]).abs().max() / exact[name].abs().max()
            worst = max(worst, error.item())
        assert worst < 1e-4, worst

        step = 1e-5
        for name, value in weights.items():
            # A row that the batch reads, so that the embedding's element is not trivially zero.
            row = input_ids[0, 0].item() if name == "shared.weight" else None
            flat = value.view(-1)
            index = torch.randint(flat.numel(), (1,), generator=generator).item()
            if row is not None:
                index = row * value.shape[1] + index % value.shape[1]
            kept, losses = flat[index].item(), []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                load_weights(model, weights, shape)
                with torch.no_grad():
                    losses.append(run_model(model, input_ids, labels, shape)[1].item())
            flat[index] = kept
            difference = (losses[0] - losses[1]) / (2 * step)
            analytic = exact[name].reshape(-1)[index].item()
            assert abs(difference - analytic) < 1e-6 * abs(analytic) + 1e-9, (
                name, index, difference, analytic)
        return worst
    finally:
        modeling_t5.T5LayerNorm.forward = original


def make_case(name, directory):
    overrides, input_lengths, target_lengths = CASES[name]
    shape = {**SHAPE, **overrides}
    generator = torch.Generator().manual_seed(SEED)
    input_ids = draw_tokens(input_lengths, shape, generator)
    labels = draw_tokens(target_lengths, shape, generator)
    model = build_model(shape)
    weights = {key: draw_weight(key, parameter.shape, shape, generator)
               for key, parameter in model.named_parameters()}
    load_weights(model, weights, shape)
    logits, loss = run_model(model, input_ids, labels, shape)
    gradients = gradients_of(model, loss, shape)
    worst = check_in_double(weights, input_ids, labels, shape, gradients, generator)

    tensors = {f"weights.{key}": value.numpy() for key, value in weights.items()}
    tensors |= {f"gradients.{key}": value.numpy() for key, value in gradients.items()}
    tensors["input_ids"] = input_ids.numpy().astype(np.int32)
    tensors["labels"] = labels.numpy().astype(np.int32)
    tensors["logits"] = logits.detach().numpy()
    tensors["loss"] = loss.detach().reshape(1).numpy()
    path = directory / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path,
              metadata={"config": json.dumps(shape)})
    print(f"{name}: loss {loss.item():.7f}, {len(weights)} parameters, "
          f"gradient error against float64 {worst:.1e}, {path.stat().st_size} bytes")


def make_buckets(directory, reach=2048):
    distances = torch.arange(-reach, reach + 1)

    def runs(bidirectional):
        buckets = modeling_t5.T5Attention._relative_position_bucket(
            distances, bidirectional=bidirectional, num_buckets=NUM_BUCKETS,
            max_distance=MAX_DISTANCE).tolist()
        return [[distance, bucket] for distance, bucket, previous
                in zip(distances.tolist(), buckets, [None] + buckets) if bucket != previous]

    content = {
        "distance": "key position - query position",
        "runs": "[first distance, bucket]; a run lasts until the next one, the last to 'last'",
        "first": -reach, "last": reach, "num_buckets": NUM_BUCKETS,
        "max_distance": MAX_DISTANCE, "bidirectional": runs(True), "causal": runs(False)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}"
                       for key, value in content.items())
    (directory / "relative_buckets.json").write_text("{\n" + lines + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in arguments.cases:
        make_case(name, arguments.output)
    make_buckets(arguments.output)


if __name__ == "__main__":
    main()
