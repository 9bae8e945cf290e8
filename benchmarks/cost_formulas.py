"""What a step of AdamW, SAM and X-SAM takes: operations, collectives and memory, as formulas.

Symbols, here and in docs/scaling.md: N all parameters, P the trainable ones, W processes, A micro-batches a step and
process, T tokens a step and process, k = `eigen_interval`, n = `power_iterations`, f = `eigen_batch_fraction`.
Everything is a mean over steps, and leaves out `eigen_warmup_steps`, whose further refreshes a run pays once.
"""

from dataclasses import dataclass
from math import ceil

from hf_xsam import XSAMConfig

MIB = 2**20
# Vectors of P numbers read or written besides the passes' own, counted in the code. AdamW: the norm for clipping (1),
# clipping (2), and w, g and two moments, of which all but g are written too (7). SAM: norms of g (2), the perturbation
# (2), the backup and its way back (4), the move (3) and the norm of a (1). X-SAM: the correction's dot product (2),
# factor (2) and sum (3).
ADAMW_VECTORS, SAM_VECTORS, CORRECTION_VECTORS = 10, 12, 7
# A power iteration: norms (4), its dot product (2), and the new v's factor, sum and length (7). An exact product is
# begun (1), and scaled (2); each piece is added (3). A finite difference: the step's norm (1) and scaling (2), the
# backup and its way back (4), the move (3), the difference (3) and its two factors (4).
ITERATION_VECTORS, EXACT_VECTORS, PIECE_VECTORS, DIFFERENCE_VECTORS = 13, 3, 3, 17


@dataclass(frozen=True)
class Policy:
    """How a step's gradient is made.

    Attributes:
        name: for tables.
        config: X-SAM's settings, with alpha 0 SAM's; None for plain AdamW.
        exact: whether Hessian-vector products are, else finite differences.
    """

    name: str
    config: XSAMConfig | None
    exact: bool = True

    @property
    def products(self) -> float:
        """n / k: Hessian-vector products a step."""
        config = self.config
        return config.power_iterations / config.eigen_interval if config and config.alpha > 0 else 0.0

    @property
    def gradients(self) -> float:
        """Gradients of the whole batch a step: 1 of AdamW, 2 of SAM, and n / k more by finite difference."""
        return (1 if self.config is None else 2) + (0 if self.exact else self.products)


def policies(exact: bool, xsam: XSAMConfig | None = None) -> list[Policy]:
    """Return AdamW, SAM, X-SAM (with the default settings unless others are given), and with the authors' policy."""
    return [
        Policy("AdamW", None),
        Policy("SAM", XSAMConfig(alpha=0.0)),
        Policy("X-SAM", xsam or XSAMConfig(), exact),
        Policy("X-SAM, paper", XSAMConfig.paper(), exact),
    ]


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama, and the rank of LoRA on all of its linear layers; 0 where all weights are trained."""

    width: int
    layers: int
    inner: int
    vocabulary: int
    key_width: int | None = None
    tied: bool = True
    lora_rank: int = 0

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of one block's q, k, v, o, gate, up and down, in this order."""
        h, inner, key = self.width, self.inner, self.key_width or self.width
        return [(h, h), (h, key), (h, key), (h, h), (h, inner), (h, inner), (inner, h)]

    @property
    def base(self) -> int:
        """Parameters without LoRA's."""
        block = sum(a * b for a, b in self.linear_layers) + 2 * self.width
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.layers * block + self.width

    @property
    def adapters(self) -> int:
        """LoRA's parameters: r (inputs + outputs) a linear layer."""
        return self.layers * self.lora_rank * sum(a + b for a, b in self.linear_layers)

    @property
    def trainable(self) -> int:
        """P."""
        return self.adapters if self.lora_rank else self.base


def flops(model: Llama, tokens: int, length: int) -> tuple[int, int]:
    """Return the operations of matrix products in forward + backward and in the backward pass through both.

    A product of M numbers of weight with T tokens is 2 M T operations. With trained weights it comes 1 + 2 times, and 6
    times in double backward; with frozen ones 1 + 1 and 2 times. Attention's two, 4 T length width, are as trained
    weights are. The inputs of the first block's q, k and v take no gradient where the embeddings are frozen.

    Args:
        model: the sizes.
        tokens: T, of sequences of equal length.
        length: of a sequence.
    """
    linear = model.layers * sum(a * b for a, b in model.linear_layers) + model.vocabulary * model.width
    attention = 2 * model.layers * length * model.width
    if not model.lora_rank:
        return 2 * tokens * 3 * (linear + attention), 2 * tokens * 6 * (linear + attention)
    first = sum(a * b for a, b in model.linear_layers[:3])
    first_adapters = 3 * model.lora_rank * model.width
    trained = model.adapters + attention
    once = 2 * linear - first + 3 * trained - first_adapters
    twice = 2 * linear - 2 * first + 6 * trained - 4 * first_adapters
    return 2 * tokens * once, 2 * tokens * twice


def share(policy: Policy, micro_batches: int, rows: int) -> float:
    """Return the share of a step's examples that an exact product takes: f, in whole rows of ceil(f A) micro-batches.

    Args:
        policy: whose f it is.
        micro_batches: A.
        rows: examples of a micro-batch.
    """
    assert policy.config is not None
    wanted = policy.config.eigen_batch_fraction * micro_batches
    return ceil(wanted) * ceil(wanted / ceil(wanted) * rows) / (micro_batches * rows)


