"""Model families: Hugging Face config.json -> ModelArgs, and Hugging Face tensor names -> ours.

An unknown config field is rejected by name unless it is off: nothing that may change the result is ignored.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor

from layers.moe import MoEConfig
from layers.rope import RopeConfig, RopeScaling
from model import ModelArgs

T = TypeVar("T")

# Fields without effect on the result: bookkeeping, training, generation defaults (the command line has its own).
NEUTRAL = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path _num_labels
    architectures attention_dropout attn_implementation auto_map bos_token_id cache_implementation
    chunk_size_feed_forward do_sample dtype embd_pdrop eos_token_id finetuned finetuning_task gradient_checkpointing
    hidden_dropout id2label initializer_range is_llama_config keys_to_ignore_at_inference label2id max_length
    max_new_tokens max_sequence_length max_window_layers model_max_length model_type num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
    repetition_penalty resid_pdrop return_dict router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    z_loss_weight""".split()
)
# Fields of rope_scaling: each belongs to one kind and, as in transformers, is ignored for the others.
ROPE_FIELDS = frozenset(
    """attention_factor beta_fast beta_slow factor high_freq_factor long_factor low_freq_factor mscale mscale_all_dim
    original_max_position_embeddings short_factor truncate""".split()
)
LLAMA3_NEEDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
QUANTISED = ("quantization_config", "quantization", "compression_config")


# Upper bounds of sizes, 2^24 if not listed: far beyond any model, yet allocated in seconds.
LARGEST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "head_dim": 1 << 16,
    "num_experts": 1 << 10,
    "max_position_embeddings": 1 << 40,
    "original_max_position_embeddings": 1 << 40,
}


def short_repr(value: object) -> str:
    """repr for an error message; Python refuses to print integers of thousands of digits."""
    return f"a {value.bit_length()}-bit integer" if isinstance(value, int) and abs(value) > 1 << 64 else repr(value)


def is_off(value: object) -> bool:
    """Return whether an unknown field has no effect: null, false, 0, 1.0 (a factor) or empty."""
    return not value or (type(value) in (int, float) and value == 1)


WANTED = {bool: "true or false", list: "a list", dict: "an object"}


class TrackedConfig:
    """config.json that tracks which fields were read, so that none that matters is overlooked.

    defaults: the family's own, in transformers, of fields that are missing. unsupported: errors that `only` adds.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.config, self.defaults, self.unread = config, defaults or {}, set(config) - NEUTRAL
        self.unsupported: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field's value; if missing or null, the family's default, else this."""
        self.unread.discard(name)
        found = (values.get(name) for values in (self.config, self.defaults))
        return next((value for value in found if value is not None), default)

    def own(self, name: str) -> Any:
        """Return the value, null included; if it is missing, the family's default."""
        self.unread.discard(name)
        return self.config.get(name, self.defaults.get(name))

    def integer(self, name: str, default: int | None = None) -> int:
        value, most = self.get(name, default), LARGEST.get(name, 1 << 24)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}: expected a positive integer")
        if value > most:
            raise ValueError(f"{name} is {short_repr(value)}: expected at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The field's value, which must be above 0; the default if it is missing or null."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value <= 1e15:
            raise ValueError(f"{name} is {short_repr(value)}: expected a number above 0, at most 1e15")
        return value

    def optional(self, name: str) -> float | None:
        """The field's number; None if it is null, or missing without a default of the family."""
        return None if self.own(name) is None else self.number(name)

    def typed(self, name: str, default: T) -> T:
        """The field's value, which must be of the default's type, a key of WANTED."""
        value = self.get(name, default)
        if not isinstance(value, type(default)):
            raise ValueError(f"{name} is {value!r}: expected {WANTED[type(default)]}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """The field's object; an empty one if it is missing or null."""
        return self.typed(name, {})

    def only(self, name: str, *values: Any) -> None:
        """Add an error if the field is present with none of the values."""
        if self.get(name, values[0]) not in values:
            choice = " or ".join(map(repr, values))
            self.unsupported.append(f"{name} {self.config[name]!r} is not supported, only {choice}")


def check_read(*parts: TrackedConfig) -> None:
    """Raise ValueError naming every field of config.json, or of an object in it, that is unsupported, or that is
    neither read nor off."""
    for name in QUANTISED:
        if parts[0].config.get(name):
            raise ValueError(
                f"{name}: weights quantised by other tools are not supported: use the original model, and quantise "
                "it with quantize.py"
            )
    problems = [problem for part in parts for problem in part.unsupported]
    unread = [(name, part.config[name]) for part in parts for name in sorted(part.unread)]
    if unknown := ", ".join(f"{name} {short_repr(value)}" for name, value in unread if not is_off(value)):
        problems.append(f"{unknown} is unknown and may change the result: if it does not, remove it from config.json")
    if problems:
        raise ValueError("; ".join(problems))


def windows(
    fields: TrackedConfig, layers: int, is_windowed: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """Sliding window of each layer; layer_types, if given, overrides the family's own rule."""
    size = fields.own("sliding_window")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"sliding_window is {size!r}: expected a positive integer")
    usual = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(layers)]
    kinds = fields.typed("layer_types", usual)
    if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}: expected full_attention or sliding_attention for each layer")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def score_scale(fields: TrackedConfig, wanted: float) -> RopeConfig:
    """Make the score scale `wanted` instead of D^-0.5, by scaling queries and keys by the same factor."""
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    return RopeConfig(scale=(wanted * head_dim**0.5) ** 0.5)


