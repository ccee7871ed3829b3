"""A penalty on drawing the tokens that a text has already, those of its context included: Keskar et al. 2019 (CTRL,
arXiv 1909.05858), section 4.1, in the form of transformers' RepetitionPenaltyLogitsProcessor.

What each row has is a mask, bool [N,V], so that a step keeps its shape; [N,0] where nothing is penalised.
Shapes: N rows, S positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NOTHING = torch.zeros(0, 0, dtype=torch.bool, device="cpu")


def seen_in(context: Sequence[int], rows: Tensor, penalty: float, vocabulary: int) -> Tensor:
    """What every one of the rows [N] has of a context that they continue."""
    seen = torch.zeros(len(rows), vocabulary if penalty != 1 else 0, dtype=torch.bool, device=rows.device)
    if seen.numel():
        seen[:, torch.tensor(context, device=rows.device)] = True
    return seen


def add(seen: Tensor, tokens: Tensor) -> Tensor:
    """The same mask, with tokens [N,k] in it."""
    return seen.scatter_(1, tokens, True) if seen.numel() else seen


def along(seen: Tensor, tokens: Tensor) -> Tensor:
    """What a row has by each of the positions where tokens [N,S] follow: [N,S,V]."""
    several = seen[:, None].repeat(1, tokens.shape[1], 1)  # [N,S,V]
    for place in range(tokens.shape[1]):
        add(several[:, place], tokens[:, : place + 1])
    return several


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [N,V], of what is seen divided by the penalty where they are above 0, else multiplied by it."""
    if not seen.numel():
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