def pieces(policy: Policy, micro_batches: int) -> int:
    """Return q, in how many pieces an exact product takes its share: ceil(f A) micro-batches, below f = 1 in quarters.

    Args:
        policy: whose f it is.
        micro_batches: A.
    """
    assert policy.config is not None
    wanted = policy.config.eigen_batch_fraction * micro_batches
    chosen = ceil(wanted)
    return chosen if policy.config.eigen_batch_fraction == 1 else chosen * ceil(4 * wanted / chosen)


def step_flops(policy: Policy, model: Llama, tokens: int, length: int, micro_batches: int) -> float:
    """Return the operations of a step of one process.

    gradients * F, and for exact products s (F + n D) / k where their share s is one piece, whose graph they keep, else
    s n (F + D) / k; F and D from `flops`, D / F is 2, or about 1 with LoRA.
    """
    gradient, double = flops(model, tokens, length)
    total = policy.gradients * gradient
    if policy.exact and policy.products:
        assert policy.config is not None
        graphs = 1 / policy.config.eigen_interval if pieces(policy, micro_batches) == 1 else policy.products
        rows = tokens // length // micro_batches
        total += share(policy, micro_batches, rows) * (graphs * gradient + policy.products * double)
    return total


def buckets(size: float) -> int:
    """Return the all-reduces that DDP makes of `size` bytes: a bucket of 1 MiB, and then of 25 MiB each.

    Tensors are not cut, so that a real model may have a few fewer.
    """
    return 1 + ceil(max(0, size - MIB) / (25 * MIB))


def ddp_traffic(policy: Policy, trainable: int, number_bytes: int = 4) -> tuple[float, float]:
    """Return a step's all-reduces of gradients and products, and the bytes of what is reduced.

    (gradients + n / k if exact) * P * `number_bytes`. A ring sends 2 (W - 1) / W times that from each process.
    """
    size = trainable * number_bytes
    products = policy.products if policy.exact else 0
    return policy.gradients * buckets(size) + products * ceil(size / (25 * MIB)), (policy.gradients + products) * size


def fsdp_traffic(
    policy: Policy, model: Llama, micro_batches: int, gathered_bytes: int = 2, reduced_bytes: int = 4
) -> dict[str, float]:
    """Return the bytes of whole tensors that a step gathers and scatters under FSDP2; (W - 1) / W of them travel.

    Weights are gathered in the forward and in the backward pass of every micro-batch, 2 N A gradients *
    `gathered_bytes`, and gradients scattered once each, P gradients * `reduced_bytes`. (The root's are gathered once.)
    """
    everything = model.base + model.adapters
    return {
        "gathered_bytes": 2 * everything * micro_batches * policy.gradients * gathered_bytes,
        "scattered_bytes": model.trainable * policy.gradients * reduced_bytes,
    }


def fsdp_collectives(policy: Policy, units: int, micro_batches: int) -> tuple[float, float]:
    """Return a step's all-gathers and reduce-scatters under FSDP2: (2 U - 1) A gradients, and U gradients.

    Args:
        policy: how a step's gradient is made.
        units: U, the modules that are gathered as one: each block, and the root, which backward finds still gathered.
        micro_batches: A.
    """
    return (2 * units - 1) * micro_batches * policy.gradients, units * policy.gradients


def extra_copies(policy: Policy) -> tuple[int, int]:
    """Return the vectors of P float32 numbers held over AdamW's four (weights, gradients, moments), at most.

    The first number is during forward and backward passes, whose activations come on top, the second between them.
    SAM: the weights' backup; between passes the perturbation too. X-SAM: v beside them. A refresh holds v,
    and in its passes the v to come and what autograd has of each weight's second derivative, which has two parts; by
    finite difference the backup and the gradient at w.
    """
    if policy.config is None:
        return 0, 0
    if not policy.products:
        return 1, 2
    return 3, 3


def state_bytes(model: Llama, shards: int) -> float:
    """Return AdamW's bytes a process: 16 P / W (float32 weights, gradients, moments), frozen weights in bfloat16."""
    frozen = model.base if model.lora_rank else 0
    return (16 * model.trainable + 2 * frozen) / shards


def vectors(policy: Policy, micro_batches: int) -> float:
    """Return the vectors of P numbers that a step reads or writes: 10 of AdamW, 22 of SAM, 29 and a refresh's of X-SAM.

    Each gradient adds 3 (A - 1) for the sum over micro-batches.
    """
    total = ADAMW_VECTORS + 3 * (micro_batches - 1) * policy.gradients
    if policy.config is not None:
        total += SAM_VECTORS
    if policy.products:
        product = EXACT_VECTORS + PIECE_VECTORS * pieces(policy, micro_batches) if policy.exact else DIFFERENCE_VECTORS
        total += CORRECTION_VECTORS + policy.products * (ITERATION_VECTORS + product)
    return total


def launches(policy: Policy, layers: int, micro_batches: int) -> float:
    """Return the blocks' forward + backward passes, each of which costs its calls however small its tensors are.

    L A gradients, and for an exact product 3 L q more, for its pieces.
    """
    total = policy.gradients * micro_batches
    if policy.exact and policy.products:
        total += 3 * policy.products * pieces(policy, micro_batches)
    return layers * total
