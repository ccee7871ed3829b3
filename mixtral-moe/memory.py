"""Print what the weights of a mixture of experts need at each precision, and what a decode step reads of them, as a
Markdown table, from its config.json alone.

    python mixtral-moe/memory.py
    python mixtral-moe/memory.py FOLDER/config.json

Without a file, the shape is that of Mixtral 8x7B. A step reads the experts that its rows choose, assuming uniform
routing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

from engine.plan import WeightSizes, human, sum_weight_sizes
from layers.linear import KINDS, tensors_of
from loading.checkpoint import read_json
from loading.families import args_from_config
from model import ModelArgs, empty_model
from quantize import choose_layers

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
}  # fmt: skip
GROUPSIZE, ROWS, DEVICES = 32, (1, 8, 64), (2, 4, 8)


def weigh_as(args: ModelArgs, mode: str) -> WeightSizes:
    """Return the sizes of the weights as quantize.py writes them; mode "bfloat16": unquantised."""
    model = empty_model(args)
    sizes = {name: 2 * tensor.numel() for name, tensor in model.named_parameters()}
    layers = {} if mode == "bfloat16" else choose_layers(model, mode, GROUPSIZE)[0]
    for name, kind in layers.items():
        outputs, inputs = model.get_submodule(name).get_parameter("weight").shape
        weight = KINDS[kind].empty(outputs, inputs, GROUPSIZE)
        sizes[f"{name}.weight"] = sum(tensor.nbytes for tensor in tensors_of(weight).values())
    return sum_weight_sizes(sizes, args)


def main() -> int:
    try:
        args = args_from_config(read_json(Path(sys.argv[1])) if len(sys.argv) > 1 else MIXTRAL)
    except (ValueError, OSError) as error:
        return print_error(error)
    names = ["weights", "weights", "experts", *(f"read at N = {rows}" for rows in ROWS)]
    names += [f"each of {devices}" for devices in DEVICES]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for mode in ("bfloat16", "int8", "int4"):
        weights = weigh_as(args, mode)
        sizes = [weights.total, weights.experts, *(weights.read(args.mixture, rows) for rows in ROWS)]
        sizes += [weights.total // devices for devices in DEVICES]
        print(f"| {mode} | {' | '.join(map(human, sizes))} |")
    return 0


if __name__ == "__main__":
    finish(main)
