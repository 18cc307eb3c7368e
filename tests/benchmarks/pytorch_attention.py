#!/usr/bin/env python3
"""Attention with T5's bias in PyTorch on a GPU, on the shapes of cuda_attention_benchmark: one JSON line each.

The bias is trainable, as T5's is: for SDPA a [1, H, S, S] tensor with its gradient, for FlexAttention (compiled) a
table of distances that score_mod reads. TFLOP/s counts 2 products forward and 4 backward.
"""

import json
import time

import torch
import torch.nn.functional as F

SHAPES = [(tokens, heads, groups) for tokens in (512, 2048) for heads in (8, 16, 64)
          for groups in sorted({heads, 8, 1}, reverse=True)]
HEAD_SIZE, TOKENS_OF_BATCH = 64, 32768


def seconds_of(work, repetitions=10):
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repetitions


def measure(kernel, attend, bias, tokens, heads, groups):
    batch = max(1, TOKENS_OF_BATCH // tokens)
    make = lambda count: torch.randn(batch, count, tokens, HEAD_SIZE, device="cuda", dtype=torch.bfloat16,
                                     requires_grad=True)
    q, k, v = make(heads), make(groups), make(groups)
    forward = seconds_of(lambda: attend(q, k, v))
    out = attend(q, k, v)
    gradient = torch.randn_like(out)
    both = seconds_of(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v, bias), gradient))
    flops = 4 * batch * heads * tokens * tokens * HEAD_SIZE
    print(json.dumps({"tokens": tokens, "heads": heads, "groups": groups, "kernel": kernel,
                      "forward_tflops": flops / forward * 1e-12,
                      "backward_tflops": 2 * flops / max(both - forward, 1e-9) * 1e-12}), flush=True)


def main():
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention)
    for tokens, heads, groups in SHAPES:
        bias = torch.randn(1, heads, tokens, tokens, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        table = torch.randn(heads, 2 * tokens - 1, device="cuda", requires_grad=True)
        score = lambda s, b, h, i, j: s + table[h, j - i + tokens - 1]
        kernels = {
            "PyTorch SDPA": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias, scale=1.0, enable_gqa=True),
                             bias),
            "PyTorch Flex": (lambda q, k, v: compiled(q, k, v, score_mod=score, scale=1.0, enable_gqa=True), table),
        }
        for kernel, (attend, trained) in kernels.items():
            try:
                torch._dynamo.reset()  # compiles each shape, however many came before
                measure(kernel, attend, trained, tokens, heads, groups)
            except Exception as error:  # out of memory, or not supported: the others still count
                print(f"{kernel} at {tokens} tokens, {heads} heads, {groups} groups: {error}".splitlines()[0])


if __name__ == "__main__":
    main()
