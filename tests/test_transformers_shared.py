"""The shared context inside transformers. Oracle: transformers' own generate, and its own forward over the plain batch,
of the same random model in fp32; for sampling, the odds of the plain path's softmax."""

import math
import runpy
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, slow
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(ROOT / "examples"))
import transformers_shared
from transformers_shared import generate_shared, logprobs_shared

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 14},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 12, "num_key_value_heads": 1},
    "Granite": {"attention_multiplier": 0.2, "logits_scaling": 1.7, "embedding_multiplier": 1.3},
}
SIZES = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None, "attention_dropout": 0.0,
}  # fmt: skip
T, N, NEW = 23, 3, 15


def make(family: str = "Llama", **fields):
    """Weights large enough that the logits differ clearly between tokens."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES.get(family, {}) | fields))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=1.2 / parameter.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def llama():
    return make()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def prompts():
    """Two prompts, of 23 and 14 tokens, the shorter padded on the left."""
    ids, mask = draw(2, T), torch.ones(2, T, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    return ids, mask


def greedy(**fields):
    return {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True} | fields


def forcing(reference: torch.Tensor):
    """A logits processor that has every row take the reference's tokens, so that a near-tie does not cascade."""

    def force(ids, scores):
        chosen = reference[:, ids.shape[1]]
        return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)

    return [force]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_are_those_of_generate(family):
    """Two prompts, one padded. Logits of each step, on the reference's tokens, within 1e-4; the tokens themselves where
    the reference's two best logits are further apart than that."""
    model, (ids, mask) = make(family), prompts()
    rows, rows_mask = (tensor.repeat_interleave(N, 0) for tensor in (ids, mask))
    plain = model.generate(rows, attention_mask=rows_mask, **greedy())
    force = {"logits_processor": forcing(plain.sequences)}
    shared = generate_shared(model, ids, N, attention_mask=mask, **greedy(**force))
    expected = torch.stack(plain.logits, 1)  # [B*N,new,V]
    torch.testing.assert_close(torch.stack(shared.logits, 1), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5, "a model whose logits are all alike shows nothing"
    best = expected.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4, "a near-tie: take another seed"
    assert torch.equal(generate_shared(model, ids, N, attention_mask=mask, **greedy()).sequences, plain.sequences)
    assert torch.equal(model.generate(rows, attention_mask=rows_mask, **greedy()).sequences, plain.sequences)


def test_rows_that_end_are_filled_as_by_generate(llama):
    """Sampled with one seed: some rows end at one of several EOS tokens, others go on."""
    ids, mask = prompts()
    fields = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": True, "eos_token_id": list(range(40, 46))}
    torch.manual_seed(5)
    plain = llama.generate(ids, num_return_sequences=N, **fields)
    torch.manual_seed(5)
    shared = generate_shared(llama, ids, N, **fields)
    ended = (plain[:, -1] == 0).sum()
    assert 0 < ended < len(plain) and torch.equal(shared, plain)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(llama, length):
    ids = draw(2, length)
    plain = llama.generate(ids.repeat_interleave(N, 0), **greedy()).sequences
    assert torch.equal(generate_shared(llama, ids, N, **greedy()).sequences, plain)


def test_sampling_frequencies_are_those_of_the_plain_path(llama):
    """4,096 rows of a prompt: the second token, given the commonest first one. Each count of the 97 is binomial; one in
    97 * 2 two-sided tests beyond 5 standard deviations (and one token's discreteness) has odds below 1 in 5,000."""
    ids = draw(1, 9)
    torch.manual_seed(7)
    rows = generate_shared(llama, ids, 4096, do_sample=True, top_k=0, max_new_tokens=2)[:, 9:]
    with torch.no_grad():
        first = llama(ids).logits[0, -1].softmax(-1)
        common = int(first.argmax())
        second = llama(torch.cat([ids, torch.tensor([[common]])], 1)).logits[0, -1].softmax(-1)
    for column, odds in ((rows[:, 0], first), (rows[rows[:, 0] == common, 1], second)):
        counts, n = torch.bincount(column, minlength=97), len(column)
        assert n > 200 and ((counts - n * odds).abs() <= 5 * (n * odds * (1 - odds)).sqrt() + 1.5).all()


def test_keys_and_values_of_the_context_are_held_once(llama):
    """Counted in the cache that generate returns, with all of the storages that its tensors are views of."""
    ids, mask = prompts()
    cache = generate_shared(llama, ids, 5, attention_mask=mask, **greedy()).past_key_values
    token = 2 * 2 * 10 * 4  # keys and values, heads, head dimension, bytes
    for own in cache.layers:
        held = [own.context.keys, own.context.values, own.keys, own.values]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == token * (2 * (T - 1) + 10 * NEW)
    assert cache.get_seq_length() == T - 1 + NEW


def test_the_prompt_is_computed_at_one_row(llama):
    """Oracle: how many tokens go through the first layer."""
    seen = Counter()
    hook = llama.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.update(tokens=args[0][..., 0].numel())
    )
    try:
        generate_shared(llama, draw(1, T), 5, do_sample=False, max_new_tokens=4)
        assert seen["tokens"] == T - 1 + 5 * 4
        seen.clear()
        logprobs_shared(llama, draw(1, T), draw(5, 7))
        assert seen["tokens"] == T + 5 * 7
    finally:
        hook.remove()


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value)

    def end(self):
        self.ended = True