def llama(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    attention = fields.typed("attention_bias", False)
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": fields.typed("mlp_bias", False)}


def smollm3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    interval = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.typed("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(layers)])
    if len(rotates) < layers or any(each not in (0, 1) for each in rotates):
        raise ValueError(f"no_rope_layers is {rotates!r}: expected 0 or 1 for each layer")
    seen: tuple[int | None, ...] = ()
    if fields.typed("use_sliding_window", False):
        seen = windows(fields, layers, lambda layer: not rotates[layer])
    fields.unread -= {"sliding_window", "layer_types"}
    kinds = tuple("global" if rotates[layer] else "none" for layer in range(layers))
    return llama(fields, layers) | {"rope": RopeConfig(layers=kinds), "windows": seen}


def granite(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    """Granite multiplies what layers add to the residual stream. Here the stream is kept divided by that multiplier
    instead, which the norms cancel, except for their epsilon."""
    residual = fields.number("residual_multiplier", 1.0)
    return llama(fields, layers) | {
        "embedding_scale": fields.number("embedding_multiplier", 1.0) / residual,
        "norm_eps": fields.number("rms_norm_eps", 1e-6) / residual**2,
        "logit_scale": 1 / fields.number("logits_scaling", 1.0),
        "rope": score_scale(fields, fields.number("attention_multiplier", 1.0)),
    }


def phi3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    rope = fields.table("rope_scaling") or fields.table("rope_parameters")
    share = rope.get("partial_rotary_factor") or fields.optional("partial_rotary_factor") or 1.0
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor is {share!r}: expected a number above 0, at most 1")
    return {"windows": windows(fields, layers), "rope": RopeConfig(share=share)}


def mistral(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return {"windows": windows(fields, layers)}


def qwen(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    if not fields.typed("use_sliding_window", False):
        fields.unread -= {"sliding_window", "layer_types"}
        return {}
    first = fields.own("max_window_layers")
    if type(first) is not int:
        raise ValueError(f"max_window_layers is {first!r}: expected an integer")
    return {"windows": windows(fields, layers, lambda layer: layer >= first)}


def gemma(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return {"activation": "gelu_tanh", "embedding_scale": fields.integer("hidden_size") ** 0.5, "norm_offset": 1.0}


def gemma2(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    seen = windows(fields, layers, lambda layer: layer % 2 == 0)
    fields.only("sliding_window_size", fields.own("sliding_window"))  # the 9B configs have both
    return gemma(fields, layers) | {
        "windows": seen,
        "score_softcap": fields.optional("attn_logit_softcapping"),
        "logit_softcap": fields.optional("final_logit_softcapping"),
        "rope": score_scale(fields, fields.number("query_pre_attn_scalar", 256) ** -0.5),
    }


def gemma3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    """Sliding-window layers use a local theta, without scaling."""
    pattern = fields.integer("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    seen = windows(fields, layers, lambda layer: (layer + 1) % pattern != 0)
    ropes, local = TrackedConfig(fields.table("rope_parameters")), TrackedConfig({})
    if {"full_attention", "sliding_attention"} & ropes.config.keys():
        local, ropes = (TrackedConfig(ropes.table(f"{kind}_attention")) for kind in ("sliding", "full"))
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters {local.config} of sliding_attention: only rope_theta is supported")
    local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 10000.0))
    kinds = tuple("global" if window is None else "local" for window in seen)
    rope = score_scale(fields, fields.number("query_pre_attn_scalar", 256) ** -0.5)
    return gemma(fields, layers) | {
        "windows": seen,
        "logit_softcap": fields.optional("final_logit_softcapping"),
        "rope": replace(rope, layers=kinds, local_theta=local_theta),
        "rope_parameters": {**ropes.config, **fields.table("rope_scaling")},
        "context_limit": fields.integer("max_position_embeddings"),  # the scaled length
    }


def mixture(
    fields: TrackedConfig, layers: int, width: str, renormalised: bool, dense: tuple[int, ...] = ()
) -> MoEConfig:
    """Read the MoE config. width: the field with an expert's hidden size. Two fields may give the expert count."""
    experts = fields.integer("num_experts", fields.get("num_local_experts"))
    used, size = fields.integer("num_experts_per_tok"), fields.integer(width)
    shared = fields.get("shared_expert_intermediate_size", 0) and fields.integer("shared_expert_intermediate_size")
    if layers * experts > 1 << 17:
        raise ValueError(
            f"num_experts is {experts} in {layers} layers: expected at most {1 << 17} in all layers together"
        )
    return MoEConfig(experts, used, size, renormalised, shared, dense)


def mixtral(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return {"windows": windows(fields, layers), "mixture": mixture(fields, layers, "intermediate_size", True)}


def qwen_moe(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.unread -= {"sliding_window", "layer_types"}
    step, plain = fields.integer("decoder_sparse_step", 1), fields.typed("mlp_only_layers", list[int]())
    dense = tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % step)
    renormalised = fields.typed("norm_topk_prob", False)
    return {"mixture": mixture(fields, layers, "moe_intermediate_size", renormalised, dense)}


def qwen2_moe(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return qwen_moe(fields, layers) | {"qkv_bias": fields.typed("qkv_bias", True)}


def olmoe(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return {"mixture": mixture(fields, layers, "intermediate_size", fields.typed("norm_topk_prob", False))}


def baichuan(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    # The 7B models use RoPE and have max_position_embeddings; the 13B models use ALiBi.
    return {"alibi": "max_position_embeddings" not in fields.config}


class Family(NamedTuple):
    """read: (config, number of layers) -> the fields of ModelArgs that this family reads from its own fields. args:
    those that are the same for all of its models. defaults: of fields that config.json leaves out. only: the values of
    a field that are supported."""

    read: Callable[[TrackedConfig, int], dict[str, Any]]
    args: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    only: dict[str, tuple] = {}


QK_NORM_WHOLE = {"qk_norm": True, "qk_norm_whole": True}
QWEN = {"sliding_window": 4096, "max_window_layers": 28}
GEMMA2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
EPS, TIED, WINDOW = {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": True}, {"sliding_window": 4096}
NO_BIAS, NO_WINDOW = {"attention_bias": (False,)}, {"use_sliding_window": (False,)}
# "gelu" in a Gemma config means the tanh approximation: the models were trained with it.
GELU = dict.fromkeys(("hidden_activation", "hidden_act"), ("gelu_pytorch_tanh", "gelu"))
GEMMA = NO_BIAS | GELU | {"use_bidirectional_attention": (False,)}

FAMILIES = {
    "LlamaForCausalLM": Family(llama),
    "MistralForCausalLM": Family(mistral, {}, WINDOW),
    "Qwen2ForCausalLM": Family(qwen, {"qkv_bias": True}, QWEN, NO_BIAS),
    "Qwen3ForCausalLM": Family(qwen, {"qk_norm": True}, QWEN, NO_BIAS),
    "GemmaForCausalLM": Family(gemma, {}, TIED, GEMMA),
    "Gemma2ForCausalLM": Family(gemma2, {"post_norms": True}, TIED | WINDOW | GEMMA2, GEMMA),
    "Gemma3ForCausalLM": Family(
        gemma3,
        {"post_norms": True, "qk_norm": True},
        TIED | WINDOW | {"rope_theta": 1e6},
        GEMMA | {"attn_logit_softcapping": (None,)},
    ),
    "Olmo2ForCausalLM": Family(llama, QK_NORM_WHOLE | {"pre_norms": False, "post_norms": True}, EPS),
    "SmolLM3ForCausalLM": Family(smollm3, {}, TIED | {"rope_theta": 2e6}),
    "GraniteForCausalLM": Family(granite),
    "Phi3ForCausalLM": Family(phi3, {}, EPS, NO_BIAS),
    # Mixtral's softmax is over the chosen experts.
    "MixtralForCausalLM": Family(mixtral, {}, EPS | {"rope_theta": 1e6}, {"norm_topk_prob": (True,)}),
    "Qwen2MoeForCausalLM": Family(qwen2_moe, only=NO_BIAS | NO_WINDOW),
    "Qwen3MoeForCausalLM": Family(qwen_moe, {"qk_norm": True}, only=NO_BIAS | NO_WINDOW),
    "OlmoeForCausalLM": Family(olmoe, QK_NORM_WHOLE, EPS, NO_BIAS | {"clip_qkv": (None,)}),
    "BaichuanForCausalLM": Family(baichuan),
    "BaiChuanForCausalLM": Family(baichuan),
}


def args_from_config(config: Mapping[str, Any]) -> ModelArgs:
    """Build ModelArgs from a Hugging Face config. Raises ValueError naming what is missing or not supported."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    fields = TrackedConfig(config, family.defaults)
    layers, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    special = {**family.args, **family.read(fields, layers)}
    for name, values in ({"hidden_act": ("silu", "swish")} | family.only).items():
        fields.only(name, *values)
    if "layer_types" in fields.unread and {*fields.typed("layer_types", [])} - {"full_attention"}:
        fields.unsupported.append(f"layer_types other than full_attention are not supported for {architecture}")
    trained = fields.integer("max_position_embeddings", config.get("model_max_length"))
    # rope_scaling is the older name of rope_parameters; like transformers, use the first present, without merging.
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    scaling_fields = TrackedConfig(special.pop("rope_parameters", old or new))
    theta, scaling = rope(fields, scaling_fields, trained, special.get("rope", RopeConfig()).share)
    longest = trained
    if scaling is not None and scaling.kind != "llama3":  # its configs give the scaled length
        longest = max(trained, int(scaling.original_context * scaling.factor))
    seen = tuple(size if size is not None and size < longest else None for size in special.pop("windows", ()))
    longest = special.pop("context_limit", longest)
    args = ModelArgs(
        dim=fields.integer("hidden_size"),
        n_layer=layers,
        n_head=heads,
        n_kv_head=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", fields.integer("hidden_size") // heads),
        hidden_dim=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        context_limit=longest,
        max_positions=trained if trained < longest else None,
        tied_output=fields.typed("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=seen if any(seen) else (),
        **{"norm_eps": float(fields.number("rms_norm_eps", 1e-6))} | special,
    )
    check_read(fields, scaling_fields)
    for each in (scaling.short, scaling.long) if scaling is not None and scaling.kind == "longrope" else ():
        if len(each) != (pairs := args.rope.size(args.head_dim) // 2):
            raise ValueError(
                f"rope scaling has {len(each)} factors: expected one for each of the {pairs} pairs of a head"
            )
    return args


def rope(fields: TrackedConfig, rope: TrackedConfig, trained: int, share: float) -> tuple[float, RopeScaling | None]:
    """Parse rope_scaling or rope_parameters -> (theta, scaling). trained: max_position_embeddings. share: rotated
    fraction of a head."""
    theta = float(rope.number("rope_theta", fields.number("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields.only("rope_type", "default", kind)
    for each in (fields, rope):
        each.only("partial_rotary_factor", 1.0, share)
    rope.unread -= ROPE_FIELDS
    # The config's top-level field overrides that of rope_scaling.
    name = "original_max_position_embeddings"
    original = next(iter([each.integer(name) for each in (fields, rope) if each.get(name) is not None]), None)
    if kind == "default":
        rope.only("factor", 1.0)
        return theta, None
    if kind in ("longrope", "su"):  # su: its former name
        return theta, longrope(rope, original or trained, trained)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        kinds = "default, linear, dynamic, llama3, yarn and longrope"
        raise ValueError(f"rope type {kind!r} is not supported, only {kinds}")
    needed = ["factor", *LLAMA3_NEEDS] if kind == "llama3" else ["factor"]
    if missing := [name for name in needed if rope.get(name) is None and fields.get(name) is None]:
        raise ValueError(f"rope scaling of type {kind} needs {', '.join(missing)}")
    factor = rope.number("factor")
    if kind == "linear":  # max_position_embeddings is the scaled length, as in transformers
        return theta, RopeScaling(kind, factor, original or int(trained / factor))
    if kind == "dynamic":
        return theta, RopeScaling(kind, factor, trained)
    if kind == "llama3":
        rotations = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return theta, RopeScaling(kind, factor, original or trained, *rotations)
    rope.only("truncate", True)
    rotations = rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0)
    return theta, RopeScaling(kind, factor, original or trained, *rotations, yarn_attention_factor(rope, factor))


def longrope(rope: TrackedConfig, original: int, trained: int) -> RopeScaling:
    """Build LongRoPE scaling. Raises ValueError if a list of factors is missing or invalid."""
    factor = rope.number("factor", trained / original)
    long, short = rope.get("long_factor"), rope.get("short_factor")
    for name, each in (("long_factor", long), ("short_factor", short)):
        if not isinstance(each, list) or not all(type(number) in (int, float) and number > 0 for number in each):
            raise ValueError(f"{name} is {each!r}: expected a list of numbers above 0")
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    scale = rope.number("attention_factor", grown)
    return RopeScaling("longrope", factor, original, attention_factor=scale, short=tuple(short), long=tuple(long))


def yarn_attention_factor(rope: TrackedConfig, factor: float) -> float:
    """YaRN's temperature as a factor of queries and keys alike; Peng et al. 2023 (arXiv 2309.00071), section 3.4."""

    def warmth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, scale, all_dim = (rope.optional(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return given
    return warmth(scale) / warmth(all_dim) if scale and all_dim else warmth(1.0)


HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.shared_expert.gate_proj": "feed_forward.shared.w1",
    "mlp.shared_expert.up_proj": "feed_forward.shared.w3",
    "mlp.shared_expert.down_proj": "feed_forward.shared.w2",
    "mlp.shared_expert_gate": "feed_forward.shared_gate",
    "mlp.gate": "feed_forward.router",
    "block_sparse_moe.gate": "feed_forward.router",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# In Gemma 2 and 3, and OLMo 2, post_attention_layernorm is another norm: the one after attention.
HF_NAMES_POST_NORMS = HF_NAMES | {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}
POST_NORMS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM")
# Names of one expert's matrices. Stacked for all experts, gate_up_proj is w1 above w3.
HF_EXPERT = {"w1": "w1", "w3": "w3", "w2": "w2", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
HF_TOP = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
# Prefixes of names, by what wrapped the saved network: DataParallel, PEFT, a vision-language model, or the class with
# the LM head. torch.compile inserts "_orig_mod." anywhere.
WRAPPED = re.compile(r"(?:module\.|base_model\.|language_model\.|model\.)*")
# Buffers that the network computes itself, and scales of fp8 keys and values, which are not used here.
BUFFER = re.compile(
    r"(?:.+\.)?(?:rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|masked_bias|self_attn\.bias|[kv]_scale)"
)


# Projections stored as one tensor, by the architecture: Hugging Face's name and the parts, one below the other.
QKV = ("attention.wq", "attention.wk", "attention.wv")
FUSED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "Phi3ForCausalLM": {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("feed_forward.w1", "feed_forward.w3")},
    "BaichuanForCausalLM": {"self_attn.W_pack": QKV},
    "BaiChuanForCausalLM": {"self_attn.W_pack": QKV},
}
FUSED = {name: parts for fused in FUSED_BY.values() for name, parts in fused.items()}


def our_tensors(name: str, tensor: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Map a Hugging Face tensor to our names: one entry per fused part, or none if the network computes the tensor
    itself. An unknown name is kept."""
    architecture = config["architectures"][0]
    names = HF_NAMES_POST_NORMS if architecture in POST_NORMS else HF_NAMES
    inner = WRAPPED.sub("", name.replace("_orig_mod.", ""), count=1)
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", inner)
    if BUFFER.fullmatch(inner):
        return {}
    if architecture.startswith("Olmo") and re.search(r"self_attn\.[qk]_norm", inner):  # one norm over all heads
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        tensor = tensor.unflatten(0, (-1, head_dim))  # [H,D]
    if layer and layer[2] in FUSED:
        parts = zip(FUSED[layer[2]], split_fused(layer[2], tensor, config), strict=True)
        return {f"layers.{layer[1]}.{part}.{layer[3]}": piece for part, piece in parts}
    if expert := re.fullmatch(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(.+)", inner):
        return expert_tensors(f"layers.{expert[1]}.feed_forward", expert[2], tensor)
    if layer and layer[2] in names:
        return {f"layers.{layer[1]}.{names[layer[2]]}.{layer[3]}": tensor}
    # Baichuan 2 normalises the rows of its output; only the vocabulary size distinguishes it from Baichuan 1.
    if inner == "lm_head.weight" and architecture == "BaichuanForCausalLM" and config["vocab_size"] == 125696:
        tensor = F.normalize(tensor.float()).to(tensor.dtype)
    return {HF_TOP.get(inner, name): tensor}


def their_name(ours: str, config: Mapping[str, Any]) -> str:
    """Hugging Face's name for our tensor, or for the fused tensor that contains it; for error messages."""
    top = {name: theirs if theirs.startswith("lm_head") else f"model.{theirs}" for theirs, name in HF_TOP.items()}
    layer = re.fullmatch(r"layers\.(\d+)\.(.+?)(?:\.(\d+))?\.(weight|bias)", ours)
    if layer is None:
        return top.get(ours, ours)
    number, module, expert, kind = layer.groups()
    architecture, matrix = config["architectures"][0], module.rpartition(".")[2]
    mixtral = architecture == "MixtralForCausalLM"
    names = {name: theirs for theirs, name in HF_NAMES.items() if mixtral or not theirs.startswith("block_sparse_moe")}
    names |= {name: theirs for theirs, name in HF_NAMES_POST_NORMS.items() if architecture in POST_NORMS}
    names |= {part: fused for fused, parts in FUSED_BY.get(architecture, {}).items() for part in parts}
    if expert is not None:
        theirs = {name: each for each, name in HF_EXPERT.items()}[matrix]
        names[module] = f"block_sparse_moe.experts.{expert}.{matrix}" if mixtral else f"mlp.experts.{expert}.{theirs}"
    return f"model.layers.{number}.{names.get(module, module)}.{kind}"


def split_fused(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Sequence[Tensor]:
    """Split a fused tensor into views of its parts. A wrong size is detected later, in the shapes of the parts."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    sizes = dict(zip(QKV, (heads, groups, groups), strict=True))
    *ends, total = accumulate(sizes.get(part, 1) for part in FUSED[name])
    return tensor.tensor_split([len(tensor) * end // total for end in ends])


def expert_tensors(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Map one expert's matrix ("3.w1.weight") or all experts' ("gate_up_proj" [E,2 width,dim], "down_proj") to our
    names, as views. An unknown name is kept."""
    one = re.fullmatch(r"(\d+)\.(\w+)\.weight", name)
    if one and one[2] in HF_EXPERT:
        return {f"{prefix}.{HF_EXPERT[one[2]]}.{one[1]}.weight": tensor}
    matrices = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(name, ())
    found = {
        f"{prefix}.{matrix}.{number}.weight": part
        for number, whole in enumerate(tensor)
        for matrix, part in zip(matrices, whole.chunk(max(1, len(matrices))), strict=True)
    }
    return found or {f"{prefix}.experts.{name}": tensor}


def is_tinyllamas(found: object) -> bool:
    """Return whether an unpickled file has karpathy/tinyllamas' layout."""
    return isinstance(found, dict) and {"model_args", "model"} <= found.keys()


def tinyllamas_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Build the config.json of a karpathy/tinyllamas file. Raises ValueError if it is not such a file after all."""
    try:
        args, state = found["model_args"], found["model"]
        hidden = next(t for name, t in state.items() if name.endswith("layers.0.feed_forward.w1.weight")).shape[0]
        ends = {t.data_ptr() for name, t in state.items() if name.endswith(("embeddings.weight", "output.weight"))}
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": args["dim"],
            "num_hidden_layers": args["n_layers"],
            "num_attention_heads": args["n_heads"],
            "num_key_value_heads": args.get("n_kv_heads") or args["n_heads"],
            "intermediate_size": hidden,
            "vocab_size": args["vocab_size"],
            "max_position_embeddings": args["max_seq_len"],
            "rms_norm_eps": args.get("norm_eps", 1e-5),
            "tie_word_embeddings": len(ends) == 1,
        }
    except (KeyError, StopIteration, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"it has model_args, but is not a karpathy/tinyllamas checkpoint: {error!r}") from error


def from_tinyllamas(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Convert their tensors, which have our names: permute wq and wk from RoPE on adjacent pairs to RoPE on halves."""
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    for name, tensor in ours.items():
        if name.endswith((".wq.weight", ".wk.weight")):
            pairs = tensor.reshape(-1, head_dim // 2, 2, tensor.shape[-1])  # [H,D/2,2,dim]
            ours[name] = pairs.transpose(1, 2).reshape(tensor.shape)
    return {name: tensor for name, tensor in ours.items() if not name.startswith("freqs_")}
