#!/usr/bin/env python3
"""A full training step of T5 1.1 here and in PyTorch (transformers' T5), side by side on the same cores.

    compare_with_pytorch.py --regroup build/release/bin/t5_step_benchmark --python VENV/bin/python [--rounds 3]

The two take turns, `--rounds` times, so that both see the same machine; of each the median round counts. PYTHON needs
torch and transformers. Every further argument after `--` goes to pytorch_t5.py (for example --mode autocast).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def regroup(arguments):
    names = ("size", "batch", "inputs", "targets", "dtype", "kv_groups", "steps", "threads")
    command = [arguments.regroup, *(f"{name.replace('_', '-')}={getattr(arguments, name)}" for name in names)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def pytorch(arguments):
    script = Path(__file__).with_name("pytorch_t5.py")
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [arguments.python, str(script), "--threads", str(arguments.threads), "--batch", str(arguments.batch),
                   "--inputs", str(arguments.inputs), "--targets", str(arguments.targets), "--dtype", arguments.dtype,
                   "--steps", str(arguments.steps), "--warmup", "1", "--json", result.name, *arguments.rest]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(Path(result.name).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regroup", required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--size", default="small", choices=["small"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--kv-groups", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("rest", nargs="*")
    arguments = parser.parse_args()

    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(regroup(arguments))
        theirs.append(pytorch(arguments))
    speed = statistics.median(run["tokens_per_second"] for run in ours)
    other = statistics.median(run["tokens_per_s"] for run in theirs)
    peak = statistics.median(run["matmul_peak_gflops"] for run in ours)
    share = statistics.median(run["share_of_peak"] for run in ours)
    shape = f"T5 1.1 {arguments.size}, {arguments.batch} x ({arguments.inputs}/{arguments.targets}), {arguments.dtype}"
    print(f"{shape}, {arguments.threads} threads, median of {arguments.rounds} rounds")
    print(f"  Regroup  {speed:8.0f} tokens/s   {share:.0%} of the {peak:.0f} GFLOP/s that oneDNN's products reach here")
    print(f"  PyTorch  {other:8.0f} tokens/s   torch {theirs[0].get('torch')}, {' '.join(arguments.rest) or 'eager'}")
    print(f"  ratio    {speed / other:8.2f}")


if __name__ == "__main__":
    main()
