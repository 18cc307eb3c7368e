#!/usr/bin/env python3
"""The whole road for every architecture: a model of transformers, through the program, into the programs it is for.

    run.py --trainer build/cpu/bin/trainer [--work DIR] [--ctranslate2]

Makes a tiny T5 1.1, T5 1.0 and mT5 with the config.json and files that the public ones have, and checks:
1. every golden import, exported hf-expanded, gives in transformers the logits that lie beside it (expected.safetensors;
   import_test compares the program's own with the same);
2. each model converted to grouped queries (even, uneven) and exported hf and hf-expanded: what check_export.py checks;
3. exports in bf16 and fp16 load in that type and give the logits of fp32 up to rounding;
4. what transformers saves again after loading (expanded and compact) is read back, bit for bit the same tensors, and
   evaluates to the same loss;
5. a checkpoint with Adafactor's moments, exported t5x, is read by tensorstore and msgpack with the same values.

Needs what check_export.py needs, tensorstore and msgpack. Run it again with an older transformers on PYTHONPATH: with
transformers 5, CTranslate2's converter takes every T5 for one with a scaled, tied lm_head; scores are then compared for
T5 1.0 only.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/system"), str(ROOT / "tests/golden")]

import harness  # noqa: E402
import make_imports  # noqa: E402
import make_t5x  # noqa: E402

import check_export  # noqa: E402

HEADS = 4
PIECES = 110  # of harness.make_corpus()
SHAPE = dict(make_imports.SHAPE, vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_heads=HEADS, num_layers=2,
             num_decoder_layers=2, kv_groups=HEADS, encoder_kv_groups=HEADS)
FAMILIES = {"t5_1_1": "flan_t5", "t5_1_0": "t5_1_0", "mt5": "mt5"}
# name -> (family, options of --convert)
MODELS = {
    "t5_1_1": ("t5_1_1", ["--kv-groups", 2, "--pooling", "spectral"]),
    "uneven": ("t5_1_1", ["--kv-groups", 2, "--pooling", "spectral", "--kv-budget", "uneven"]),
    "t5_1_0": ("t5_1_0", ["--kv-groups", 2, "--pooling", "mean"]),
    "mt5": ("mt5", ["--kv-groups", 1, "--pooling", "spectral"]),
}
TYPES = {"bf16": (torch.bfloat16, 5e-2), "fp16": (torch.float16, 5e-3)}  # largest error of the largest logit


def run(*arguments):
    outcome = harness.run(list(arguments), ranks=1)
    assert outcome.code == 0, outcome
    return outcome


def export(form, checkpoint, output, *more):
    run("--export", form, "--checkpoint", checkpoint, "--output", output, *more)
    return output


def spiece_of_mt5(model):
    """A SentencePiece model with the sentinels among its pieces: a protocol buffer goes on with what is appended."""
    def field(tag, data):
        return bytes([tag, len(data)]) + data

    return model + b"".join(field(0x0A, field(0x0A, f"\u2581<extra_id_{i}>".encode()) + b"\x15\0\0\0\0\x18\x04")
                            for i in range(99, -1, -1))


def make_parent(family, folder, spiece):
    """A folder as the public model's."""
    fields, write, overrides, build = make_imports.FAMILIES[FAMILIES[family]]
    overrides = {key: value for key, value in overrides.items() if key not in SHAPE}
    source = make_imports.Source(SHAPE | overrides, build)
    for name in source.weights.keys() & {"shared.weight", "lm_head.weight"}:
        source.weights[name][PIECES + 100:] = 0  # nothing speaks of padding rows
    for name in ("k", "v"):  # one attention whose heads cost nothing to merge, so that budgets become uneven
        heads = source.weights[f"decoder.block.1.layer.0.SelfAttention.{name}.weight"].view(HEADS, SHAPE["d_kv"], -1)
        heads[:] = heads[0].clone()
    folder.mkdir()
    write(folder, source.model())
    sizes = {key: value for key, value in SHAPE.items() if "groups" not in key and key != "z_loss"}
    (folder / "config.json").write_text(json.dumps(fields | sizes))
    (folder / "spiece.model").write_bytes(spiece_of_mt5(spiece) if family == "mt5" else spiece)
    tokenizer = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "tokenizer_class": "T5Tokenizer",
                 "extra_ids": 0 if family == "mt5" else 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def check_golden(work):
    for case in sorted((ROOT / "tests/golden/imports").iterdir()):
        folder = export("hf-expanded", case, work / f"golden-{case.name}")
        expected = load_file(case / "expected.safetensors")
        ids, labels = (torch.tensor(expected[name]).long() for name in ("input_ids", "labels"))
        model = check_export.load(folder, "eager", stock=True)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != 0).long(),
                           labels=labels.masked_fill(labels == 0, -100)).logits
        scale = np.abs(expected["logits"]).max()
        difference = np.abs(logits.numpy() - expected["logits"])[expected["labels"] != 0].max() / scale
        assert difference <= check_export.TOLERANCE, f"{case.name}: {difference}"
        print(f"golden {case.name}: logits differ by {difference:.1e} of the largest")


