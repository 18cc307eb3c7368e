#!/usr/bin/env python3
"""Faults at chosen moments: whatever dies or is damaged, no checkpoint is lost and the run ends with the same bits.

Ranks meet their faults through regroup_fault_preload (tests/support/fault_preload.cpp, which says what a fault is).
"""

import fcntl
import json
import re
import shutil
import subprocess

import harness
from harness import changed, step_directory
from resume_test import SAVE_EVERY, STEPS, InterruptedRun

SYNCHRONOUS = ["--background-save", "off"]


class FaultTest(InterruptedRun):
    def begin(self, layout, *more):
        """A fresh run of the layout's reference."""
        self.run_folder = self.folder / "run"
        self.whole = self.reference(layout)
        self.command = [*self.whole.command, *more, "--run", self.run_folder]

    def next_step(self):
        """The step of the next save."""
        return max(harness.saved_steps(self.run_folder), default=0) + SAVE_EVERY

    def meet(self, fault):
        """A job that a fault ends, within seconds; the checkpoints that were there still are, or are newer."""
        before = harness.saved_steps(self.run_folder)
        with harness.Job(self.command, fault=fault.format(step=f"step-{self.next_step():08}")) as job:
            outcome = job.finish(harness.SECONDS_TO_FAIL)
        self.assertNotIn("REGROUP_FAULT=", outcome.stderr)
        self.assertNotEqual(outcome.code, 0, f"{fault} did not happen:\n{outcome}")
        if before:
            self.assertGreaterEqual(max(harness.saved_steps(self.run_folder), default=0), max(before))
        self.assert_steps_intact(self.run_folder, self.whole)
        return outcome

    def complete(self):
        outcome = self.train(self.command)
        self.assert_same_run(self.run_folder, self.whole)
        return outcome


class KillTest(FaultTest):
    """kill -9 of a rank; the next job goes on where the last one ended."""

    def kill(self, *faults):
        for fault in faults:
            with self.subTest(fault):
                outcome = self.meet(f"kill@{fault}")
                rank = re.search(r"rank=(\d)", fault).group(1)
                self.assertRegex(outcome.stderr, rf"rank {rank} .*exited on signal 9")


class TrainingTest(KillTest):
    """In each phase of a step."""

    changes = ("--steps", 240, "--save-every", 10)

    def test_data_parallel(self):
        # Between its reductions a step is forward and backward alone: the first third of its matmuls and the rest.
        self.begin("dp2")
        self.kill("open,rank=1,path=manifest.json",                      # at the start
                  "dnnl_primitive_execute:1,rank=1,after=MPI_Allreduce:60",   # a batch has come
                  "dnnl_primitive_execute:6,rank=0,after=MPI_Allreduce:70",   # forward
                  "dnnl_primitive_execute:25,rank=1,after=MPI_Allreduce:80",  # backward
                  "MPI_Allreduce:60,rank=0",                                  # reductions
                  "MPI_Allreduce-after:61,rank=1")
        self.complete()

    def test_tensor_parallel(self):
        # Reductions are within forward and backward.
        self.begin("tp2")
        self.kill("MPI_Allreduce:100,rank=0", "MPI_Allreduce-after:111,rank=1",
                  "dnnl_primitive_execute:30,rank=0,after=MPI_Allreduce:122")
        self.complete()


class SaveTest(KillTest):
    """In each phase of a save, which rank 0 begins and ends and all ranks write."""

    changes = ("--precision", "fp32")  # which leaves the exchange in tensor-parallel groups to saves

    def test_data_parallel(self):
        self.begin("dp2")
        self.kill(r"mkdir-after,rank=0,path={step}\.partial",
                  r"open:3,rank=0,path={step}\.partial/",
                  r"pwrite:1,rank=0,path={step}\.partial/",
                  r"pwrite-after:1,rank=1,path={step}\.partial/",
                  r"fdatasync:1,rank=0,path={step}\.partial/",
                  r"fdatasync-after:1,rank=1,path={step}\.partial/",
                  r"write:1,rank=0,path={step}\.partial/trainer\.json",
                  r"fsync:1,rank=0,path={step}\.partial$",
                  r"rename,rank=0,path=/{step}$",
                  r"rename-after,rank=0,path=/{step}$",
                  r"rename,rank=0,path=/latest$")
        self.complete()
        self.assertEqual((self.run_folder / "checkpoints" / "latest").read_text().strip(),
                         step_directory(self.run_folder, STEPS).name)

    def test_removal_of_old_steps(self):
        self.begin("dp2")
        self.kill(r"rename,rank=0,path=\.deleting$", r"rename-after,rank=0,path=\.deleting$")
        self.complete()

    def test_an_old_step_that_cannot_be_removed(self):
        """Harms nobody: the run goes on, and a later job removes what it can."""
        self.begin("dp2")
        outcome = self.train(self.command, fault="EIO@unlinkat:1,rank=0")
        self.assertRegex(outcome.stderr, r"cannot remove .*\.deleting: Input/output error: it stays")
        self.assert_steps_intact(self.run_folder, self.whole)
        self.assertRegex(" ".join(harness.unfinished(self.run_folder)), r"^(step-\d+\.deleting ?)+$")
        self.complete()

    def test_tensor_parallel(self):
        self.begin("tp2")
        for exchange in ("MPI_Alltoallv:1,rank=0", "MPI_Alltoallv-after:1,rank=1"):
            self.kill(exchange)
            self.assertEqual(harness.unfinished(self.run_folder), [f"step-{SAVE_EVERY:08}.partial"])
        self.kill(r"pwrite:1,rank=1,path={step}\.partial/", r"rename,rank=0,path=/{step}$")
        self.complete()

    def test_synchronous(self):
        self.begin("tp2", *SYNCHRONOUS)
        self.kill(r"pwrite-after:1,rank=1,path={step}\.partial/", r"rename,rank=0,path=/{step}$")
        self.complete()