def test_the_loop_is_transformers_own(llama):
    """Processors, criteria, a streamer and a configuration all reach it, and N of the configuration does not count."""
    listener, ids = Listener(), draw(1, T)

    def ban(tokens, scores):
        return scores.index_fill(1, torch.arange(50, 97), -math.inf)

    def stop(tokens, scores, **kwargs):
        return torch.full((len(tokens),), tokens.shape[1] == T + 4)

    out = generate_shared(
        llama, ids, N, generation_config=GenerationConfig(do_sample=True, max_new_tokens=9, num_return_sequences=2),
        logits_processor=[ban], stopping_criteria=StoppingCriteriaList([stop]), streamer=listener,
    )  # fmt: skip
    assert out.shape == (N, T + 4) and out[:, T:].max() < 50
    assert listener.ended and [tuple(each.shape) for each in listener.heard] == [(N, T), *[(N,)] * 4]
    assert llama.generation_config.num_return_sequences is None  # the model's own is not written to


@slow
def test_a_compiled_forward_generates_the_same():
    """Traced and not made into code, which would take a minute. After the first call nothing is traced again."""
    model, (ids, mask), graphs = make(num_hidden_layers=1), prompts(), []
    expected = generate_shared(model, ids, N, attention_mask=mask, **greedy()).sequences
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(2):
        assert torch.equal(generate_shared(model, ids, N, attention_mask=mask, **greedy()).sequences, expected)
        assert 0 < len(graphs) <= 3


G, R = 4, 11


def completions():
    """Four completions of each of two prompts, ragged: of 11, 4, 11, 11, 1, 7, 11 and 11 tokens."""
    mask = torch.ones(2 * G, R, dtype=torch.long)
    for row, length in ((1, 4), (4, 1), (5, 7)):
        mask[row, length:] = 0
    return draw(2 * G, R, seed=2) * mask, mask


