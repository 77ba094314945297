"""Makes a tiny Qwen2 model with random weights, its tokenizer, and chat rows that it can learn something from.

    python make_demo.py OUTDIR [--rows 320]

Writes OUTDIR/model (a model directory as ms-swift and transformers take it) and OUTDIR/train.jsonl. A function of its
arguments alone: no network, no clock, no random state of the machine. Needs numpy, tokenizers and safetensors, which
every ms-swift installation has; neither torch nor transformers is imported, so it takes about a second.
"""

import argparse
import json
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen2 cuts text before BPE: transformers/models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX. transformers 5
# uses it whatever tokenizer.json says, transformers 4 uses tokenizer.json: only with this do both give equal tokens.
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ms-swift's own default for the qwen templates. It is part of every row, so the tokenizer learns it too.
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CYCLES = [
    "monday tuesday wednesday thursday friday saturday sunday".split(),
    "january february march april may june july august september october november december".split(),
    "spring summer autumn winter".split(),
    "mercury venus earth mars jupiter saturn uranus neptune".split(),
    "north east south west".split(),
    "red orange yellow green blue indigo violet".split(),
]
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, POSITIONS = 64, 3, 4, 2, 16, 192, 2048


def chat_rows(count):
    """Returns exercises in going round a cycle for 10 to 120 words, each with its own marker `<id NNNN>`.

    Lengths differ on purpose: what a micro-batch needs follows its longest row.
    """
    rng = numpy.random.default_rng(20)
    rows = []
    for row in range(count):
        cycle = CYCLES[int(rng.integers(len(CYCLES)))]
        start, words = int(rng.integers(len(cycle))), int(rng.integers(10, 121))
        ask = f"<id {row:04d}> Start with {cycle[start]} and go on for {words} words."
        say = " ".join(cycle[(start + i) % len(cycle)] for i in range(words))
        rows.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]})
    return rows


def write_tokenizer(folder, texts):
    """Trains a byte-level BPE of at most 512 tokens. Returns the ids of the special tokens and the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=509, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    special = [END_OF_TEXT, TURN_START, TURN_END]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": POSITIONS,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    # transformers 5 builds the tokenizer from these two.
    bpe = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", bpe["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in special}, tokenizer.get_vocab_size()


def write_model(folder, special, vocabulary):
    rng = numpy.random.default_rng(4)

    def normal(*shape):
        return (rng.standard_normal(shape) * 0.02).astype(numpy.float32)

    def ones():
        return numpy.ones(HIDDEN, dtype=numpy.float32)

    tensors = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN), "model.norm.weight": ones()}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = ones()
        tensors[f"{layer}.post_attention_layernorm.weight"] = ones()
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = normal(heads * HEAD_DIM, HIDDEN)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = numpy.zeros(heads * HEAD_DIM, dtype=numpy.float32)
        tensors[f"{layer}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD_DIM)
        tensors[f"{layer}.mlp.gate_proj.weight"] = normal(MLP, HIDDEN)
        tensors[f"{layer}.mlp.up_proj.weight"] = normal(MLP, HIDDEN)
        tensors[f"{layer}.mlp.down_proj.weight"] = normal(HIDDEN, MLP)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})

    tokens = {"eos_token_id": special[TURN_END], "pad_token_id": special[END_OF_TEXT]}
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "torch_dtype": "float32",
            "vocab_size": vocabulary,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": POSITIONS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            **tokens,
        },
    )
    write_json(folder / "generation_config.json", tokens)
    # Several of ms-swift's model types share this architecture. It looks here, as in a directory that it exported
    # itself, before it asks the user for --model_type; 4.x takes a file without swift_version for one of 3.x.
    write_json(folder / "args.json", {"swift_version": "4.6.0", "model_type": "qwen2", "template": "qwen2_5"})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="a tiny random Qwen2 model, its tokenizer and chat rows")
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--rows", type=int, default=320)
    arguments = parser.parse_args()
    if not 1 <= arguments.rows <= 10_000:
        parser.error("--rows: from 1 to 10000, the marker has four digits")
    folder = arguments.outdir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    rows = chat_rows(arguments.rows)
    texts = [message["content"] for row in rows for message in row["messages"]]
    texts += ["system", "user", "assistant", SYSTEM]
    special, vocabulary = write_tokenizer(folder, texts)
    write_model(folder, special, vocabulary)
    with open(arguments.outdir / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


main()
