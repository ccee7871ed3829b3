"""Model families: Hugging Face config.json -> ModelArgs, and Hugging Face tensor names -> ours.

An unknown config field is rejected by name unless it is off: nothing that may change the result is ignored.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from layers.moe import MoEConfig
from layers.rope import RopeConfig, RopeScaling
from model import ModelArgs

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
    """Whether an unknown field has no effect: null, false, 0, 1.0 (a factor) or empty."""
    return not value or (type(value) in (int, float) and value == 1)


class TrackedConfig:
    """config.json that tracks which fields were read, so that none that matters is overlooked.

    unsupported: errors that `only` adds and `done` raises together. parts: nested objects, which `done` checks too.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.unread = config, set(config) - NEUTRAL
        self.unsupported: list[str] = []
        self.parts: list[TrackedConfig] = []

    def part(self, config: Mapping[str, Any]) -> "TrackedConfig":
        """Track the fields of a nested object."""
        self.parts.append(TrackedConfig(config))
        return self.parts[-1]

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default if it is missing or null."""
        self.unread.discard(name)
        value = self.config.get(name)
        return default if value is None else value

    def own(self, name: str, default: Any) -> Any:
        """The field's value, null included; if it is missing, the family's default in transformers."""
        self.unread.discard(name)
        return self.config.get(name, default)

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
        return None if self.get(name) is None else self.number(name)

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def switch(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise ValueError(f"{name} is {value!r}: expected true or false")
        return value

    def listed(self, name: str, default: list) -> list:
        value = self.get(name, default)
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}: expected a list")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """The field's object; an empty one if it is missing or null."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}: expected an object")
        return value

    def only(self, name: str, *values: Any) -> None:
        """Add an error for `done` if the field is present with none of the values."""
        if self.get(name, values[0]) not in values:
            choice = " or ".join(map(repr, values))
            self.unsupported.append(f"{name} {self.config[name]!r} is not supported, only {choice}")

    def done(self) -> None:
        """Raises ValueError naming every field that is unsupported, or that is neither read nor off."""
        for name in QUANTISED:
            if self.config.get(name):
                raise ValueError(
                    f"{name}: weights quantised by other tools are not supported: use the original model, and quantise "
                    "it with quantize.py"
                )
        every = (self, *self.parts)
        found = [(name, each.config[name]) for each in every for name in sorted(each.unread)]
        unknown = ", ".join(f"{name} {short_repr(value)}" for name, value in found if not is_off(value))
        problems = [problem for each in every for problem in each.unsupported]
        if unknown:
            problems.append(
                f"{unknown} is unknown and may change the result: if it does not, remove it from config.json"
            )
        if problems:
            raise ValueError("; ".join(problems))


def windows(
    fields: TrackedConfig, layers: int, default: int | None, is_windowed: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Sliding window of each layer; layer_types, if given, overrides the family's own rule."""
    size = fields.own("sliding_window", default)
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"sliding_window is {size!r}: expected a positive integer")
    usual = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(layers)]
    kinds = fields.listed("layer_types", usual)
    if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}: expected full_attention or sliding_attention for each layer")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def biases(fields: TrackedConfig) -> dict[str, Any]:
    attention = fields.switch("attention_bias", False)
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": fields.switch("mlp_bias", False)}


def score_scale(fields: TrackedConfig, wanted: float) -> RopeConfig:
    """Make the score scale `wanted` instead of D^-0.5, by scaling queries and keys by the same factor."""
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    return RopeConfig(scale=(wanted * head_dim**0.5) ** 0.5)


