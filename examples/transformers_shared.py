"""Bifurcated attention inside transformers: its own generate, with N samples of a prompt that hold and read it once,
and log-probabilities of a group of completions, with gradients, that compute the prompt once.

    python examples/transformers_shared.py --model FOLDER_OR_HUB_ID --prompt TEXT -n 8

From Python: generate_shared replaces model.generate(..., num_return_sequences=N), and logprobs_shared scores
completions for a trainer. To reuse it, copy this file and bifurcated_attention.py. Nothing of transformers is replaced:
two attention functions are registered beside its own, and a model uses one of them during a call into this file.

Shapes: B prompts of T tokens, N samples or G completions of each, R tokens of a completion; the others, H query heads,
S query positions and D head dimension, as in bifurcated_attention.py. Rows that share a prompt are consecutive.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor

from bifurcated_attention import merge_partials, shared_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ValueError(f"tried with transformers 5.23; {transformers.__version__} differs: {error}") from error

Output = tuple[Tensor, None]  # of an attention function: [rows,S,H,D], no weights

# Attention arguments of some models that these functions do not support.
FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias")


class Parts(NamedTuple):
    """Keys, values or masks: of the prompts (keys: [B,G,T,D]), and of each row alone (keys: [B*N,G,L,D])."""

    context: Any
    own: Any


class SharedLayer(DynamicLayer):
    """Keys and values of one layer: the context's once, frozen, and the rows' own, which grow."""

    is_croppable = False

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.context = context

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states)
        return Parts(self.context.keys, keys), Parts(self.context.values, values)

    def get_seq_length(self) -> int:
        return self.context.get_seq_length() + super().get_seq_length()

    def refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("rows that share a context are for sampling and greedy decoding: they cannot be moved or cut")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = refuse


class Group(NamedTuple):
    """Layout of a row with a prompt and then its completions, [B,T+G*R], and their masks (None: all is visible)."""

    length: int  # T
    size: int  # G
    prompt: Tensor | None  # [B,1,T,T]
    context: Tensor | None  # [B,1,1,T]
    completion: Tensor  # [1,1,R,R]


def rescaled(module: Any, query: Tensor, scaling: float | None = None, dropout: float = 0.0, **asked: Any) -> Tensor:
    """Scale the query so that only 1 / sqrt(D) is left. Raises ValueError unless attention is plain and full."""
    foreign = [name for name in FOREIGN if asked.get(name) is not None] + ["dropout"] * (dropout > 0)
    if foreign:
        raise ValueError(f"{type(module).__name__} asks for {foreign[0]}, which attention to a shared context lacks")
    factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
    return query if abs(factor - 1) < 1e-6 else query * factor


def attend_context(module: Any, query: Tensor, key: Parts, value: Parts, attention_mask: Any, **kwargs: Any) -> Output:
    """Decode: query [B*N,H,S,D] against what SharedLayer returns -> [B*N,S,H,D]; attention_mask [B*N,1,S,T+L]."""
    if not isinstance(key, Parts):
        raise ValueError("the attention 'shared_context' is for generate_shared alone: no context is shared here")
    query = rescaled(module, query, **kwargs)
    B, _, T, _ = key.context.shape
    seen = Parts(None, None)
    if attention_mask is not None:  # all rows of a prompt see the same part of it
        seen = Parts(attention_mask[:: len(query) // B, ..., :T], attention_mask[..., T:])
    partials = [shared_attention(query, *part) for part in zip(key, value, seen, strict=True)]
    return merge_partials(partials)[0].to(query.dtype).transpose(1, 2).contiguous(), None


def attend_group(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Output:
    """Score: query [B,H,T+G*R,D], key and value alike -> [B,T+G*R,H,D]. Without a group, use transformers' SDPA."""
    group: Group | None = kwargs.pop("group", None)
    if group is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ValueError(f"{type(module).__name__} is given no keywords by its model: a group cannot reach it")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    T, scaling = group.length, kwargs.get("scaling")
    first, k, v = (tensor[:, :, :T] for tensor in (query, key, value))
    read, _ = sdpa_attention_forward(module, first, k, v, group.prompt, scaling=scaling)  # [B,T,H,D]
    tails = (tensor[:, :, T:] for tensor in (rescaled(module, query, **kwargs), key, value))
    q, *own = (tail.unflatten(2, (group.size, -1)).transpose(1, 2).flatten(0, 1) for tail in tails)  # [B*G,H,R,D]
    partials = [shared_attention(q, k, v, group.context), shared_attention(q, own[0], own[1], group.completion)]
    out = merge_partials(partials)[0].to(query.dtype).transpose(1, 2)  # [B*G,R,H,D]
    return torch.cat([read, out.reshape(len(read), -1, *read.shape[2:])], 1), None