def plain_logprobs(model, ids, mask, tokens, valid, temperature=1.0):
    """What trainers do: every completion behind its own copy of the prompt."""
    rows = torch.cat([ids.repeat_interleave(G, 0), tokens], 1)
    seen = torch.cat([mask.repeat_interleave(G, 0), valid], 1)
    places = (seen.cumsum(1) - 1).clamp_min(0)
    logits = model(rows, attention_mask=seen, position_ids=places, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * valid


def gradients(model, logprobs):
    """The gradients of a policy's loss: advantages differ between completions."""
    model.zero_grad()
    advantage = torch.randn(2 * G, 1, generator=torch.Generator().manual_seed(3))
    (logprobs * advantage).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, expected):
    """Within 1e-5 of each tensor's norm, and of its largest element."""
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_plain_batch(family):
    """Two prompts, one padded, ragged completions, grouped heads. Oracle: the plain batch."""
    model, (ids, mask), (tokens, valid) = make(family), prompts(), completions()
    expected = plain_logprobs(model, ids, mask, tokens, valid, 0.7)
    actual = logprobs_shared(model, ids, tokens, valid, mask, temperature=0.7)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    assert_close(gradients(model, actual), gradients(model, expected))
    assert (actual[valid == 0] == 0).all() and (actual[valid == 1] < 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(reentrant):
    model, (ids, mask), (tokens, valid) = make(), prompts(), completions()
    expected = gradients(model, plain_logprobs(model, ids, mask, tokens, valid))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with pytest.raises(
        ValueError, match=r"gradient checkpointing: call model.set_attn_implementation\('shared_prompt'"
    ):
        logprobs_shared(model, ids, tokens, valid, mask)
    with pytest.raises(ValueError, match="^gradient checkpointing: generate_shared has a cache of its own"):
        generate_shared(model, ids, N)
    model.set_attn_implementation("shared_prompt")
    assert_close(gradients(model, logprobs_shared(model, ids, tokens, valid, mask)), expected)
    assert_close(gradients(model, plain_logprobs(model, ids, mask, tokens, valid)), expected)  # without a group: SDPA


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_completions_and_prompts(llama, length):
    ids, mask = draw(2, length), torch.ones(2, length, dtype=torch.long)
    tokens = draw(2 * G, length, seed=2)
    actual, expected = logprobs_shared(llama, ids, tokens), plain_logprobs(llama, ids, mask, tokens, tokens * 0 + 1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_scores_is_kept_for_the_backward_pass(llama):
    """Oracle: the sizes of what autograd saves; the scores of a layer are 4 heads of G * R queries and 200 keys."""
    ids, tokens, saved = draw(1, 200), draw(G, R), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda each: each
    ):
        logprobs_shared(llama, ids, tokens).sum().backward()
    assert saved and max(saved) < 4 * G * R * 200


def windowed(layer_types=None, **fields):
    return make("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, **fields)


REFUSED = {
    "DynamicSlidingWindowLayer": windowed,
    "Mistral.*DynamicSlidingWindowLayer": lambda: make("Mistral", sliding_window=8),
    "Gemma2ForCausalLM has attn_logit_softcapping: ": lambda: make("Gemma2", sliding_window=None),
    "LinearAttention": lambda: make(
        "Qwen3Next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    ),
    "DeepseekV3ForCausalLM has kv_lora_rank": lambda: make("DeepseekV3", num_key_value_heads=4, kv_lora_rank=8),
    "T5ForConditionalGeneration is more than a decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ),
    "BloomForCausalLM does not take its attention": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_of_another_attention_are_refused_by_name(message):
    model = REFUSED[message]()
    own = model.config._attn_implementation
    for call in (
        lambda: generate_shared(model, draw(1, 5) % 9, 2),
        lambda: logprobs_shared(model, draw(1, 5) % 9, draw(2, 3) % 9),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.config._attn_implementation == own


def test_an_unknown_attention_type_is_refused_by_name():
    model = make()
    model.config.__dict__["layer_types"] = ["full_attention", "spiral_attention", "full_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of the unknown type 'spiral_attention'"):
        generate_shared(model, draw(1, 5), 2)


def test_a_model_that_keeps_keywords_from_its_attention_is_refused_by_name():
    """For scoring, which tells the attention by one; generate needs none."""
    model, ids = make("StableLm"), draw(1, T)
    with pytest.raises(ValueError, match="StableLmAttention is given no keywords"):
        logprobs_shared(model, ids, draw(2, 3))
    plain = model.generate(ids, **greedy()).sequences
    assert torch.equal(generate_shared(model, ids, N, **greedy()).sequences, plain.expand(N, -1))


def test_what_a_module_asks_of_its_attention_is_refused_by_name(llama):
    """What no configuration tells: it reaches the attention function alone."""
    model = make(attention_dropout=0.25).train()
    with pytest.raises(ValueError, match="LlamaAttention asks for dropout"):
        logprobs_shared(model, draw(1, 5), draw(2, 3))
    parts = transformers_shared.Parts(torch.zeros(1, 2, 3, 4), torch.zeros(2, 2, 1, 4))
    with pytest.raises(ValueError, match="Linear asks for s_aux"):
        transformers_shared.attend_context(
            torch.nn.Linear(1, 1), torch.zeros(2, 2, 1, 4), parts, parts, None, s_aux=torch.zeros(2)
        )
    llama.set_attn_implementation("shared_context")
    try:
        with pytest.raises(ValueError, match="'shared_context' is for generate_shared alone"):
            llama(draw(1, 5))
    finally:
        llama.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"num_beams": 2}, "beam_search: rows that share a context are for sampling and greedy"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample: "),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation: "),
        ({"assistant_model": "llama"}, "assisted_generation: "),
        ({"generation_config": GenerationConfig(num_beams=3)}, "beam_search: "),
        ({"use_cache": False}, "use_cache: generate_shared has a cache of its own"),
        ({"cache_implementation": "static"}, "cache_implementation: "),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values: "),
        ({"position_ids": torch.arange(5)[None]}, "position_ids: "),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "prompts are padded on the left"),
        ({"attention_mask": torch.tensor([[True, False, True, True, True]])}, "prompts are padded on the left"),
        ({"attention_mask": torch.ones(2, 5)}, r"a mask of shape \(2, 5\) for \(1, 5\)"),
        ({"num_return_sequences": 0}, "num_return_sequences 0: at least one"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, r"prompts of shape \(1, 0\)"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"prompts of shape \(5,\)"),
    ],
)
def test_bad_requests_are_refused(llama, fields, message):
    fields = {"model": llama, "input_ids": draw(1, 5), "num_return_sequences": 2, "max_new_tokens": 2} | fields
    if fields.get("generation_config"):
        del fields["max_new_tokens"]
    with pytest.raises(ValueError, match=message):
        generate_shared(**(fields | {"assistant_model": llama} if "assistant_model" in fields else fields))


