#!/usr/bin/env python3
"""Writes imports/t5x_zarr and imports/t5x_legacy: one small T5 1.1 as T5X saves it, and what transformers computes from it.

    make_t5x.py                            writes the two folders
    make_t5x.py --check CHECKPOINT MODEL   compares a checkpoint_<step> directory, read by tensorstore and msgpack, with
                                           a directory that has the same tensors in model.safetensors and, where it is
                                           there, optimizer.safetensors

The slots are what T5X's rule makes of two random gradients, matrices factored from a side of 8 on; contents.safetensors
has the parameters and, from the transposed gradients by rows and columns, the same slots under this program's names.
"""

import argparse
import json
import pathlib
import re
import shutil

import msgpack
import numpy as np
import tensorstore
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

import make_golden

SHAPE = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=1, num_decoder_layers=2, kv_groups=4,
             encoder_kv_groups=4, z_loss=0.0)
STEP = 1000
DECAYS = (0.0, 0.6)
SMALLEST_FACTORED = 8
# Arrays that are cut into several chunks, some of them not evenly.
CHUNKS = {
    "token_embedder/embedding": (24, 10),
    "encoder/layers_0/attention/query/kernel": (5, 7),
    "encoder/layers_0/mlp/wi_0/kernel": (16, 9),
    "encoder/layers_0/mlp/wo/kernel": (8, 16),
    "decoder/relpos_bias/rel_embedding": (2, 32),
    "decoder/layers_1/encoder_decoder_attention/out/kernel": (16, 5),
    "decoder/logits_dense/kernel": (16, 32),
}


def t5x_path(name):
    """T5X's path of a parameter of transformers' (flat, without a table: an opinion of its own)."""
    if name == "shared.weight":
        return "token_embedder/embedding"
    if name == "lm_head.weight":
        return "decoder/logits_dense/kernel"
    stack, rest = name.split(".", 1)
    if rest == "final_layer_norm.weight":
        return f"{stack}/{stack}_norm/scale"
    if "relative_attention_bias" in rest:
        return f"{stack}/relpos_bias/rel_embedding"
    layer, part, module = re.fullmatch(r"block\.(\d+)\.layer\.(\d)\.(.*)\.weight", rest).groups()
    module, *leaf = module.split(".")
    attentions = {"encoder": ["attention"], "decoder": ["self_attention", "encoder_decoder_attention"]}[stack]
    norms = {"encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
             "decoder": ["pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"]}[stack]
    if module == "layer_norm":
        return f"{stack}/layers_{layer}/{norms[int(part)]}/scale"
    if module == "DenseReluDense":
        return f"{stack}/layers_{layer}/mlp/{leaf[0]}/kernel"
    long = {"q": "query", "k": "key", "v": "value", "o": "out"}[leaf[0]]
    return f"{stack}/layers_{layer}/{attentions[int(part)]}/{long}/kernel"


def to_t5x(name, array):
    transposed = array.ndim == 2 and name != "shared.weight"
    return np.ascontiguousarray(array.T if transposed else array)


def bfloat16_valued(tensor):
    """Values with short mantissas: half the bytes when compressed."""
    return tensor.to(torch.bfloat16).to(torch.float32)


def t5x_slots(gradients):
    """v, v_row, v_col of one parameter, in T5X's layout, by its rule."""
    shape = gradients[0].shape
    unused = np.zeros(1, np.float32)
    order = np.argsort(shape)
    if len(shape) == 2 and shape[order[-2]] >= SMALLEST_FACTORED:
        longest, second = int(order[-1]), int(order[-2])
        v_row = np.zeros(np.delete(shape, longest), np.float64)
        v_col = np.zeros(np.delete(shape, second), np.float64)
        for decay, g in zip(DECAYS, gradients):
            squared = np.square(g, dtype=np.float64) + 1e-30
            v_row = decay * v_row + (1 - decay) * squared.mean(axis=longest)
            v_col = decay * v_col + (1 - decay) * squared.mean(axis=second)
        return {"v": unused, "v_row": v_row.astype(np.float32), "v_col": v_col.astype(np.float32), "m": unused}
    v = np.zeros(shape, np.float64)
    for decay, g in zip(DECAYS, gradients):
        v = decay * v + (1 - decay) * (np.square(g, dtype=np.float64) + 1e-30)
    return {"v": v.astype(np.float32), "v_row": unused, "v_col": unused, "m": unused}


def own_slots(name, gradients):
    """The same from gradients as transformers has them: means over rows and columns."""
    squared = [np.square(g, dtype=np.float64) + 1e-30 for g in gradients]
    moment = squared[0] * (1 - DECAYS[0]) * DECAYS[1] + squared[1] * (1 - DECAYS[1])
    if moment.ndim == 2 and min(moment.shape) >= SMALLEST_FACTORED:
        return {f"{name}.second_moment_row": moment.mean(axis=1).astype(np.float32),
                f"{name}.second_moment_column": moment.mean(axis=0).astype(np.float32)}
    return {f"{name}.second_moment": moment.astype(np.float32)}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return tree


def extension(value):
    packed = msgpack.packb((list(value.shape), value.dtype.name, value.tobytes("C")), use_bin_type=True)
    return msgpack.ExtType(3 if value.ndim == 0 else 1, packed)


def write_index(path, arrays):
    tree = nested({key: value if isinstance(value, dict) else extension(value) for key, value in arrays.items()})
    path.write_bytes(msgpack.packb({"version": 3, "optimizer": tree}, strict_types=True))


