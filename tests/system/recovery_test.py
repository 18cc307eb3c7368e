#!/usr/bin/env python3
"""--until-recovered: an uptraining that ends early, by what its checkpoint says."""

import signal

import harness
from harness import PARENT_STEPS, PARENT_TRAINING as TRAINING, SystemTest, step_directory

ALPHA = 0.6
STEPS = PARENT_STEPS + round(ALPHA * PARENT_STEPS)
EVALUATE_EVERY = 4


class RecoveryTest(SystemTest):
    """`whole` trains for all of alpha and keeps every evaluated step; the others end where it first had `target`."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent, cls.whole = harness.trained_parent(cls.corpus), cls.home / "whole"
        cls.command = ["--uptrain", "--corpus", cls.corpus, "--init-from", cls.parent, *TRAINING, "--kv-groups", 1,
                       "--alpha", ALPHA, "--evaluate-every", EVALUATE_EVERY, "--save-every", 3, "--restart-budget", 0]
        outcome = harness.run(harness.changed([*cls.command, "--run", cls.whole, "--keep-every", 1], "--save-every",
                                              EVALUATE_EVERY))
        if outcome.code != 0:
            raise AssertionError(f"the run that goes on failed: {outcome}")
        cls.shares = harness.recovered(cls.whole)
        # The first evaluation better than all before it, but neither the first nor the last of the run.
        steps = sorted(cls.shares)
        cls.end = next(step for step in steps[1:-1]
                       if cls.shares[step] > max(0, *(cls.shares[other] for other in steps if other < step)))
        cls.target = cls.shares[cls.end] - 1e-9
        assert 0 < cls.target <= 1, cls.shares

    def until(self, run, *changes):
        return harness.changed([*self.command, "--run", run, "--until-recovered", self.target], *changes)

    def assert_ended(self, run):
        """With the very model, optimizer and numbers that the run which went on had at that step."""
        self.assert_complete(run)
        self.assertEqual(max(harness.saved_steps(run)), self.end)
        for file in ("model.safetensors", "optimizer.safetensors", "trainer.json"):
            self.assertEqual(harness.digest(step_directory(run, self.end) / file),
                             harness.digest(step_directory(self.whole, self.end) / file), file)
        for kind in ("train", "evaluation"):
            self.assertEqual(harness.metrics(run, kind),
                             [line for line in harness.metrics(self.whole, kind) if line["step"] <= self.end])
        self.assertEqual(harness.recovered(run),
                         {step: share for step, share in self.shares.items() if step <= self.end})
        self.assertEqual(harness.events(run, "recovered"), [self.end])

    def assert_says_complete(self, run):
        before = harness.tree(run)
        outcome = self.train(self.until(run))
        self.assertRegex(outcome.stderr, rf"is complete: step {self.end} had [\d.]+ % of the gap recovered")
        self.assertEqual(harness.tree(run), before)

    def test_shares_are_of_the_gap(self):
        losses = harness.evaluations(self.whole)
        parent, converted = losses[PARENT_STEPS, "parent"], losses[PARENT_STEPS, "converted"]
        self.assertGreater(converted, parent)
        self.assertEqual(sorted(self.shares), list(range(PARENT_STEPS + EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY)))
        for step, share in self.shares.items():
            self.assertAlmostEqual(share, (converted - losses[step, "held-out"]) / (converted - parent), 12)
        self.assertIn("share of the gap", (self.whole / "recovery.svg").read_text())
        self.assertFalse((self.parent / "recovery.svg").exists())
        self.assertEqual(harness.events(self.whole, "recovered"), [])

    def test_ends_early_and_stays_so(self):
        run = self.folder / "run"
        outcome = self.train(self.until(run))
        alpha = (self.end - PARENT_STEPS) / PARENT_STEPS
        self.assertRegex(outcome.stderr, rf"step {self.end}: .* of the gap recovered, .* after "
                                         rf"{self.end - PARENT_STEPS} steps, alpha {alpha:.4g} of at most {ALPHA}")
        self.assert_ended(run)
        self.assertIn("target", (run / "recovery.svg").read_text())
        self.assert_says_complete(run)

    def test_goes_on_when_asked_for_more(self):
        for changes in (["--until-recovered", 1], ["--until-recovered", None]):
            if changes[1] and max(self.shares.values()) >= changes[1]:
                continue  # it would end early again
            run = self.folder / f"run-{changes[1]}"
            self.train(self.until(run))
            self.train(self.until(run, *changes))
            self.assertEqual(harness.metrics(run, "train"), harness.metrics(self.whole, "train"))
            self.assertEqual(harness.recovered(run), self.shares)
            for file in ("model.safetensors", "optimizer.safetensors"):
                self.assertEqual(harness.digest(step_directory(run, STEPS) / file),
                                 harness.digest(step_directory(self.whole, STEPS) / file))

    def kill_when(self, name, condition):
        """Kills every rank once the condition holds of the run; it and its command."""
        run = self.folder / name
        with harness.Job(self.until(run)) as job:
            if job.wait_for(lambda: condition(run)):
                for rank in job.rank_pids():
                    job.kill(rank, signal.SIGKILL)
            job.finish()
        self.train(self.until(run))
        self.assert_ended(run)
        self.assert_says_complete(run)

    def test_killed_before_the_last_save(self):
        self.kill_when("evaluated", lambda run: "recovered" in self.text_of(run))

    def test_killed_before_the_decision(self):
        self.kill_when("trained", lambda run: f'"step":{self.end - 1},' in self.text_of(run))

    def test_killed_while_it_saves(self):
        self.kill_when("saving", lambda run: any(str(self.end) in name for name in harness.unfinished(run)))

    def test_killed_after_the_last_save(self):
        self.kill_when("saved", lambda run: self.end in harness.saved_steps(run))

    @staticmethod
    def text_of(run):
        metrics = run / "metrics.jsonl"
        return metrics.read_text() if metrics.exists() else ""


if __name__ == "__main__":
    harness.main()
