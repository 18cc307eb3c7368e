"""Drives the real program under mpirun: a small corpus, jobs of N ranks, and what they leave behind.

A test's main is harness.main(); it takes the program as `--trainer PATH` before unittest's own arguments.
"""

import argparse
import atexit
import fcntl
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

SAVED_AND_STOPPED = 75
NO_PROGRESS = 77
USER_ERROR = 2
# A job that a wrong input ends must be gone within seconds; the rest is for a machine with other things to do.
SECONDS_TO_FAIL = 60
SECONDS_TO_TRAIN = 300

# As ctest sets them, for calls by hand.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
}

# A model that learns in tens of steps and takes milliseconds for each; embedding and feed-forward are large enough
# for Adafactor to factor.
MODEL = ["--model", "tiny", "--d-model", 128, "--d-ff", 160, "--layers", 1, "--heads", 4, "--d-kv", 16]
DATA = ["--inputs-length", 32, "--batch-size", 8, "--evaluation-samples", 16, "--workers", 1]
# The multi-head model that several tests convert.
PARENT_STEPS = 60
PARENT_TRAINING = [*DATA, "--precision", "fp32", "--warmup", 10, "--learning-rate", 0.1, "--progress-every", 10]

options = argparse.Namespace(trainer=None, mpiexec="mpirun --oversubscribe --bind-to none", device="cpu",
                             kills=10, seed=1, fault_library=None, shared=None)


# ---- The corpus ----------------------------------------------------------------------------------------------------

WORDS = {
    "article": "the a this that each some every our".split(),
    "adjective": "small old bright quiet heavy distant early simple hollow patient northern careful".split(),
    "noun": "river engine garden letter window teacher harbour lantern mountain winter signal branch market "
            "reader shadow bridge machine village".split(),
    "verb": "follows carries watches repairs answers remembers crosses measures gathers leaves turns "
            "holds".split(),
    "preposition": "under beside through before after near with without".split(),
}
# What may come after what; each list is drawn from uniformly.
FOLLOWERS = {
    "article": ["adjective", "noun", "noun"],
    "adjective": ["noun", "noun", "adjective"],
    "noun": ["verb", "verb", "preposition", "."],
    "verb": ["article", "article", "preposition"],
    "preposition": ["article"],
}


def sentence(draw):
    """A sentence whose words follow one another by a fixed chain, so that there is something to learn."""
    words, kind = [], "article"
    while kind != ".":
        if words and draw.random() < 0.7:  # a word has a favourite successor of each kind
            choices = WORDS[kind]
            words.append(choices[sum(words[-1].encode()) % len(choices)])
        else:
            words.append(draw.choice(WORDS[kind]))
        kind = "." if len(words) > 14 else draw.choice(FOLLOWERS[kind])
    return " ".join(words).capitalize() + "."


def write_text(path, documents=400, seed=7):
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(sentence(draw) for _ in range(draw.randint(3, 12)))
            file.write(json.dumps({"text": text}) + "\n")


def make_corpus(folder):
    """Text, a vocabulary and a token corpus in `folder`."""
    text, tokenizer, corpus = folder / "text.jsonl", folder / "tokenizer.model", folder / "corpus"
    write_text(text)
    for arguments in (["--train-tokenizer", "--input", text, "--vocab-pieces", 110, "--output", tokenizer],
                      ["--prepare-data", "--input", text, "--tokenizer", tokenizer, "--output", corpus,
                       "--heldout-fraction", 0.1]):
        outcome = run(arguments, ranks=1)
        if outcome.code != 0:
            raise AssertionError(f"the corpus could not be made:\n{outcome.stderr}")


# ---- Jobs ----------------------------------------------------------------------------------------------------------


class Outcome:
    """How a job ended: exit code, outputs, seconds."""

    def __init__(self, code, stdout, stderr, seconds):
        self.code, self.stdout, self.stderr, self.seconds = code, stdout, stderr, seconds

    # What the program itself printed on standard error, without mpirun's banners: (rank, text) pairs.
    @property
    def messages(self):
        found = re.findall(r"^\[[\d:]+\] \[rank (\d+)\] (.*)$", self.stderr, re.MULTILINE)
        return [(int(rank), text) for rank, text in found]

    def __str__(self):
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.stdout}{self.stderr}"


def changed(arguments, *changes):
    """The arguments with the values of some options replaced, or added; a value of None removes the option."""
    result = list(arguments)
    for name, value in zip(changes[::2], changes[1::2]):
        if name in result:
            at = result.index(name)
            del result[at:at + 2]
        result += [] if value is None else [name, value]
    return result


