"""What one GPU holds in a training step of a Griffin, in bytes, as formulas; for `plan_memory.py`.

Symbols: B rows, T tokens a row, N = B T tokens; V vocabulary, D hidden size, M MLP width, C RG-LRU channels, H heads,
G key-value heads, K head dimension; e bytes of a number in the matrix products, r bytes of one in the residual stream.
"""

from math import prod
from typing import NamedTuple

from modeling_griffin import GriffinConfig
from modeling_griffin.causal_lm_loss import CHUNK_ELEMENTS
from modeling_griffin.kernels.attention import BLOCK
from modeling_griffin.kernels.linears import NARROW


class Sizes(NamedTuple):
    """The numbers of a configuration that memory depends on. V rows of the embedding are held, `logits` computed."""

    V: int
    logits: int
    D: int
    M: int
    C: int
    H: int
    G: int
    K: int
    blocks: int  # of each gate
    taps: int  # of the convolution
    rotated: int  # dimensions of a head
    window: int  # W, keys that a query sees
    kinds: tuple[str, ...]  # layer_types
    tied: bool
    capped: bool


class Precision(NamedTuple):
    """e and r; whether autocast copies weights and inputs of matrix products to e bytes; whether kernels are fused."""

    e: int
    r: int
    copies: bool
    fused: bool = False


# By the definitions, as on a CPU and on a GPU under tensor parallelism: autocast makes a copy for each product.
FLOAT32 = Precision(4, 4, copies=False)
AUTOCAST = Precision(2, 4, copies=True)
BFLOAT16 = Precision(2, 2, copies=False)
# By the kernels that a model takes on a GPU.
FUSED_AUTOCAST = AUTOCAST._replace(fused=True)  # float32 weights under bfloat16 autocast: one GPU, DDP
FUSED_BFLOAT16 = BFLOAT16._replace(fused=True)  # weights that FSDP2 gathers in bfloat16


def sizes_of(config: GriffinConfig) -> Sizes:
    """The sizes of a GriffinConfig."""
    return Sizes(
        V=config.vocab_size,
        logits=config.vocab_size,
        D=config.hidden_size,
        M=config.intermediate_size,
        C=config.lru_width,
        H=config.num_attention_heads,
        G=config.num_key_value_heads,
        K=config.head_dim,
        blocks=config.num_gate_blocks,
        taps=config.conv1d_width,
        rotated=int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        window=config.attention_window_size,
        kinds=tuple(config.layer_types),
        tied=config.tie_word_embeddings,
        capped=config.final_logit_softcapping is not None,
    )


# Parameters


