#!/usr/bin/env python3
"""How much uptraining each conversion needs: the table and plots of docs/conversion.md, by one command.

    conversion_study.py --work DIR                        everything, from nothing; the same command again goes on
    conversion_study.py --work DIR --parent RUN --jobs 8  with a parent that exists
    conversion_study.py --work DIR --table                only the table, goals and plots of what is there

1. Corpus: --corpus, or quickstart-data/corpus, which `./quickstart --corpus` makes.
2. Parent: a multi-head T5 1.1 pretrained in DIR/parent, or a copy of --parent's newest checkpoint.
3. Control: the parent trained on for the largest alpha, from its own optimizer state.
4. One uptraining run for each method, G and seed, to the largest alpha, its held-out loss taken at every alpha. T5's
   rsqrt schedule does not know how long a run is, so these points are the ends of shorter runs. Alpha 0 is the model as
   converted. "unconverted" is the parent uptrained with all its heads: what other orders of the data cost or gain.
5. DIR/results.json, DIR/table.md, DIR/loss.svg, DIR/loss-zoom.svg.

A step whose result exists is skipped; an uptraining run that was interrupted begins again. To repeat runs, remove their
folders in DIR/runs. Seeds change the order of the data, and what a method draws. Each run is one process of one thread.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path

import conversion_table

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["unconverted", "mean", "first", "random", "spectral", "calibrated", "mean+similarity",
           "calibrated+similarity", "calibrated+uneven"]
POOLINGS = ("mean", "first", "random", "spectral", "calibrated")
NEVER = 10**9  # steps


class StudyError(Exception):
    """Something to put right, in one line."""


# ---- What is run ---------------------------------------------------------------------------------------------------


def pooling_options(method, calibration_batches):
    """The trainer's options of a method: a pooling and what is added to it with '+'."""
    if method == "unconverted":
        return ["--pooling", "mean"]
    pooling, *additions = method.split("+")
    if pooling not in POOLINGS or not set(additions) <= {"similarity", "uneven"}:
        raise StudyError(f"no method {method}: it is one of {', '.join(POOLINGS)} with +similarity or +uneven, "
                         "or unconverted")
    options = ["--pooling", pooling]
    if "similarity" in additions:
        options += ["--grouping", "similarity"]
    if "uneven" in additions:
        options += ["--kv-budget", "uneven"]
    if pooling == "calibrated" and calibration_batches:
        options += ["--calibration-batches", calibration_batches]
    return options


def cases(methods, groups, seeds, heads):
    """(method, G, seed), all methods of the first seed first. One group can neither be chosen nor be uneven."""
    for seed in seeds:
        if "unconverted" in methods:
            yield "unconverted", heads, seed
        for count in groups:
            for method in methods:
                if method != "unconverted" and not (count == 1 and "+" in method):
                    yield method, count, seed


def evaluation_grid(parent_steps, alphas):
    """Steps between evaluations and, for each alpha, the steps of uptraining; alphas are Fractions.

    The trainer evaluates where the global step is a multiple, so the distance has to divide the parent's steps. Where
    no divisor hits every alpha, each gets the nearest step that is evaluated.
    """
    denominator = lcm(*(alpha.denominator for alpha in alphas))
    common = Fraction(gcd(*(int(alpha * denominator) for alpha in alphas)), denominator)
    unit = parent_steps * common
    if unit < 1:
        raise StudyError(f"a parent of {parent_steps} steps is too short for alphas that are multiples of "
                         f"{float(common)}: train it for at least {-(-1 // common)} steps or give --alphas")
    every = max(d for d in range(1, int(unit) + 1) if parent_steps % d == 0)
    if every * 10 < unit:
        raise StudyError(f"{parent_steps} parent steps have no divisor near {float(unit):.1f}, so the alphas would "
                         f"need an evaluation every {every} steps: take a parent of a multiple of {-(-1 // common)}")
    return every, {alpha: every * int(alpha * parent_steps / every + Fraction(1, 2)) for alpha in alphas}


# ---- Processes -----------------------------------------------------------------------------------------------------


class Processes:
    """Runs commands, several at a time from several threads, and ends them all where asked."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running = set()
        self.closed = False

    def run(self, command, log, threads):
        """The exit code; output goes to the file `log`."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "w", encoding="utf-8") as output:
            with self.lock:
                if self.closed:
                    return -1
                process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output,
                                           stderr=subprocess.STDOUT, env=environment)
                self.running.add(process)
            try:
                return process.wait()
            finally:
                with self.lock:
                    self.running.discard(process)

    def close(self):
        with self.lock:
            self.closed = True
            for process in self.running:
                process.terminate()


