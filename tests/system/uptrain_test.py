#!/usr/bin/env python3
"""Uptraining a multi-head parent into grouped queries, and evaluation, at several layouts."""

import json
import re
import shutil

import harness
from harness import DATA, MODEL, SystemTest, changed, step_directory

PARENT_STEPS = 60
ALPHA = 0.2
STEPS = PARENT_STEPS + round(ALPHA * PARENT_STEPS)
WARMUP, BASE_RATE = 10, 0.1
TRAINING = [*DATA, "--precision", "fp32", "--warmup", WARMUP, "--learning-rate", BASE_RATE, "--progress-every", 10]
LAYOUTS = {"one": (1, 1), "tp2": (2, 2), "dp2": (2, 1)}  # ranks, tensor-parallel
HEADS, D_KV = 4, 16


class UptrainTest(SystemTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent = cls.home / "parent"
        outcome = harness.run(["--pretrain", "--corpus", cls.corpus, "--run", cls.parent, *MODEL, *TRAINING, "--steps",
                               PARENT_STEPS])
        if outcome.code != 0:
            raise AssertionError(f"the parent could not be trained: {outcome}")

    def uptrain(self, run, layout="one", groups=2, pooling="mean", *more, code=0):
        ranks, tensor_parallel = LAYOUTS[layout]
        return self.train(["--uptrain", "--corpus", self.corpus, "--run", run, "--init-from", self.parent, *TRAINING,
                           "--kv-groups", groups, "--alpha", ALPHA, "--pooling", pooling, "--tensor-parallel",
                           tensor_parallel, *more], ranks=ranks, code=code)

    def evaluate(self, checkpoint, layout="one", *more):
        ranks, tensor_parallel = LAYOUTS[layout]
        outcome = self.train(["--evaluate", "--corpus", self.corpus, "--checkpoint", checkpoint, *DATA[:2], *DATA[4:6],
                              "--precision", "fp32", "--tensor-parallel", tensor_parallel, *more], ranks=ranks)
        match = re.search(r"held-out loss ([\d.]+)  perplexity ([\d.]+)  targets ([\d,]+)", outcome.stdout)
        self.assertIsNotNone(match, outcome)
        return float(match.group(1)), int(match.group(3).replace(",", ""))

    def check_conversion(self, groups, pooling):
        """The same run at every layout: parent's and converted losses, steps, schedule, first losses, final loss."""
        runs = {layout: self.folder / f"{pooling}-{groups}-{layout}" for layout in LAYOUTS}
        for layout, run in runs.items():
            self.uptrain(run, layout, groups, pooling)
            lines = harness.metrics(run, "train")
            self.assertEqual([line["step"] for line in lines], list(range(PARENT_STEPS + 1, STEPS + 1)))
            self.assertEqual({line["total_steps"] for line in lines}, {STEPS})
            batch = DATA[3]
            self.assertEqual([line["samples"] for line in lines], [batch * line["step"] for line in lines])
            for line in lines:  # the parent's schedule goes on
                self.assert_relative(line["learning_rate"], BASE_RATE * max(line["step"] - 1, WARMUP) ** -0.5, 1e-12)
            self.assertEqual(harness.saved_steps(run), [STEPS])
        one = harness.evaluations(runs["one"])
        self.assertEqual(set(one), {(PARENT_STEPS, "parent"), (PARENT_STEPS, "converted"), (STEPS, "held-out")})
        parent_end = harness.evaluations(self.parent)[PARENT_STEPS, "held-out"]
        self.assert_relative(one[PARENT_STEPS, "parent"], parent_end, 1e-5)
        self.assertNotEqual(one[PARENT_STEPS, "converted"], one[PARENT_STEPS, "parent"])
        for layout in ("tp2", "dp2"):
            other = harness.evaluations(runs[layout])
            self.assertEqual(set(other), set(one))
            for key, loss in one.items():
                self.assert_relative(other[key], loss, 1e-5, f"{layout} {key}")
            self.assert_same_losses(harness.losses(runs[layout]), harness.losses(runs["one"]), 1e-5)

    def test_two_groups_by_mean(self):
        self.check_conversion(2, "mean")

    def test_two_groups_by_first(self):
        self.check_conversion(2, "first")

    def test_two_groups_by_random(self):
        self.check_conversion(2, "random")

    def test_one_group_by_mean(self):
        self.check_conversion(1, "mean")

    def test_one_group_by_first(self):
        self.check_conversion(1, "first")

    def test_one_group_by_random(self):
        self.check_conversion(1, "random")

    def test_learning_rate_goes_on_where_the_parent_ended(self):
        self.uptrain(self.folder / "run")
        last = harness.metrics(self.parent, "train")[-1]
        first = harness.metrics(self.folder / "run", "train")[0]
        self.assertEqual(first["step"], last["step"] + 1)
        self.assertLess(first["learning_rate"], last["learning_rate"])
        self.assert_relative(first["learning_rate"], last["learning_rate"], 0.01)
        self.assertEqual(first["samples"], last["samples"] + DATA[3])

    def test_as_many_groups_as_heads_change_nothing(self):
        run = self.folder / "run"
        self.uptrain(run, groups=HEADS)
        losses = harness.evaluations(run)
        self.assertEqual(losses[PARENT_STEPS, "converted"], losses[PARENT_STEPS, "parent"])

    def test_as_many_groups_as_heads_is_the_parent_trained_on(self):
        # By the parent's moments, where they are kept: to the bit, for nothing tells the two apart.
        for optimizer in ("adafactor", "adamw"):
            home = self.folder / optimizer
            parent, on, run, anew = (home / name for name in ("parent", "on", "run", "anew"))
            pretrain = ["--pretrain", "--corpus", self.corpus, *MODEL, *TRAINING, "--optimizer", optimizer]
            self.train([*pretrain, "--run", parent, "--steps", 20], ranks=1)
            shutil.copytree(parent, on)
            self.train([*pretrain, "--run", on, "--steps", 26], ranks=1)
            uptrain = ["--uptrain", "--corpus", self.corpus, "--init-from", parent, *TRAINING, "--kv-groups", HEADS,
                       "--alpha", 0.3]
            outcome = self.train([*uptrain, "--run", run], ranks=1)
            self.assertRegex(outcome.stderr, r"goes on with the parent's moments of (\d+) of \1 parameters")
            self.train([*uptrain, "--run", anew, "--parent-moments", "off"], ranks=1)
            self.assertEqual(harness.losses(run), harness.losses(on)[20:])
            self.assertNotEqual(harness.losses(anew), harness.losses(run))
            for file in ("model.safetensors", "optimizer.safetensors"):
                self.assertEqual(harness.digest(step_directory(run, 26) / file),
                                 harness.digest(step_directory(on, 26) / file))

    def test_only_the_decoder_is_grouped(self):
        run = self.folder / "run"
        self.uptrain(run, "tp2", groups=2)
        shapes = {name: shape for name, (shape, _) in
                  harness.read_tensors(step_directory(run, STEPS) / "model.safetensors").items()}
        d_model = MODEL[MODEL.index("--d-model") + 1]
        for name, shape in shapes.items():
            if name.endswith((".k.weight", ".v.weight")):
                groups = 2 if name.startswith("decoder") else HEADS
                self.assertEqual(shape, [groups * D_KV, d_model], name)
        self.assertEqual(sum(name.endswith(".k.weight") for name in shapes), 3)

    def test_evaluation_at_every_layout(self):
        run = self.folder / "run"
        self.uptrain(run)
        expected = harness.evaluations(run)[STEPS, "held-out"]
        last = harness.metrics(run, "evaluation")[-1]
        for checkpoint in (run, step_directory(run, STEPS)):
            for layout in LAYOUTS:
                loss, targets = self.evaluate(checkpoint, layout)
                self.assert_relative(loss, expected, 1e-5, f"{checkpoint} {layout}")
                self.assertEqual(targets, last["tokens"])

    def test_evaluation_writes_nothing(self):
        before = harness.tree(self.parent)
        self.evaluate(self.parent, "tp2")
        self.assertEqual(harness.tree(self.parent), before)

    def test_evaluation_of_a_bare_model(self):
        # What transformers would have: weights and configuration, no run around them.
        model = self.folder / "model"
        model.mkdir()
        for name in ("model.safetensors", "config.json"):
            (model / name).write_bytes((step_directory(self.parent, PARENT_STEPS) / name).read_bytes())
        self.assertEqual(self.evaluate(model, "tp2"), self.evaluate(self.parent, "tp2"))

    def test_a_parent_that_does_not_say_its_steps(self):
        model = self.folder / "model"
        model.mkdir()
        for name in ("model.safetensors", "config.json"):
            (model / name).write_bytes((step_directory(self.parent, PARENT_STEPS) / name).read_bytes())
        run = self.folder / "run"
        self.train(["--uptrain", "--corpus", self.corpus, "--run", run, "--init-from", model, *TRAINING, "--kv-groups", 2,
                    "--alpha", 0.01, "--parent-steps", 1000])
        self.assertEqual([line["step"] for line in harness.metrics(run, "train")], list(range(1001, 1011)))

    def test_resumed_uptraining_is_the_same(self):
        whole, run = self.folder / "whole", self.folder / "run"
        self.uptrain(whole, "tp2", 2, "mean", "--save-every", 4)
        with_few_steps = ["--uptrain", "--corpus", self.corpus, "--run", run, "--init-from", self.parent, *TRAINING,
                          "--kv-groups", 2, "--alpha", ALPHA, "--tensor-parallel", 2, "--save-every", 4]
        with harness.Job(with_few_steps) as job:
            self.assertTrue(job.wait_for(lambda: harness.saved_steps(run)))
            for rank in job.rank_pids()[1:]:
                job.kill(rank, 9)
            job.finish()
        self.train(with_few_steps)
        self.assertEqual(harness.metrics(run, "train"), harness.metrics(whole, "train"))
        self.assertEqual(harness.metrics(run, "evaluation"), harness.metrics(whole, "evaluation"))
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assertEqual(harness.digest(step_directory(run, STEPS) / file),
                             harness.digest(step_directory(whole, STEPS) / file))

    def uneven_parent(self):
        """A bare model: the parent with all key/value heads of decoder self-attention, the first of cross-attention."""
        model, step = self.folder / "uneven", step_directory(self.parent, PARENT_STEPS)
        model.mkdir()
        config = json.loads((step / "config.json").read_text())
        config |= {"num_key_value_heads": 2, "decoder_num_key_value_heads": {"self": [HEADS], "cross": [1]}}
        (model / "config.json").write_text(json.dumps(config))
        tensors = harness.read_tensors(step / "model.safetensors")
        for name, (shape, content) in tensors.items():
            if re.search(r"EncDecAttention\.[kv]\.weight", name):
                tensors[name] = [D_KV, shape[1]], content[:len(content) // HEADS]
        harness.write_tensors(model / "model.safetensors", tensors)
        return model

    def test_an_uneven_model_trains_resumes_and_is_measured_at_every_layout(self):
        model = self.uneven_parent()
        arguments = ["--uptrain", "--corpus", self.corpus, "--init-from", model, *TRAINING, "--kv-groups", 2, "--alpha",
                     ALPHA, "--parent-steps", PARENT_STEPS, "--save-every", 4]
        one, whole, run = (self.folder / name for name in ("one", "whole", "run"))
        self.train([*arguments, "--run", one], ranks=1)
        tp2 = [*arguments, "--tensor-parallel", 2, "--run"]
        self.train([*tp2, whole])
        self.assert_same_losses(harness.losses(whole), harness.losses(one), 1e-5)
        with harness.Job([*tp2, run]) as job:
            self.assertTrue(job.wait_for(lambda: harness.saved_steps(run)))
            for rank in job.rank_pids()[1:]:
                job.kill(rank, 9)
            job.finish()
        self.train([*tp2, run])
        for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
            self.assertEqual(harness.digest(step_directory(run, STEPS) / file),
                             harness.digest(step_directory(whole, STEPS) / file), file)
        config = json.loads((step_directory(run, STEPS) / "config.json").read_text())
        self.assertEqual(config["decoder_num_key_value_heads"], {"self": [HEADS], "cross": [1]})
        expected = harness.evaluations(run)[STEPS, "held-out"]
        for layout in LAYOUTS:
            self.assert_relative(self.evaluate(run, layout)[0], expected, 1e-5, layout)
        report = self.train(["--report", "--runs", run], ranks=1).stdout
        self.assertRegex(report, r"\| run +\| GQA-2 uneven +\| mean ")
        self.assertIn(f" {2 * HEADS * D_KV * 2} |", report)
        resumed = harness.run(changed([*tp2, run], "--kv-groups", 1))
        self.assert_refused(resumed, "made by another run: .*num_key_value_heads was 2, now 1")
        more = harness.run(changed([*tp2, self.folder / "more"], "--kv-groups", 4))
        self.assert_refused(more, "kv_groups of decoder layer 0 cross-attention = 4 is impossible from a checkpoint "
                                  "that has 1 key/value groups; use one of 1")

    def t5_1_0_parent(self):
        """A bare model as the public t5-small is stored: relu after wi, lm_head.weight an alias of the embedding, and a
        configuration that says neither."""
        model, step = self.folder / "t5_1_0", step_directory(self.parent, PARENT_STEPS)
        model.mkdir()
        config = json.loads((step / "config.json").read_text())
        for field in ("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"):
            del config[field]
        (model / "config.json").write_text(json.dumps(config))
        tensors = harness.read_tensors(step / "model.safetensors")
        tensors["lm_head.weight"] = tensors["shared.weight"]
        harness.write_tensors(model / "model.safetensors", {
            name.replace("wi_0", "wi"): tensor for name, tensor in tensors.items() if "wi_1" not in name})
        return model

    def test_a_t5_1_0_is_converted_trains_resumes_and_is_measured_at_every_layout(self):
        model = self.t5_1_0_parent()
        parent_loss = self.evaluate(model)[0]
        converted = self.folder / "converted"
        self.train(["--convert", "--init-from", model, "--output", converted, "--kv-groups", 2, "--corpus", self.corpus,
                    "--evaluation-samples", 16, "--precision", "fp32", "--parent-steps", PARENT_STEPS])
        runs = {layout: self.folder / layout for layout in LAYOUTS}
        arguments = ["--uptrain", "--corpus", self.corpus, "--init-from", model, *TRAINING, "--kv-groups", 2, "--alpha",
                     ALPHA, "--parent-steps", PARENT_STEPS, "--save-every", 4]
        for layout, run in runs.items():
            ranks, tensor_parallel = LAYOUTS[layout]
            layout_arguments = [*arguments, "--tensor-parallel", tensor_parallel, "--run", run]
            self.train(layout_arguments, ranks=ranks)
            self.assert_same_losses(harness.losses(run), harness.losses(runs["one"]), 1e-5)
            evaluations = harness.evaluations(run)
            self.assert_relative(evaluations[PARENT_STEPS, "parent"], parent_loss, 1e-5, layout)
            self.assert_relative(evaluations[PARENT_STEPS, "converted"], self.evaluate(converted, layout)[0], 1e-5, layout)
            self.assert_relative(self.evaluate(run, layout)[0], evaluations[STEPS, "held-out"], 1e-5, layout)
        self.assertLess(harness.losses(runs["one"])[-1], harness.losses(runs["one"])[0])
        step = step_directory(runs["one"], STEPS)
        names = set(harness.read_tensors(step / "model.safetensors"))
        self.assertIn("encoder.block.0.layer.1.DenseReluDense.wi.weight", names)
        self.assertFalse({"lm_head.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"} & names)
        config = json.loads((step / "config.json").read_text())
        self.assertEqual([config[field] for field in ("feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs")],
                         ["relu", True, True])
        whole = {file: harness.digest(step / file) for file in ("model.safetensors", "optimizer.safetensors")}
        shutil.rmtree(step)
        self.train([*arguments, "--run", runs["one"]], ranks=1)
        self.assertTrue(harness.events(runs["one"], "resume"))
        self.assertEqual({file: harness.digest(step / file) for file in whole}, whole)

    def test_report(self):
        mean, mqa, converted = self.folder / "mean", self.folder / "mqa", self.folder / "converted"
        self.uptrain(mean, groups=2)
        self.uptrain(mqa, groups=1)
        self.train(["--convert", "--init-from", self.parent, "--output", converted, "--kv-groups", 2, "--pooling",
                    "calibrated", "--corpus", self.corpus, "--evaluation-samples", 16, "--precision", "fp32"])
        outcome = self.train(["--report", "--runs", mqa, mean, converted, self.parent])
        lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in outcome.stdout.splitlines()
                 if line.startswith("|")]
        rows = [dict(zip(lines[0], line)) for line in lines[2:]]
        # From the parent to the smallest cache; as they were given where that is the same.
        self.assertEqual([(row["run"], row["attention"], row["pooling"], row["steps"]) for row in rows],
                         [("parent", "MHA", "-", str(PARENT_STEPS)), ("mean", "GQA-2", "mean", str(STEPS - PARENT_STEPS)),
                          ("converted", "GQA-2", "calibrated", "0"), ("mqa", "MQA", "mean", str(STEPS - PARENT_STEPS))])
        # Keys and values of one decoder self-attention, bf16.
        self.assertEqual([row["KV bytes"] for row in rows],
                         [str(2 * groups * D_KV * 2) for groups in (HEADS, 2, 2, 1)])
        losses, parent_loss = harness.evaluations(mqa), harness.evaluations(self.parent)[PARENT_STEPS, "held-out"]
        parent, _, regrouped, last = rows
        self.assertEqual(last["before"], f"{losses[PARENT_STEPS, 'converted']:.4f}")
        self.assertEqual(last["after"], f"{losses[STEPS, 'held-out']:.4f}")
        self.assertEqual(last["- parent"], f"{losses[STEPS, 'held-out'] - losses[PARENT_STEPS, 'parent']:+.4f}")
        self.assertEqual(last["recovered"], f"{100 * harness.recovered(mqa)[STEPS]:.1f} %")
        self.assertEqual((parent["after"], parent["- parent"], parent["recovered"]), (f"{parent_loss:.4f}", "-", "-"))
        # A conversion that was not trained on.
        self.assertEqual((regrouped["after"], regrouped["recovered"], regrouped["tokens/s"]), ("-", "-", "-"))
        self.assertAlmostEqual(float(regrouped["- parent"]), float(regrouped["before"]) - parent_loss, delta=2e-4)
        # Who computed it: one line, as it was one machine.
        self.assertRegex(outcome.stdout, r"\nTrained on .+, fp32: parent, mean, mqa\.\n")

    def test_report_names_the_instruction_set_where_the_run_tells(self):
        run = self.folder / "run"
        shutil.copytree(self.parent, run)
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps({"kind": "event", "step": PARENT_STEPS, "name": "resume", "detail": "",
                              "processor": "Z80", "cpu_level": "avx2", "precision": "bf16"}), file=file)
        outcome = self.train(["--report", "--runs", run], ranks=1)
        self.assertIn("\nTrained on Z80, avx2, bf16: run.\n", outcome.stdout)



if __name__ == "__main__":
    harness.main()
