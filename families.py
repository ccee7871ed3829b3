"""The model families: Hugging Face's config.json -> ModelArgs, and the names of their tensors -> ours.

A room of its own because it is a table that grows with every family, where checkpoint.py stays as it is. A field of a
config that this file does not know is refused by name unless it is off: what might change the result is never ignored.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from model import ModelArgs
from rotary import RopeScaling

# Fields that say nothing of the result: bookkeeping, training, generation defaults that the command line has itself.
NEUTRAL = frozenset(
    """_attn_implementation _attn_implementation_autoset _from_model_config _name_or_path architectures
    attention_dropout attn_implementation auto_map bos_token_id cache_implementation chunk_size_feed_forward do_sample
    dtype embd_pdrop eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range is_llama_config
    keys_to_ignore_at_inference label2id max_length max_sequence_length model_max_length model_type
    pad_token_id problem_type resid_pdrop return_dict sep_token_id task_specific_params temperature tokenizer_class
    top_k top_p torch_dtype transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_cache z_loss_weight""".split()
)


class Fields:
    """A config whose fields are ticked off as they are read, so that none that matters is passed over."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.unread = config, set(config) - NEUTRAL

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default where it is missing or null."""
        self.unread.discard(name)
        value = self.config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, not a positive number: the model's shape is not known without it")
        return value

    def only(self, name: str, *values: Any) -> None:
        """Raises ValueError unless the field has one of the values, or is missing."""
        if self.get(name, values[0]) not in values:
            raise ValueError(f"{name} {self.config[name]!r} is not supported, only {' or '.join(map(repr, values))}")

    def done(self) -> None:
        """Raises ValueError that names a field which was not read and is not off."""
        for name in sorted(self.unread):
            if self.config[name]:
                raise ValueError(
                    f"{name} {self.config[name]!r} is not known here and may change the result: "
                    "if it does not, remove it from config.json"
                )


def windows(fields: Fields, layers: int, is_windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The sliding window of each layer; layer_types, where it is given, goes before the family's own rule."""
    size, kinds = fields.get("sliding_window"), fields.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types {kinds!r} is not supported: one of full_attention, sliding_attention a layer"
            )
        return tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return tuple(size if is_windowed(layer) else None for layer in range(layers))


