#!/usr/bin/env python3
"""How fast checkpoints are written and read, next to dd on the same file system, and what a save costs training.

    checkpoint_benchmark.py --build build/release [--directory DIR] [--rounds 3] [--corpus CORPUS]

Round by round: 1, 2 and 4 ranks save and load a checkpoint, each followed by dd, which writes and reads a file of its
size; medians count, and of loading also the median of the ratios to the dd that followed. Reading begins with nothing
in the system's cache. The tensors and the saver's memory, which loading uses, are there already, as in a run. With a
corpus (see trainer --prepare-data), also a training run on one thread that saves in the background and one that waits:
seconds a step beside a save and without one.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

MIB = 1 << 20


def seconds(command):
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - begin


def dd(folder, size):
    """Seconds to write `size` bytes, flushed, and to read them from the disk: the best of two, for the first meets memory
    that the system has not had in its cache lately, which may be slow."""
    file = folder / "dd"
    blocks = size // (4 * MIB)
    written = seconds(["dd", "if=/dev/zero", f"of={file}", "bs=4M", f"count={blocks}", "conv=fsync"])
    reads = []
    for _ in range(2):
        subprocess.run(["dd", f"of={file}", "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "if=/dev/null"], check=True,
                       capture_output=True)
        reads.append(seconds(["dd", f"if={file}", "of=/dev/null", "bs=4M"]))
    file.unlink()
    return written, min(reads)


def save_and_load(arguments, folder, ranks):
    command = [*shlex.split(arguments.mpiexec), "-n", str(ranks), str(arguments.build / "bin/checkpoint_benchmark"),
               f"directory={folder / 'run'}", f"tp={ranks}", f"layers={arguments.layers}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder / "run")
    return json.loads(result.stdout)


def bandwidth(arguments, folder):
    size = 0
    ours, theirs = {}, []
    for _ in range(arguments.rounds):
        for ranks in arguments.ranks:
            result = save_and_load(arguments, folder, ranks)
            ours.setdefault(ranks, []).append(result)
            size = result["bytes"]
            theirs.append(dd(folder, size))
            result["dd_read"] = theirs[-1][1]
    write, read = (size / statistics.median(times) for times in zip(*theirs))
    print(f"{size / 1e9:.2f} GB; dd writes {write / 1e9:.2f} GB/s and reads {read / 1e9:.2f} GB/s")
    print("| tp | training waits | saved | of dd | loaded | of dd | of the dd after it |")
    print("|---|---|---|---|---|---|---|")
    for ranks, results in ours.items():
        staged, saved, loaded = (statistics.median(r[field] for r in results) for field in ("staged", "saved", "loaded"))
        beside = statistics.median(r["dd_read"] / r["loaded"] for r in results)
        print(f"| {ranks} | {staged:.2f} s ({staged / saved:.0%}) | {size / saved / 1e9:.2f} GB/s | {size / saved / write:.2f} "
              f"| {size / loaded / 1e9:.2f} GB/s | {size / loaded / read:.2f} | {beside:.2f} |")


def training(arguments, folder, background):
    """Median seconds of a step without and beside a save, and what the saves themselves took and held up."""
    run = folder / f"run-{background}"
    subprocess.run([arguments.build / "bin/trainer", "--pretrain", "--corpus", arguments.corpus, "--run", run, "--model", "base",
                    "--steps", "40", "--save-every", "10", "--batch-size", "2", "--inputs-length", "128", "--threads", "1",
                    "--evaluate-every", "0", "--evaluation-samples", "1", "--background-save", background],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["seconds_per_step"] for line in lines if line["kind"] == "train"}
    saves = [(line["step"], *(float(word) for word in line["detail"].split() if word[0].isdigit()))
             for line in lines if line["kind"] == "event" and line["name"] == "checkpoint"]
    shutil.rmtree(run)
    beside, alone = [], []
    for step, took in steps.items():
        if step == 1 or step % 10 == 1 and background == "off":
            continue
        during = any(first < step <= first + max(1, int(total / steps[step])) for first, total, _ in saves)
        (beside if during else alone).append(took)
    return beside, alone, saves


def interference(arguments, folder):
    beside, alone, saves = training(arguments, folder, "on")
    _, _, blocking = training(arguments, folder, "off")
    waited = statistics.median(waits for _, _, waits in saves[:-1])
    whole = statistics.median(waits for _, _, waits in blocking[:-1])
    print(f"a step takes {statistics.median(alone):.3f} s, beside a save {statistics.median(beside):.3f} s "
          f"({statistics.median(beside) / statistics.median(alone) - 1:+.1%}); a save holds training up for {waited:.2f} s, "
          f"a synchronous one for {whole:.2f} s ({waited / whole:.0%})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=Path)
    parser.add_argument("--directory", help="on the file system to measure; the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28, help="of the encoder and of the decoder; 28 make 2 GB")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--corpus", help="to train on")
    parser.add_argument("--mpiexec", default="mpirun --oversubscribe --bind-to none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        if arguments.ranks:
            bandwidth(arguments, Path(folder))
        if arguments.corpus:
            interference(arguments, Path(folder))


if __name__ == "__main__":
    main()
