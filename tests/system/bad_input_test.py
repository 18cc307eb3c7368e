#!/usr/bin/env python3
"""What users get wrong and what disks do: one clear line, exit code 2, all ranks gone, nothing half-written."""

import gzip
import json
import random
import resource
import shutil
import struct

import harness
from harness import DATA, MODEL, SystemTest, changed, step_directory

HUGE = 2**63
TRAINING = [*MODEL, *DATA, "--steps", 4, "--save-every", 2, "--warmup", 10, "--learning-rate", 0.1]


class BadInputTest(SystemTest):
    def refuse(self, arguments, *patterns, ranks=2, changes=(), **how):
        """One line with all patterns, and the test's folder is as it was, but for `changes`."""
        before = harness.tree(self.folder)
        outcome = harness.run(arguments, ranks, seconds=harness.SECONDS_TO_FAIL, **how)
        for pattern in patterns:
            self.assert_refused(outcome, pattern)
        self.assertNotRegex(outcome.stderr, "terminate called|Segmentation|Signal: ", outcome)
        difference = {name for name, _ in set(harness.tree(self.folder).items()) ^ set(before.items())}
        self.assertEqual(difference, set(changes), outcome)
        return outcome

    def pretrain(self, *changes):
        return changed(["--pretrain", "--corpus", self.corpus, "--run", self.folder / "run", *TRAINING], *changes)