def llama(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return biases(fields)


def olmo2(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
    return biases(fields) | norms | {"norm_eps": fields.number("rms_norm_eps", 1e-5)}


def smollm3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    interval = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.listed("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(layers)])
    if len(rotates) < layers or any(each not in (0, 1) for each in rotates):
        raise ValueError(f"no_rope_layers is {rotates!r}: expected 0 or 1 for each layer")
    seen: tuple[int | None, ...] = ()
    if fields.switch("use_sliding_window", False):
        seen = windows(fields, layers, None, lambda layer: not rotates[layer])
    fields.unread -= {"sliding_window", "layer_types"}
    kinds = tuple("global" if rotates[layer] else "none" for layer in range(layers))
    tied = fields.switch("tie_word_embeddings", True)
    return biases(fields) | {"rope": RopeConfig(layers=kinds), "windows": seen, "tied_output": tied, "theta": 2e6}


def granite(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    """Granite multiplies what layers add to the residual stream. Here the stream is kept divided by that multiplier
    instead, which the norms cancel, except for their epsilon."""
    residual = fields.number("residual_multiplier", 1.0)
    return biases(fields) | {
        "embedding_scale": fields.number("embedding_multiplier", 1.0) / residual,
        "norm_eps": fields.number("rms_norm_eps", 1e-6) / residual**2,
        "logit_scale": 1 / fields.number("logits_scaling", 1.0),
        "rope": score_scale(fields, fields.number("attention_multiplier", 1.0)),
    }


def phi3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    rope = fields.table("rope_scaling") or fields.table("rope_parameters")
    share = rope.get("partial_rotary_factor") or fields.optional("partial_rotary_factor") or 1.0
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor is {share!r}: expected a number above 0, at most 1")
    return {
        "windows": windows(fields, layers, None, lambda layer: True),
        "rope": RopeConfig(share=share),
        "norm_eps": fields.number("rms_norm_eps", 1e-5),
    }


def mistral(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    return {"windows": windows(fields, layers, 4096, lambda layer: True)}


def qwen(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    if not fields.switch("use_sliding_window", False):
        fields.unread -= {"sliding_window", "layer_types"}
        return {}
    first = fields.own("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"max_window_layers is {first!r}: expected an integer")
    return {"windows": windows(fields, layers, 4096, lambda layer: layer >= first)}


def gemma(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    # "gelu" in a Gemma config means the tanh approximation: the models were trained with it.
    fields.only("hidden_activation", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("use_bidirectional_attention", False)
    scale = fields.integer("hidden_size") ** 0.5
    tied = fields.switch("tie_word_embeddings", True)
    return {"activation": "gelu_tanh", "embedding_scale": scale, "norm_offset": 1.0, "tied_output": tied}


def gemma2(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    seen = windows(fields, layers, 4096, lambda layer: layer % 2 == 0)
    fields.only("sliding_window_size", fields.own("sliding_window", 4096))  # the 9B configs have both
    for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if fields.own(name, default) is not None:
            fields.number(name, default)
    return gemma(fields, layers) | {
        "windows": seen,
        "post_norms": True,
        "score_softcap": fields.own("attn_logit_softcapping", 50.0),
        "logit_softcap": fields.own("final_logit_softcapping", 30.0),
        "rope": score_scale(fields, fields.number("query_pre_attn_scalar", 256) ** -0.5),
    }


def gemma3(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    """Sliding-window layers use a local theta, without scaling."""
    pattern = fields.integer("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    fields.integer("sliding_window", 4096)
    seen = windows(fields, layers, 4096, lambda layer: (layer + 1) % pattern != 0)
    ropes, local = TrackedConfig(fields.table("rope_parameters")), TrackedConfig({})
    if {"full_attention", "sliding_attention"} & ropes.config.keys():
        local, ropes = (TrackedConfig(ropes.table(f"{kind}_attention")) for kind in ("sliding", "full"))
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters {local.config} of sliding_attention: only rope_theta is supported")
    local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 10000.0))
    fields.only("attn_logit_softcapping", None)
    kinds = tuple("global" if window is None else "local" for window in seen)
    rope = score_scale(fields, fields.number("query_pre_attn_scalar", 256) ** -0.5)
    return gemma(fields, layers) | {
        "windows": seen,
        "post_norms": True,
        "qk_norm": True,
        "logit_softcap": fields.optional("final_logit_softcapping"),
        "rope": replace(rope, layers=kinds, local_theta=local_theta),
        "rope_parameters": {**ropes.config, **fields.table("rope_scaling")},
        "theta": 1e6,
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
    fields.only("norm_topk_prob", True)  # Mixtral's softmax is over the chosen experts
    seen = windows(fields, layers, None, lambda layer: True)
    return {
        "windows": seen,
        "mixture": mixture(fields, layers, "intermediate_size", True),
        "norm_eps": fields.number("rms_norm_eps", 1e-5),
        "theta": 1e6,
    }


def qwen_moe(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.only("use_sliding_window", False)
    fields.only("attention_bias", False)
    fields.unread -= {"sliding_window", "layer_types"}
    step, plain = fields.integer("decoder_sparse_step", 1), fields.listed("mlp_only_layers", [])
    dense = tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % step)
    renormalised = fields.switch("norm_topk_prob", False)
    return {"mixture": mixture(fields, layers, "moe_intermediate_size", renormalised, dense)}


def olmoe(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    fields.only("clip_qkv", None)
    renormalised = fields.switch("norm_topk_prob", False)
    experts = mixture(fields, layers, "intermediate_size", renormalised)
    return {"mixture": experts, "qk_norm": True, "qk_norm_whole": True, "norm_eps": fields.number("rms_norm_eps", 1e-5)}


def baichuan(fields: TrackedConfig, layers: int) -> dict[str, Any]:
    # The 7B models use RoPE and have max_position_embeddings; the 13B models use ALiBi.
    return {"alibi": "max_position_embeddings" not in fields.config}


FAMILIES: dict[str, Callable[[TrackedConfig, int], dict[str, Any]]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": lambda fields, layers: qwen(fields, layers) | {"qkv_bias": True},
    "Qwen3ForCausalLM": lambda fields, layers: qwen(fields, layers) | {"qk_norm": True},
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Olmo2ForCausalLM": olmo2,
    "SmolLM3ForCausalLM": smollm3,
    "GraniteForCausalLM": granite,
    "Phi3ForCausalLM": phi3,
    "MixtralForCausalLM": mixtral,
    "Qwen2MoeForCausalLM": lambda fields, layers: (
        qwen_moe(fields, layers) | {"qkv_bias": fields.switch("qkv_bias", True)}
    ),
    "Qwen3MoeForCausalLM": lambda fields, layers: qwen_moe(fields, layers) | {"qk_norm": True},
    "OlmoeForCausalLM": olmoe,
    "BaichuanForCausalLM": baichuan,
    "BaiChuanForCausalLM": baichuan,
}


def args_from_config(config: Mapping[str, Any]) -> ModelArgs:
    """Build ModelArgs from a Hugging Face config. Raises ValueError naming what is missing or not supported."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    fields = TrackedConfig(config)
    layers, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    special = FAMILIES[architecture](fields, layers)
    if "activation" not in special:
        fields.only("hidden_act", "silu", "swish")
    if "layer_types" in fields.unread and {*fields.listed("layer_types", [])} - {"full_attention"}:
        fields.unsupported.append(f"layer_types other than full_attention are not supported for {architecture}")
    share = special.get("rope", RopeConfig()).share
    fields.only("partial_rotary_factor", 1.0, share)
    trained = fields.integer("max_position_embeddings", config.get("model_max_length"))
    # rope_scaling is the older name of rope_parameters; like transformers, use the first present, without merging.
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    theta, scaling = rope(
        fields, special.pop("rope_parameters", old or new), special.pop("theta", 10000.0), trained, share
    )
    longest = trained
    if scaling is not None and scaling.kind != "llama3":  # its configs give the scaled length
        longest = max(trained, int(scaling.original_context * scaling.factor))
    seen = tuple(size if size is not None and size < longest else None for size in special.pop("windows", ()))
    longest = special.pop("context_limit", longest)
    eps = float(fields.number("rms_norm_eps", 1e-6))
    usual = {"tied_output": fields.switch("tie_word_embeddings", False), "norm_eps": eps}
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
        rope_theta=theta,
        rope_scaling=scaling,
        windows=seen if any(seen) else (),
        **usual | special,
    )
    fields.done()
    for each in (scaling.short, scaling.long) if scaling is not None and scaling.kind == "longrope" else ():
        if len(each) != (pairs := args.rope.size(args.head_dim) // 2):
            raise ValueError(
                f"rope scaling has {len(each)} factors: expected one for each of the {pairs} pairs of a head"
            )
    return args


def rope(
    fields: TrackedConfig, values: Mapping[str, Any], usual_theta: float, trained: int, share: float
) -> tuple[float, RopeScaling | None]:
    """Parse rope_scaling or rope_parameters -> (theta, scaling). usual_theta: default. trained:
    max_position_embeddings. share: rotated fraction of a head."""
    rope = fields.part(values)
    theta = float(rope.number("rope_theta", fields.number("rope_theta", usual_theta)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    fields.only("rope_type", "default", kind)
    rope.only("partial_rotary_factor", 1.0, share)
    rope.unread -= ROPE_FIELDS
    # The config's top-level field overrides that of rope_scaling.
    own, inside = (each.optional_integer("original_max_position_embeddings") for each in (fields, rope))
    original = own or inside
    if kind == "default":
        rope.only("factor", 1.0)
        return theta, None
    if kind in ("longrope", "su"):  # su: its former name
        return theta, longrope(rope, original or trained, trained)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"rope type {kind!r} is not supported, only default, linear, dynamic, llama3, yarn and longrope"
        )
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
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
    if layer and layer[2] == "self_attn.W_pack":  # Baichuan: fused q, k, v
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"layers.{layer[1]}.attention.w{part}.{layer[3]}": piece for part, piece in parts}
    if layer and layer[2] in ("self_attn.qkv_proj", "mlp.gate_up_proj"):  # Phi-3
        return phi3_tensors(f"layers.{layer[1]}", layer[2], tensor, config)
    if expert := re.fullmatch(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(.+)", inner):
        return expert_tensors(f"layers.{expert[1]}.feed_forward", expert[2], tensor)
    if layer and layer[2] in names:
        return {f"layers.{layer[1]}.{names[layer[2]]}.{layer[3]}": tensor}
    # Baichuan 2 normalises the rows of its output; only the vocabulary size distinguishes it from Baichuan 1.
    if inner == "lm_head.weight" and architecture == "BaichuanForCausalLM" and config["vocab_size"] == 125696:
        tensor = F.normalize(tensor.float()).to(tensor.dtype)
    return {HF_TOP.get(inner, name): tensor}


QKV = ("attention.wq", "attention.wk", "attention.wv")
PACKED = {
    "Phi3ForCausalLM": dict.fromkeys(QKV, "self_attn.qkv_proj")
    | dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), "mlp.gate_up_proj"),
    "BaichuanForCausalLM": dict.fromkeys(QKV, "self_attn.W_pack"),
    "BaiChuanForCausalLM": dict.fromkeys(QKV, "self_attn.W_pack"),
}


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
    names |= PACKED.get(architecture, {})
    if expert is not None:
        theirs = {name: each for each, name in HF_EXPERT.items()}[matrix]
        names[module] = f"block_sparse_moe.experts.{expert}.{matrix}" if mixtral else f"mlp.experts.{expert}.{theirs}"
    return f"model.layers.{number}.{names.get(module, module)}.{kind}"


def phi3_tensors(prefix: str, name: str, tensor: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Split a fused q, k, v or gate, up projection into views. A wrong size is detected later, in the shapes of the
    parts."""
    if name == "mlp.gate_up_proj":
        parts = zip(("w1", "w3"), tensor.tensor_split(2), strict=True)
        return {f"{prefix}.feed_forward.{part}.weight": piece for part, piece in parts}
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    ends = [len(tensor) * heads // (heads + 2 * groups), len(tensor) * (heads + groups) // (heads + 2 * groups)]
    parts = zip("qkv", tensor.tensor_split(ends), strict=True)
    return {f"{prefix}.attention.w{part}.weight": piece for part, piece in parts}


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
    """Whether an unpickled file has karpathy/tinyllamas' layout."""
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
