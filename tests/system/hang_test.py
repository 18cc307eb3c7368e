#!/usr/bin/env python3
"""The watchdog: a job of which a rank no longer comes is ended, with a line that says which; one that is suspended as
a whole, or slow, is not."""

import os
import re
import shutil
import signal
import socket
import sys
import time
import unittest

import harness
from harness import DATA, MODEL, SystemTest, step_directory

STEPS = 60
TIMEOUT = 3
SECONDS_TO_END = 60  # the bound is the timeout, one and a half of it, and a few seconds: 23; the rest is the machine's
HUNG = 76
TRAINING = [*MODEL, *DATA, "--steps", STEPS, "--save-every", 10, "--evaluate-every", 20, "--warmup", 10,
            "--learning-rate", 0.1, "--progress-every", 10, "--hang-timeout", TIMEOUT]


class HangCase(SystemTest):
    def command(self, run, *changes):
        return harness.changed(["--pretrain", "--corpus", self.corpus, "--run", run, *TRAINING], *changes)

    @staticmethod
    def wait_for_training(job, run, size=2000):
        return job.wait_for(lambda: harness.size_of(run / "metrics.jsonl") > size and len(job.rank_pids()) == job.ranks)

    def line_of(self, outcome):
        """What was said of the hang that ended the job, by one rank alone."""
        self.assertEqual(outcome.code, HUNG, outcome)
        told = [text for _, text in outcome.messages if "the job hangs" in text]
        self.assertEqual(len(told), 1, outcome)
        return told[0]


class HangTest(HangCase):
    def stop_a_rank(self, victim, layout):
        """The run of a job of which one rank is stopped while it trains, that process, and how the job ends."""
        run = self.folder / f"run-{victim}"
        command = self.command(run, "--tensor-parallel", layout)
        # So that it does not end before: the steps it is to do come when it is resumed.
        with harness.Job(harness.changed(command, "--steps", 10**6, "--save-every", 40), ranks=2) as job:
            self.assertTrue(self.wait_for_training(job, run), "too late")
            pid = job.rank_pids()[victim]
            os.kill(pid, signal.SIGSTOP)
            stopped = job.seconds()
            outcome = job.finish(stopped + SECONDS_TO_END)
            print(f"rank {victim} stopped at {stopped:.1f} s: exit code {outcome.code} after "
                  f"{outcome.seconds - stopped:.1f} s", flush=True)
            # It is killed before mpirun ends, and gone when the kernel comes to it.
            self.assertTrue(harness.gone(pid, seconds=30), "the stopped process outlives the job")
        return run, pid, outcome

    def check_a_stopped_rank(self, victim, layout):
        run, pid, outcome = self.stop_a_rank(victim, layout)
        told = self.line_of(outcome)
        host = re.escape(socket.gethostname())
        self.assertRegex(told, rf"rank {victim} on {host} \(process {pid}\) gives no sign of life: .*stopped.*; "
                               rf"rank {1 - victim} on {host} \(process \d+\), at step \d+ in .+ of '.+', waits")
        self.assertRegex(told, "the same command resumes from its last checkpoint")
        step = int(re.search(r"at step (\d+)", told).group(1))
        done = harness.metrics(run, "train")[-1]["step"]
        self.assertLessEqual(abs(step - done), 2, told)
        # The same command goes on, to what an undisturbed run comes to.
        steps = max([0, *harness.saved_steps(run)]) + 10
        command = self.command(run, "--tensor-parallel", layout, "--steps", steps, "--save-every", 40)
        self.train(command)
        whole = self.folder / f"whole-{victim}"
        self.train(harness.changed(command, "--run", whole))
        self.assertEqual(harness.losses(run), harness.losses(whole))
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assertEqual(harness.digest(step_directory(run, steps) / file),
                             harness.digest(step_directory(whole, steps) / file), file)
        self.assertFalse((run / "hang").exists(), "the next job removes what the watchdogs wrote")

    def test_a_stopped_rank_of_two_data_parallel_ones(self):
        self.check_a_stopped_rank(1, 1)

    def test_a_stopped_first_rank_of_two_tensor_parallel_ones(self):
        self.check_a_stopped_rank(0, 2)

    def test_a_rank_that_waits_for_a_file_is_named_with_what_it_does(self):
        corpus = shutil.copytree(self.corpus, self.folder / "corpus")
        tokenizer = corpus / "tokenizer.model"  # which rank 0 reads for every checkpoint
        for ranks in (1, 2):
            run = self.folder / f"run-{ranks}"
            command = self.command(run, "--corpus", corpus, "--steps", 10**6, "--save-every", 40)
            with harness.Job(command, ranks=ranks) as job:
                self.assertTrue(self.wait_for_training(job, run), "too late")
                tokenizer.rename(corpus / "aside")
                os.mkfifo(tokenizer)  # whoever opens it waits for a writer
                began, pid = job.seconds(), job.rank_pids()[0]
                outcome = job.finish(began + SECONDS_TO_END)
            told = self.line_of(outcome)
            self.assertRegex(told, rf"rank 0 on .* \(process {pid}\), at step \d+ in 'saving a checkpoint', has not")
            if ranks == 2:
                self.assertRegex(told, r"; rank 1 on .*, at step \d+ in broadcast of 'saving a checkpoint', waits")
            (corpus / "aside").replace(tokenizer)
            steps = max([0, *harness.saved_steps(run)]) + 10
            self.train(harness.changed(command, "--steps", steps), ranks=ranks)

    def test_a_file_waited_for_before_the_run_begins_ends_it(self):
        run, corpus = self.folder / "run", shutil.copytree(self.corpus, self.folder / "corpus")
        command = self.command(run, "--corpus", corpus, "--steps", 10, "--save-every", 10)
        evaluation = ["--evaluate", "--checkpoint", run, "--corpus", corpus, "--hang-timeout", TIMEOUT]
        tokenizer = corpus / "tokenizer.model"
        tokenizer.rename(corpus / "aside")
        os.mkfifo(tokenizer)
        with harness.Job(command, ranks=1) as job:
            told = self.line_of(job.finish(SECONDS_TO_END))
        self.assertRegex(told, r"rank 0 on .* \(process \d+\) has made no progress in \d+ s, at step 0 in ")
        self.assertFalse(run.exists(), "it did not come so far as to make it")
        (corpus / "aside").replace(tokenizer)
        self.train(command, ranks=1)
        tokenizer.rename(corpus / "aside")
        os.mkfifo(tokenizer)
        with harness.Job(evaluation, ranks=1) as job:
            self.assertIn("has made no progress", self.line_of(job.finish(SECONDS_TO_END)))

    def test_a_job_suspended_as_a_whole_goes_on(self):
        run = self.folder / "run"
        with harness.Job(self.command(run, "--steps", 10**6, "--save-every", 40), ranks=2) as job:
            self.assertTrue(self.wait_for_training(job, run), "too late")
            pids = job.rank_pids()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(2.5 * TIMEOUT)  # past the timeout and the time that follows it
            size = harness.size_of(run / "metrics.jsonl")
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            self.assertTrue(job.wait_for(lambda: harness.size_of(run / "metrics.jsonl") > size + 2000),
                            "it did not go on")
            time.sleep(2.5 * TIMEOUT)
            self.assertFalse(job.over(), "it was ended after all")
            job.kill(pids[0], signal.SIGUSR1)
            outcome = job.finish(job.seconds() + SECONDS_TO_END)
        self.assertEqual(outcome.code, harness.SAVED_AND_STOPPED, outcome)
        self.assertNotIn("the job hangs", outcome.stderr)
        self.assertFalse((run / "hang").exists())

    def test_without_a_timeout_nothing_is_watched(self):
        run = self.folder / "run"
        with harness.Job(self.command(run, "--steps", 10**6, "--save-every", 40, "--hang-timeout", 0), ranks=2) as job:
            self.assertTrue(self.wait_for_training(job, run), "too late")
            pid = job.rank_pids()[1]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(3 * TIMEOUT)
            self.assertFalse(job.over())
            os.kill(pid, signal.SIGCONT)
            job.kill(pid, signal.SIGUSR1)
            outcome = job.finish(job.seconds() + SECONDS_TO_END)
        self.assertEqual(outcome.code, harness.SAVED_AND_STOPPED, outcome)


