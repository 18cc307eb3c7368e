#!/usr/bin/env python3
"""Uptraining, evaluation and conversion of a T5X checkpoint: it goes on at its step, with Adafactor's moments."""

import json
import re
import struct

import harness
from harness import DATA, MODEL, SystemTest, step_directory

PARENT_STEPS = 20
TRAINING = [*DATA, "--precision", "fp32", "--warmup", 10, "--learning-rate", 0.1]
HEADS = 4
MODULES = {"q": "query", "k": "key", "v": "value", "o": "out"}
NORMS = {"encoder": ["pre_attention", "pre_mlp"], "decoder": ["pre_self_attention", "pre_cross_attention", "pre_mlp"]}
ATTENTIONS = {"encoder": ["attention"], "decoder": ["self_attention", "encoder_decoder_attention"]}


def t5x_path(name):
    if name in ("shared.weight", "lm_head.weight"):
        return {"s": "token_embedder/embedding", "l": "decoder/logits_dense/kernel"}[name[0]]
    stack = name.split(".")[0]
    if "block" not in name:
        return f"{stack}/{stack}_norm/scale"
    _, _, layer, _, part, module, *rest = name.split(".")
    if "relative_attention_bias" in rest:
        return f"{stack}/relpos_bias/rel_embedding"
    if module == "layer_norm":
        return f"{stack}/layers_{layer}/{NORMS[stack][int(part)]}_layer_norm/scale"
    if module == "DenseReluDense":
        return f"{stack}/layers_{layer}/mlp/{rest[0]}/kernel"
    return f"{stack}/layers_{layer}/{ATTENTIONS[stack][int(part)]}/{MODULES[rest[0]]}/kernel"


def packed(value):
    """msgpack of maps, texts, small numbers, bytes and (extension, bytes)."""
    if isinstance(value, dict):
        head = struct.pack(">B", 0x80 | len(value)) if len(value) < 16 else struct.pack(">BH", 0xDE, len(value))
        return head + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return struct.pack(">B", 0xA0 | len(value)) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, list):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(packed, value))
    if isinstance(value, tuple):
        return struct.pack(">BIB", 0xC9, len(value[1]), value[0]) + value[1]
    return struct.pack(">Bi", 0xD2, value)


def array(shape, dtype, data):
    return 1, packed([list(shape), dtype, data])


def floats(data):
    return struct.unpack(f"<{len(data) // 4}f", data)


def transposed(shape, data):
    rows, columns = shape
    cells = [data[4 * i:4 * i + 4] for i in range(rows * columns)]
    return [columns, rows], b"".join(cells[r * columns + c] for c in range(columns) for r in range(rows))


def write_t5x(step, path):
    """The checkpoint of a step directory as T5X has it, all arrays in one file."""
    weights = harness.read_tensors(step / "model.safetensors")
    slots = harness.read_tensors(step / "optimizer.safetensors")
    optimizer = {"target": {}, "state": {"step": array([], "int32", struct.pack("<i", PARENT_STEPS)), "param_states": {}}}

    def put(tree, key, shape, data):
        *parents, leaf = key.split("/")
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[leaf] = array(shape, "float32", data)

    for name, (shape, data) in weights.items():
        turn = len(shape) == 2 and name != "shared.weight"
        key = t5x_path(name)
        put(optimizer["target"], key, *(transposed(shape, data) if turn else (shape, data)))
        moments = dict.fromkeys(("m", "v", "v_row", "v_col"), ([1], bytes(4)))
        if f"{name}.second_moment" in slots:
            full = slots[f"{name}.second_moment"]
            moments["v"] = transposed(*full) if turn else full
        else:
            outputs, inputs = slots[f"{name}.second_moment_row"], slots[f"{name}.second_moment_column"]
            first, second = (inputs, outputs) if turn else (outputs, inputs)  # along T5X's axes
            # v_row averages over the longer axis, the second one of equal ones.
            long_first = first[0][0] > second[0][0]
            moments["v_row"], moments["v_col"] = (second, first) if long_first else (first, second)
        for slot, moment in moments.items():
            put(optimizer["state"]["param_states"], f"{key}/{slot}", *moment)
    path.parent.mkdir(parents=True)
    path.write_bytes(packed({"version": 3, "optimizer": optimizer}))


