"""Damage to a trained model's weights: rounding to few bits, and noise. A flat minimum should bear more of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from watching import Batches, scores_of

GROUP = 64
DRAWS = 3  # of the noise, whose scores are averaged
Change = Callable[[Tensor], Tensor]


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of linear layers and convolutions, by name: what is quantized for inference."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return the weight rounded to nearest, to at most 2^bits values in each group of 64 along its inputs.

    A group's values are evenly spaced from its least weight to its largest. A convolution's inputs are channels times
    kernel; the last group of a row may be shorter.
    """
    rows = weight.flatten(1)
    return torch.cat([_on_grid(group, bits) for group in rows.split(GROUP, dim=1)], dim=1).view_as(weight)


def _on_grid(group: Tensor, bits: int) -> Tensor:
    low, high = group.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + step * ((group - low) / step.clamp(min=torch.finfo(step.dtype).tiny)).round()


def with_noise(weight: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Return the weight plus Gaussian noise, whose standard deviation is `level` times the weight's."""
    return weight + level * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


@contextmanager
def damaged(model: nn.Module, change: Change) -> Iterator[None]:
    """Put `change(weight)` in place of each matrix within the block, and the weights back after it, bit for bit."""
    weights = matrices(model)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        try:
            for weight in weights.values():
                weight.copy_(change(weight))
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(kept[name])


def damages(seed: int) -> dict[str, list[Change]]:
    """Return the kinds of damage, each with its draws."""
    return {
        **{f"int{bits}": [partial(rounded, bits=bits)] for bits in (4, 3)},
        **{f"noise_{level}": [_noise(level, seed * DRAWS + draw) for draw in range(DRAWS)] for level in (0.1, 0.2)},
    }


def _noise(level: float, seed: int) -> Change:
    return partial(with_noise, level=level, generator=torch.Generator().manual_seed(seed))


def scores_after_damage(model: nn.Module, batches: Batches, seed: int) -> Mapping[str, dict[str, float]]:
    """Return the model's scores on the batches after each kind of damage, as means over its draws."""
    found = {}
    for name, draws in damages(seed).items():
        each = []
        for change in draws:
            with damaged(model, change):
                each.append(scores_of(model, batches))
        found[name] = {score: sum(one[score] for one in each) / len(each) for score in each[0]}
    return found