@unittest.skipUnless("--fault-library" in sys.argv, "needs --fault-library")
class HangWithFaultsTest(HangCase):
    def test_a_rank_stopped_before_the_run_begins(self):
        run = self.folder / "run"
        with harness.Job(self.command(run), ranks=2, fault="stop@open,rank=1,path=manifest.json") as job:
            told = self.line_of(job.finish(job.seconds() + SECONDS_TO_END))
        self.assertRegex(told, r"rank 0 on .* has made no progress in \d+ s, at step 0 in all_gather of 'starting'\. ")
        self.assertFalse(run.exists())

    def test_reports_do_not_wait_for_the_disk(self):
        run = self.folder / "run"
        # To bring a file of the watchdogs to the disk fails: nobody tries.
        with harness.Job(self.command(run, "--steps", 10**6, "--save-every", 40), ranks=2,
                         fault="EIO@fsync,path=/hang") as job:
            self.assertTrue(self.wait_for_training(job, run), "too late")
            pid = job.rank_pids()[1]
            os.kill(pid, signal.SIGSTOP)
            told = self.line_of(job.finish(job.seconds() + SECONDS_TO_END))
        self.assertRegex(told, rf"rank 1 on .* \(process {pid}\) gives no sign of life")

    def test_a_board_that_refuses_is_named_with_the_reason(self):
        run = self.folder / "run"
        with harness.Job(self.command(run, "--steps", 10**6, "--save-every", 40), ranks=2,
                         fault="ENOSPC@mkdir,path=/hang") as job:
            self.assertTrue(self.wait_for_training(job, run), "too late")
            os.kill(job.rank_pids()[1], signal.SIGSTOP)
            told = self.line_of(job.finish(job.seconds() + SECONDS_TO_END))
        self.assertRegex(told, r"rank 0 on .* has made no progress .* refuses: .*: No space left on device\. ")


if __name__ == "__main__":
    harness.main()
