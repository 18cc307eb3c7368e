#!/usr/bin/env python3
"""Writes imports/<case>/: one tiny T5 1.1 model in every format that a checkpoint may come in. And torch/*.bin:
tensors of all kinds in PyTorch's own formats.

Every case has config.json as transformers writes it, the weights in its format and type, and expected.safetensors:
input_ids, labels, and the logits and loss that transformers computes in fp32 from the stored (rounded) weights.
See README.md. A format is a function that fills a folder; FORMATS lists them.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.numpy import save_file

import make_golden

# Small, and no two dimensions of a matrix alike.
SHAPE = dict(vocab_size=48, d_model=12, d_kv=4, d_ff=20, num_heads=6, num_layers=1, num_decoder_layers=2,
             kv_groups=6, encoder_kv_groups=6, z_loss=0.0)
INPUT_LENGTHS, TARGET_LENGTHS = [11, 8, 5], [7, 4, 6]
SEED = 20231023
SHARD = "20KB"  # two or three files


class Source:
    """What every case has in common: inputs, and weights in fp32."""

    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        self.input_ids = make_golden.draw_tokens(INPUT_LENGTHS, SHAPE, generator)
        self.labels = make_golden.draw_tokens(TARGET_LENGTHS, SHAPE, generator)
        self.weights = {name: make_golden.draw_weight(name, parameter.shape, SHAPE, generator)
                        for name, parameter in make_golden.build_model(SHAPE).named_parameters()}

    def model(self, dtype=torch.float32):
        model = make_golden.build_model(SHAPE)
        make_golden.load_weights(model, self.weights, SHAPE)
        return model.to(dtype)

    def write_expected(self, directory, dtype):
        with torch.no_grad():
            logits, loss = make_golden.run_model(self.model(dtype).float(), self.input_ids, self.labels, SHAPE)
        save_file({"input_ids": self.input_ids.numpy().astype(np.int32),
                   "labels": self.labels.numpy().astype(np.int32),
                   "logits": logits.numpy(), "loss": loss.reshape(1).numpy()},
                   directory / "expected.safetensors")
        return loss.item()


# ---- Formats: functions of (folder, model) -------------------------------------------------------------------------

def write_safetensors(directory, model):
    """A tensor that has several names is stored once."""
    model.save_pretrained(directory)


def write_safetensors_sharded(directory, model):
    model.save_pretrained(directory, max_shard_size=SHARD)


def write_torch(directory, model):
    """All names of the state dict: the embedding has three."""
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def write_torch_legacy(directory, model):
    """As before PyTorch 1.6."""
    torch.save(model.state_dict(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_torch_sharded(directory, model):
    """The first file as PyTorch writes it today, the others as before 1.6."""
    tensors = model.state_dict()
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=SHARD, filename_pattern="pytorch_model{suffix}.bin")
    for i, (name, keys) in enumerate(split.filename_to_tensors.items()):
        torch.save({key: tensors[key] for key in keys}, directory / name, _use_new_zipfile_serialization=i == 0)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


# case -> (format, type of the weights)
FORMATS = {
    "safetensors_fp32": (write_safetensors, torch.float32),
    "safetensors_bf16": (write_safetensors, torch.bfloat16),
    "safetensors_fp16": (write_safetensors, torch.float16),
    "safetensors_sharded": (write_safetensors_sharded, torch.float32),
    "torch_fp32": (write_torch, torch.float32),
    "torch_bf16": (write_torch, torch.bfloat16),
    "torch_fp16": (write_torch, torch.float16),
    "torch_legacy": (write_torch_legacy, torch.float32),
    "torch_sharded": (write_torch_sharded, torch.float32),
}


def make_case(name, source, output):
    write, dtype = FORMATS[name]
    directory = output / "imports" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model = source.model(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    write(directory, model)
    loss = source.write_expected(directory, dtype)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    print(f"{name}: loss {loss:.7f}, {sizes}")


def make_torch_files(directory):
    """Types, ranks, views and shared storages; elements count up from 0 in every one."""
    grid = torch.arange(12.0)
    tensors = {
        "matrix": grid.view(3, 4), "same": grid.view(3, 4), "transposed": grid.view(3, 4).t(), "part": grid[4:10],
        "parameter": torch.nn.Parameter(torch.arange(6.0).view(1, 2, 3)), "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3), "column": torch.arange(5.0)[:, None],
        "f64": torch.arange(3.0).double(), "f16": torch.arange(3.0).half(), "bf16": torch.arange(3.0).bfloat16(),
        "i64": torch.arange(3), "i32": torch.arange(3).int(), "i16": torch.arange(3).short(),
        "i8": torch.arange(3).char(), "u8": torch.arange(3).byte(), "bool": torch.arange(3) > 0}
    directory.mkdir(exist_ok=True)
    torch.save(tensors, directory / "zip.bin")
    torch.save(tensors, directory / "zip_protocol4.bin", pickle_protocol=4)
    torch.save(tensors, directory / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(tensors, directory / "legacy_protocol5.bin", _use_new_zipfile_serialization=False,
               pickle_protocol=5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--cases", nargs="*", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    source = Source()
    for name in arguments.cases:
        make_case(name, source, arguments.output)
    make_torch_files(arguments.output / "torch")


if __name__ == "__main__":
    main()
