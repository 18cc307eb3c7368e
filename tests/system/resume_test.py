#!/usr/bin/env python3
"""A run is a function of its configuration, not of how often it was killed, stopped, or laid out anew."""

import os
import random
import re
import signal
import time

import harness
from harness import DATA, MODEL, SystemTest, step_directory

STEPS, EMULATED_STEPS = 60, 15
SAVE_EVERY = 5
# Dropout on: its masks too must not notice that the process is another one. In bf16, which every processor must do.
TRAINING = [*MODEL, *DATA, "--precision", "bf16", "--steps", STEPS, "--save-every", SAVE_EVERY, "--evaluate-every", 10,
            "--warmup", 10,
            "--learning-rate", 0.1, "--dropout", 0.1, "--progress-every", 10, "--restart-budget", 0]
LAYOUTS = {"dp2": ["--tensor-parallel", 1], "tp2": ["--tensor-parallel", 2]}


class Reference:
    """An uninterrupted run that keeps every checkpoint."""

    def __init__(self, corpus, layout, *changes):
        self.command = harness.changed(["--pretrain", "--corpus", corpus, *TRAINING, *LAYOUTS[layout]], *changes)
        self.run, self.seconds = harness.trained(f"reference-{layout}", [*self.command, "--keep-every", 1])
        self.steps = {step: harness.tree(step_directory(self.run, step)) for step in harness.saved_steps(self.run)}
        self.last = max(self.steps)


class InterruptedRun(SystemTest):
    references = {}
    changes = ()  # of the command

    def reference(self, layout):
        if layout not in self.references:
            # An emulated step takes a second.
            emulated = () if harness.options.device == "cpu" else ("--steps", EMULATED_STEPS)
            self.references[layout] = Reference(self.corpus, layout, *self.changes, *emulated)
        return self.references[layout]

    @classmethod
    def tearDownClass(cls):
        cls.references.clear()

    def assert_steps_intact(self, run, reference, interrupted_at=None):
        """Every directory that looks complete has the very bytes of the uninterrupted run."""
        for step in harness.saved_steps(run):
            if step == interrupted_at:
                continue
            self.assertEqual(harness.tree(step_directory(run, step)), reference.steps[step], f"step {step}")

    def assert_same_run(self, run, reference):
        """The run ended as if nothing had happened to it."""
        self.assert_complete(run)
        self.assertIn(reference.last, harness.saved_steps(run))
        self.assertTrue((run / "loss.svg").is_file())
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assertEqual(harness.digest(step_directory(run, reference.last) / file),
                             harness.digest(step_directory(reference.run, reference.last) / file), file)
        for kind in ("train", "evaluation"):
            self.assertEqual(harness.metrics(run, kind), harness.metrics(reference.run, kind))


class KillTest(InterruptedRun):
    """kill -9 of a random rank at random moments; the same command again, until the run is complete."""

    def kill_at_random(self, layout, kills):
        draw = random.Random(f"{harness.options.seed} {layout}")
        reference = self.reference(layout)
        done, runs = 0, 0
        while done < kills:
            runs += 1
            run = self.folder / f"run-{runs}"
            command = [*reference.command, "--run", run]
            while done < kills and self.kill_once(command, run, reference, draw):
                done += 1
                self.assert_steps_intact(run, reference)
            self.train(command)
            self.assert_same_run(run, reference)
        print(f"{layout}: {done} kills in {runs} runs", flush=True)

    def kill_once(self, command, run, reference, draw):
        """Starts the job and kills one of its ranks; False where the job was over before."""
        with harness.Job(command) as job:
            if job.wait_for(lambda: len(job.rank_pids()) == job.ranks) and \
                    self.wait_for_a_moment(job, run, reference, draw):
                for victim in draw.sample(job.rank_pids(), len(job.rank_pids()))[:1]:
                    job.kill(victim, signal.SIGKILL)
            outcome = job.finish(job.seconds() + harness.SECONDS_TO_FAIL)
            return outcome.code != 0

    @staticmethod
    def wait_for_a_moment(job, run, reference, draw):
        """Any moment of the job, one of its training, or one of a save; False where the job ends before."""
        kind = draw.choice(["any", "training", "saving", "saving"])
        if kind == "any":
            time.sleep(draw.uniform(0, reference.seconds))
        elif kind == "training":
            before = harness.size_of(run / "metrics.jsonl")
            if not job.wait_for(lambda: harness.size_of(run / "metrics.jsonl") not in (0, before)):
                return False
            time.sleep(draw.uniform(0, reference.seconds / 10))
        else:
            saves, seen = draw.randint(1, 3), set()

            def another_save():
                seen.update(harness.unfinished(run))
                return len(seen) >= saves

            if not job.wait_for(another_save):
                return False
            time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))
        return not job.over()

    def test_data_parallel(self):
        self.kill_at_random("dp2", harness.options.kills)

    def test_tensor_parallel(self):
        self.kill_at_random("tp2", harness.options.kills)


