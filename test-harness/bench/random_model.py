"""Random models of every family that the worker computes, as GGUF files of 32-bit floats."""

from dataclasses import dataclass, field

import gguf
import numpy as np

# Standard deviation of the logits. With some 50,000 tokens, the likeliest then has a clear lead at most positions.
LOGITS_STD = 4.0
# Factor of a block's results, so that the blocks outweigh the embedding.
GAIN = 2.0


@dataclass(frozen=True)
class Family:
    """A family: sizes, and the differences between its files and those of `llama`.

    Rows of all matrices are multiples of 256, the longest block of a quantised format.
    """

    architecture: str
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 768
    # The embedding serves as output matrix.
    tied: bool = False
    # Queries, keys and values have biases.
    biases: bool = False
    # Queries and keys are normalised.
    qk_norms: bool = False
    # The results of attention and feed-forward are normalised.
    post_norms: bool = False
    # The embedding is multiplied by the root of the width.
    scaled: bool = False
    # Queries, keys and values are one tensor, and so are gates and up-projections.
    fused: bool = False
    # Tensors with a factor for each frequency of the rotation, each with the largest factor.
    factors: dict = field(default_factory=dict)
    # Further keys of the header, without the architecture's name.
    keys: dict = field(default_factory=dict)


LONGROPE = {"rope_factors_long.weight": 8.0, "rope_factors_short.weight": 1.5}
LONGROPE_KEYS = {"rope.scaling.attn_factor": 1.19}
FAMILIES = {
    "llama": Family("llama"),
    # As in Llama 3: factors of the frequencies in a tensor.
    "llama-factors": Family("llama", factors={"rope_freqs.weight": 8.0}),
    "qwen2": Family("qwen2", biases=True, tied=True),
    "qwen3": Family("qwen3", qk_norms=True, head_dim=128, keys={"rope.freq_base": 1e6}),
    # Seven layers, because the sixth sees all positions; its rotation is stretched as in the larger models.
    "gemma3": Family(
        "gemma3",
        layers=7,
        head_dim=128,
        qk_norms=True,
        post_norms=True,
        scaled=True,
        tied=True,
        keys={
            "attention.sliding_window": 64,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": Family("phi3", fused=True),
    # As in Phi-3.5: contexts longer than the original one have factors of their own.
    "phi3-short": Family("phi3", fused=True, factors=LONGROPE, keys={"rope.scaling.original_context_length": 2048} | LONGROPE_KEYS),
    "phi3-long": Family("phi3", fused=True, factors=LONGROPE, keys={"rope.scaling.original_context_length": 32} | LONGROPE_KEYS),
}


def write(path, name, vocabulary, seed=1):
    """Writes a random model of the family with the tokenizer of the GGUF file `vocabulary`. Returns the number of tokens."""
    family = FAMILIES[name]
    writer = gguf.GGUFWriter(path, family.architecture)
    tokens = copy_tokenizer(writer, vocabulary)
    header(writer, family, tokens)
    for tensor, values in tensors(family, tokens, np.random.default_rng(seed)):
        writer.add_tensor(tensor, values)
    finish(writer)
    return tokens


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_tokenizer(writer, path):
    """Copies the tokenizer of a file, and returns the number of its tokens. A tokenizer may depend on the model's name."""
    reader = gguf.GGUFReader(path)
    for key, entry in reader.fields.items():
        if key.startswith("tokenizer.") or key == "general.name":
            kind = entry.types[0]
            element = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, entry.contents(), kind, sub_type=element)
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def header(writer, family, tokens):
    writer.add_context_length(2048)
    writer.add_embedding_length(family.width)
    writer.add_block_count(family.layers)
    writer.add_feed_forward_length(family.feed_forward)
    writer.add_head_count(family.heads)
    writer.add_head_count_kv(family.kv_heads)
    writer.add_key_length(family.head_dim)
    writer.add_value_length(family.head_dim)
    writer.add_rope_dimension_count(family.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    keys = {"rope.freq_base": 10_000.0} | family.keys
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{family.architecture}.{key}", value)


def tensors(family, tokens, random):
    """Yields name and values of every tensor. Every product's results have a standard deviation of about 1."""

    def normal(*shape, std=1.0, mean=0.0):
        return (random.standard_normal(shape, dtype=np.float32) * std + mean).astype(np.float32)

    def matrix(rows, columns, std=1.0):
        return normal(rows, columns, std=std / columns**0.5)

    width, head_dim = family.width, family.head_dim
    query, kv, inner = family.heads * head_dim, family.kv_heads * head_dim, family.feed_forward
    embedding_std = 1 / width**0.5 if family.scaled else 1.0
    yield "token_embd.weight", normal(tokens, width, std=embedding_std)
    if family.tied:
        logits_std = embedding_std * width**0.5
    else:
        logits_std = 1.0
        yield "output.weight", matrix(tokens, width)
    scale = LOGITS_STD / logits_std
    yield "output_norm.weight", normal(width, std=0.2 * scale, mean=scale)
    for name, largest in family.factors.items():
        yield name, np.linspace(1, largest, head_dim // 2, dtype=np.float32)
    for layer in range(family.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", normal(width, std=0.2, mean=1)
        yield block + "ffn_norm.weight", normal(width, std=0.2, mean=1)
        inputs = {"attn_q": matrix(query, width, 1.2), "attn_k": matrix(kv, width, 1.2), "attn_v": matrix(kv, width)}
        if family.fused:
            inputs = {"attn_qkv": np.concatenate(list(inputs.values()))}
        for name, values in inputs.items():
            yield block + name + ".weight", values
            if family.biases:
                yield block + name + ".bias", normal(len(values), std=0.5)
        yield block + "attn_output.weight", matrix(width, query, GAIN)
        gate, up = matrix(inner, width), matrix(inner, width)
        if family.fused:
            yield block + "ffn_up.weight", np.concatenate([gate, up])
        else:
            yield block + "ffn_gate.weight", gate
            yield block + "ffn_up.weight", up
        yield block + "ffn_down.weight", matrix(width, inner, 2 * GAIN)
        if family.qk_norms:
            yield block + "attn_q_norm.weight", normal(head_dim, std=0.2, mean=1.2)
            yield block + "attn_k_norm.weight", normal(head_dim, std=0.2, mean=1.2)
        if family.post_norms:
            yield block + "post_attention_norm.weight", normal(width, std=0.2, mean=1)
            yield block + "post_ffw_norm.weight", normal(width, std=0.2, mean=GAIN)