class DiskTest(FaultTest):
    """A disk that refuses during a save: one line, and what was saved stays."""

    def refused(self, fault, pattern, codes=(harness.USER_ERROR,)):
        with self.subTest(fault):
            outcome = self.meet(fault)
            self.assertIn(outcome.code, codes, outcome)
            self.assert_refused(outcome, pattern, code=outcome.code)
            self.assert_complete(self.run_folder)

    def test_full(self):
        self.begin("dp2")
        self.meet(r"kill@rename-after,rank=0,path=/latest$")
        for fault in (r"mkdir,path={step}\.partial", r"open,path={step}\.partial/", r"fallocate,path={step}\.partial/",
                      r"pwrite:1,path={step}\.partial/", r"fdatasync:1,path={step}\.partial/",
                      r"write:1,path={step}\.partial/trainer\.json", r"rename,path=/{step}$",
                      r"write:20,path=/metrics\.jsonl", rf"pwrite:1,path=step-{STEPS:08}\.partial/"):
            self.refused(f"ENOSPC@{fault}", "No space left on device")
        self.complete()

    def test_input_output_error(self):
        self.begin("tp2")
        for fault in (r"pwrite:1,rank=1,path={step}\.partial/", r"fdatasync:1,rank=1,path={step}\.partial/",
                      r"fsync:1,path={step}\.partial", r"pwrite:1,rank=0,path={step}\.partial/"):
            self.refused(f"EIO@{fault}", r"Input/output error", codes=(1,))
        self.refused(r"EIO@write:20,path=/metrics\.jsonl", "Input/output error", codes=(1,))
        self.complete()

    def test_full_in_a_synchronous_save(self):
        self.begin("dp2", *SYNCHRONOUS)
        self.refused(r"ENOSPC@pwrite:1,path={step}\.partial/", "No space left on device")
        self.complete()

    def test_becomes_read_only(self):
        self.begin("dp2")
        self.refused(r"EROFS@mkdir,path={step}\.partial", "Read-only file system")
        self.complete()

    def test_small_disk(self):
        """A file system of its own, which two checkpoints fill."""
        disk = self.folder / "disk"
        disk.mkdir()
        self.begin("dp2")
        size = sum(path.stat().st_size for path in step_directory(self.whole.run, STEPS).iterdir())
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={5 * size // 2 + 2**18}", "tmpfs", disk],
                                 capture_output=True)
        if mounted.returncode != 0:
            self.skipTest(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
        self.addCleanup(subprocess.run, ["umount", disk])
        self.run_folder = disk / "run"
        self.command = changed(self.command, "--run", self.run_folder)
        outcome = harness.run([*self.command, "--keep-every", SAVE_EVERY], seconds=harness.SECONDS_TO_FAIL)
        self.assert_refused(outcome, "cannot write .*: No space left on device")
        self.assertIn(len(harness.saved_steps(self.run_folder)), (1, 2), "some, but not all")
        self.assert_steps_intact(self.run_folder, self.whole)
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        self.complete()


class DamageTest(FaultTest):
    """The newest checkpoint is damaged: it is set aside, and the one before it is used."""

    FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.model", "trainer.json")
    NEWEST, OLDER = STEPS - SAVE_EVERY, STEPS - 2 * SAVE_EVERY

    def begin(self, layout, *more):
        """A run that was stopped some steps before its end, with two checkpoints."""
        super().begin(layout, *more)
        shutil.rmtree(self.run_folder, ignore_errors=True)
        shutil.copytree(self.whole.run, self.run_folder)
        for step in harness.saved_steps(self.run_folder):
            if step not in (self.NEWEST, self.OLDER):
                shutil.rmtree(step_directory(self.run_folder, step))
        (self.run_folder / "checkpoints" / "latest").write_text(f"step-{self.NEWEST:08}\n")
        (self.run_folder / "loss.svg").unlink()

    def damage(self, step, name, how):
        file = step_directory(self.run_folder, step) / name
        content = bytearray(file.read_bytes())
        if how.startswith("flipped"):
            content[{"flipped length": 1, "flipped header": 9}.get(how, len(content) // 2)] ^= 4
        elif how == "truncated":
            del content[len(content) // 2:]
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(content)

    def check(self, name, how, layout="dp2"):
        with self.subTest(f"{name} {how}"):
            self.begin(layout)
            self.damage(self.NEWEST, name, how)
            damaged = harness.tree(step_directory(self.run_folder, self.NEWEST))
            outcome = self.complete()
            aside = step_directory(self.run_folder, self.NEWEST).with_suffix(".damaged")
            told = [text for _, text in outcome.messages if f"{aside.stem}/{name}" in text]
            self.assertEqual(len(told), 1, outcome)
            self.assertIn(aside.name, told[0])
            self.assertRegex(outcome.stderr, rf"resuming .* at step {self.OLDER}")
            self.assertEqual(harness.tree(aside), damaged, "what was damaged is kept as it was")

    def test_flipped_bit(self):
        for name in self.FILES:
            self.check(name, "flipped")
        for name in ("model.safetensors", "optimizer.safetensors"):
            self.check(name, "flipped length")
            self.check(name, "flipped header")

    def test_truncated(self):
        for name in self.FILES:
            self.check(name, "truncated", "tp2")

    def test_missing(self):
        for name in self.FILES:
            self.check(name, "missing")

    def test_killed_while_setting_aside(self):
        self.begin("dp2")
        self.damage(self.NEWEST, "model.safetensors", "flipped")
        for moment in ("rename", "rename-after"):
            outcome = harness.run(self.command, fault=rf"kill@{moment},rank=0,path=\.damaged$")
            self.assertRegex(outcome.stderr, "exited on signal 9")
        self.complete()

    def test_nothing_intact_is_left(self):
        self.begin("dp2")
        for step in (self.NEWEST, self.OLDER):
            self.damage(step, "model.safetensors", "flipped")
        latest = self.run_folder / "checkpoints" / "latest"
        latest.unlink()  # it follows
        before = sorted(harness.tree(self.run_folder / "checkpoints").values())
        outcome = harness.run(self.command, seconds=harness.SECONDS_TO_FAIL)
        self.assertEqual(outcome.code, harness.USER_ERROR, outcome)
        self.assertRegex(outcome.messages[-1][1], "checkpoint")
        latest.unlink()
        self.assertEqual(sorted(harness.tree(self.run_folder / "checkpoints").values()), before, "nothing is lost")


class DivergenceTest(KillTest):
    """Spikes, which with such a threshold are but the higher norms, are the same ones after a kill."""

    SPIKES = ("--spike-threshold", 0.7)

    def events(self, run, name):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if line["kind"] == "event" and line["name"] == name]


class SkipTest(DivergenceTest):
    """Their updates are left out."""

    changes = ("--on-divergence", "skip", *DivergenceTest.SPIKES)

    def test_killed(self):
        self.begin("dp2")
        skipped = self.events(self.whole.run, "skip")
        self.assertGreater(len(skipped), 0)
        self.kill("MPI_Allreduce:110,rank=1", "MPI_Allreduce:80,rank=0")
        self.complete()
        self.assertEqual(self.events(self.run_folder, "skip"), skipped)
        steps = {line["step"] for line in harness.metrics(self.run_folder, "train")}
        self.assertEqual(set(range(1, STEPS + 1)) - steps, set(skipped))

    def test_stop(self):
        self.begin("dp2")
        stop = changed(self.command, "--on-divergence", "stop")
        outcome = harness.run(stop, seconds=harness.SECONDS_TO_FAIL)
        self.assert_refused(outcome, r"the gradient's norm of .* is a spike.* at step \d+.*--on-divergence skip")
        self.assert_steps_intact(self.run_folder, self.whole)
        self.complete()


class RollbackTest(DivergenceTest):
    """The run goes back to its last checkpoint, and on with other samples."""

    changes = ("--on-divergence", "rollback", *DivergenceTest.SPIKES)

    def test_killed(self):
        self.begin("dp2")
        self.assertGreater(len(self.events(self.whole.run, "rollback")), 0)
        self.assertGreater(harness.metrics(self.whole.run, "train")[-1]["samples"], STEPS * 8, "some were left out")
        self.kill("MPI_Allreduce:110,rank=1", "MPI_Allreduce:80,rank=0")
        self.complete()
        self.assertGreater(len(self.events(self.run_folder, "rollback")), 0)


class BudgetTest(FaultTest):
    """Starts that come to no new checkpoint end at some time."""

    def test_budget(self):
        self.begin("dp2")
        unlimited, limited = self.command, changed(self.command, "--restart-budget", 2)
        before_save = r"kill@mkdir,rank=0,path={step}\.partial"
        self.command = limited
        for _ in range(2):
            self.meet(before_save)
        before = harness.tree(self.run_folder)
        for _ in range(2):
            outcome = harness.run(self.command, seconds=harness.SECONDS_TO_FAIL)
            self.assert_refused(outcome, "the last 2 starts of .*run came to no new checkpoint.*--restart-budget 0",
                                code=harness.NO_PROGRESS)
        self.assertEqual(harness.tree(self.run_folder), before)
        self.command = unlimited
        self.meet(rf"kill@mkdir,rank=0,path=step-{2 * SAVE_EVERY:08}\.partial")
        self.command = limited  # there is a new checkpoint: the count begins anew
        self.meet(before_save)
        self.complete()


    KILLED_AT_THE_START = r"kill@open,rank=0,path=/resolved\.cfg"

    def make_mistakes(self):
        """Starts that a person has to mend, before the first step."""
        for changes, fault, pattern in (
                ([], r"ENOSPC@write,rank=0,path=/resolved\.cfg", "resolved.cfg: No space left on device"),
                ([], r"EROFS@open,rank=0,path=/resolved\.cfg", "resolved.cfg: Read-only file system"),
                ([], r"ENOLCK@flock,rank=0,path=/\.lock", r"cannot lock .*\.lock: No locks available"),
                # Lustre that is mounted without flock.
                ([], r"ENOSYS@flock,rank=0,path=/\.lock", r"cannot lock .*\.lock: .*Lustre: -o flock.*another"),
                (["--d-model", 2**20, "--d-ff", 2**24], None, "bytes of memory were asked for and this host has not so many")):
            with self.subTest(f"{changes} {fault}"):
                outcome = harness.run(changed(self.command, *changes), seconds=harness.SECONDS_TO_FAIL, fault=fault)
                self.assertEqual(outcome.code, harness.USER_ERROR, outcome)
                self.assertRegex(outcome.messages[-1][1], pattern)

    def test_mistakes_do_not_count(self):
        self.begin("dp2")
        self.command = changed(self.command, "--restart-budget", 2)
        self.make_mistakes()
        self.meet(self.KILLED_AT_THE_START)
        self.make_mistakes()
        self.complete()

    def test_kills_between_mistakes_count(self):
        self.begin("dp2")
        self.command = changed(self.command, "--restart-budget", 2)
        self.meet(self.KILLED_AT_THE_START)
        self.make_mistakes()
        self.meet(self.KILLED_AT_THE_START)
        self.assert_refused(harness.run(self.command, seconds=harness.SECONDS_TO_FAIL), "the last 2 starts of ",
                            code=harness.NO_PROGRESS)


class OneJobTest(FaultTest):
    def test_second_job_is_refused(self):
        self.begin("dp2")
        endless = changed(self.command, "--steps", 10**6, "--evaluate-every", 0)
        with harness.Job(endless) as first:
            self.assertTrue(first.wait_for(lambda: harness.size_of(self.run_folder / "metrics.jsonl") > 0))
            second = harness.run(endless, seconds=harness.SECONDS_TO_FAIL)
            self.assert_refused(second, r"run/\.lock is held by another job.*--run")
            self.assertFalse(first.over())
            steps = harness.saved_steps(self.run_folder)
            self.assertTrue(first.wait_for(lambda: harness.saved_steps(self.run_folder) != steps), "it goes on")

    def test_the_lock_of_a_machine_that_is_gone(self):
        """A file system may keep it for a while: the job waits, and takes the run as it then is."""
        self.begin("dp2")
        self.run_folder.mkdir()
        with open(self.run_folder / ".lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            print("elsewhere", end="", file=lock, flush=True)
            with harness.Job(self.command) as job:
                self.assertTrue(job.wait_for(lambda: "is held by a job on elsewhere; waiting" in job.output(job.stderr)))
                shutil.copytree(step_directory(self.whole.run, SAVE_EVERY), step_directory(self.run_folder, SAVE_EVERY))
                fcntl.flock(lock, fcntl.LOCK_UN)
                outcome = job.finish()
        self.assertEqual(outcome.code, 0, outcome)
        self.assertRegex(outcome.stderr, rf"resuming .* at step {SAVE_EVERY}")
        self.assertIn(STEPS, harness.saved_steps(self.run_folder))
        self.assert_steps_intact(self.run_folder, self.whole)


if __name__ == "__main__":
    harness.main()