class SignalTest(InterruptedRun):
    """SIGTERM and SIGUSR1: save at the next step boundary, exit with code 75, go on by the same command."""

    def stop(self, run, command, send, progress):
        """Sends a signal once the run has made some progress; how the job ended."""
        with harness.Job(command) as job:
            size = harness.size_of(run / "metrics.jsonl")
            self.assertTrue(job.wait_for(lambda: harness.size_of(run / "metrics.jsonl") > size + progress), "too late")
            job.rank_pids()
            send(job)
            return job.finish()

    def stopped_at(self, run, outcome):
        """The step at which a job that was stopped by a signal saved."""
        self.assertEqual(outcome.code, harness.SAVED_AND_STOPPED, outcome)
        steps = [re.search(r"stopped by a signal; saved at step (\d+)", text) for _, text in outcome.messages]
        steps = [int(match.group(1)) for match in steps if match]
        self.assertEqual(len(steps), 1, outcome)
        self.assertEqual(steps[0], max(harness.saved_steps(run)))
        self.assertEqual(steps[0], harness.metrics(run, "train")[-1]["step"])
        return steps[0]

    def check_signal(self, number, to_mpirun=False):
        reference = self.reference("dp2")
        run = self.folder / "run"
        command = [*reference.command, "--run", run]
        for rank in (1, 0):
            outcome = self.stop(run, command, lambda job, rank=rank: job.kill(
                job.process.pid if to_mpirun else job.rank_pids()[rank], number), progress=2000)
            step = self.stopped_at(run, outcome)
            self.assertLess(step, STEPS)
            self.assert_steps_intact(run, reference, interrupted_at=step)
        self.train(command)
        self.assert_same_run(run, reference)

    def test_terminate_a_rank(self):
        self.check_signal(signal.SIGTERM)

    def test_user_signal_to_a_rank(self):
        self.check_signal(signal.SIGUSR1)

    def test_user_signal_to_mpirun(self):
        # Open MPI's mpirun passes SIGUSR1 on to every rank: the way for batch systems.
        self.check_signal(signal.SIGUSR1, to_mpirun=True)

    def test_terminate_mpirun(self):
        # On SIGTERM Open MPI's mpirun sends SIGTERM to the ranks, SIGKILL seconds later, and exits with 1: a small run
        # saves in between, a large one goes on from its last checkpoint. No step that it did is lost or done twice.
        self.check_mpirun_ends(signal.SIGTERM)

    def test_kill_mpirun(self):
        # Ranks that have lost their launcher end by themselves: nobody writes to the run but the next job.
        self.check_mpirun_ends(signal.SIGKILL)

    def check_mpirun_ends(self, number):
        endless = harness.changed(self.reference("dp2").command, "--steps", 10**6, "--save-every", 40,
                                  "--evaluate-every", 0, "--run", self.folder / "run")
        run = self.folder / "run"
        outcome = self.stop(run, endless, lambda job: job.kill(job.process.pid, number), progress=20000)
        self.assertNotIn(outcome.code, (0, harness.SAVED_AND_STOPPED), outcome)
        steps = max(harness.saved_steps(run)) + 10
        print(f"mpirun ended by signal {number}: exit code {outcome.code}, {steps - 10} steps saved", flush=True)
        self.train(harness.changed(endless, "--steps", steps))
        self.assert_complete(run)
        self.train(harness.changed(endless, "--steps", steps, "--run", self.folder / "whole"))
        self.assertEqual(harness.losses(run), harness.losses(self.folder / "whole"))
        self.assertEqual(harness.digest(step_directory(run, steps) / "model.safetensors"),
                         harness.digest(step_directory(self.folder / "whole", steps) / "model.safetensors"))

    def test_signal_before_the_first_step(self):
        reference = self.reference("dp2")
        run = self.folder / "run"
        command = [*reference.command, "--run", run]
        with harness.Job(command) as job:
            self.assertTrue(job.wait_for(lambda: (run / "checkpoints").is_dir()))
            job.kill(job.rank_pids()[1], signal.SIGTERM)
            self.stopped_or_started(job.finish(), run)
        self.train(command)
        self.assert_same_run(run, reference)

    def stopped_or_started(self, outcome, run):
        self.assertEqual(outcome.code, harness.SAVED_AND_STOPPED, outcome)
        self.assertLess(max(harness.saved_steps(run)), STEPS)