def last_line(log):
    lines = [line for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def newest_checkpoint(run):
    steps = sorted(Path(run).glob("checkpoints/step-*"))
    steps = [step for step in steps if re.fullmatch(r"step-\d+", step.name)]
    return steps[-1] if steps else None


def copy_checkpoint(step, source, target):
    """A run directory with this one checkpoint: whole or absent."""
    aside = target.with_name(target.name + ".part")
    for folder in (aside, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(step, aside / "checkpoints" / step.name)
    (aside / "checkpoints" / "latest").write_text(step.name + "\n", encoding="utf-8")
    for name in ("resolved.cfg", "metrics.jsonl"):
        if (source / name).exists():
            shutil.copy(source / name, aside / name)
    aside.rename(target)


def resolved_options(run):
    """What a run was told, as its resolved.cfg says."""
    lines = (Path(run) / "resolved.cfg").read_text(encoding="utf-8").splitlines()
    return dict(map(str.strip, line.split("=", 1)) for line in lines if "=" in line and not line.startswith("#"))


# ---- The stages ----------------------------------------------------------------------------------------------------


class Study:
    def __init__(self, arguments):
        self.arguments = arguments
        self.work = arguments.work.resolve()
        self.processes = Processes()
        self.corpus = None
        self.parent_step = None  # the step directory that is converted
        self.every = 0
        self.points = {}  # alpha -> steps

    def run(self):
        for folder in ("runs", "logs"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self.get_corpus()
        self.get_parent()
        self.fix_settings()
        self.train()

    def get_corpus(self):
        self.corpus = (self.arguments.corpus or ROOT / "quickstart-data" / "corpus").resolve()
        if (self.corpus / "manifest.json").exists():
            return
        if self.arguments.corpus:
            raise StudyError(f"{self.corpus} is no corpus of `trainer --prepare-data`")
        print("corpus: ./quickstart --corpus", flush=True)
        subprocess.run([ROOT / "quickstart", "--corpus"], check=True, stdin=subprocess.DEVNULL)

    def get_parent(self):
        parent = self.work / "parent"
        if self.arguments.parent:
            origin = parent / "origin"
            known = origin.read_text(encoding="utf-8") if origin.exists() else "elsewhere"
            if parent.exists() and known != str(self.arguments.parent.resolve()):
                raise StudyError(f"the parent in {parent} is from {known}: take another --work")
            if not parent.exists():
                step = newest_checkpoint(self.arguments.parent)
                if step is None:
                    raise StudyError(f"{self.arguments.parent} is no run with a checkpoint")
                print(f"parent: a copy of {step}", flush=True)
                copy_checkpoint(step, self.arguments.parent, parent)
                origin.write_text(str(self.arguments.parent.resolve()), encoding="utf-8")
        elif not (parent / "complete").exists():
            self.pretrain(parent)
        self.parent_step = newest_checkpoint(parent)

    def pretrain(self, parent):
        a = self.arguments
        threads = len(os.sched_getaffinity(0))
        log = self.work / "logs" / "parent.log"
        often = max(1, a.steps // 40)
        print(f"parent: {a.steps} steps on {threads} threads; progress in {log}", flush=True)
        code = self.processes.run(
            [a.trainer, "--pretrain", "--run", parent, "--corpus", self.corpus, "--model", "tiny",
             "--d-model", a.d_model, "--heads", a.heads, "--d-kv", a.d_kv or a.d_model // a.heads,
             "--d-ff", a.d_ff or 2 * a.d_model, "--layers", a.layers, "--inputs-length", a.inputs_length,
             "--batch-size", a.batch_size, "--precision", a.precision, "--seed", 0, "--steps", a.steps,
             "--save-every", often, "--evaluate-every", often, "--evaluation-samples", a.evaluation_samples,
             "--threads", threads], log, threads)
        if code != 0:
            raise StudyError(f"the parent's pretraining ended with exit code {code}: {last_line(log)}")
        (parent / "complete").touch()

    def fix_settings(self):
        """What must not change between two calls, or runs of different studies would be compared."""
        config = json.loads((self.parent_step / "config.json").read_text(encoding="utf-8"))
        parent_steps = int(self.parent_step.name.removeprefix("step-"))
        self.every, self.points = evaluation_grid(parent_steps, self.arguments.alphas)
        settings = {"parent_steps": parent_steps, "heads": config["num_heads"],
                    "parent": resolved_options(self.work / "parent"),
                    "manifest": json.loads((self.corpus / "manifest.json").read_text(encoding="utf-8")),
                    "alphas": {str(float(alpha)): steps for alpha, steps in self.points.items()},
                    "evaluation_samples": self.arguments.evaluation_samples,
                    "calibration_batches": self.arguments.calibration_batches}
        path = self.work / "study.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if changed:
                raise StudyError(f"{self.work} holds a study with another {', '.join(changed)}: take another --work")
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def train(self):
        heads = json.loads((self.work / "study.json").read_text(encoding="utf-8"))["heads"]
        a = self.arguments
        todo = [case for case in cases(a.methods, a.groups, a.seeds, heads)
                if not self.is_complete(self.work / "runs" / conversion_table.run_name(*case))]
        jobs = [] if self.is_complete(self.work / "control") else [self.control]
        jobs += [lambda case=case: self.uptrain(*case) for case in todo]
        print(f"{len(jobs)} runs of {max(self.points.values())} steps to do, {a.jobs} at a time", flush=True)
        done = 0
        with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
            try:
                for future in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
                    done += 1
                    print(f"[{done}/{len(jobs)}] {future.result()}", flush=True)
            except BaseException:
                self.processes.close()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def is_complete(self, run):
        losses = conversion_table.evaluations(run / "metrics.jsonl")
        parent_steps = int(self.parent_step.name.removeprefix("step-"))
        return all(("held-out", parent_steps + steps) in losses for steps in self.points.values())

    def evaluation_options(self):
        return ["--evaluate-every", self.every, "--evaluation-samples", self.arguments.evaluation_samples,
                "--save-every", NEVER, "--progress-every", 100, "--threads", 1]

    def control(self):
        run = self.work / "control"
        copy_checkpoint(self.parent_step, self.work / "parent", run)
        steps = int(self.parent_step.name.removeprefix("step-")) + max(self.points.values())
        # The copy knows how it was pretrained: options that are not named here stay as they were.
        command = ["--pretrain", "--config", self.work / "parent" / "resolved.cfg", "--run", run, "--corpus",
                   self.corpus, "--steps", steps, *self.evaluation_options()]
        return self.finish("control", run, command)

    def uptrain(self, method, groups, seed):
        name = conversion_table.run_name(method, groups, seed)
        run = self.work / "runs" / name
        shutil.rmtree(run, ignore_errors=True)
        parent_steps = int(self.parent_step.name.removeprefix("step-"))
        precision = resolved_options(self.work / "parent").get("precision", "bf16")
        command = ["--uptrain", "--init-from", self.parent_step, "--run", run, "--corpus", self.corpus, "--kv-groups",
                   groups, *pooling_options(method, self.arguments.calibration_batches), "--alpha",
                   f"{max(self.points.values()) / parent_steps:.15g}", "--seed", seed, "--precision", precision,
                   *self.evaluation_options()]
        return self.finish(name, run, command)

    def finish(self, name, run, options):
        """Trains, and keeps of the run only what it measured."""
        log = self.work / "logs" / f"{name}.log"
        began = time.monotonic()
        code = self.processes.run([self.arguments.trainer, *options], log, threads=1)
        if code != 0 or not self.is_complete(run):
            return f"{name}: FAILED with exit code {code}: {last_line(log)}"
        if not self.arguments.keep_checkpoints:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        losses = conversion_table.evaluations(run / "metrics.jsonl")
        converted = [loss for (kind, _), loss in losses.items() if kind == "converted"]
        last = losses["held-out", max(step for kind, step in losses if kind == "held-out")]
        start = f"{converted[-1]:.4f} -> " if converted else ""
        return f"{name}: {start}{last:.4f} in {time.monotonic() - began:.0f} s"


# ---- The command line ----------------------------------------------------------------------------------------------


def alpha(text):
    value = Fraction(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def parse(command_line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--trainer", type=Path, default=ROOT / "build" / "cpu" / "bin" / "trainer")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--parent", type=Path, help="a run whose newest checkpoint is converted")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--alphas", nargs="+", type=alpha, help="besides 0",
                        default=[Fraction(text) for text in ("0.005", "0.0125", "0.025", "0.05", "0.1")])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--evaluation-samples", type=int, default=512)
    parser.add_argument("--calibration-batches", type=int, help="instead of the trainer's default")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of the runs' ends")
    parent = parser.add_argument_group("a parent that is pretrained here")
    parent.add_argument("--steps", type=int, default=20000)
    parent.add_argument("--d-model", type=int, default=256)
    parent.add_argument("--heads", type=int, default=8)
    parent.add_argument("--d-kv", type=int, help="default: d_model / heads, as in T5")
    parent.add_argument("--d-ff", type=int, help="default: 2 d_model")
    parent.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parent.add_argument("--inputs-length", type=int, default=128)
    parent.add_argument("--batch-size", type=int, default=32)
    parent.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args(command_line)
    for method in arguments.methods:
        pooling_options(method, None)
    return arguments


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    signal.signal(signal.SIGTERM, interrupt)
    try:
        arguments = parse(sys.argv[1:])
        if not arguments.table:
            Study(arguments).run()
        print(conversion_table.write(arguments.work, arguments.methods, arguments.groups, arguments.seeds, cases))
    except KeyboardInterrupt:
        return "interrupted; the same command goes on"
    except (StudyError, conversion_table.NoStudy, OSError, subprocess.CalledProcessError) as error:
        return f"conversion_study: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
