#!/usr/bin/env python3
"""Times a full training step (forward, backward, Adafactor) of Hugging Face transformers' T5 1.1
in PyTorch, on random tokens without padding. Tokens/s is (inputs + targets) * batch
over the median step. Needs torch >= 1.13 and a transformers version that works with it."""

import argparse
import inspect
import json
import os
import statistics
import time


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512, help="encoder tokens per row")
    parser.add_argument("--targets", type=int, default=114, help="decoder tokens per row")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--mode", choices=["bf16-weights", "autocast"], default="bf16-weights",
                        help="what --dtype bf16 means: the model cast to bfloat16, or fp32 weights"
                             " under torch.autocast")
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager",
                        help="sdpa needs transformers 5")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--mask", action="store_true", help="pass an attention mask of ones")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", metavar="PATH", help="also write the results as JSON here")
    parser.add_argument("--profile", type=int, nargs="?", const=20, metavar="ROWS",
                        help="profile one more step and print its most expensive operators")

    shape = parser.add_argument_group("model (defaults are T5 1.1 small)")
    shape.add_argument("--vocab-size", type=int, default=32128)
    shape.add_argument("--d-model", type=int, default=512)
    shape.add_argument("--d-kv", type=int, default=64)
    shape.add_argument("--d-ff", type=int, default=1024)
    shape.add_argument("--heads", type=int, default=6)
    shape.add_argument("--layers", type=int, default=8, help="of the encoder and of the decoder")
    return parser.parse_args()


def build_model(torch, arguments):
    from transformers import T5Config, T5ForConditionalGeneration
    config = T5Config(
        vocab_size=arguments.vocab_size, d_model=arguments.d_model, d_kv=arguments.d_kv,
        d_ff=arguments.d_ff, num_heads=arguments.heads, num_layers=arguments.layers,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False)
    config._attn_implementation = arguments.attention
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties lm_head to the embedding even under tie_word_embeddings=False.
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn_like(model.lm_head.weight) * arguments.d_model ** -0.5)
    assert not getattr(config, "scale_decoder_outputs", False)
    if arguments.dtype == "bf16" and arguments.mode == "bf16-weights":
        model = model.to(torch.bfloat16)
    return model.to(arguments.device).train()


def main():
    arguments = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    import torch
    import transformers
    from transformers.optimization import Adafactor
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)

    model = build_model(torch, arguments)
    options = dict(lr=1e-2, scale_parameter=True, relative_step=False)
    optimizer = Adafactor(model.parameters(), **options)
    autocast = arguments.dtype == "bf16" and arguments.mode == "autocast"
    forward = torch.compile(model) if arguments.compile else model

    size = (arguments.batch, arguments.inputs)
    inputs = dict(input_ids=torch.randint(2, arguments.vocab_size, size),
                  labels=torch.randint(2, arguments.vocab_size,
                                       (arguments.batch, arguments.targets)))
    if arguments.mask:
        inputs["attention_mask"] = torch.ones(size, dtype=torch.long)
    inputs = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None

    def step():
        times = [time.perf_counter()]
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=autocast):
            loss = forward(**inputs).loss
        wait()
        times.append(time.perf_counter())
        loss.backward()
        wait()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        wait()
        times.append(time.perf_counter())
        return loss.item(), [end - start for start, end in zip(times, times[1:])]

    start = time.perf_counter()
    for _ in range(arguments.warmup):
        step()
    warmup_seconds = time.perf_counter() - start

    cpu_start, start = time.process_time(), time.perf_counter()
    losses, phases = zip(*(step() for _ in range(arguments.steps)))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    seconds = [sum(phase) for phase in phases]
    tokens = (arguments.inputs + arguments.targets) * arguments.batch
    forward_s, backward_s, optimizer_s = (statistics.median(phase) for phase in zip(*phases))
    result = {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{key: value for key, value in vars(arguments).items() if key not in ("json", "profile")},
        "median_step_s": statistics.median(seconds), "best_step_s": min(seconds),
        "forward_s": forward_s, "backward_s": backward_s, "optimizer_s": optimizer_s,
        "tokens_per_s": tokens / statistics.median(seconds),
        "best_tokens_per_s": tokens / min(seconds),
        # Well under 1 means that other work competed for the cores.
        "core_utilization": cpu / wall / arguments.threads,
        "warmup_s": warmup_seconds, "loss": losses[-1],
    }
    print(f"{result['tokens_per_s']:.0f} tokens/s (best {result['best_tokens_per_s']:.0f}): step "
          f"{result['median_step_s']:.3f} s = forward {forward_s:.3f} + backward {backward_s:.3f}"
          f" + Adafactor {optimizer_s:.3f}, core utilization {result['core_utilization']:.2f}")
    print(json.dumps(result))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")

    if arguments.profile:
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        names = inspect.signature(profiler.key_averages().table).parameters
        width = {"max_name_column_width": 45} if "max_name_column_width" in names else {}
        print(profiler.key_averages().table(sort_by="self_cpu_time_total",
                                            row_limit=arguments.profile, **width))


if __name__ == "__main__":
    main()