class OptionTest(BadInputTest):
    def test_unknown_option(self):
        self.refuse(["--pretrain", "--kv-grops", 2], "'kv-grops'.*did you mean 'kv-groups'")

    def test_word_that_is_no_option(self):
        self.refuse(["--pretrain", "fast"], "fast")

    def test_option_without_value(self):
        self.refuse(["--pretrain", "--steps"], "steps")

    def test_option_given_twice(self):
        self.refuse(["--pretrain", "--steps", 3, "--steps", 4], "steps")

    def test_two_modes(self):
        self.refuse(["--pretrain", "--uptrain"], "--pretrain and --uptrain.*one mode")

    def test_no_mode(self):
        self.refuse(["--steps", 3], "no mode is given; say .*--uptrain")

    def test_values(self):
        cases = {"--steps": ("many", "steps.*many|many.*steps"), "--batch-size": (0, "batch-size = 0.*at least 1"),
                 "--precision": ("bf61", "precision = bf61.*did you mean 'bf16'"),
                 "--model": ("smal", "smal.*did you mean 'small'"), "--heads": (0, "heads = 0"),
                 "--optimizer": ("adam", "optimizer = adam.*adamw"), "--schedule": ("cosin", "cosin.*cosine"),
                 "--dropout": (1.5, "dropout = 1.5"), "--noise-density": (0.9, "noise.density of 0.9|noise.density = 0.9"),
                 "--inputs-length": (0, "input.*length.* 0"), "--mean-span": (0, "mean.span"),
                 "--workers": (0, "workers = 0"), "--save-every": (0, "save-every = 0"),
                 "--learning-rate": ("fast", "learning-rate.*fast|fast.*learning-rate"),
                 "--recompute": ("perhaps", "recompute.*perhaps|perhaps.*recompute")}
        for option, (value, pattern) in cases.items():
            with self.subTest(f"{option} {value}"):
                self.refuse(self.pretrain(option, value), pattern, ranks=1)

    def test_numbers_out_of_range(self):
        for option, value in (("learning-rate", -1), ("learning-rate", "nan"), ("weight-decay", "nan"), ("z-loss", "nan"),
                              ("max-gradient-norm", -1), ("keep-every", -3), ("steps", -1), ("warmup", -1), ("seed", -1),
                              ("batch-size", 10**12), ("micro-batch", -1)):
            with self.subTest(f"{option} {value}"):
                self.refuse(self.pretrain("--run", self.folder / f"{option} {value}", f"--{option}", value), option,
                            ranks=1)

    def test_missing_options(self):
        for option in ("--run", "--corpus", "--steps"):
            with self.subTest(option):
                self.refuse(self.pretrain(option, None), f"--pretrain needs {option}", ranks=1)

    def test_configuration_file(self):
        file = self.folder / "my.cfg"
        cases = {"# a comment\n\nkv-grops = 2\n": r"my\.cfg:3: .*'kv-grops'.*did you mean 'kv-groups'",
                 "seed = 1\n\nsteps = many\n": r"my\.cfg:3: .*many",
                 "steps\n": r"my\.cfg:1: 'steps' is not of the form",
                 "[pretrian]\n": r"my\.cfg:1: .*did you mean 'pretrain'",
                 "seed = 1\npretrain = on\n": r"my\.cfg:2: .*--pretrain belongs on the command line",
                 "config = other.cfg\n": r"my\.cfg:1: ", "\n[uptrain]\nkv-grops = 2\n": r"my\.cfg:3: .*kv-grops",
                 "seed = 1\nsteps = \0\n": r"my\.cfg:2: "}
        for text, pattern in cases.items():
            with self.subTest(text):
                file.write_text(text)
                self.refuse([*self.pretrain(), "--config", file], pattern, ranks=1)
        file.write_bytes(bytes(range(128, 256)) * 10)
        self.refuse([*self.pretrain(), "--config", file], r"my\.cfg:1: ")
        self.refuse([*self.pretrain(), "--config", self.folder / "none.cfg"], r"none\.cfg.*No such file")

    def test_layouts(self):
        for ranks, changes, pattern in (
                (3, ["--tensor-parallel", 3, "--batch-size", 9], "tensor-parallel = 3 .*does not divide.*use one of 1, 2, 4"),
                (2, ["--tensor-parallel", 4], "tensor.parallel.*2 ranks"),
                (2, ["--tensor-parallel", 0], "tensor.parallel.* 0.*at least 1"),
                (2, ["--data-parallel", 4], "start 4|-n 4"),
                (2, ["--batch-size", 7], "batch-size = 7.*2 data-parallel.*use .*8"),
                (2, ["--micro-batch", 3], "micro-batch = 3 does not divide.*use 2"),
                (2, ["--kv-groups", 3], "kv-groups = 3 does not divide the 4 .*heads; use one of 1, 2, 4"),
                (2, ["--encoder-kv-groups", 8], "encoder-kv-groups = 8.*use one of 1, 2, 4")):
            with self.subTest(" ".join(map(str, changes))):
                self.refuse(self.pretrain(*changes), pattern, ranks=ranks)

    def test_uptraining(self):
        parent = self.home / "layout-parent"
        self.train(self.pretrain("--run", parent), ranks=1)
        uptrain = ["--uptrain", "--corpus", self.corpus, "--run", self.folder / "run", "--init-from", parent, *DATA,
                   "--kv-groups", 2]
        for changes, pattern in (
                (["--kv-groups", None], "--uptrain needs --kv-groups"),
                (["--kv-groups", 3], "kv-groups = 3.*use one of 1, 2, 4"),
                (["--alpha", 0], "alpha = 0"), (["--alpha", "nan"], "alpha = nan"), (["--alpha", -0.1], "alpha = -0.1"),
                (["--until-recovered", 1.5], "until-recovered = 1.5.* above 0 and at most 1"),
                (["--until-recovered", -0.5], "until-recovered = -0.5"),
                (["--until-recovered", "nan"], "until-recovered = nan"),
                (["--until-recovered", 0.9, "--evaluate-every", 0], "evaluate-every = 0.* give --evaluate-every"),
                (["--pooling", "meen"], "pooling = meen.*did you mean 'mean'"),
                (["--init-from", None], "--uptrain needs --init-from"),
                (["--init-from", self.folder / "none"], "there is no checkpoint .*none"),
                (["--init-from", self.home], "neither a run with a complete checkpoint, nor a step directory")):
            with self.subTest(" ".join(map(str, changes))):
                self.refuse(changed(uptrain, *changes), pattern)

    def test_uptraining_of_grouped_parents(self):
        parent = self.home / "grouped-parent"
        self.train(self.pretrain("--run", parent, "--kv-groups", 2), ranks=1)
        self.refuse(["--uptrain", "--corpus", self.corpus, "--run", self.folder / "run", "--init-from", parent, *DATA,
                     "--kv-groups", 4], "4 is impossible from a checkpoint that has 2 key/value groups; use one of 1, 2")

    def test_the_quickstart_that_was_not_run(self):
        self.refuse(["--uptrain"], r"\./quickstart", cwd=self.folder)
        self.refuse(["--pretrain"], r"\./quickstart", cwd=self.folder)


