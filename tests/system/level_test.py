#!/usr/bin/env python3
"""Processor levels and the precision that follows from them, in whole runs."""

import os
import re
import shutil
import subprocess
import unittest
import unittest.mock

import harness
from harness import DATA, MODEL, SystemTest

STEPS = 8
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")


def at(level):
    """The environment that asks for a level; the call is restored by unittest's patch of os.environ."""
    return unittest.mock.patch.dict(os.environ, {"REGROUP_CPU_LEVEL": level})


def version():
    """Level and products of this processor, by --version."""
    text = harness.run(["--version"], ranks=1).stdout
    return re.search(r"processor level (\w+), products in (.*)", text).groups()


class LevelTest(SystemTest):
    def command(self, run, steps=STEPS, *more):
        return ["--pretrain", "--corpus", self.corpus, "--run", run, *MODEL, *DATA, "--warmup", 10, "--learning-rate",
                0.1, "--steps", steps, *more]

    def usable(self):
        highest, _ = version()
        return LEVELS[:LEVELS.index(highest) + 1]

    def test_levels_give_the_same_losses_up_to_rounding(self):
        losses = {}
        for level in self.usable():
            with self.subTest(level), at(level):
                run = self.folder / level
                outcome = self.train(self.command(run, STEPS, "--precision", "fp32"))
                self.assertIn(f"CPU ({level})", outcome.stderr)
                losses[level] = harness.losses(run)
        for level, found in losses.items():
            self.assert_same_losses(found, losses["portable"], 1e-5)

    def test_a_run_goes_on_at_another_level(self):
        run = self.folder / "run"
        with at("portable"):
            self.train(self.command(run, 4, "--precision", "fp32"))
        outcome = self.train(self.command(run, STEPS, "--precision", "fp32"))
        highest, _ = version()
        if highest != "portable":
            self.assertIn(f"goes on at processor level {highest}; its checkpoint is from portable", outcome.stderr)
        whole = self.folder / "whole"
        self.train(self.command(whole, STEPS, "--precision", "fp32"))
        self.assert_same_losses(harness.losses(run), harness.losses(whole), 1e-5)

    def test_auto_takes_what_the_processor_multiplies(self):
        _, products = version()
        expected = "bf16" if "bfloat16" in products else "fp32"
        for level, precision in ((None, expected), ("portable", "fp32")):
            run = self.folder / f"run-{level}"
            if level:
                with at(level):
                    outcome = self.train(self.command(run))
            else:
                outcome = self.train(self.command(run))
            self.assertRegex(outcome.stderr, rf"  precision = {precision}\n")
            self.assertIn(f"precision = {precision}\n", (run / "resolved.cfg").read_text())

    def test_a_resumed_run_keeps_its_precision(self):
        run = self.folder / "run"
        with at("portable"):  # where auto is fp32
            self.train(self.command(run, 4, "--precision", "bf16"))
            outcome = self.train(self.command(run, STEPS))
        self.assertRegex(outcome.stderr, r"  precision = bf16\n")
        self.assertRegex(outcome.stderr, "resuming .* at step 4")

    def test_bf16_where_the_processor_lacks_it(self):
        """Slower, said in one line, and as near to fp32 as rounding to eight bits allows."""
        losses = {}
        with at("portable"):
            for precision in ("bf16", "fp32"):
                outcome = self.train(self.command(self.folder / precision, STEPS, "--precision", precision))
                losses[precision] = harness.losses(self.folder / precision)
                said = [line for line in outcome.stderr.splitlines() if "does not multiply bfloat16" in line]
                self.assertEqual(len(said), 1 if precision == "bf16" else 0, outcome)
        self.assert_same_losses(losses["bf16"], losses["fp32"], 0.01)

    def test_levels_that_there_are_not(self):
        with at("foo"):
            self.assert_refused(harness.run(["--version"], ranks=1),
                                "REGROUP_CPU_LEVEL: there is no processor level 'foo'.*portable, avx2")
        highest, _ = version()
        if highest != LEVELS[-1]:
            with at(LEVELS[-1]):
                self.assert_refused(harness.run(["--version"]), f"does not run the level {LEVELS[-1]}; use one of portable")

    def test_ranks_of_different_levels_are_told(self):
        if version()[0] == "portable":
            self.skipTest("this processor has one level only")
        program = f"{harness.options.trainer}"
        call = ["sh", "-c", f'[ "$OMPI_COMM_WORLD_RANK" = 1 ] && export REGROUP_CPU_LEVEL=portable; exec {program} "$@"', "sh"]
        arguments = [str(a) for a in self.command(self.folder / "run", 2, "--precision", "fp32")]
        done = subprocess.run([*harness.options.mpiexec.split(), "-n", "2", *call, *arguments],
                              env={**harness.ENVIRONMENT, **os.environ}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=harness.SECONDS_TO_TRAIN)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"rank 1 runs at processor level portable, rank 0 at \w+: .*REGROUP_CPU_LEVEL")


class EmulatedProcessorTest(SystemTest):
    """A training step on processors that this machine is not, by qemu's user mode."""

    def test_a_training_step(self):
        qemu = shutil.which("qemu-x86_64")
        if qemu is None:
            self.skipTest("needs qemu-user")
        for processor, level in (("Haswell", "avx2"), ("Nehalem", "portable")):
            with self.subTest(processor):
                run = self.folder / processor
                arguments = ["--pretrain", "--corpus", self.corpus, "--run", run, *MODEL, *DATA, "--steps", 1,
                             "--hang-timeout", 0]
                done = subprocess.run([qemu, "-cpu", processor, harness.options.trainer, *map(str, arguments)],
                                      env={**harness.ENVIRONMENT, **os.environ}, capture_output=True, text=True,
                                      stdin=subprocess.DEVNULL, timeout=1200)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn(f"CPU ({level})", done.stderr)
                self.assertEqual(len(harness.losses(run)), 1)


if __name__ == "__main__":
    harness.main()