def test_a_cache_of_rows_cannot_be_moved(llama):
    """What a loop that this file does not know would do to it."""
    cache = generate_shared(llama, draw(1, 5), 2, **greedy()).past_key_values
    for change in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        with pytest.raises(ValueError, match="cannot be moved or cut"):
            change()
    assert not cache.is_croppable


@pytest.mark.parametrize(
    "tokens,valid,message",
    [
        (draw(3, 4), None, r"completions of shape \(3, 4\): expected \[2\*G,R\] for 2 prompts"),
        (draw(2, 4)[:, :0], None, r"completions of shape \(2, 0\)"),
        (draw(2, 4), torch.ones(2, 3), r"a completion mask of shape \(2, 3\)"),
        (draw(2, 4), torch.tensor([[1, 0, 1, 1]] * 2), "completions are padded on the right"),
    ],
)
def test_bad_completions_are_refused(llama, tokens, valid, message):
    with pytest.raises(ValueError, match=message):
        logprobs_shared(llama, draw(2, 5), tokens, valid)


def test_another_interface_is_named_with_its_version(monkeypatch):
    """A transformers of another form: a stand-in that has nothing but its version."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.0.1"))
    with pytest.raises(ValueError, match="^tried with transformers 5.23; 4.0.1 differs: cannot import name"):
        runpy.run_path(str(ROOT / "examples" / "transformers_shared.py"))


@slow
@pytest.mark.parametrize("published", ["tiny"], indirect=True)
def test_the_command(published):
    """From another folder."""
    command = [sys.executable, str(ROOT / "examples" / "transformers_shared.py"), "--prompt", "The cat", "--model"]
    result = subprocess.run(
        [*command, str(published), "-n", "3", "--max_new_tokens", "4"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert all(f"[{number}] The cat" in result.stdout for number in (1, 2, 3))
    assert [line.split(":")[0] for line in result.stdout.splitlines()[-2:]] == [
        "with the shared context", "without the shared context"
    ]  # fmt: skip