for name, function in (("shared_context", attend_context), ("shared_prompt", attend_group)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def empty_context(model: Any) -> DynamicCache:
    """Create the cache for prefilling the prompt. Raises ValueError unless every layer is full attention."""
    config, kind = model.config, type(model).__name__
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{kind} is more than a decoder of text: only such models have a shared form here")
    asked = [name for name in ("attn_logit_softcapping", "kv_lora_rank") if getattr(config, name, None) is not None]
    if asked:
        raise ValueError(f"{kind} has {asked[0]}: only full attention without it has a shared form here")
    try:
        cache = DynamicCache(config=config)
        foreign = {type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__}
    except KeyError as error:
        foreign = {f"the unknown type {error}"}
    if foreign:
        raise ValueError(f"{kind} has layers of {', '.join(sorted(foreign))}: only full attention is shared")
    return cache


def recomputes(model: Any) -> bool:
    """Return whether gradient checkpointing is on: layers rerun in the backward pass, and no cache is kept."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Give the model the named attention function inside the block. Raises ValueError if it does not take it."""
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not take its attention from transformers' AttentionInterface")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def check_request(model: Any, config: Any, others: dict) -> None:
    """Raise ValueError for options of generate that rows with a shared context do not support."""
    mode = config.get_generation_mode(others.get("assistant_model")).value
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"{mode}: rows that share a context are for sampling and greedy decoding only")
    own = [name for name, value in others.items() if isinstance(value, Tensor | Cache)]
    own += [name for name in ("cache_implementation", "token_healing") if getattr(config, name, None)]
    own += ["use_cache"] * (config.use_cache is False) + ["gradient checkpointing"] * recomputes(model)
    if own:
        raise ValueError(f"{own[0]}: generate_shared has a cache of its own, and its only inputs are ids and a mask")