class ContinuationTest(SystemTest):
    """The same run with something changed."""

    def command(self, run, steps, *more):
        return harness.changed(["--pretrain", "--corpus", self.corpus, *MODEL, *DATA, "--warmup", 10, "--learning-rate",
                                0.1, "--dropout", 0.1, "--precision", "fp32", "--steps", steps, *more], "--run", run)

    def check_layouts(self, tensor_parallel_of):
        """1 -> 4 -> 2 -> 1 ranks, with optimizer state: the losses of one rank throughout."""
        part = 3 if harness.options.device != "cpu" else 15  # an emulated step takes a second
        one, _ = harness.trained("one", self.command(None, 4 * part), ranks=1)
        run = self.folder / "run"
        for number, ranks in enumerate((1, 4, 2, 1), 1):
            tensor_parallel = tensor_parallel_of(ranks)
            outcome = self.train(self.command(run, number * part, "--tensor-parallel", tensor_parallel), ranks=ranks)
            self.assertIn(f"{ranks} ranks = {ranks // tensor_parallel} data-parallel x {tensor_parallel} "
                          "tensor-parallel", outcome.stderr)
        self.assert_same_losses(harness.losses(run), harness.losses(one), 1e-5)

    def test_tensor_parallel_layouts(self):
        self.check_layouts(lambda ranks: ranks)

    def test_data_parallel_layouts(self):
        self.check_layouts(lambda ranks: 1)

    def test_layouts_of_both(self):
        self.check_layouts(lambda ranks: min(ranks, 2))

    def test_more_steps_continue_the_run(self):
        run = self.folder / "run"
        self.train(self.command(run, 10))
        outcome = self.train(self.command(run, 20))
        self.assertRegex(outcome.stderr, "resuming .* at step 10")
        self.train(self.command(self.folder / "whole", 20))
        self.assertEqual(harness.losses(run), harness.losses(self.folder / "whole"))
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assertEqual(harness.digest(step_directory(run, 20) / file),
                             harness.digest(step_directory(self.folder / "whole", 20) / file))

    def test_a_complete_run_says_so(self):
        run = self.folder / "run"
        self.train(self.command(run, 5))
        before = harness.tree(run)
        outcome = self.train(self.command(run, 5))
        self.assertRegex(outcome.stderr, "is complete: 5 steps are done")
        self.assertEqual(harness.tree(run), before)

    def test_a_run_killed_after_its_last_save_is_tidied_up(self):
        # Between the last checkpoint and the end an older one is removed and the loss is drawn.
        run = self.folder / "run"
        self.train(self.command(run, 5))
        (run / "loss.svg").unlink()
        left = run / "checkpoints" / "step-00000003.deleting"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
        outcome = self.train(self.command(run, 5))
        self.assertRegex(outcome.stderr, "is complete: 5 steps are done")
        self.assert_complete(run)
        self.assertTrue((run / "loss.svg").is_file(), outcome)

    def test_another_run_is_refused(self):
        run = self.folder / "run"
        self.train(self.command(run, 5))
        before = harness.tree(run)
        changes = {"seed": ["--seed", 9], "batch-size": ["--batch-size", 4], "precision": ["--precision", "bf16"],
                   "optimizer": ["--optimizer", "adamw"], "learning-rate": ["--learning-rate", 0.2],
                   "z-loss": ["--z-loss", 0.5], "inputs-length": ["--inputs-length", 40], "d-ff|d_ff": ["--d-ff", 192],
                   "dropout": ["--dropout", 0.2], "schedule": ["--schedule", "constant"]}
        for name, change in changes.items():
            with self.subTest(name):
                outcome = harness.run(harness.changed(self.command(run, 10), *change), ranks=1)
                self.assert_refused(outcome, rf"{run} was made by another run: .*({name})\S* was .*, now .*--run")
                self.assertLess(len(outcome.messages[0][1]), 400, "a line to read")
                self.assertEqual(harness.tree(run), before)


if __name__ == "__main__":
    harness.main()
