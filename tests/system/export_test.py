#!/usr/bin/env python3
"""What --export writes: whole, the same at every layout, read back as the model it was made from."""

import json
import shutil
import signal
import struct

import harness
from harness import DATA, MODEL, SystemTest, step_directory

STEPS = 20


def safetensors_header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


class ExportTest(SystemTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent = parent = cls.home / "parent"
        cls.grouped = cls.home / "grouped"
        for arguments in (["--pretrain", "--corpus", cls.corpus, "--run", parent, *MODEL, *DATA, "--steps", STEPS],
                          ["--convert", "--init-from", parent, "--output", cls.grouped, "--kv-groups", 2]):
            outcome = harness.run(arguments)
            if outcome.code != 0:
                raise AssertionError(f"there is nothing to export: {outcome}")

    def export(self, form, output, *more, ranks=1, code=0, checkpoint=None):
        return self.train(["--export", form, "--checkpoint", checkpoint or self.grouped, "--output", output, *more],
                          ranks=ranks, code=code)

    def held_out(self, checkpoint):
        return self.train(["--evaluate", "--corpus", self.corpus, "--checkpoint", checkpoint, "--precision", "fp32", *DATA],
                          ranks=1).stdout

    def test_what_is_written_is_the_model(self):
        for form in ("hf", "hf-expanded", "t5x", "t5x-expanded"):
            output = self.folder / form
            outcome = self.export(form, output)
            self.assertRegex(outcome.stderr, r"self-check: logits of what was written differ by at most [\d.e-]+ ")
            self.assertEqual(self.held_out(output), self.held_out(self.grouped), form)
            weights = f"checkpoint_{STEPS}/checkpoint" if form.startswith("t5x") else "model.safetensors"
            for name in ("config.json", "generation_config.json", weights, "spiece.model", "tokenizer_config.json"):
                self.assertGreater(harness.size_of(output / name), 0, name)
            self.assertEqual(harness.digest(output / "spiece.model"),
                             harness.digest(step_directory(self.grouped, STEPS) / "tokenizer.model"))

    def test_t5x_there_and_back(self):
        """With the optimizer's moments: what is read of an export is exported as the same bytes, by two ranks too."""
        there, again = self.folder / "there", self.folder / "again"
        self.export("t5x", there, checkpoint=self.parent)
        self.export("t5x", again, checkpoint=there, ranks=2)
        self.assertEqual(harness.tree(again), harness.tree(there))
        names = {name.split("/")[1] for name in harness.tree(there) if name.startswith(f"checkpoint_{STEPS}/state.")}
        self.assertTrue(any(name.endswith(".v_row") for name in names), names)
        expanded = self.folder / "expanded"
        self.export("t5x-expanded", expanded)
        self.assertFalse([name for name in harness.tree(expanded) if "/state." in name])

    def test_an_export_that_was_killed(self):
        output, unfinished = self.folder / "output", self.folder / "output.partial"
        with harness.Job(["--export", "hf", "--checkpoint", self.grouped, "--output", output], ranks=1) as job:
            job.wait_for(unfinished.exists)
            job.kill(job.process.pid, signal.SIGKILL)
            job.finish()
        if not output.exists():  # it may have been done
            self.assertTrue(unfinished.exists())
            self.export("hf", output)
        self.assertFalse(unfinished.exists())
        other = self.folder / "other"
        self.export("hf", other)
        self.assertEqual(harness.tree(output), harness.tree(other))
        early = self.folder / "early"
        (self.folder / "early.partial").mkdir()  # killed before it wrote anything
        self.export("hf", early)
        self.assertEqual(harness.tree(early), harness.tree(other))

    def test_each_is_what_its_reader_wants(self):
        compact, expanded = self.folder / "compact", self.folder / "expanded"
        self.export("hf", compact)
        self.export("hf-expanded", expanded)
        config = json.loads((compact / "config.json").read_text())
        self.assertEqual((config["model_type"], config["num_key_value_heads"]), ("regroup_t5", 2))
        module, _ = config["auto_map"]["AutoModelForSeq2SeqLM"].split(".")
        compile((compact / f"{module}.py").read_text(), module, "exec")
        config = json.loads((expanded / "config.json").read_text())
        self.assertEqual(config["model_type"], "t5")
        self.assertNotIn("num_key_value_heads", config)
        name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
        heads, width, d_model = 4, 16, 128
        self.assertEqual(safetensors_header(compact / "model.safetensors")[name]["shape"], [2 * width, d_model])
        self.assertEqual(safetensors_header(expanded / "model.safetensors")[name]["shape"], [heads * width, d_model])

    def test_layouts_and_types(self):
        trees = {}
        for ranks, tensor_parallel in ((1, 1), (2, 2), (2, 1)):
            output = self.folder / f"{ranks}-{tensor_parallel}"
            self.export("hf", output, "--tensor-parallel", tensor_parallel, ranks=ranks)
            trees[ranks, tensor_parallel] = harness.tree(output)
        self.assertEqual(trees[2, 2], trees[1, 1])
        self.assertEqual(trees[2, 1], trees[1, 1])
        for name, stored in (("bf16", "BF16"), ("fp16", "F16")):
            output = self.folder / name
            self.export("hf-expanded", output, "--export-type", name)
            header = safetensors_header(output / "model.safetensors")
            self.assertEqual({tensor["dtype"] for key, tensor in header.items() if key != "__metadata__"}, {stored})

    def test_how_it_generates_is_taken_along(self):
        model, converted, output = self.folder / "model", self.folder / "converted", self.folder / "output"
        self.export("hf", model)
        generation = json.dumps({"max_new_tokens": 77})
        (model / "generation_config.json").write_text(generation)
        self.train(["--convert", "--init-from", model, "--output", converted, "--kv-groups", 1, "--parent-steps", STEPS],
                   ranks=1)
        self.export("hf", output, checkpoint=converted)
        self.assertEqual((output / "generation_config.json").read_text(), generation)

    def test_a_model_that_is_not_finite(self):
        model, output = self.folder / "model", self.folder / "output"
        self.export("hf-expanded", model)
        header = safetensors_header(model / "model.safetensors")
        names = ["decoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.o.weight"]
        with open(model / "model.safetensors", "r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            for name, value in zip(names, (float("nan"), float("inf"))):
                file.seek(8 + length + header[name]["data_offsets"][1] - 4)
                file.write(struct.pack("<f", value))
        for arguments in (["--evaluate", "--corpus", self.corpus, "--checkpoint", model],
                          ["--convert", "--init-from", model, "--output", self.folder / "converted", "--kv-groups", 1]):
            outcome = harness.run([*arguments, "--tensor-parallel", 2])
            self.assert_refused(outcome, ", ".join(names))
        self.assert_refused(harness.run(["--export", "hf", "--checkpoint", model, "--output", output]), "not finite")
        self.assertFalse(output.exists())

    def test_what_is_refused(self):
        output = self.folder / "output"
        base = ["--checkpoint", self.grouped, "--output", output]
        self.assert_refused(harness.run(["--export", "hugging-face", *base]), "hf, hf-expanded")
        self.assert_refused(harness.run(["--export", "hf", *base, "--export-type", "int8"]), "fp32, bf16, fp16")
        self.assert_refused(harness.run(["--export", "hf", *base[2:]]), "--checkpoint")
        self.assert_refused(harness.run(["--export", "hf", *base[:2]]), "--output")
        self.assertFalse(output.exists())
        output.mkdir()
        (output / "mine").write_text("kept")
        self.assert_refused(harness.run(["--export", "hf", *base]), "there already")
        self.assertEqual([path.name for path in output.iterdir()], ["mine"])
        in_the_way = self.folder / "new.partial"
        in_the_way.mkdir()
        (in_the_way / "mine").write_text("kept")
        self.assert_refused(harness.run(["--export", "hf", *base[:3], self.folder / "new"]), "in the way")
        self.assertEqual([path.name for path in in_the_way.iterdir()], ["mine"])
        shutil.rmtree(output)


if __name__ == "__main__":
    harness.main()