def padding(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mask and positions, [B,T] each, of left-padded prompts. Raises ValueError for any other form."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"prompts of shape {tuple(ids.shape)}: expected [B,T], at least one token each")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape or not mask[:, -1].all() or (mask.long().diff(dim=1) < 0).any():
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for {tuple(ids.shape)}: prompts are padded on the left")
    return mask, (mask.long().cumsum(1) - 1).clamp_min(0)


def make_group(seen: Tensor, size: int, length: int) -> Group:
    """Build the masks for `size` completions of `length` tokens after prompts; seen [B,1,1,T] is False at padding."""
    T, everything = seen.shape[-1], seen.new_ones(1, 1, length, length)
    if seen.all():
        return Group(T, size, None, None, everything.tril())
    causal = seen.new_ones(T, T).tril()
    prompt = (causal & seen) | (causal & causal.T)  # padding sees itself, so no softmax row is empty
    return Group(T, size, prompt, seen, everything.tril())


@torch.no_grad()
def generate_shared(
    model: Any, input_ids: Tensor, num_return_sequences: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run model.generate(input_ids, num_return_sequences=N, ...), reading, holding and attending to every prompt once.

    input_ids [B,T], padded on the left where attention_mask [B,T] is 0 (None: nowhere). All else is generate's own:
    logits processors, stopping criteria, streamers, generation_config; greedy or sampling. Returns what generate
    returns, rows of one prompt together: token ids [B*N,T+new]. The same seed gives the same samples, except for
    rounding. Raises ValueError for models other than full attention, beam search, assistants and other kinds of cache.
    """
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences {num_return_sequences}: at least one sample is needed")
    mask, positions = padding(input_ids, attention_mask)
    config = copy.deepcopy(kwargs.pop("generation_config", None) or model.generation_config)
    kwargs = config.update(**kwargs)
    check_request(model, config, kwargs)
    context = empty_context(model)
    config.num_return_sequences = 1
    rows = [tensor.repeat_interleave(num_return_sequences, 0) for tensor in (input_ids, mask)]
    kwargs |= {"attention_mask": rows[1], "generation_config": config}
    if input_ids.shape[1] == 1:  # nothing to prefill: a prompt's last token is run by each row
        return model.generate(rows[0], **kwargs)
    fields = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    fields = {key: tensor[:, :-1] for key, tensor in fields.items()}
    model.base_model(**fields, past_key_values=context, use_cache=True)
    cache = Cache(layers=[SharedLayer(layer) for layer in context.layers])
    with attention(model, "shared_context"):
        return model.generate(rows[0], past_key_values=cache, **kwargs)


def logprobs_shared(
    model: Any,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probability of every completion token, with gradients, from T + G*R tokens for G completions.

    prompt_ids [B,T], padded on the left; completion_ids [B*G,R], padded on the right, those of a prompt together; masks
    of the same shapes, 1 at tokens (None: everywhere). Returns [B*G,R], fp32, 0 at padding. Logits are divided by the
    temperature. Raises ValueError for models other than full attention and for shapes that do not fit.
    """
    seen, positions = padding(prompt_ids, prompt_mask)
    (B, T), R, device = prompt_ids.shape, completion_ids.shape[-1], prompt_ids.device
    if completion_ids.dim() != 2 or 0 in completion_ids.shape or len(completion_ids) % B:
        raise ValueError(f"completions of shape {tuple(completion_ids.shape)}: expected [{B}*G,R] for {B} prompts")
    valid = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    if valid.shape != completion_ids.shape or (valid.long().diff(dim=1) > 0).any():
        raise ValueError(f"a completion mask of shape {tuple(valid.shape)}: completions are padded on the right")
    empty_context(model)
    if recomputes(model) and model.config._attn_implementation != "shared_prompt":
        # The backward pass reads from the configuration which attention to rerun.
        raise ValueError("gradient checkpointing: call model.set_attn_implementation('shared_prompt') before, for good")
    G = len(completion_ids) // B
    behind = torch.arange(R, device=device).repeat(G)  # [G*R]
    ids = torch.cat([prompt_ids, completion_ids.reshape(B, G * R)], 1)  # [B,T+G*R]
    positions = torch.cat([positions, positions[:, -1:] + 1 + behind], 1)
    # A token is predicted by the one before it, the first of each completion by the prompt's last.
    keep = torch.where(behind == 0, T - 1, T - 1 + torch.arange(G * R, device=device))
    seen = seen.bool()[:, None, None]  # [B,1,1,T]: transformers passes a 4-D mask on unchanged
    fields = {"input_ids": ids, "attention_mask": seen, "position_ids": positions, "use_cache": False}
    with attention(model, "shared_prompt"):
        logits = model(**fields, logits_to_keep=keep, group=make_group(seen, G, R)).logits.float()  # [B,G*R,V]
    logits = logits if temperature == 1 else logits / temperature
    logprobs = logits.gather(-1, ids[:, T:, None])[..., 0] - logits.logsumexp(-1)  # [B,G*R]
    return logprobs.view(B * G, R).masked_fill(~valid.bool(), 0)


def timed(generate: Callable[..., Tensor], *arguments: Any, **kwargs: Any) -> tuple[Tensor, float, float]:
    """Return generate's result, seconds to its first token, and the median milliseconds of a step."""
    clock = [time.perf_counter()]

    def tick(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # a stopping criterion that stops nothing
        clock.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    out = generate(*arguments, stopping_criteria=[tick], **kwargs)
    steps = [(after - before) * 1e3 for before, after in zip(clock[1:], clock[2:], strict=False)]
    return out, clock[1] - clock[0], statistics.median(steps or [float("nan")])


def main() -> int:
    parser = argparse.ArgumentParser(description="Samples of one prompt by transformers, without and with sharing it.")
    parser.add_argument("--model", required=True, help="a folder, or OWNER/NAME of the Hugging Face Hub")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("-n", type=int, default=8, help="samples")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    from loading.hub import locate  # imported here: a copy of this file may load models otherwise
    from loading.tokenizer import load_tokenizer

    try:
        folder = locate(options.model)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = torch.tensor([bos + tokenizer.encode(options.prompt)])
        fields = {"num_return_sequences": options.n, "max_new_tokens": options.max_new_tokens, "do_sample": True}
        runs = []
        for generate in (partial(generate_shared, model), model.generate):  # first the one that may reject the model
            torch.manual_seed(0)
            runs.append(timed(generate, ids, attention_mask=torch.ones_like(ids), **fields))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, row in enumerate(runs[0][0].tolist(), 1):
        print(f"[{number}] {tokenizer.decode(row)}")
    for name, (_, first, step) in zip(("with", "without"), runs, strict=True):
        print(f"{name} the shared context: {first * 1e3:.1f} ms to the first token, {step:.1f} ms a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
