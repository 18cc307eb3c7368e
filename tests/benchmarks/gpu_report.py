#!/usr/bin/env python3
"""What Regroup does on one GPU: first that it is right, then how fast it is, beside PyTorch on the same GPU.

    gpu_report.py --bin build/release/bin [--python PYTHON] [--minutes 9] [--parts LIST] [--json FILE]
    gpu_report.py --bin build/release/bin --bundle FILE.tar.gz

In this order: the op tests on the GPU; compute-sanitizer on a few of them, where it is installed; cuDNN against the
flash kernels, with short masks; every attention kernel; full training steps (forward, backward, Adafactor) of T5 1.1 at
512/114 in bfloat16, from base to XXL as far as the memory goes; transformers' T5 where PYTHON has torch. What would
begin after --minutes is left out, and said so. Tables in Markdown; all of it also to --json. Fails where a test fails.

--bundle makes an archive of at most 64 MB with this program, the others and the libraries they need, to be carried to a
machine with a driver, CUDA's libraries and Open MPI. There: tar xf FILE.tar.gz; regroup-gpu/gpu_report.py --bin
regroup-gpu/bin.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
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


# (name, program, filter): what must hold before a speed means anything.
TESTS = (
    ("attention in bfloat16", "ops_test", "*AttentionTest.BFloat16*/*cuda*"),
    ("Hopper's attention", "wgmma_attention_test", "*"),
    ("same bits in every run", "ops_test", "*SameBits*/*cuda*"),
    ("queries that see nothing", "ops_test", "*Blind*/*cuda*"),
    ("gradients", "ops_test", "*Gradient*/*cuda*"),
    ("the other ops", "ops_test", "*OpCaseTest.Agrees*/*cuda*:*MatmulTest*/*cuda*"),
    ("choices, cuDNN on short masks", "cuda_choice_test", "*"),
)
SANITIZED = ("*AttentionTest.BFloat16*/*cuda*B2_Q150_K133_H4_G2_C64*:*AttentionTest.BFloat16*/*cuda*B2_Q140_K200*:"
             "*AttentionTest.BFloat16*/*cuda*B2_Q131_K131*")
# Libraries of the machine that the bundle is carried to.
OF_THE_MACHINE = re.compile(r"^(lib(cuda|cudart|cublas|cublasLt|cudnn\w*|nccl|nvrtc\w*|mpi\w*|open-rte|open-pal|c|m|dl|rt|"
                            r"pthread|gcc_s|stdc\+\+)|ld-linux.*|linux-vdso)\.so")
PROGRAMS = ("ops_test", "wgmma_attention_test", "cuda_choice_test", "cuda_attention_benchmark", "t5_step_benchmark")
BUNDLE_BYTES = 64 << 20


def passes(command, deadline):
    """"passed (12 tests, 3 skipped)", or what went wrong."""
    left = deadline - time.monotonic()
    if left < 10:
        return "no time left"
    try:
        outcome = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=left)
    except FileNotFoundError:
        return "not here"
    except subprocess.TimeoutExpired:
        return "no time left"
    ran = re.search(r"\[==========\] (\d+) tests? .* ran", outcome.stdout)
    skipped = re.search(r"\[  SKIPPED \] (\d+) test", outcome.stdout)
    if skipped and ran and skipped.group(1) == ran.group(1):
        return "FAILED: every test was skipped, as without a GPU"
    if outcome.returncode == 0 and ran and ran.group(1) != "0":
        return f"passed ({ran.group(1)} tests{f', {skipped.group(1)} skipped' if skipped else ''})"
    failed = re.findall(r"\[  FAILED  \] (\S+)", outcome.stdout)
    words = (outcome.stdout + outcome.stderr).strip().splitlines()
    return f"FAILED: {', '.join(sorted(set(failed))[:5]) or (words or ['it ran no test'])[-1]}"


def correctness(arguments, deadline, results):
    print("\n| what must hold | |\n|---|---|")
    for name, program, tests in TESTS:
        results[name] = passes([arguments.bin / program, f"--gtest_filter={tests}"], deadline)
        print(f"| {name} | {results[name]} |", flush=True)


def sanitizers(arguments, deadline, results):
    print("\n| compute-sanitizer | |\n|---|---|")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9, arguments.bin / "ops_test",
                   f"--gtest_filter={SANITIZED}"]
        results[tool] = passes(command, min(deadline, time.monotonic() + 60))
        print(f"| {tool} | {results[tool]} |", flush=True)


def memory_gib():
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def training_steps(arguments, deadline, results):
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
        results[name] = step
        speed[name] = step["tokens_per_second"]
        rate = step["model_gflop_per_step"] / step["median_step_seconds"] * 1e-3
        print(f"| {name} | {options['batch']} | {step['median_step_seconds']:.3f} | {step['tokens_per_second']:.0f} "
              f"| {rate:.0f} | {step['share_of_peak']:.1%} of {step['matmul_peak_gflops'] * 1e-3:.0f} |", flush=True)
    return speed


def pytorch_steps(arguments, deadline, ours, results):
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
            results[f"{name}, {label}"] = found[-1]
            speed = found[-1]["tokens_per_s"]
            ratio = f"{ours[name] / speed:.2f}" if name in ours else ""
            print(f"| {name}, {label} | {options['batch']} | {speed:.0f} | {ratio} |", flush=True)


def attention(arguments, deadline, results):
    print("\n| tokens | heads | groups | kernel | forward, TFLOP/s | backward, TFLOP/s |\n|---|---|---|---|---|---|")
    commands = [[arguments.bin / "cuda_attention_benchmark"], [arguments.python, HERE / "pytorch_attention.py"]]
    for command in commands:
        name = Path(command[-1]).name
        found = run(command, deadline)
        results[name] = found
        if not isinstance(found, list):
            print(f"| | | | {name}: {found or 'no time left'} | | |")
            continue
        rows = {}  # forward and backward of a kernel may come apart
        for row in found:
            rows.setdefault(tuple(row[key] for key in ("tokens", "heads", "groups", "kernel")), {}).update(row)
        for key, row in rows.items():
            speeds = [f"{row[f'{way}_tflops']:.0f}" if f"{way}_tflops" in row else "-" for way in ("forward", "backward")]
            print(f"| {' | '.join(map(str, (*key, *speeds)))} |", flush=True)


def bundle(arguments):
    """Packs what this report runs, stripped, with the libraries that the other machine need not have."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "regroup-gpu"
        libraries = folder / "lib"
        for part in (folder / "bin", libraries):
            part.mkdir(parents=True)
        for script in ("gpu_report.py", "pytorch_t5.py", "pytorch_attention.py"):
            shutil.copy(HERE / script, folder)
        for name in PROGRAMS:
            subprocess.run(["strip", "-o", folder / "bin" / name, arguments.bin / name], check=True)
            listed = subprocess.run(["ldd", arguments.bin / name], capture_output=True, text=True, check=True).stdout
            for library, path in re.findall(r"^\s*(\S+) => (/\S+)", listed, re.MULTILINE):
                if not OF_THE_MACHINE.match(library) and not (libraries / library).exists():
                    shutil.copy(path, libraries / library)
        with tarfile.open(arguments.bundle, "w:gz") as archive:
            archive.add(folder, folder.name)
    size = arguments.bundle.stat().st_size
    print(f"{arguments.bundle}: {size / 2**20:.1f} MB")
    return 0 if size <= BUNDLE_BYTES else f"The bundle has more than {BUNDLE_BYTES >> 20} MB"