def llama(fields: Fields, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("pretraining_tp", 1)
    return {}


def mistral(fields: Fields, layers: int) -> dict[str, Any]:
    return {"windows": windows(fields, layers, lambda layer: True)}


def qwen(fields: Fields, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    first = fields.get("max_window_layers", layers)
    if not fields.get("use_sliding_window", False):
        fields.get("sliding_window"), fields.get("layer_types")
        return {}
    return {"windows": windows(fields, layers, lambda layer: layer >= first)}


def gemma(fields: Fields, layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    # "gelu" in a Gemma config has always meant the tanh form, with which the models were trained.
    fields.only("hidden_activation", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("use_bidirectional_attention", False)
    scale = fields.integer("hidden_size") ** 0.5
    tied = fields.get("tie_word_embeddings", True)
    return {"activation": "gelu_tanh", "embedding_scale": scale, "norm_offset": 1.0, "tied_output": tied}


def gemma2(fields: Fields, layers: int) -> dict[str, Any]:
    fields.only("query_pre_attn_scalar", fields.integer("head_dim"))
    return gemma(fields, layers) | {
        "windows": windows(fields, layers, lambda layer: layer % 2 == 0),
        "post_norms": True,
        "score_softcap": fields.get("attn_logit_softcapping"),
        "logit_softcap": fields.get("final_logit_softcapping"),
    }


def baichuan(fields: Fields, layers: int) -> dict[str, Any]:
    # The 7B models turn queries and keys and say for how many positions; the 13B models weigh distance instead.
    return {"alibi": "max_position_embeddings" not in fields.config}


FAMILIES: dict[str, Callable[[Fields, int], dict[str, Any]]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": lambda fields, layers: qwen(fields, layers) | {"qkv_bias": True},
    "Qwen3ForCausalLM": lambda fields, layers: qwen(fields, layers) | {"qk_norm": True},
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "BaichuanForCausalLM": baichuan,
}


def args_from_config(config: Mapping[str, Any]) -> ModelArgs:
    """ModelArgs from a Hugging Face config. Raises ValueError on what is missing or not supported, by name."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    fields = Fields(config)
    layers, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    special = FAMILIES[architecture](fields, layers)
    if "activation" not in special:
        fields.only("hidden_act", "silu")
    fields.only("partial_rotary_factor", 1.0)
    trained = fields.integer("max_position_embeddings", config.get("model_max_length"))
    theta, scaling = rope(fields, trained)
    longest = max(trained, int(scaling.original_context * scaling.factor)) if scaling else trained
    seen = tuple(size if size is not None and size < longest else None for size in special.pop("windows", ()))
    args = ModelArgs(
        dim=fields.integer("hidden_size"),
        n_layer=layers,
        n_head=heads,
        n_kv_head=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", fields.integer("hidden_size") // heads),
        hidden_dim=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        context_limit=longest,
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=seen if any(seen) else (),
        **{"tied_output": fields.get("tie_word_embeddings", False)} | special,
    )
    fields.done()
    return args


def rope(fields: Fields, trained: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). trained: max_position_embeddings, which is the original context where no other is given."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    rope = Fields(new or old or {})
    theta = float(rope.get("rope_theta", fields.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    rope.only("partial_rotary_factor", 1.0)
    rope.only("truncate", True)
    factor, original = rope.get("factor", 1.0), rope.get("original_max_position_embeddings", trained)
    if kind == "default":
        return theta, None
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"rope type {kind!r} is not supported, only default, linear, dynamic, llama3 and yarn")
    needed = ["factor"] + ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] * (
        kind == "llama3"
    )
    if missing := [name for name in needed if rope.get(name) is None]:
        raise ValueError(f"rope scaling of type {kind} lacks {', '.join(missing)}")
    scaling = RopeScaling(kind, factor, trained if kind == "dynamic" else original)
    if kind == "llama3":
        scaling = RopeScaling(kind, factor, original, rope.get("low_freq_factor"), rope.get("high_freq_factor"))
    if kind == "yarn":
        low, high = rope.get("beta_slow", 1.0), rope.get("beta_fast", 32.0)
        scaling = RopeScaling(kind, factor, original, low, high, yarn_attention_factor(rope, factor))
    rope.done()
    return theta, scaling


def yarn_attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's temperature, as a factor of queries and keys alike; Peng et al. 2023 (arXiv 2309.00071), section 3.4."""

    def warmth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, scale, all_dim = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
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
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Gemma 2 gives the last name to another norm.
HF_NAMES_POST_NORMS = HF_NAMES | {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}
HF_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def our_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names, without what the network computes itself; unknown names are kept."""
    architecture = config["architectures"][0]
    names = HF_NAMES_POST_NORMS if architecture == "Gemma2ForCausalLM" else HF_NAMES
    # Baichuan 2 normalises the rows of its output; only the vocabulary tells it from Baichuan 1.
    normalised_head = architecture == "BaichuanForCausalLM" and config["vocab_size"] == 125696
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if layer and layer[2] == "self_attn.W_pack":  # Baichuan: queries, keys and values in one
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"layers.{layer[1]}.attention.w{part}.{layer[3]}"] = piece
        elif layer and layer[2] in names:
            ours[f"layers.{layer[1]}.{names[layer[2]]}.{layer[3]}"] = tensor
        elif name == "lm_head.weight" and normalised_head:
            ours["output.weight"] = F.normalize(tensor.float()).to(tensor.dtype)
        else:
            ours[HF_TOP.get(name, name)] = tensor
    return ours


def is_tinyllamas(found: object) -> bool:
    """Whether an unpickled file has the layout of karpathy/tinyllamas."""
    return isinstance(found, dict) and {"model_args", "model"} <= found.keys()


def tinyllamas_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a file of karpathy/tinyllamas. Raises ValueError where it is not such a file after all."""
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
    except (KeyError, StopIteration, AttributeError, TypeError) as error:
        raise ValueError(f"it has model_args, but is not of karpathy/tinyllamas: {error!r} is missing") from error


def from_tinyllamas(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Their tensors: our names, but queries and keys whose heads turn pairs of neighbours instead of halves."""
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    for name, tensor in ours.items():
        if name.endswith((".wq.weight", ".wk.weight")):
            pairs = tensor.reshape(-1, head_dim // 2, 2, tensor.shape[-1])  # [H,D/2,2,dim]
            ours[name] = pairs.transpose(1, 2).reshape(tensor.shape)
    return {name: tensor for name, tensor in ours.items() if not name.startswith("freqs_")}