def logits_of(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SHAPE["vocab_size"], (2, 3, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits.float()


def same_tensors(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a), (one, other)


def held_out(corpus, checkpoint):
    return run("--evaluate", "--corpus", corpus, "--checkpoint", checkpoint, "--precision", "fp32", *harness.DATA).stdout


def load(folder, form, **options):
    kind = AutoModelForSeq2SeqLM if form == "hf" else T5ForConditionalGeneration
    return kind.from_pretrained(folder, trust_remote_code=form == "hf", attn_implementation="eager", **options).eval()


def check_types(grouped, form, reference, work):
    for name, (dtype, tolerance) in TYPES.items():
        folder = export(form, grouped, work / f"{form}-{name}", "--export-type", name)
        model = load(folder, form, **{"dtype" if transformers.__version__ >= "4.56" else "torch_dtype": "auto"})
        kept = [key for key, value in model.named_parameters() if value.dtype != dtype]
        # transformers keeps wo in fp32 where the model is fp16
        assert name == "fp16" and all(key.endswith(".wo.weight") for key in kept) or not kept, kept
        model = load(folder, form, dtype=torch.float32)
        difference = ((logits_of(model) - reference).abs().max() / reference.abs().max()).item()
        assert difference <= tolerance, f"{folder}: {difference}"
        print(f"  {form} {name}: weights rounded, logits differ by {difference:.1e} of the largest")


def check_saved_again(grouped, folder, form, reference, corpus, work):
    again = work / f"{form}-again"
    load(folder, form).save_pretrained(again)
    shutil.copy(folder / "spiece.model", again)
    back = export(form, again, work / f"{form}-back")
    same_tensors(folder, back)
    assert torch.equal(logits_of(load(back, form)), reference)
    if corpus:
        assert held_out(corpus, again) == held_out(corpus, grouped)
    print(f"  {form}: saved again by transformers and read back, the same tensors")


def check_model(name, parent, options, corpus, work, ctranslate2):
    print(f"{name}:")
    work.mkdir()
    grouped = work / "grouped"
    run("--convert", "--init-from", parent, "--output", grouped, *options)
    folders = {form: export(form, grouped, work / form) for form in ("hf", "hf-expanded")}
    config = json.loads((folders["hf"] / "config.json").read_text())
    assert ("decoder_num_key_value_heads" in config) == ("uneven" in options), config
    arguments = ["--compact", str(folders["hf"]), "--expanded", str(folders["hf-expanded"])]
    check_export.main(arguments + ["--ctranslate2"] * ctranslate2)
    for form, folder in folders.items():
        reference = logits_of(load(folder, form))
        check_types(grouped, form, reference, work)
        check_saved_again(grouped, folder, form, reference, corpus, work)


def check_t5x(name, parent, corpus, work):
    """Uptrains without conversion for a few steps, so that there are moments."""
    run("--uptrain", "--init-from", parent, "--kv-groups", HEADS, "--run", work / f"{name}-run", "--corpus", corpus,
        "--parent-steps", 60, "--alpha", 0.05, *harness.DATA)
    target = export("t5x", work / f"{name}-run", work / f"{name}-t5x")
    (checkpoint,) = target.glob("checkpoint_*")
    (step,) = (work / f"{name}-run" / "checkpoints").glob("step-*63")
    print(f"{name}: ", end="")
    make_t5x.check(checkpoint, step)
    expanded = export("hf-expanded", target, work / f"{name}-t5x-hf")
    same_tensors(expanded, export("hf-expanded", work / f"{name}-run", work / f"{name}-run-hf"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True, type=Path)
    parser.add_argument("--work", type=Path, help="an empty folder to keep everything in")
    parser.add_argument("--ctranslate2", action="store_true")
    arguments = parser.parse_args()
    harness.options.trainer = str(arguments.trainer.resolve())
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(exist_ok=True)
        corpora = {}
        for family in ("t5_1_1", "mt5"):
            (work / f"corpus-{family}").mkdir()
        corpora["t5_1_1"] = corpora["t5_1_0"] = harness.make_corpus(work / "corpus-t5_1_1")
        spiece = (work / "corpus-t5_1_1/tokenizer.model").read_bytes()
        parents = {family: make_parent(family, work / family, spiece) for family in FAMILIES}
        corpora["mt5"] = work / "corpus-mt5/corpus"
        run("--prepare-data", "--input", work / "corpus-t5_1_1/text.jsonl", "--tokenizer", parents["mt5"] / "spiece.model",
            "--output", corpora["mt5"], "--heldout-fraction", 0.1)
        check_golden(work)
        for name, (family, options) in MODELS.items():
            check_model(name, parents[family], options, corpora[family], work / f"model-{name}", arguments.ctranslate2)
        for family in FAMILIES:
            check_t5x(family, parents[family], corpora[family], work)
    print("all of it holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