class T5xTest(SystemTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parent, cls.model = cls.home / "parent", cls.home / "t5x"
        outcome = harness.run(["--pretrain", "--corpus", cls.corpus, "--run", cls.parent, *MODEL, *TRAINING, "--steps",
                               PARENT_STEPS])
        if outcome.code != 0:
            raise AssertionError(f"the parent could not be trained: {outcome}")
        write_t5x(step_directory(cls.parent, PARENT_STEPS), cls.model / f"checkpoint_{PARENT_STEPS}" / "checkpoint")

    def uptrain(self, run, groups, tensor_parallel=2):
        return self.train(["--uptrain", "--corpus", self.corpus, "--run", run, "--init-from", self.model, *TRAINING,
                           "--kv-groups", groups, "--alpha", 0.05, "--tensor-parallel", tensor_parallel])

    def test_it_goes_on_at_its_step_with_its_moments(self):
        run = self.folder / "run"
        outcome = self.uptrain(run, HEADS)
        self.assertRegex(outcome.stderr, r"goes on with the parent's moments of (\d+) of \1 parameters")
        self.assertNotIn("does not say how long", outcome.stderr)
        self.assertEqual([line["step"] for line in harness.metrics(run, "train")], [PARENT_STEPS + 1])
        ends = harness.evaluations(self.parent)[PARENT_STEPS, "held-out"]
        self.assert_relative(harness.evaluations(run)[PARENT_STEPS, "parent"], ends, 1e-5)
        # One step on: beta2 of the old moment, and what is not negative.
        beta2 = 1 - (PARENT_STEPS + 1) ** -0.8
        before = harness.read_tensors(step_directory(self.parent, PARENT_STEPS) / "optimizer.safetensors")
        after = harness.read_tensors(step_directory(run, PARENT_STEPS + 1) / "optimizer.safetensors")
        self.assertEqual(set(after), set(before))
        self.assertTrue(any(name.endswith("_row") for name in after))
        for name, (shape, data) in before.items():
            self.assertEqual(after[name][0], shape)
            for old, new in zip(floats(data), floats(after[name][1])):
                self.assertGreaterEqual(new, beta2 * old * (1 - 1e-5), name)

    def test_merged_heads_begin_anew(self):
        outcome = self.uptrain(self.folder / "run", 1)
        kept, all_of_them = map(int, re.search(r"parent's moments of (\d+) of (\d+)", outcome.stderr).groups())
        self.assertEqual(all_of_them - kept, 4)  # k and v of self- and cross-attention

    def test_it_is_evaluated_and_converted(self):
        outcome = self.train(["--evaluate", "--corpus", self.corpus, "--checkpoint", self.model, *DATA[:2], *DATA[4:6],
                              "--precision", "fp32"])
        loss = float(re.search(r"held-out loss ([\d.]+)", outcome.stdout).group(1))
        self.assert_relative(loss, harness.evaluations(self.parent)[PARENT_STEPS, "held-out"], 1e-5)
        output = self.folder / "output"
        self.train(["--convert", "--init-from", self.model, "--output", output, "--kv-groups", 2])
        self.assertEqual(harness.saved_steps(output), [PARENT_STEPS])
        report = json.loads((output / "conversion.json").read_text())
        self.assertRegex(report["provenance"]["parent_checksum"], r"^[0-9a-f]{16}$")

    def test_export_is_the_model_whoever_writes_it(self):
        trees = {}
        for ranks in (1, 2):
            output = self.folder / f"{ranks}"
            self.train(["--export", "t5x", "--checkpoint", self.parent, "--output", output], ranks=ranks)
            trees[ranks] = harness.tree(output)
            self.assertFalse([name for name in trees[ranks] if "partial" in name])
            outcome = self.train(["--evaluate", "--corpus", self.corpus, "--checkpoint", output, *DATA[:2], *DATA[4:6],
                                  "--precision", "fp32"])
            loss = float(re.search(r"held-out loss ([\d.]+)", outcome.stdout).group(1))
            self.assert_relative(loss, harness.evaluations(self.parent)[PARENT_STEPS, "held-out"], 1e-5)
        self.assertEqual(trees[2], trees[1])
        grouped = self.folder / "grouped"
        self.train(["--convert", "--init-from", self.parent, "--output", grouped, "--kv-groups", 2])
        outcome = self.train(["--export", "t5x-expanded", "--checkpoint", grouped, "--output", self.folder / "expanded"])
        self.assertRegex(outcome.stderr, r"self-check: logits of what was written differ by at most [\d.e-]+ ")

    def test_all_that_is_missing_is_listed(self):
        output = self.folder / "output"
        self.train(["--export", "t5x", "--checkpoint", self.parent, "--output", output])
        arrays = output / f"checkpoint_{PARENT_STEPS}"
        gone = [arrays / "target.decoder.logits_dense.kernel" / "0.0", arrays / "target.encoder.encoder_norm.scale" / "0"]
        for path in gone:
            path.unlink()
        outcome = harness.run(["--evaluate", "--corpus", self.corpus, "--checkpoint", output])
        self.assert_refused(outcome, "2 parts .*decoder.logits_dense.kernel/0.0, .*encoder_norm.scale/0")

    def test_what_is_refused(self):
        index = self.model / f"checkpoint_{PARENT_STEPS}" / "checkpoint"
        broken = self.folder / "checkpoint"
        whole = index.read_bytes()
        command = ["--evaluate", "--corpus", self.corpus, "--checkpoint", self.folder]
        for text, pattern in [(whole[:-1], "truncated"), (whole.replace(b"wi_0", b"wi_9"), "no 'encoder.*wi_0.weight'"),
                              (whole.replace(b"float32", b"float99"), "float99"),
                              (whole.replace(b"decoder_norm", b"decoder_form"), "missing .decoder.final_layer_norm")]:
            broken.write_bytes(text)
            self.assert_refused(harness.run(command), pattern)


if __name__ == "__main__":
    harness.main()