def layer_tensors(s: Sizes, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's parameters."""
    gate = (s.blocks, s.C // s.blocks, s.C // s.blocks)
    temporal = {
        "linear_attention": {
            **_linear("temporal_block.linear_x", s.D, s.C),
            **_linear("temporal_block.linear_y", s.D, s.C),
            **_linear("temporal_block.linear_out", s.C, s.D),
            "temporal_block.conv_1d.weight": (s.C, 1, s.taps),
            "temporal_block.conv_1d.bias": (s.C,),
            "temporal_block.rg_lru.recurrence_gate.weight": gate,
            "temporal_block.rg_lru.recurrence_gate.bias": gate[:2],
            "temporal_block.rg_lru.input_gate.weight": gate,
            "temporal_block.rg_lru.input_gate.bias": gate[:2],
            "temporal_block.rg_lru.decay.lambda_bias": (s.C,),
        },
        "sliding_attention": {
            "temporal_block.q_proj.weight": (s.H * s.K, s.D),
            "temporal_block.k_proj.weight": (s.G * s.K, s.D),
            "temporal_block.v_proj.weight": (s.G * s.K, s.D),
            **_linear("temporal_block.o_proj", s.H * s.K, s.D),
        },
    }[kind]
    return {
        "temporal_pre_norm.weight": (s.D,),
        **temporal,
        "channel_pre_norm.weight": (s.D,),
        **_linear("mlp_block.gate_proj", s.D, s.M),
        **_linear("mlp_block.up_proj", s.D, s.M),
        **_linear("mlp_block.down_proj", s.M, s.D),
    }


def other_tensors(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters outside the layers."""
    head = {} if s.tied else {"lm_head.weight": (s.V, s.D)}
    return {"model.embed_tokens.weight": (s.V, s.D), "model.final_norm.weight": (s.D,), **head}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def parameters(s: Sizes) -> int:
    """P, tied ones once."""
    groups = [layer_tensors(s, kind) for kind in s.kinds] + [other_tensors(s)]
    return sum(prod(shape) for tensors in groups for shape in tensors.values())


# Activations: what autograd keeps for the backward pass


def kept_by_layer(s: Sizes, kind: str, rows: int, length: int, precision: Precision) -> int:
    """Of a layer, by the definitions: two norms, the inputs of its projections, the temporal block, the MLP, copies.

    norms        N (16 D + 8) + 8 D          float32: input, normalised input and 1 / rms of each; 1 + weight
    inputs       e N D i                     i = 2, one a block; autocast copies one for each projection: 4 or 5
    recurrent    e (8 N C + taps B C) + 4 C  convolution's input and output, two gates, hidden; branch y before and
                                             after its activation; the product. And log a^c
    attention    e N 3 H K + e B S 2 G K + 4 N H + e B A    queries, output twice (once within two windows); keys,
                                             values; log-sum-exp; the mask
    MLP          4 e N M
    copies       e (weights of matrix products and of the convolution), under autocast
    documents    (taps - 1) N                of a recurrent layer, for a convolution that stops where documents start

    S keys and A pairs of a mask a row: `keys_and_pairs`. For rows that hold several documents. One alone does without
    the last line, and without the mask where it is not longer than the window. A single key-value head is not repeated
    for the heads; several are.
    """
    if precision.fused:
        return kept_by_fused_layer(s, kind, rows * length, precision)
    e, tokens = precision.e, rows * length
    kept = tokens * (16 * s.D + 8) + 8 * s.D + 4 * e * tokens * s.M
    if kind == "linear_attention":
        kept += e * (8 * tokens * s.C + s.taps * rows * s.C) + 4 * s.C + (s.taps - 1) * tokens
        projections = 2
    else:
        repeated = s.H if s.G > 1 else s.G
        keys, pairs = keys_and_pairs(s, length)
        like_queries = 2 if length <= 2 * s.window else 3
        kept += e * s.K * (like_queries * tokens * s.H + rows * keys * 2 * repeated)
        kept += 4 * tokens * s.H + e * rows * pairs
        projections = 3
    if precision.copies:
        weights = {name: shape for name, shape in layer_tensors(s, kind).items() if name.endswith(".weight")}
        kept += e * sum(prod(shape) for name, shape in weights.items() if "norm" not in name)
        return kept + e * tokens * s.D * (projections + 2)
    return kept + e * tokens * s.D * 2


def kept_by_fused_layer(s: Sizes, kind: str, tokens: int, precision: Precision) -> int:
    """Of a layer by its kernels on a GPU, which make again what is quickly made.

    norms        2 r N D                what is normalised: the residual stream before and after the temporal block
    inputs       2 e N D                one a block, which its projections share
    recurrent    7 e N C + 4 C          convolution's input and output, two gates, hidden; branch y; the product
    attention    e N K (2 H + 2 G) + 4 N H    queries, output, keys, values; log-sum-exp
    MLP          3 e N M
    copies       e (weights of matrix products), under autocast; else the joined ones of narrow projections alone
    """
    e = precision.e
    kept = 2 * (precision.r + e) * tokens * s.D + 3 * e * tokens * s.M
    if kind == "linear_attention":
        kept += 7 * e * tokens * s.C + 4 * s.C
    else:
        kept += e * tokens * s.K * 2 * (s.H + s.G) + 4 * tokens * s.H
    if precision.copies:
        weights = {name: shape for name, shape in layer_tensors(s, kind).items() if name.endswith(".weight")}
        return kept + e * sum(prod(w) for name, w in weights.items() if "norm" not in name and "conv" not in name)
    return kept + (e * s.D * joined_outputs(s) if kind == "sliding_attention" else 0)


def joined_outputs(s: Sizes) -> int:
    """Of queries, keys and values, the outputs that `fused_linear` makes as one product; 0 for one alone."""
    narrow = [outputs for outputs in (s.H * s.K, s.G * s.K, s.G * s.K) if outputs <= NARROW]
    return sum(narrow) if len(narrow) > 1 else 0


def keys_and_pairs(s: Sizes, length: int) -> tuple[int, int]:
    """Of a row: T, T^2. Beyond two windows `local_attention` takes blocks of W queries, each with the one before."""
    if length <= 2 * s.window:
        return length, length**2
    blocks = [min(s.window, length - start) for start in range(0, length, s.window)]
    pairs = sum(queries * (before + queries) for before, queries in zip([0, *blocks], blocks))
    return 2 * length - blocks[-1], pairs


def kept_outside_layers(s: Sizes, rows: int, length: int, precision: Precision) -> int:
    """Final norm, head and loss; token ids, labels, starts of documents, rotation.

    N (8 D + 4) + 4 D + e N D + e N V, the last one the logits; e N V more for a cap on them; a copy of the head under
    autocast, e V D; 16 N + 4 + N. (8 bytes more for B = 1.) By kernels r N D + 4 N, the loss's log-sum-exps, in place
    of N (8 D + 4) + 4 D; and `visible`.
    """
    e, tokens = precision.e, rows * length
    norm = precision.r * tokens * s.D + 4 * tokens if precision.fused else tokens * (8 * s.D + 4) + 4 * s.D
    kept = norm + e * tokens * s.D + e * tokens * s.logits + 16 * tokens + 4
    kept += e * tokens * s.logits if s.capped else 0
    kept += e * s.V * s.D if precision.copies else 0
    kept += tokens if "linear_attention" in s.kinds else 0
    if "sliding_attention" in s.kinds:
        kept += rotation(s, rows, length, precision) + (visible(tokens) if precision.fused else 0)
    return kept


def visible(tokens: int) -> int:
    """What the attention kernels read in place of a mask, for all layers: 8 N, and 8 for each block of tokens."""
    return 8 * tokens + 8 * -(-tokens // BLOCK)


def rotation(s: Sizes, rows: int, length: int, precision: Precision) -> int:
    """cos and sin, 2 r N R for R rotated dimensions of a head."""
    return 2 * precision.r * rows * length * s.rotated


def kept(s: Sizes, rows: int, length: int, precision: Precision, checkpointing: bool = False) -> int:
    """After the forward pass. With checkpointing, of a layer only its input, r N D; and one mask for all, B T^2.

    Beyond two windows 8 (T + N) in its place, the numbers of tokens and of documents that masks are made from. By
    kernels neither.

    (The rotation is then kept for a Hawk too, whose layers are called with it.)
    """
    outside = kept_outside_layers(s, rows, length, precision)
    if checkpointing:
        shared = rotation(s, rows, length, precision)
        if "sliding_attention" in s.kinds and precision.fused:
            shared = 0
        elif "sliding_attention" in s.kinds:
            shared = rows * length**2 if length <= 2 * s.window else 8 * (length + rows * length)
        return outside + len(s.kinds) * precision.r * rows * length * s.D + shared
    return outside + sum(kept_by_layer(s, kind, rows, length, precision) for kind in s.kinds)


def activations(s: Sizes, rows: int, length: int, precision: Precision, checkpointing: bool = False) -> int:
    """The most there is at a time: what is kept, and the largest of these workspaces on top of it.

    Backward pass of the loss: e N V, the gradient of the logits, and 4 c for the softmax of a chunk of at most
    c = 2^25 logits; 8 c where they are cast to float32 for it; by kernels neither. Where e = 2, the logits that the
    model returns, which accelerate casts to float32: 4 N V. With checkpointing also one layer's activations, made
    again; and, in the loss at the end of the forward pass, 8 c beside the copies of all weights that autocast holds.
    """
    elements = rows * length * s.logits
    chunk = 0 if precision.fused else (8 if precision.e == 2 else 4) * min(elements, CHUNK_ELEMENTS["cuda"])
    workspaces = [precision.e * elements + chunk, 4 * elements]
    if checkpointing:
        workspaces += [kept_by_layer(s, kind, rows, length, precision) for kind in set(s.kinds)]
        if precision.copies:
            shapes = [shape for kind in s.kinds for shape in layer_tensors(s, kind).values() if len(shape) > 1]
            workspaces += [chunk + precision.e * sum(map(prod, shapes))]
    return kept(s, rows, length, precision, checkpointing) + max(workspaces)


def activations_in_pieces(s: Sizes, rows: int, length: int, precision: Precision, piece: int | None) -> int:
    """With checkpointing, of one row or a chunk of it; the loss in pieces, MLPs in pieces of p tokens (None: p = N).

    Kept: the inputs of all layers, r N D each; token ids, labels, starts, rotation, `visible`. At the peak, which is in
    the backward pass of an MLP of the last layer: the layer's own, without its input and without the MLP's 3 e N M;
    gradients r N D of the residual stream and e N D of the MLP's input; and of p tokens 5 e p M: both projections, and
    the gradients of their product and of themselves. In pieces also the sums of the MLP's gradients, in float32 and e.
    """
    e, tokens = precision.e, rows * length
    mlp = min(piece or tokens, tokens)
    stream = precision.r * tokens * s.D
    kept = len(s.kinds) * stream + 17 * tokens + rotation(s, rows, length, precision) + visible(tokens)
    workspace = max(kept_by_fused_layer(s, kind, tokens, precision) for kind in set(s.kinds)) - 3 * e * tokens * s.M
    workspace += e * tokens * s.D + 5 * e * mlp * s.M  # the stream's gradient is as large as the input, kept already
    return kept + workspace + (3 * (4 + e) * s.D * s.M if mlp < tokens else 0)
