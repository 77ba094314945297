"""Makes a model of a given shape with random weights, its tokenizer and chat rows. Runs under the trainer's interpreter.

    python make_checkpoint.py CONFIG OUTDIR --rows 128 --long-rows 8 --tokens 3000 --device cuda --dtype bfloat16

Writes OUTDIR/model (config.json, weights in shards, tokenizer) and OUTDIR/train.jsonl. The tokenizer is the demo's small
one; the vocabulary of the weights stays that of the config, because the loss over it is what sets the peak. Weights are
those of a Qwen2 block. No network.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

SHARD_BYTES = 2 << 30
DEMO = pathlib.Path(__file__).resolve().parents[2] / "crates/mhtraind/src/demo/make_demo.py"
CYCLE = "monday tuesday wednesday thursday friday saturday sunday".split()
# Tokens of the template around a row, its system text among them.
TEMPLATE_TOKENS = 60


def tensors(config):
    """Yields (name, shape) of the weights of a Qwen2 model."""
    hidden, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (width, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, mlp)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def value(name, shape, device, dtype):
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02).cpu()


def write_weights(folder, config, device, dtype):
    torch.manual_seed(4)
    size_of = torch.empty(0, dtype=dtype).element_size()
    shards, size, total = [{}], 0, 0
    places = {}

    def write():
        name = f"model-{len(shards):05}.safetensors"
        save_file(shards[-1], str(folder / name), metadata={"format": "pt"})
        places.update(dict.fromkeys(shards[-1], name))
        shards[-1] = None

    for name, shape in tensors(config):
        bytes_of = size_of * torch.Size(shape).numel()
        if shards[-1] and size + bytes_of > SHARD_BYTES:
            write()
            shards.append({})
            size = 0
        shards[-1][name] = value(name, shape, device, dtype)
        size, total = size + bytes_of, total + bytes_of
    write()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def chat_rows(tokenizer, count, long_rows, tokens, rng):
    """Returns rows with a marker `<id NNNN>` each: `long_rows` of about `tokens` tokens, the others a tenth of that."""
    a_round = len(tokenizer.encode(" ".join(CYCLE) + " ").ids) / len(CYCLE)
    rows = []
    for row in range(count):
        wanted = tokens if row < long_rows else int(tokens * rng.uniform(0.03, 0.15))
        words = max(2, int((wanted - TEMPLATE_TOKENS) / a_round))
        ask, say = f"<id {row:04d}> Go on for {words} words.", " ".join(CYCLE[i % len(CYCLE)] for i in range(words))
        rows.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]})
    rng.shuffle(rows)
    return rows


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="a model of a given shape with random weights, and chat rows")
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("outdir", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--long-rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    wanted = parser.parse_args()
    # Tokenizer, chat template and args.json are the demo's.
    subprocess.run([sys.executable, DEMO, wanted.outdir, "--rows", "320"], check=True)
    folder = wanted.outdir / "model"
    small = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = json.loads(wanted.config.read_text(encoding="utf-8"))
    special = {name: small[name] for name in ("eos_token_id", "pad_token_id")}
    (folder / "model.safetensors").unlink()
    write_json(folder / "config.json", {**config, **special, "torch_dtype": wanted.dtype})
    write_weights(folder, config, wanted.device, getattr(torch, wanted.dtype))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = chat_rows(tokenizer, wanted.rows, wanted.long_rows, wanted.tokens, random.Random(20))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (wanted.outdir / "train.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
