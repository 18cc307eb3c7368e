#!/usr/bin/env python3
"""Conversion with what it reports, by --convert and at the start of --uptrain, at several layouts."""

import json
import re
import shutil

import harness
from harness import DATA, MODEL, SystemTest, step_directory

PARENT_STEPS = 60
ALPHA = 0.1
STEPS = PARENT_STEPS + round(ALPHA * PARENT_STEPS)
TRAINING = [*DATA, "--precision", "fp32", "--warmup", 10, "--learning-rate", 0.1, "--progress-every", 10]
LAYOUTS = {"one": (1, 1), "tp2": (2, 2), "dp2": (2, 1)}  # ranks, tensor-parallel
HEADS, D_KV, D_MODEL = 4, 16, 128
CALIBRATED = ["--pooling", "calibrated", "--calibration-batches", 2]


class ConvertTest(SystemTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent = cls.home / "parent"
        outcome = harness.run(["--pretrain", "--corpus", cls.corpus, "--run", cls.parent, *MODEL, *TRAINING, "--steps",
                               PARENT_STEPS])
        if outcome.code != 0:
            raise AssertionError(f"the parent could not be trained: {outcome}")

    def convert(self, output, layout="one", groups=2, *more, corpus=True, code=0):
        ranks, tensor_parallel = LAYOUTS[layout]
        data = ["--corpus", self.corpus] if corpus else []
        return self.train(["--convert", "--init-from", self.parent, "--output", output, "--kv-groups", groups, *data,
                           "--evaluation-samples", 16, "--precision", "fp32", "--tensor-parallel", tensor_parallel, *more],
                          ranks=ranks, code=code)

    def evaluate(self, checkpoint):
        outcome = self.train(["--evaluate", "--corpus", self.corpus, "--checkpoint", checkpoint, "--evaluation-samples", 16,
                              "--precision", "fp32", "--tensor-parallel", 2])
        return float(re.search(r"held-out loss ([\d.]+)", outcome.stdout).group(1))

    @staticmethod
    def report(folder):
        return json.loads((folder / "conversion.json").read_text())

    def test_layouts_give_the_same_model(self):
        losses = {}
        for layout in LAYOUTS:
            output = self.folder / layout
            outcome = self.convert(output, layout, 1, *CALIBRATED)
            self.assertIn("| cross | 0 | 4 -> 1 |", outcome.stdout)
            report = self.report(output)
            losses[layout] = report["held_out_loss"]["converted"]
            self.assert_relative(self.evaluate(output), losses[layout], 1e-5)
            parent_end = harness.evaluations(self.parent)[PARENT_STEPS, "held-out"]
            self.assert_relative(report["held_out_loss"]["parent"], parent_end, 1e-5)
            self.assertEqual(harness.saved_steps(output), [PARENT_STEPS])
            self.assert_complete(output)
        for layout, loss in losses.items():
            self.assert_relative(loss, losses["one"], 1e-5, layout)

    def test_the_report_says_what_was_lost(self):
        errors = {}
        for pooling in ("mean", "first", "random", "spectral", "calibrated"):
            output = self.folder / pooling
            self.convert(output, "tp2", 1, "--pooling", pooling, "--calibration-batches", 2)
            report = self.report(output)
            sites = report["attentions"]
            self.assertEqual([site["attention"] for site in sites],
                             ["decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"])
            errors[pooling] = [site[error] for site in sites for error in ("score_error", "output_error")]
            self.assertEqual(report["kv_cache_bytes"]["before"]["per_target_token"], 2 * 2 * HEADS * D_KV)
            self.assertEqual(report["kv_cache_bytes"]["after"]["per_target_token"], 2 * 2 * D_KV)
            self.assertEqual(report["provenance"]["pooling"], pooling)
            self.assertEqual(report["provenance"]["calibration"]["samples"], 2 * DATA[3])
            state = json.loads((step_directory(output, PARENT_STEPS) / "trainer.json").read_text())
            self.assertEqual(state["conversion"], report["provenance"])
            self.assertGreater(harness.size_of(output / "conversion.svg"), 0)
        self.assertTrue(all(abs(error - 1) < 1e-12 for error in errors["random"]))
        for other in ("mean", "first", "spectral"):
            for best, error in zip(errors["calibrated"], errors[other]):
                self.assertLess(best, error, other)

    def test_all_heads_kept_are_the_parents_to_the_bit(self):
        output = self.folder / "same"
        self.convert(output, "tp2", HEADS, "--pooling", "spectral", corpus=False)
        self.assertEqual(self.report(output)["attentions"], [])
        self.assertEqual(harness.read_tensors(step_directory(output, PARENT_STEPS) / "model.safetensors"),
                         harness.read_tensors(step_directory(self.parent, PARENT_STEPS) / "model.safetensors"))

    def test_moments_of_some_attentions_at_a_time(self):
        whole, parts = self.folder / "whole", self.folder / "parts"
        self.convert(whole, "tp2", 1, *CALIBRATED)
        self.convert(parts, "tp2", 1, *CALIBRATED, "--calibration-memory", 1)  # one attention's: half a MiB
        self.assertEqual(harness.digest(step_directory(whole, PARENT_STEPS) / "model.safetensors"),
                         harness.digest(step_directory(parts, PARENT_STEPS) / "model.safetensors"))

    def test_uptraining_converts_alike_and_goes_on(self):
        converted, run = self.folder / "converted", self.folder / "run"
        self.convert(converted, "one", 1, *CALIBRATED)
        uptrain = ["--uptrain", "--corpus", self.corpus, *TRAINING, "--kv-groups", 1, "--alpha", ALPHA, "--tensor-parallel", 2]
        # What --convert writes has no optimizer state.
        self.train([*uptrain, "--run", run, "--init-from", self.parent, *CALIBRATED, "--parent-moments", "off"])
        losses = harness.evaluations(run)
        self.assert_relative(losses[PARENT_STEPS, "converted"], self.report(converted)["held_out_loss"]["converted"], 1e-5)
        self.assertEqual(self.report(run)["provenance"]["pooling"], "calibrated")
        # From what --convert wrote, nothing is left to convert, and the steps are counted on.
        second = self.folder / "second"
        self.train([*uptrain, "--run", second, "--init-from", converted])
        again = harness.evaluations(second)
        self.assert_relative(again[PARENT_STEPS, "converted"], losses[PARENT_STEPS, "converted"], 1e-5)
        self.assertEqual([line["step"] for line in harness.metrics(second, "train")],
                         list(range(PARENT_STEPS + 1, STEPS + 1)))
        self.assert_same_losses(harness.losses(second), harness.losses(run), 1e-4)
        # The gap to recover is still the one to the multi-head parent.
        self.assert_relative(again[PARENT_STEPS, "parent"], losses[PARENT_STEPS, "parent"], 1e-5)
        state = json.loads((step_directory(second, STEPS) / "trainer.json").read_text())
        self.assertEqual(state["conversion"], self.report(converted)["provenance"])
        outcome = self.train(["--report", "--runs", self.parent, converted, second], ranks=1)
        self.assertRegex(outcome.stdout, r"\| converted +\| MQA +\| calibrated ")
        self.assert_refused(harness.run(["--pretrain", "--corpus", self.corpus, "--run", converted, *MODEL, *TRAINING,
                                         "--steps", 100, "--kv-groups", 1]), "mode was \"convert\"")

    def test_an_uneven_uptraining_resumes_after_a_kill(self):
        command = ["--uptrain", "--corpus", self.corpus, "--init-from", self.parent, *TRAINING, "--kv-groups", 2, "--alpha",
                   0.2, "--tensor-parallel", 2, "--save-every", 2, *CALIBRATED, "--kv-budget", "uneven", "--grouping",
                   "similarity"]
        whole, run = self.folder / "whole", self.folder / "run"
        self.train([*command, "--run", whole])
        groups = [site["groups_after"] for site in self.report(whole)["attentions"]]
        self.assertLessEqual(sum(groups), 4)
        with harness.Job([*command, "--run", run]) as job:
            self.assertTrue(job.wait_for(lambda: harness.saved_steps(run)))
            for rank in job.rank_pids()[1:]:
                job.kill(rank, 9)
            job.finish()
        self.train([*command, "--run", run])
        last = harness.saved_steps(whole)[-1]
        self.assertEqual(harness.saved_steps(run)[-1], last)
        for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
            self.assertEqual(harness.digest(step_directory(run, last) / file),
                             harness.digest(step_directory(whole, last) / file))
        self.assert_refused(harness.run([*harness.changed(command, "--kv-budget", "even"), "--run", run]), "kv-budget")

    def test_what_is_measured_decides_nothing_else(self):
        # The same heads share with and without a corpus.
        orders = []
        for corpus in (True, False):
            output = self.folder / f"corpus-{corpus}"
            self.convert(output, "one", 2, "--pooling", "mean", "--grouping", "similarity", corpus=corpus)
            orders.append([site["heads"] for site in self.report(output)["attentions"]])
        self.assertEqual(orders[0], orders[1])

    def test_similar_heads_of_an_uneven_parent(self):
        uneven, again = self.folder / "uneven", self.folder / "again"
        self.train(["--pretrain", "--corpus", self.corpus, "--run", self.folder / "deep", *harness.changed(MODEL, "--layers", 2),
                    *TRAINING, "--steps", 8], ranks=1)
        self.train(["--convert", "--init-from", self.folder / "deep", "--output", uneven, "--kv-groups", 2, "--pooling",
                    "spectral"], ranks=1)
        config = step_directory(uneven, 8) / "config.json"
        self.assertIn("num_key_value_heads", config.read_text())
        self.train(["--convert", "--init-from", uneven, "--output", again, "--kv-groups", 1, "--pooling", "spectral",
                    "--grouping", "similarity"], ranks=1)
        self.assertEqual({site["groups_before"] for site in self.report(again)["attentions"]}, {2})

    def test_a_bare_model(self):
        model = self.folder / "model"
        model.mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(step_directory(self.parent, PARENT_STEPS) / name, model)
        output = self.folder / "output"
        self.train(["--convert", "--init-from", model, "--output", output, "--kv-groups", 1, "--pooling", "spectral",
                    "--parent-steps", 500])
        self.assertEqual(harness.saved_steps(output), [500])
        self.assertRegex(self.report(output)["provenance"]["parent_checksum"], r"^[0-9a-f]{16}$")

    def test_what_is_refused(self):
        output = self.folder / "output"
        base = ["--convert", "--init-from", self.parent, "--output", output, "--kv-groups", 2]
        for changes, pattern in [(["--pooling", "calibrated"], "--corpus"), (["--pooling", "calibrate"], "calibrated"),
                                 (["--grouping", "similar"], "similarity"), (["--kv-budget", "odd"], "uneven"),
                                 (["--kv-groups", 3], "one of 1, 2, 4"), (["--output", None], "--output"),
                                 (["--kv-groups", None], "--kv-groups"), (["--init-from", self.folder / "no"], "no"),
                                 (["--calibration-batches", 0], "calibration-batches")]:
            self.assert_refused(harness.run(harness.changed(base, *changes)), pattern)
            self.assertFalse(output.exists(), changes)
        self.train(base)
        before = harness.tree(output)
        self.assert_refused(harness.run(base), "already")
        self.assertEqual(harness.tree(output), before)


if __name__ == "__main__":
    harness.main()