def report(arguments):
    deadline = time.monotonic() + 60 * arguments.minutes
    results, speed = {}, {}
    for part in arguments.parts.split(","):
        found = results[part] = {}
        if part == "correctness":
            correctness(arguments, deadline, found)
        elif part == "sanitizers":
            sanitizers(arguments, deadline, found)
        elif part == "attention":
            attention(arguments, deadline, found)
        elif part == "steps":
            speed = training_steps(arguments, deadline, found)
        elif part == "pytorch":
            pytorch_steps(arguments, deadline, speed, found)
        else:
            return f"There is no part '{part}'; there are {PARTS}"
        if arguments.json:  # after each: the time may be up before the last
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    verdicts = [*results.get("correctness", {}).values(), *results.get("sanitizers", {}).values()]
    return 1 if any(verdict.startswith("FAILED") for verdict in verdicts) else 0


PARTS = "correctness,sanitizers,attention,steps,pytorch"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, type=Path, help="folder of tests and benchmarks")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", default=PARTS, help=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    if arguments.bundle:
        return bundle(arguments)
    carried = arguments.bin.resolve().parent / "lib"
    if carried.is_dir():
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(carried), os.environ.get("LD_LIBRARY_PATH", "")])
    return report(arguments)


if __name__ == "__main__":
    sys.exit(main())
