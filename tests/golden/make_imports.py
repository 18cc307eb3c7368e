#!/usr/bin/env python3
"""Writes imports/<case>/: one tiny T5 1.1 model in every format that a checkpoint may come in, and one of each public
family with the config.json that family has. And torch/*.bin: tensors of all kinds in PyTorch's own formats.

Every case has config.json as transformers writes it or as a public model has it, the weights in its format and type, and expected.safetensors:
input_ids, labels, and the logits and loss that transformers computes in fp32 from the stored (rounded) weights.
See README.md. A format is a function that fills a folder; FORMATS lists them, FAMILIES the public models.
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
from transformers import MT5Config, MT5ForConditionalGeneration

import make_golden

# Small, and no two dimensions of a matrix alike.
SHAPE = dict(vocab_size=48, d_model=12, d_kv=4, d_ff=20, num_heads=6, num_layers=1, num_decoder_layers=2,
             kv_groups=6, encoder_kv_groups=6, z_loss=0.0)
INPUT_LENGTHS, TARGET_LENGTHS = [11, 8, 5], [7, 4, 6]
SEED = 20231023
SHARD = "20KB"  # two or three files


class Source:
    """What cases of one shape have in common: inputs, and weights in fp32."""

    def __init__(self, shape, build=make_golden.build_model):
        generator = torch.Generator().manual_seed(SEED)
        self.shape, self.build = shape, build
        self.input_ids = make_golden.draw_tokens(INPUT_LENGTHS, shape, generator)
        self.labels = make_golden.draw_tokens(TARGET_LENGTHS, shape, generator)
        self.weights = {name: make_golden.draw_weight(name, parameter.shape, shape, generator)
                        for name, parameter in build(shape).named_parameters()}

    def model(self, dtype=torch.float32):
        model = self.build(self.shape)
        make_golden.load_weights(model, self.weights, self.shape)
        return model.to(dtype)

    def write_expected(self, directory, dtype):
        with torch.no_grad():
            logits, loss = make_golden.run_model(self.model(dtype).float(), self.input_ids, self.labels, self.shape)
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


# ---- Families: config.json and files as the public models have them ------------------------------------------------

def build_mt5(shape):
    """The lm_head is mT5's own in every version of transformers that reads two tensors for it and the embedding."""
    model = MT5ForConditionalGeneration(MT5Config(
        vocab_size=shape["vocab_size"], d_model=shape["d_model"], d_kv=shape["d_kv"], d_ff=shape["d_ff"],
        num_heads=shape["num_heads"], num_layers=shape["num_layers"], num_decoder_layers=shape["num_decoder_layers"],
        dropout_rate=0.0, tie_word_embeddings=False, use_cache=False, attn_implementation="eager"))
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model.train()


def write_as_t5_small(directory, model):
    """Aliases of the embedding, and a table of cross-attention that no T5 computes with."""
    tensors = model.state_dict()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.full((32, model.config.num_heads), 9.0)
    torch.save(tensors, directory / "pytorch_model.bin")


# What the public files say besides the shape. T5 1.0: no feed_forward_proj, no tie_word_embeddings, no
# num_decoder_layers; what is said of tasks is nobody's business here.
T5_SMALL = {
    "architectures": ["T5WithLMHeadModel"], "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "model_type": "t5",
    "n_positions": 512, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "task_specific_params": {
        "summarization": {"early_stopping": True, "length_penalty": 2.0, "max_length": 200, "num_beams": 4,
                          "prefix": "summarize: "},
        "translation_en_to_de": {"d_model": 1, "max_length": 300, "tie_word_embeddings": False}}}
FLAN_T5 = {
    "architectures": ["T5ForConditionalGeneration"], "classifier_dropout": 0.0, "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-6,
    "model_max_length": 512, "model_type": "t5", "n_positions": 512, "output_past": True, "pad_token_id": 0,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"prefix": "summarize: "}}, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.23.1", "use_cache": True}
MT5_SMALL = {
    "_name_or_path": "mt5-small",
    "architectures": ["MT5ForConditionalGeneration"], "decoder_start_token_id": 0, "dropout_rate": 0.1,
    "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6, "model_type": "mt5", "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "transformers_version": "4.10.0.dev0",
    "use_cache": True}

# case -> (config.json, format, overrides of SHAPE, builder)
FAMILIES = {
    "t5_1_0": (T5_SMALL, write_as_t5_small,
               dict(num_layers=2, num_decoder_layers=2, d_ff=8, **make_golden.T5_1_0), make_golden.build_model),
    "flan_t5": (FLAN_T5, write_safetensors, {}, make_golden.build_model),
    "mt5": (MT5_SMALL, write_torch, {}, build_mt5),
}


def make_family(name, output):
    fields, write, overrides, build = FAMILIES[name]
    directory = empty_folder(output / "imports" / name)
    source = Source(SHAPE | overrides, build)
    write(directory, source.model())
    sizes = {key: value for key, value in source.shape.items()
             if key in SHAPE and "groups" not in key and key != "z_loss"}
    if fields is T5_SMALL:
        assert sizes.pop("num_decoder_layers") == sizes["num_layers"]
    (directory / "config.json").write_text(json.dumps(dict(sorted((fields | sizes).items())), indent=2) + "\n")
    report(name, directory, source.write_expected(directory, torch.float32))


def empty_folder(directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def report(name, directory, loss):
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    print(f"{name}: loss {loss:.7f}, {sizes}")


def make_case(name, source, output):
    write, dtype = FORMATS[name]
    directory = empty_folder(output / "imports" / name)
    model = source.model(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    write(directory, model)
    report(name, directory, source.write_expected(directory, dtype))


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
    parser.add_argument("--cases", nargs="*", choices=[*FORMATS, *FAMILIES],
                        default=[*FORMATS, *FAMILIES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    source = Source(SHAPE)
    for name in arguments.cases:
        if name in FORMATS:
            make_case(name, source, arguments.output)
        else:
            make_family(name, arguments.output)
    make_torch_files(arguments.output / "torch")


if __name__ == "__main__":
    main()