class CorpusTest(BadInputTest):
    def setUp(self):
        super().setUp()
        self.damaged = self.folder / "corpus"
        shutil.copytree(self.corpus, self.damaged)
        self.command = self.pretrain("--corpus", self.damaged)

    def edit_manifest(self, edit):
        manifest = json.loads((self.damaged / "manifest.json").read_text())
        edit(manifest)
        (self.damaged / "manifest.json").write_text(json.dumps(manifest))

    def test_no_corpus(self):
        self.refuse(self.pretrain("--corpus", self.folder / "none"), "there is no corpus at .*none.*--prepare-data")

    def test_truncated_shard(self):
        shard = self.damaged / "tokens-00000.bin"
        shard.write_bytes(shard.read_bytes()[:-100])
        self.refuse(self.command, r"tokens-00000\.bin has \d+ bytes.*truncated")

    def test_missing_files(self):
        for name in ("tokens-00000.bin", "documents-00001.bin", "tokenizer.model"):
            with self.subTest(name):
                (self.damaged / name).rename(self.folder / "aside")
                self.refuse(self.command, name)
                (self.folder / "aside").rename(self.damaged / name)

    def test_damaged_manifest(self):
        file = self.damaged / "manifest.json"
        whole = file.read_text()
        for text in ("", "{", "[]", "null", whole[:len(whole) // 2], "\x00" * 100, '{"format": "other"}', "[" * 100000,
                     whole.replace("uint16", "uint8"), whole.replace('"vocab_size": 256', '"vocab_size": -1')):
            with self.subTest(text[:20]):
                file.write_text(text)
                self.refuse(self.command, r"manifest\.json", ranks=1)
        file.write_bytes(random.Random(1).randbytes(5000))
        self.refuse(self.command, r"manifest\.json")

    def test_hostile_manifest(self):
        def escape(manifest):
            manifest["splits"]["train"][0]["tokens_file"] = "../../outside"

        def overflow(manifest):
            manifest["splits"]["train"][0]["tokens"] = HUGE

        for edit in (escape, overflow):
            with self.subTest(edit.__name__):
                shutil.copy(self.corpus / "manifest.json", self.damaged)
                self.edit_manifest(edit)
                self.refuse(self.command, r"manifest\.json")

    # What --verify-corpus=off lets through. A run has begun when it meets such a token: what it began with stays, but no checkpoint.
    def refuse_tokens(self, edit):
        shard = self.damaged / "tokens-00000.bin"
        tokens = bytearray(shard.read_bytes())
        edit(tokens)
        shard.write_bytes(tokens)
        command = changed(self.command, "--verify-corpus", "off")
        outcome = harness.run(command, seconds=harness.SECONDS_TO_FAIL)
        self.assert_refused(outcome, r"tokens-00000\.bin holds the token \d+, .*damaged, prepare it again")
        self.assertEqual(harness.unfinished(self.folder / "run"), [])

    def test_flipped_bit_of_one_token(self):
        def flip(tokens):
            tokens[len(tokens) // 2 & ~1 | 1] |= 0x80

        self.command = changed(self.command, "--steps", 200)
        self.refuse_tokens(flip)

    def test_flipped_bit_that_makes_another_token(self):
        shard = self.damaged / "tokens-00000.bin"
        tokens = bytearray(shard.read_bytes())
        tokens[len(tokens) // 2 & ~1] ^= 1
        shard.write_bytes(tokens)
        self.refuse(self.command, r"tokens-00000\.bin has checksum .*damaged, prepare it again")

    def test_tokens_of_another_vocabulary(self):
        def flip(tokens):
            tokens[1::2] = b"\x40" * (len(tokens) // 2)

        self.refuse_tokens(flip)

    def test_text_for_less_than_a_window(self):
        self.refuse(self.pretrain("--inputs-length", 5000, "--mean-span", 20), "tokens, fewer than one window of")


class TextTest(BadInputTest):
    """--prepare-data and --train-tokenizer."""

    def setUp(self):
        super().setUp()
        self.text = self.folder / "lines.jsonl"
        self.output = self.folder / "out"

    def prepare(self, *changes):
        return changed(["--prepare-data", "--input", self.text, "--tokenizer", self.data / "tokenizer.model", "--output",
                        self.output], *changes)

    def write_lines(self, good, bad):
        """Some good lines, with bad ones after the 20th."""
        lines = [json.dumps({"text": f"The small river number {n}."}).encode() for n in range(good)]
        lines[20:20] = bad
        self.text.write_bytes(b"\n".join(lines) + b"\n")

    def test_no_such_text(self):
        self.refuse(self.prepare(), r"lines\.jsonl")

    def test_file_of_another_kind(self):
        (self.folder / "picture.png").write_bytes(b"\x89PNG")
        self.refuse(self.prepare("--input", self.folder / "picture.png"), r"picture\.png")

    def test_folder_without_text(self):
        (self.folder / "empty").mkdir()
        self.refuse(self.prepare("--input", self.folder / "empty"), r"no text .*empty")

    def test_malformed_json(self):
        self.write_lines(40, [b'{"text": "torn'] * 30)
        for ranks in (1, 2):
            self.refuse(self.prepare(), r"30 of 70 lines.*lines\.jsonl:21: ", ranks=ranks)

    def test_json_without_text(self):
        self.write_lines(40, [b'{"txet": "x"}'] * 10 + [b'{"text": 3}'] * 10 + [b'"text"'] * 10)
        self.refuse(self.prepare(), r"30 of 70 lines.*lines\.jsonl:21: ")

    def test_invalid_utf8(self):
        self.write_lines(40, [b'{"text": "caf\xe9 \xff"}'] * 30)
        self.refuse(self.prepare(), r"30 of 70 lines.*lines\.jsonl:21: .*UTF-8")

    def test_binary_file_named_as_text(self):
        self.text = self.folder / "binary.txt"
        self.text.write_bytes(random.Random(3).randbytes(20000))
        self.refuse(self.prepare(), r"lines are unusable.*binary\.txt:\d+: ")

    def test_a_few_bad_lines_are_told(self):
        self.write_lines(2000, [b'{"text": "torn', b'{"text": "caf\xe9"}'])
        outcome = self.train(self.prepare())
        self.assertRegex(outcome.stderr, r"left out 2 malformed lines")
        self.assertRegex(outcome.stderr, r"lines\.jsonl:21: ")
        self.assertRegex(outcome.stderr, r"lines\.jsonl:22: .*UTF-8")

    def test_truncated_gzip(self):
        self.text = self.folder / "lines.jsonl.gz"
        packed = gzip.compress(b"".join(b'{"text": "river %d"}\n' % n for n in range(5000)))
        self.text.write_bytes(packed[:len(packed) // 2])
        self.refuse(self.prepare(), r"lines\.jsonl\.gz is truncated")
        self.text.write_bytes(packed[:100] + bytes(200) + packed[300:])
        self.refuse(self.prepare(), r"lines\.jsonl\.gz is damaged")

    def test_vocabularies(self):
        self.write_lines(40, [])
        wrong = self.folder / "wrong.model"
        self.refuse(self.prepare("--tokenizer", wrong), r"wrong\.model")
        wrong.write_bytes(random.Random(4).randbytes(1000))
        self.refuse(self.prepare("--tokenizer", wrong), r"wrong\.model is not a SentencePiece model")
        wrong.write_bytes((self.data / "tokenizer.model").read_bytes()[:5000])
        self.refuse(self.prepare("--tokenizer", wrong), r"wrong\.model")
        self.refuse(["--train-tokenizer", "--input", self.text, "--output", self.folder / "new.model", "--vocab-pieces",
                     5000], "too small for 5000 pieces")

    def test_output_in_the_way(self):
        self.write_lines(40, [])
        self.output.write_text("mine")
        self.refuse(self.prepare(), "out: a file of that name is in the way")
        self.refuse(self.prepare("--output", self.output / "below"), "out/below")
        self.output.unlink()
        self.output.mkdir()
        (self.output / "mine").write_text("mine")
        self.refuse(self.prepare(), "out is not empty and holds no corpus")
        self.refuse(self.prepare("--output", self.corpus), "--overwrite")
        self.refuse(["--train-tokenizer", "--input", self.corpus.parent / "text.jsonl", "--output",
                     self.output / "mine" / "new.model", "--vocab-pieces", 110], r"mine/new\.model")


class CheckpointTest(BadInputTest):
    """What is read and not written: to a parent nothing is done. Runs that are resumed: see fault_test.py."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.good = cls.home / "good"
        outcome = harness.run(["--pretrain", "--corpus", cls.corpus, "--run", cls.good, *TRAINING])
        if outcome.code != 0:
            raise AssertionError(f"the run to damage could not be made: {outcome}")

    def setUp(self):
        super().setUp()
        self.run_folder = self.folder / "run"
        shutil.copytree(self.good, self.run_folder)
        self.step = step_directory(self.run_folder, 4)
        self.resume = self.pretrain("--steps", 6)
        self.evaluate = ["--evaluate", "--corpus", self.corpus, "--checkpoint", self.run_folder, *DATA]
        self.uptrain = ["--uptrain", "--corpus", self.corpus, "--run", self.folder / "child", "--init-from",
                        self.run_folder, *DATA, "--kv-groups", 2]

    def refuse_everywhere(self, pattern):
        for command in (self.evaluate, self.uptrain):
            with self.subTest(command[0]):
                self.refuse(command, pattern)

    def test_truncated(self):
        for name in ("model.safetensors", "optimizer.safetensors"):
            whole = (self.step / name).read_bytes()
            (self.step / name).write_bytes(whole[:-10])
            self.refuse_everywhere(rf"step-00000004/{name} is damaged: it has \d+ bytes.*remove .*step-00000004 to go on")
            (self.step / name).write_bytes(whole)

    def test_flipped_bit(self):
        for name in ("model.safetensors", "config.json", "tokenizer.model"):
            whole = (self.step / name).read_bytes()
            flipped = bytearray(whole)
            flipped[len(flipped) // 2] ^= 1
            (self.step / name).write_bytes(flipped)
            self.refuse_everywhere(rf"step-00000004/{name} is damaged: its checksum.*remove .*step-00000004 to go on")
            (self.step / name).write_bytes(whole)

    def test_what_the_message_advises_works(self):
        (self.step / "model.safetensors").write_bytes(b"")
        self.refuse(self.evaluate, "remove .*step-00000004 to go on from an earlier checkpoint")
        shutil.rmtree(self.step)
        self.train(self.evaluate)
        self.train(self.uptrain)

    def test_missing_files(self):
        for name in ("trainer.json", "model.safetensors", "optimizer.safetensors", "config.json"):
            (self.step / name).rename(self.folder / "aside")
            self.refuse_everywhere(rf"step-00000004/{name}")
            (self.folder / "aside").rename(self.step / name)

    def test_damaged_state(self):
        state = self.step / "trainer.json"
        whole = state.read_text()
        for text in ("", "{}", whole[:-20], whole.replace('"step": 4', '"step": 3'), "\xff\x00"):
            state.write_text(text)
            self.refuse(self.evaluate, r"step-00000004/trainer\.json is damaged; remove .*step-00000004", ranks=1)

    def test_damaged_metrics(self):
        metrics = self.run_folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join([lines[0], "what?\n", *lines[1:]]))
        self.refuse(self.resume, r"metrics\.jsonl:2: not a metrics line", changes=["run/starts.json"])

    def bare_model(self):
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copy(self.step / name, model)
        return model

    def test_hostile_headers(self):
        # No checksums protect a model directory: its header has to stand for itself.
        model = self.bare_model()
        file = model / "model.safetensors"
        whole = file.read_bytes()
        (length,) = struct.unpack_from("<Q", whole)
        header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
        first, second = sorted((name for name in header if name != "__metadata__"),
                               key=lambda name: header[name]["data_offsets"])[:2]

        def with_header(text):
            encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
            return struct.pack("<Q", len(encoded)) + encoded + data

        def edited(name, **fields):
            return with_header({**header, name: {**header[name], **fields}})

        begin, end = header[second]["data_offsets"]
        cases = {
            "length": (struct.pack("<Q", HUGE) + whole[8:], "header would have 9223372036854775808 bytes"),
            "longer than the file": (struct.pack("<Q", 10**7) + whole[8:], "header"),
            "empty": (b"", "too few"), "short": (whole[:6], "too few"), "garbage": (with_header(b"{]" * 50), "JSON"),
            "deep": (with_header(b'{"a":' * 10000), r"model\.safetensors"),
            "overlap": (edited(second, data_offsets=[begin - 8, end - 8]), "overlap"),
            "out of range": (edited(second, data_offsets=[begin + 2**40, end + 2**40]), second),
            "backwards": (edited(second, data_offsets=[end, begin]), second),
            "dtype": (edited(second, dtype="F33"), "F33"), "a hole": (with_header({
                name: entry for name, entry in header.items() if name != second}), "belong to no tensor"),
            "shape": (edited(second, shape=[2**40, 2**40]), second),
            "twice": (with_header(json.dumps(header)[:-1].encode() + b"," + json.dumps(
                {second: header[second]})[1:].encode()), "twice")}
        evaluate = changed(self.evaluate, "--checkpoint", model)
        uptrain = changed(self.uptrain, "--init-from", model, "--parent-steps", 100)
        for name, (content, pattern) in cases.items():
            with self.subTest(name):
                file.write_bytes(content)
                self.refuse(evaluate, r"model/model\.safetensors", pattern, ranks=2 if name == "length" else 1)
        file.write_bytes(whole[:-10])
        for command in (evaluate, uptrain):
            with self.subTest(command[0]):
                before = sorted(self.folder.iterdir())
                self.assert_refused(harness.run(command), r"model/model\.safetensors.*truncated or damaged")
                self.assertEqual(harness.unfinished(self.folder / "child"), [])
                self.assertEqual(sorted(path for path in self.folder.iterdir() if path.name != "child"), before)

    def test_model_of_another_shape(self):
        model = self.bare_model()
        config = json.loads((model / "config.json").read_text())
        for field, value, pattern in (
                ("d_ff", 192, r"DenseReluDense\.wi_0\.weight: \[160, 128\] instead of \[192, 128\]"),
                ("num_layers", 2, r"missing \(encoder\.block\.1\."),
                ("num_key_value_heads", 1, r"SelfAttention\.k\.weight: \[64, 128\] instead of \[16, 128\]"),
                ("num_heads", 2, r"config\.json: .*2 attention heads")):
            with self.subTest(field):
                (model / "config.json").write_text(json.dumps({**config, field: value}))
                self.refuse(changed(self.evaluate, "--checkpoint", model), rf"/model.*{pattern}",
                            ranks=2 if field == "d_ff" else 1)
        for field, value in (("model_type", "llama"), ("d_model", "x"), ("d_ff", -1), ("feed_forward_proj", "relu"),
                             ("num_heads", 2**62)):
            with self.subTest(field):
                (model / "config.json").write_text(json.dumps({**config, field: value}))
                self.refuse(changed(self.evaluate, "--checkpoint", model), rf"model/config\.json.*{field}",
                            ranks=1)
        (model / "config.json").write_text("{")
        self.refuse(changed(self.evaluate, "--checkpoint", model), r"model/config\.json")

    def test_vocabulary_of_another_size(self):
        draw = random.Random(5)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(600)]
        (self.home / "words.txt").write_text("".join(" ".join(draw.choices(words, k=12)) + "\n" for _ in range(800)))
        other, tokenizer = self.home / "other", self.home / "other.model"
        self.train(["--train-tokenizer", "--input", self.home / "words.txt", "--vocab-pieces", 250, "--output",
                    tokenizer], ranks=1)
        self.train(["--prepare-data", "--input", self.home / "words.txt", "--tokenizer", tokenizer, "--output", other,
                    "--heldout-fraction", 0.2, "--document", "line"], ranks=1)
        for command in (self.resume, self.evaluate, self.uptrain):
            with self.subTest(command[0]):
                self.refuse(changed(command, "--corpus", other), "vocabulary of 256.*one of 384|vocab.*256.*384")


class OutputTest(BadInputTest):
    def test_run_where_nothing_can_be_written(self):
        # Below a file, since root may write anywhere else.
        (self.folder / "file").write_text("mine")
        self.refuse(self.pretrain("--run", self.folder / "file" / "run"), "file/run")
        self.refuse(self.pretrain("--run", self.folder / "file"), "file")
        self.refuse(self.pretrain("--run", "/proc/regroup-run"), "/proc/regroup-run")

    def test_disk_full_during_a_save(self):
        # The limit of a file's size stands for the disk's: it meets the model's file, not the small ones.
        run = self.folder / "run"
        self.train(self.pretrain("--steps", 2))
        before = harness.tree(step_directory(run, 2))
        size = harness.size_of(step_directory(run, 2) / "model.safetensors")
        lines = harness.size_of(run / "metrics.jsonl")
        longer = self.pretrain("--steps", 400, "--save-every", 200, "--evaluate-every", 0)
        with harness.Job(longer) as job:
            self.assertTrue(job.wait_for(lambda: harness.size_of(run / "metrics.jsonl") > lines))
            for rank in job.rank_pids():
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (size // 2, size // 2))
            outcome = job.finish(harness.SECONDS_TO_FAIL)
        self.assert_refused(outcome, r"cannot write .*step-\d+\.partial/model\.safetensors.*ulimit")
        self.assertEqual(harness.saved_steps(run), [2])
        self.assertEqual(harness.tree(step_directory(run, 2)), before)
        self.assertEqual(harness.unfinished(run), [])
        self.train(self.pretrain("--steps", 4))
        self.train(self.pretrain("--steps", 4, "--run", self.folder / "whole"))
        self.assertEqual(harness.digest(step_directory(run, 4) / "model.safetensors"),
                         harness.digest(step_directory(self.folder / "whole", 4) / "model.safetensors"))

    def test_loss_that_is_no_number(self):
        run = self.folder / "run"
        self.train(self.pretrain("--steps", 2))
        before = harness.tree(step_directory(run, 2))
        outcome = harness.run(self.pretrain("--run", self.folder / "diverging", "--learning-rate", 1e38, "--steps", 20,
                                            "--save-every", 50), seconds=harness.SECONDS_TO_FAIL)
        self.assert_refused(outcome, r"the loss is .* at step \d+.*--learning-rate")
        self.assertEqual(harness.unfinished(self.folder / "diverging"), [])
        self.assertEqual(harness.tree(step_directory(run, 2)), before)


if __name__ == "__main__":
    harness.main()