def command_of(arguments, ranks, fault=None):
    """The command of a job; `fault` (see tests/support/fault_preload.cpp) meets its ranks, not their launcher."""
    words = [str(word) for word in arguments]
    program = [options.trainer]
    if fault:
        program = ["env", f"LD_PRELOAD={options.fault_library}", f"REGROUP_FAULT={fault}", options.trainer]
    if options.device != "cpu" and {"--pretrain", "--uptrain", "--evaluate"}.intersection(words):
        words += ["--device", options.device]
    if ranks == 1:
        return [*program, *words]
    return [*shlex.split(options.mpiexec), "-n", str(ranks), *program, *words]


def children(pid):
    """Process ids of the children of a process."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def exists(pid):
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid, seconds):
    """Whether a process has ended within so many seconds."""
    end = time.monotonic() + seconds
    while exists(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Job:
    """A job under way, in a process group of its own; a context manager that leaves nothing behind."""

    def __init__(self, arguments, ranks=2, cwd=None, fault=None):
        self.ranks = ranks
        self.begin = time.monotonic()
        self.stdout = tempfile.TemporaryFile()
        self.stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command_of(arguments, ranks, fault), stdin=subprocess.DEVNULL, stdout=self.stdout, stderr=self.stderr,
            env={**ENVIRONMENT, **os.environ}, cwd=cwd, start_new_session=True)
        self.seen = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.rank_pids(), *self.seen, self.process.pid]:
            if exists(pid) and (pid == self.process.pid or self.is_rank(pid)):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.stdout.close()
        self.stderr.close()

    @staticmethod
    def is_rank(pid):
        try:
            return Path(f"/proc/{pid}/exe").resolve() == Path(options.trainer).resolve()
        except OSError:
            return False

    def rank_pids(self):
        """The ranks that run now, lowest rank first as mpirun starts them in that order."""
        if self.ranks == 1:
            return [self.process.pid] if self.is_rank(self.process.pid) else []
        found = [pid for pid in sorted(children(self.process.pid)) if self.is_rank(pid)]
        self.seen.update(found)
        return found

    def kill(self, pid, number):
        """Sends a signal to a process of the job, which may have ended in the meantime."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    def seconds(self):
        return time.monotonic() - self.begin

    def over(self):
        return self.process.poll() is not None

    def wait_for(self, condition, seconds=SECONDS_TO_TRAIN):
        """Until the condition holds; False where the job ends first."""
        end = time.monotonic() + seconds
        while not condition():
            if self.over():
                return False
            if time.monotonic() > end:
                raise AssertionError(f"nothing happened in {seconds} s:\n{self.output(self.stderr)}")
            time.sleep(0.002)
        return True

    def output(self, file):
        file.seek(0)
        return file.read().decode(errors="replace")

    def finish(self, seconds=SECONDS_TO_TRAIN):
        """Waits for the end of mpirun and of every rank."""
        left = self.begin + seconds
        self.rank_pids()
        try:
            self.process.wait(max(left - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job hangs:\n{self.output(self.stderr)}") from None
        while lingering := [pid for pid in self.seen if exists(pid) and self.is_rank(pid)]:
            if time.monotonic() > left:
                raise AssertionError(f"ranks outlive mpirun: {lingering}\n{self.output(self.stderr)}")
            time.sleep(0.05)
        return Outcome(self.process.returncode, self.output(self.stdout), self.output(self.stderr), self.seconds())


def run(arguments, ranks=2, seconds=SECONDS_TO_TRAIN, **how):
    with Job(arguments, ranks, **how) as job:
        return job.finish(seconds)


# ---- What tests share ----------------------------------------------------------------------------------------------


def shared(name, make):
    """A folder that make(folder) has filled, now or for another test; nobody writes to it. What `--shared` names ctest
    empties before the first test; by hand each program has its own."""
    if options.shared is None:
        options.shared = tempfile.mkdtemp(prefix="regroup-")
        atexit.register(shutil.rmtree, options.shared, ignore_errors=True)
    home = Path(options.shared)
    home.mkdir(parents=True, exist_ok=True)
    folder, made = home / name, home / f"{name}.made"
    with open(home / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def trained(name, arguments, ranks=2):
    """The folder, of this name, of a run by these arguments, and the seconds that it took."""

    def make(folder):
        outcome = run([*arguments, "--run", folder / name], ranks)
        if outcome.code != 0:
            raise AssertionError(f"{name} could not be trained: {outcome}")
        (folder / "seconds").write_text(str(outcome.seconds))

    words = " ".join(map(str, [options.trainer, options.device, ranks, *arguments]))
    folder = shared(f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:16]}", make)
    return folder / name, float((folder / "seconds").read_text())


def trained_parent(corpus):
    """The folder of the parent's run."""
    return trained("parent", ["--pretrain", "--corpus", corpus, *MODEL, *PARENT_TRAINING, "--steps", PARENT_STEPS])[0]


# ---- What a run leaves ---------------------------------------------------------------------------------------------


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def size_of(path):
    """Bytes of a file; 0 where there is none."""
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return 0


def tree(folder):
    """{relative path: digest} of all files under a folder."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def step_directory(run_folder, step):
    return Path(run_folder) / "checkpoints" / f"step-{step:08}"


def saved_steps(run_folder):
    names = [path.name for path in (Path(run_folder) / "checkpoints").glob("step-*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def unfinished(run_folder):
    """Names among the checkpoints that only a save (or removal) under way may have; not what was set aside."""
    try:
        return sorted(name for name in os.listdir(Path(run_folder) / "checkpoints")
                      if name != "latest" and not re.fullmatch(r"step-\d{8,}(\.damaged)?", name))
    except FileNotFoundError:
        return []


DETERMINISTIC = {
    "train": ("step", "total_steps", "loss", "z_loss", "learning_rate", "gradient_norm", "samples"),
    "evaluation": ("step", "name", "loss", "tokens"),
}


def metrics(run_folder, kind):
    """The lines of one kind, their deterministic fields only."""
    lines = (Path(run_folder) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{field: line[field] for field in DETERMINISTIC[kind]} for line in parsed if line["kind"] == kind]


def losses(run_folder):
    return [line["loss"] for line in metrics(run_folder, "train")]


def evaluations(run_folder):
    return {(line["step"], line["name"]): line["loss"] for line in metrics(run_folder, "evaluation")}


def recovered(run_folder):
    """{step: share of the conversion's gap} of an uptraining's held-out evaluations."""
    parsed = [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["scores"]["recovered"] for line in parsed
            if line["kind"] == "evaluation" and "scores" in line}


def events(run_folder, name):
    """The steps at which an event of this name is noted."""
    parsed = [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in parsed if line["kind"] == "event" and line["name"] == name]


def is_report(message):
    """Whether a line of the program is one of those that a run prints before anything can go wrong with it."""
    return re.match(r"configuration:|  \S+ = |[\d,]+ parameters; |matmul peak|held-out loss|resuming |step \d+: (?:saved|held-out) |"
                    r"read \d+ documents|left out \d+|  \S+:\d+: |this processor does not multiply bfloat16", message) is not None


def read_tensors(path):
    """{name: (shape, bytes)} of a safetensors file."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    return {name: (entry["shape"], data[8 + length + entry["data_offsets"][0]:8 + length + entry["data_offsets"][1]])
            for name, entry in header.items()}


def write_tensors(path, tensors):
    """The inverse of read_tensors() of a file of fp32 tensors."""
    header, data = {}, b""
    for name, (shape, content) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- Test cases ----------------------------------------------------------------------------------------------------


class SystemTest(unittest.TestCase):
    """Has a corpus, which is shared, a folder for all tests of the class and one for each."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(tempfile.mkdtemp(prefix="regroup-"))
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.data = shared("data", make_corpus)
        cls.corpus = cls.data / "corpus"

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(dir=self.home))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def train(self, arguments, ranks=2, code=0, **how):
        outcome = run(arguments, ranks, **how)
        self.assertEqual(outcome.code, code, outcome)
        return outcome

    def assert_refused(self, outcome, pattern, code=USER_ERROR):
        """One line of the program that matches, the exit code, and within seconds."""
        self.assertEqual(outcome.code, code, outcome)
        told = [text for _, text in outcome.messages if not is_report(text)]
        self.assertEqual(len(told), 1, f"not one line:\n{outcome}")
        self.assertRegex(told[0], pattern)
        self.assertLess(outcome.seconds, SECONDS_TO_FAIL)

    def assert_complete(self, run_folder):
        """Nothing of a save under way is left."""
        self.assertEqual(unfinished(run_folder), [])

    def assert_relative(self, found, expected, tolerance, what=""):
        self.assertLessEqual(abs(found - expected), tolerance * abs(expected), f"{what}: {found} for {expected}")

    def assert_same_losses(self, found, expected, tolerance):
        self.assertEqual(len(found), len(expected))
        for step, (a, b) in enumerate(zip(found, expected), 1):
            self.assert_relative(a, b, tolerance, f"step {step}")


def main():
    parser = argparse.ArgumentParser(description="Tests of the program, under mpirun.")
    parser.add_argument("--trainer", required=True, type=os.path.abspath)
    parser.add_argument("--mpiexec", default=options.mpiexec, help="the launcher and its flags, as one word")
    parser.add_argument("--device", default=options.device, help="that training and evaluation run on")
    parser.add_argument("--fault-library", type=os.path.abspath, help="regroup_fault_preload, for the fault test")
    parser.add_argument("--shared", type=os.path.abspath, help="folder of what tests share, emptied before the first")
    parser.add_argument("--kills", type=int, default=options.kills, help="of the resume test")
    parser.add_argument("--seed", type=int, default=options.seed, help="of the moments of the kills")
    _, left = parser.parse_known_args(namespace=options)
    unittest.main(module="__main__", argv=[sys.argv[0], *left], verbosity=2)