def write_zarr(folder, path, array, chunks):
    name = path.replace("/", ".")
    spec = {"driver": "zarr", "dtype": "float32", "kvstore": {"driver": "file", "path": name},
            "metadata": {"compressor": {"id": "gzip"}, "shape": array.shape, "chunks": list(chunks)}}
    relative = tensorstore.Spec(spec).to_json()
    spec["kvstore"]["path"] = str(folder / name)
    tensorstore.open(spec, create=True).result().write(array).result()
    return relative


def make_fixtures(output):
    generator = torch.Generator().manual_seed(make_golden.SEED)
    draw = np.random.default_rng(make_golden.SEED)
    input_ids = make_golden.draw_tokens([9, 6], SHAPE, generator)
    labels = make_golden.draw_tokens([7, 5], SHAPE, generator)
    model = make_golden.build_model(SHAPE)
    weights = {name: bfloat16_valued(make_golden.draw_weight(name, parameter.shape, SHAPE, generator))
               for name, parameter in model.named_parameters()}
    make_golden.load_weights(model, weights, SHAPE)
    logits, loss = make_golden.run_model(model, input_ids, labels, SHAPE)
    expected = {"input_ids": input_ids.numpy().astype(np.int32), "labels": labels.numpy().astype(np.int32),
                "logits": logits.detach().numpy(), "loss": loss.detach().reshape(1).numpy()}

    arrays, contents = {}, {}
    for name, weight in weights.items():
        gradients = [draw.standard_normal(weight.shape).astype(np.float32) * 10.0 ** draw.uniform(-3, 0, weight.shape[-1])
                     for _ in DECAYS]
        path = t5x_path(name)
        arrays[f"target/{path}"] = to_t5x(name, weight.numpy())
        for slot, value in t5x_slots([to_t5x(name, g) for g in gradients]).items():
            arrays[f"state/param_states/{path}/{slot}"] = value
        contents[name] = weight.to(torch.bfloat16)  # exactly
        contents |= {slot: torch.from_numpy(value) for slot, value in own_slots(name, gradients).items()}
    arrays["state/step"] = np.int32(STEP).reshape(())

    legacy, native = output / "t5x_legacy", output / "t5x_zarr"
    step_folder = native / f"checkpoint_{STEP}"
    for folder in (legacy, native):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (legacy, step_folder):
        folder.mkdir(parents=True)
    write_index(legacy / "checkpoint", arrays)
    described = dict(arrays)
    for path, array in arrays.items():
        parameter = re.sub(r"target/|state/param_states/|/v.*|/m$", "", path)
        # T5X writes what is not partitioned into the index; here also some of what is, to have fewer files.
        if path.endswith("/scale") or array.shape in ((), (1,)) or path[0] == "s" and parameter not in CHUNKS:
            continue
        described[path] = write_zarr(step_folder, path, array, CHUNKS.get(path.removeprefix("target/"), array.shape))
    write_index(step_folder / "checkpoint", described)
    config = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config |= {key: value for key, value in SHAPE.items() if "groups" not in key and key != "z_loss"}
    for folder in (legacy, native):
        save_file(expected, folder / "expected.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_torch_file(contents, native / "contents.safetensors")
    print(f"loss {loss.item():.7f}, {len(weights)} parameters")


def read_checkpoint(folder):
    """{path: array} of all arrays, the unused slots among them, read as T5X reads them."""
    arrays = {}

    def walk(tree, path):
        if "driver" in tree:
            tree["kvstore"]["path"] = str(folder / tree["kvstore"]["path"])
            del tree["metadata"]["chunks"], tree["metadata"]["compressor"]
            arrays[path] = tensorstore.open(tree, open=True).result().read().result()
            return
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{path}/{key}" if path else key)
            else:
                arrays[f"{path}/{key}"] = value

    def array_of(code, data):
        shape, dtype, values = msgpack.unpackb(data, raw=True)
        return np.frombuffer(values, dtype=dtype.decode()).reshape(shape)

    root = msgpack.unpackb((folder / "checkpoint").read_bytes(), ext_hook=array_of)
    assert root["version"] == 3, root["version"]
    walk(root["optimizer"], "")
    return arrays


def check(folder, model):
    arrays = read_checkpoint(folder)
    print(f"step {int(arrays.pop('state/step'))}, {len(arrays)} arrays")
    compared = 0
    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        assert np.array_equal(arrays.pop(f"target/{t5x_path(name)}"), to_t5x(name, value)), name
        compared += 1
    slots = load_file(model / "optimizer.safetensors") if (model / "optimizer.safetensors").exists() else {}
    for name, value in slots.items():
        parameter, slot = re.fullmatch(r"(.*)\.second_moment(.*)", name).groups()
        path = f"state/param_states/{t5x_path(parameter)}"
        if not slot:
            found = arrays.pop(f"{path}/v")
            assert np.array_equal(found, to_t5x(parameter, value)), name
        else:  # v_row is what the mean over the longest axis leaves
            shape = to_t5x(parameter, weights[parameter]).shape
            axis = (1 if slot == "_row" else 0) if parameter != "shared.weight" else (0 if slot == "_row" else 1)
            found = arrays.pop(f"{path}/{'v_col' if axis == int(np.argsort(shape)[-1]) else 'v_row'}")
            assert np.array_equal(found, value), name
        compared += 1
    assert all(value.shape == (1,) and value[0] == 0 for value in arrays.values()), list(arrays)
    print(f"{compared} tensors equal, {len(arrays)} unused slots")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "imports")
    parser.add_argument("--check", nargs=2, type=pathlib.Path, metavar=("CHECKPOINT", "MODEL"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        check(*arguments.check)
    else:
        make_fixtures(arguments.output)


if __name__ == "__main__":
    main()
