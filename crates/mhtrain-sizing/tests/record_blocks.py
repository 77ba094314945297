#!/usr/bin/env python3
"""Records what one training step takes and gives back, as symbols: the source of the lists in `src/block.rs`.

The harness of the memory study (`measure.py`: the real transformers model and the real peft adapters on fake tensors) runs
one step of a tiny model whose dimensions are different primes. Blocks of the allocator are set to one byte, so each size
can be taken apart into primes, and thereby into dimensions. Each line is one event: phase, + or - and the number of the
tensor, its size in symbols, the operation, the autograd node or the module that made it.

    python record_blocks.py path/to/measure.py qwen3 lora gc=1 attn=flash_attn heads=gqa

Options: gc, attn (flash_attn, sdpa, eager), padded, accum, targets, heads (gqa, mha, mqa), layers, tied, batch, kept.
Symbols: B rows, S length, H hidden, D head width, G key heads, n query heads per key head, I width of the MLP, M of an
expert, w of the shared expert, E experts, r rank, V vocabulary, Sr and Dr what FlashAttention rounds up to, q64 blocks of a
4-bit weight; F width of a head that does not slide, P and W columns and rows of a layer's inputs (Gemma 4; it and LFM2 take
layers=4); N key heads of a gated delta rule, half as many as of the value, and Y and Z widths of either (Qwen3.5, Qwen3-Next: their
rows of 101 are two chunks). DeepSeek and GLM-4.7-Flash want heads=mha: N and Y are the ranks, Z half of the rotated part. Needs what
the harness needs (torch, transformers 5, peft, accelerate).
"""
import importlib.util, os, sys

import torch

PRIMES = {3: "B", 101: "S", 17: "H", 7: "(D/4)", 5: "G", 11: "n", 31: "I", 19: "r", 23: "V", 61: "E", 67: "M", 13: "(n+2)",
          37: "Sr", 41: "Dr", 43: "S32", 53: "q64", 71: "w", 73: "(F/4)", 79: "P", 83: "W", 47: "N", 59: "Y",
          89: "Z"}
