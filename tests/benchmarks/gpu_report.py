#!/usr/bin/env python3
"""What Regroup reaches on one GPU, beside PyTorch on the same GPU, as tables in Markdown.

    gpu_report.py --bin build/release/bin [--python PYTHON] [--minutes 9] [--only steps,pytorch,attention]

Full training steps (forward, backward, Adafactor) of T5 1.1 at 512/114 in bfloat16, from base to XXL as far as the
memory goes; transformers' T5 in PyTorch where PYTHON has torch; every attention kernel. Whatever would begin after
--minutes is left out, and said so.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# (name, arguments of t5_step_benchmark, least GiB of memory)
STEPS = (
    ("base", {"size": "base", "batch": 64}, 40),
    ("base GQA-4", {"size": "base", "batch": 64, "kv-groups": 4}, 40),
    ("large", {"size": "large", "batch": 32}, 60),
    ("XL", {"size": "xl", "batch": 16, "recompute": 1}, 70),
    ("XXL GQA-8", {"size": "xxl", "batch": 16, "kv-groups": 8, "recompute": 1, "steps": 3}, 130),
)
PYTORCH = (
    ("base", {"d-model": 768, "d-ff": 2048, "heads": 12, "layers": 12, "batch": 64}),
    ("large", {"d-model": 1024, "d-ff": 2816, "heads": 16, "layers": 24, "batch": 32}),
)


def run(command, deadline):
    """The JSON lines a command prints; None where time is up, its last words where it fails."""
    left = deadline - time.monotonic()
    if left < 20:
        return None
    errors = []
    try:
        outcome = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=left)
        printed, errors = outcome.stdout, outcome.stderr.strip().splitlines()
    except subprocess.TimeoutExpired as late:
        printed = (late.stdout or b"").decode()  # what was measured until then counts
    found = []
    for line in printed.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
        else:
            print(f"  {line}", file=sys.stderr)
    return found or (errors or ["it printed nothing in time"])[-1]


def memory_gib():
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def training_steps(arguments, deadline):
    print("\n| T5 1.1 | batch | step, s | tokens/s | model TFLOP/s | share of matmul peak |\n|---|---|---|---|---|---|")
    memory, speed = memory_gib(), {}
    for name, options, least in STEPS:
        if memory < least:
            print(f"| {name} | {options['batch']} | needs {least} GiB of GPU memory, here are {memory:.0f} | | | |")
            continue
        command = [arguments.bin / "t5_step_benchmark", "device=cuda"]
        found = run(command + [f"{key}={value}" for key, value in options.items()], deadline)
        if not isinstance(found, list):
            print(f"| {name} | {options['batch']} | {found or 'no time left'} | | | |")
            continue
        step = found[-1]
        speed[name] = step["tokens_per_second"]
        rate = step["model_gflop_per_step"] / step["median_step_seconds"] * 1e-3
        print(f"| {name} | {options['batch']} | {step['median_step_seconds']:.3f} | {step['tokens_per_second']:.0f} "
              f"| {rate:.0f} | {step['share_of_peak']:.1%} of {step['matmul_peak_gflops'] * 1e-3:.0f} |", flush=True)
    return speed


def pytorch_steps(arguments, deadline, ours):
    print("\n| PyTorch, transformers | batch | tokens/s | Regroup at this batch is faster by |\n|---|---|---|---|")
    for name, options in PYTORCH:
        for label, flags in (("SDPA", []), ("SDPA, torch.compile", ["--compile"])):
            command = [arguments.python, HERE / "pytorch_t5.py", "--device", "cuda", "--attention", "sdpa", *flags]
            for key, value in options.items():
                command += [f"--{key}", value]
            found = run(command, deadline)
            if not isinstance(found, list):
                print(f"| {name}, {label} | {options['batch']} | {found or 'no time left'} | |")
                continue
            speed = found[-1]["tokens_per_s"]
            ratio = f"{ours[name] / speed:.2f}" if name in ours else ""
            print(f"| {name}, {label} | {options['batch']} | {speed:.0f} | {ratio} |", flush=True)


def attention(arguments, deadline):
    print("\n| tokens | heads | groups | kernel | forward, TFLOP/s | backward, TFLOP/s |\n|---|---|---|---|---|---|")
    commands = [[arguments.bin / "cuda_attention_benchmark"], [arguments.python, HERE / "pytorch_attention.py"]]
    for command in commands:
        found = run(command, deadline)
        if not isinstance(found, list):
            print(f"| | | | {Path(command[-1]).name}: {found or 'no time left'} | | |")
            continue
        for row in found:
            print(f"| {row['tokens']} | {row['heads']} | {row['groups']} | {row['kernel']} "
                  f"| {row['forward_tflops']:.0f} | {row['backward_tflops']:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, type=Path, help="folder of the benchmarks")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", default="steps,pytorch,attention")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    parts, speed = arguments.only.split(","), {}
    if "steps" in parts:
        speed = training_steps(arguments, deadline)
    if "pytorch" in parts:
        pytorch_steps(arguments, deadline, speed)
    if "attention" in parts:
        attention(arguments, deadline)


if __name__ == "__main__":
    main()
