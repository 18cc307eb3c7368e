#!/usr/bin/env python3
"""How fast a T5 1.1 XL of random fp32 weights (11.4 GB, sharded as transformers does) is read into two tensor-parallel ranks
and converted to 8 key/value groups on the way, next to dd reading the same files, and how much memory a rank takes.

    import_benchmark.py --build build/release [--directory DIR] [--rounds 3] [--layers 24] [--ranks 2] [--groups 8]

Rounds of dd and the import alternate, each beginning with nothing of the files in memory; medians count.
"""

import argparse
import json
import os
import shlex
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

D_MODEL, D_KV, D_FF, HEADS, VOCABULARY = 2048, 64, 5120, 32, 32128  # T5 1.1 XL
SHARD = 5_000_000_000


def parameters(layers):
    """{name: shape} as transformers has them."""
    inner = HEADS * D_KV
    table = {"shared.weight": [VOCABULARY, D_MODEL], "lm_head.weight": [VOCABULARY, D_MODEL]}

    def attention(prefix):
        table.update({f"{prefix}.{name}.weight": [inner, D_MODEL] for name in "qkv"})
        table[f"{prefix}.o.weight"] = [D_MODEL, inner]

    for stack, kinds in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            for number, kind in enumerate(kinds):
                attention(f"{block}.{number}.{kind}")
                table[f"{block}.{number}.layer_norm.weight"] = [D_MODEL]
            dense = f"{block}.{len(kinds)}"
            table.update({f"{dense}.DenseReluDense.wi_{i}.weight": [D_FF, D_MODEL] for i in (0, 1)})
            table[f"{dense}.DenseReluDense.wo.weight"] = [D_MODEL, D_FF]
            table[f"{dense}.layer_norm.weight"] = [D_MODEL]
        table[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = [32, HEADS]
        table[f"{stack}.final_layer_norm.weight"] = [D_MODEL]
    return table


def size(shape):
    count = 4
    for extent in shape:
        count *= extent
    return count


def write_shard(path, table, noise):
    header, at = {}, 0
    for name, shape in table.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            at -= file.write(noise[:min(at, len(noise))])
        os.fsync(file.fileno())


def make_model(folder, layers):
    """The bytes of all files."""
    folder.mkdir()
    # Random fractions of floats near 0.1: finite, and nothing compresses them.
    words = bytearray(os.urandom(64 << 20))
    words[2::4] = bytes(byte & 0x7F | 0x80 for byte in words[2::4])
    words[3::4] = b"\x3d" * (len(words) // 4)
    shards, filled = [{}], 0
    for name, shape in parameters(layers).items():
        if filled + size(shape) > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size(shape)
    names = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    for name, table in zip(names, shards):
        write_shard(folder / name, table, bytes(words))
    weight_map = {tensor: name for name, table in zip(names, shards) for tensor in table}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "t5", "vocab_size": VOCABULARY, "d_model": D_MODEL, "d_kv": D_KV, "d_ff": D_FF, "num_heads": HEADS,
        "num_layers": layers, "num_decoder_layers": layers, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False}))
    return [folder / name for name in names]


def forget(files):
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd(files):
    begin = time.monotonic()
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)
    return time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=Path)
    parser.add_argument("--directory", help="on the file system to measure; the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24, help="of the encoder and of the decoder; XL has 24")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--mpiexec", default="mpirun --oversubscribe --bind-to none")
    arguments = parser.parse_args()
    theirs, ours = [], []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as work:
        files = make_model(Path(work) / "model", arguments.layers)
        total = sum(file.stat().st_size for file in files)
        command = [*shlex.split(arguments.mpiexec), "-n", str(arguments.ranks),
                   str(arguments.build / "bin/import_benchmark"), f"model={work}/model", f"groups={arguments.groups}"]
        for _ in range(arguments.rounds):
            forget(files)
            theirs.append(dd(files))
            forget(files)
            ours.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"dd {theirs[-1]:.2f} s, import {ours[-1]['seconds']:.2f} s", flush=True)
    read = statistics.median(theirs)
    took = statistics.median(result["seconds"] for result in ours)
    memory = max(result["peak"] for result in ours)
    kept = ours[0]["kept"]
    print(f"{total / 1e9:.2f} GB into {arguments.ranks} ranks: {total / took / 1e9:.2f} GB/s, {read / took:.2f} of dd's "
          f"{total / read / 1e9:.2f}; a rank keeps {kept / 1e9:.2f} GB and takes at most {memory / 1e9:.2f} GB, "
          f"{memory / kept:.3f} of it")


if __name__ == "__main__":
    main()