LENGTH, HEAD_WIDTH, RANK = 101, 28, 19
DELTA = dict(linear_num_key_heads=47, linear_num_value_heads=94, linear_key_head_dim=59, linear_value_head_dim=89,
             layer_types=["linear_attention", "full_attention"],
             rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
LATENT = dict(head_dim=178, q_lora_rank=376, kv_lora_rank=472, qk_rope_head_dim=178, qk_nope_head_dim=82, v_head_dim=260,
              n_routed_experts=61, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=536)
KINDS = {
    "phi3": dict(bos_token_id=0, eos_token_id=0),
    "qwen3_5_text": DELTA,
    "qwen3_next": dict(num_experts=61, num_experts_per_tok=2, moe_intermediate_size=536, shared_expert_intermediate_size=568, **DELTA),
    "deepseek_v2": LATENT,
    "deepseek_v3": dict(n_group=1, topk_group=1, **LATENT),
    "glm4_moe_lite": LATENT,
    "afmoe": dict(num_experts=61, num_experts_per_tok=2, moe_intermediate_size=536, num_shared_experts=1, num_dense_layers=0),
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(query_pre_attn_scalar=16),
    "gemma4_text": dict(global_head_dim=292, hidden_size_per_layer_input=79, vocab_size_per_layer_input=83, sliding_window=4000,
                        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2),
    "lfm2": dict(block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2),
    "glm": dict(attention_bias=True),
    "glm4": dict(attention_bias=True),
    "qwen3_moe": dict(num_experts=61, num_experts_per_tok=2, moe_intermediate_size=536, norm_topk_prob=True),
    "qwen2_moe": dict(num_experts=61, num_experts_per_tok=2, moe_intermediate_size=536, shared_expert_intermediate_size=568),
    "mixtral": dict(num_local_experts=61, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=61, num_experts_per_tok=2),
    "phimoe": dict(num_local_experts=61, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True),
}
HEADS = {"gqa": (5, 11), "mha": (5, 1), "mqa": (1, 11)}


def load(path):
    """The harness, with one-byte blocks and with roundings that can be recognised."""
    spec = importlib.util.spec_from_file_location("measure", path)
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    harness.BLOCK = 1

    def up(n, multiple):
        if multiple == 1:
            return n
        if multiple == 128:
            return 37
        if multiple in (32, 64) and n == HEAD_WIDTH:
            return 41
        if multiple == 32 and n == LENGTH:
            return 43
        if multiple == 64:
            return 64 * 53 * n
        return (n + multiple - 1) // multiple * multiple
    harness._up = up
    return harness


def symbols(size, heads):
    """Takes a size apart. H is a multiple of all heads, because some configurations insist."""
    parts = []
    for prime, symbol in PRIMES.items():
        while size and size % prime == 0:
            size //= prime
            parts.append(symbol)
            if symbol == "H" and size % heads == 0:
                size //= heads
    return ".".join([f"{size}"] + parts)


def recorder(harness, heads, log, modules):
    class Recorder(harness.LiveBytes):
        number, numbers, operation = 0, {}, ""

        def note(self, sign, key, size):
            node = torch._C._current_autograd_node()
            where = node.name() if node else (modules[-1] if modules else "")
            log.append((self.phase[:3], sign, self.numbers.get(key, 0), symbols(size, heads), self.operation, where))

        def add(self, tensor):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in self.live:
                return
            before, key = self.cur, tensor.untyped_storage()._cdata
            super().add(tensor)
            if self.phase != "build":
                self.number += 1
                self.numbers[key] = self.number
                self.note("+", key, self.cur - before)

        def drop(self, key):
            before = self.cur
            super().drop(key)
            if self.phase != "build":
                self.note("-", key, before - self.cur)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operation = func._overloadpacket.__name__
            return super().__torch_dispatch__(func, types, args, kwargs)
    return Recorder


def main():
    path, kind, method, *rest = sys.argv[1:]
    options = dict(text.split("=") for text in rest)
    key_heads, per_key = HEADS[options.get("heads", "gqa")]
    heads = key_heads * per_key
    # Grouped products want rows of 16 bytes, so mixtures get dimensions that are multiples of 8.
    eight = 8 if "moe" in kind or kind in ("mixtral", "gpt_oss", "phimoe", "qwen3_next", "deepseek_v2",
                                                     "deepseek_v3", "glm4_moe_lite") else 1
    config = dict(model_type=kind, hidden_size=17 * heads * eight, num_hidden_layers=int(options.get("layers", 2)),
                  num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=HEAD_WIDTH, intermediate_size=31 * eight,
                  vocab_size=23, max_position_embeddings=4096, pad_token_id=0,
                  tie_word_embeddings=options.get("tied") == "1")
    config.update(KINDS.get(kind, {}))
    harness, log, modules, names = load(path), [], [], {}
    harness.LiveBytes = recorder(harness, heads, log, modules)
    call = torch.nn.Module.__call__

    def traced(module, *args, **kwargs):
        if id(module) not in names:
            names.update({id(part): name for name, part in module.named_modules()})
        modules.append(names.get(id(module), "?"))
        try:
            return call(module, *args, **kwargs)
        finally:
            modules.pop()
    torch.nn.Module.__call__ = traced
    harness._install()
    harness.measure(config, int(options.get("batch", 3)), LENGTH, method, rank=RANK, targets=options.get("targets", "all-linear"),
                    gc=options.get("gc", "1") == "1", attn=options.get("attn", "flash_attn"),
                    padded=options.get("padded") == "1", grad_accum=options.get("accum") == "1",
                    kept=float(options.get("kept", 1.0)))
    try:
        for phase, sign, number, size, operation, where in log:
            print(f"{phase} {sign}{number:<5} {size:<28} {operation:<28} {where}")
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
