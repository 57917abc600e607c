"""SWAT: sparse weights and sparse saved activations over a dense master copy.

Source: Raihan and Aamodt, "Sparse Weight Activation Training", NeurIPS 2020, algorithm 1 and section 3, and its
reference code (AamirRaihan/SWAT) for constants and the rules about first and last layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgetrain.densities import DISTRIBUTIONS
from edgetrain.errors import UsageError
from edgetrain.keeping import keep_masks, keep_residual_masks
from edgetrain.optim import Optimizer
from edgetrain.saved_activations import compress_activations, mask_activations
from edgetrain.sparsity.layers import SparseLayer, entries, shapes_of
from edgetrain.sparsity.policy import INDEX_BYTES, Floats, Mask, SparsityPolicy, largest

if TYPE_CHECKING:
    from edgetrain.autodiff import TrainingGraph
    from edgetrain.sparsity.topology import Topology

VARIANTS = ("unstructured", "erk", "momentum", "structured")
# SWAT-M leaves no layer denser than this (reference code).
_DENSEST = 0.99
# Steps between the first choices. What is not in the pattern moves unseen, and enters all at once: after 100 steps from
# the start the loss of LeNet-5 went from 1.2 to 309. After 8 epochs of 10,000 images with 90 % zeros (three seeds) it
# had 71.8 % with 100 steps from the start, 84.6 % with 10 always, 84.4 % so; after 20 epochs of 60,000 all are alike.
_SHORTEST = 10
# Steps over which a weight outside the pattern falls to ``fade`` of itself.
_FADING = 100


@dataclass(frozen=True)
class SWAT(SparsityPolicy):
    """Forward pass and error propagation with the largest weights, weight gradients from the largest activations.

    All weights keep their master copy, receive the dense gradient and are updated; so which of them are the largest
    may change, and does so every ``refresh`` steps. The forward pass sees all activations; only the copy that is kept
    for the weight gradient is thinned. The network that predicts, and is exported, has the sparse weights.

    Training may diverge at first unless the norm of the gradients is bounded (LeNet-5 with 0.05 and momentum 0.9 does).
    ``edgetrain fit`` bounds it to 1; a learner does what its optimizer says: ``SGD(..., clip_norm=1.0)``.

    What that saves in memory depends on the network, for a list takes 8 bytes per number kept and has room for a
    quarter more. Where a map is kept for the weight gradient alone (sums with another branch) the list, and bits of
    the Relu, take its place: ResNet-20 at batch 32 plans 35.6 MiB with 90 % zeros instead of 44.6 (ERK, whose first
    layers are denser, 43.1). A normalised map is not kept in dense training either, but computed again, so its list
    comes on top: MobileNetV1 of width 0.25 plans 7.3 MiB instead of 6.7. LeNet-5 plans 2.17 instead of 1.75.

    Attributes:
        weights, activations: shares of zeros.
        variant: ``"unstructured"``: the same density in all layers but the first, which is dense; ``"erk"``: densities
            by Erdos-Renyi-kernel; ``"momentum"``: by the mean momentum of every layer's weights, anew at each refresh;
            ``"structured"``: whole kernels (output channel, input channel) by their L1 norm, uniform densities;
            fully connected layers stay unstructured.
        group: what of the saved activations is kept or dropped together: ``"element"``: every number for itself, as
            published; ``"lanes"``: vectors, one pixel of the samples that lie in the lanes, of convolutions only, which
            costs more accuracy (docs/sparse_accuracy.md). Both are stored as lists, and skipped, but for single numbers
            where the gradients skip the exact zeros behind a max pool instead (LeNet-5). Single numbers are listed for
            convolutions of one group on maps of 16 pixels and more, with at most 0.32 of the numbers kept, 0.24 where
            samples fill half a vector or more (batches of 5 and more with AVX-512), and never for ``momentum``, which
            may keep any share; for others they are zeros in a copy, which saves neither time nor memory.
        refresh: steps between choices of the weights, once that is a twentieth of all steps; at first 10, then twice
            as many whenever the number of steps has doubled. (The reference code applies a threshold of 10 to 1000
            steps ago to the present weights; here the pattern itself is kept in between, so the density is exact at
            every step.)
        dense_first: whether the first layer stays dense; ``None``: in the unstructured and structured variants.
        dense_last: whether the last layer stays dense.
        rescale: whether the weights that a learner begins with are scaled so that the largest have the norm that all
            had; ``None``: those of a builder are, trained ones are not (``Graph.trained``). (Not in the reference code:
            its networks have batch normalisation; LeNet-5 without it stays at 10 % accuracy at 90 %, as every layer
            passes on a quarter of the variance.)
        fade: what a weight outside the pattern keeps of itself over 100 steps, 0 to 1; 1: everything. Its part for the
            steps to come is multiplied in when weights are chosen, at the first choice too. (Not in Raihan and Aamodt,
            where such weights grow as fast as all others until they swap places back and forth; after Zhou et al.,
            "Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch", ICLR 2021, SR-STE, whose decay
            follows the learning rate. With 90 % zeros by ERK, on held-out images, 1, 0.95 and 0.9: LeNet-5 89.5, 90.4,
            90.3 %; ResNet-8 91.8 and 92.2 % with 1 and 0.95.)
        linear: whether saved activations of fully connected layers are pruned too, as published, with ``"element"``:
            as zeros in a copy, which saves neither time nor memory and costs LeNet-5 a point there.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> SWAT(weights=0.8, activations=0.8, variant="erk").refresh
        100
    """

    activations: float = 0.9
    variant: str = "unstructured"
    group: str = "element"
    refresh: int = 100
    dense_first: bool | None = None
    dense_last: bool = False
    rescale: bool | None = None
    fade: float = 0.95
    linear: bool = False

    name: ClassVar[str] = "swat"
    compact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_zeros("activations")
        self.limits.one_of("variant", VARIANTS)
        self.limits.one_of("group", ("element", "lanes"))
        self.limits.count("refresh")
        self.limits.flag("dense_first", optional=True)
        self.limits.flag("dense_last")
        self.limits.flag("rescale", optional=True)
        self.limits.flag("linear")
        if self.linear and self.group != "element":
            raise UsageError("swat: linear=true with group=lanes, for convolutions only; expected group=element")
        if self.variant == "momentum" and self.weights == 0 < self.activations:
            raise UsageError(
                "swat: variant=momentum with weights=0; it shares out what is kept by the momentum of sparse weights: "
                "expected weights above 0, or another variant for activations alone"
            )
        self.limits.number("fade", lambda fade: 0 <= fade <= 1, "a number from 0 to 1; 1 lets nothing fade")

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer without momentum for the momentum variant.

        Raises:
            UsageError: it keeps no moments.
        """
        if self.variant == "momentum" and not optimizer.moments:
            raise UsageError("swat: variant 'momentum' needs an optimizer with momentum; give momentum=0.9")

    @property
    def dense_ends(self) -> tuple[bool, bool]:
        """Whether the first and the last layer stay dense."""
        by_rule = self.variant in ("unstructured", "structured")
        return by_rule if self.dense_first is None else self.dense_first, self.dense_last

    @property
    def skips_nothing(self) -> bool:
        """Whether the settings ask for dense training."""
        return self.weights == self.activations == 0

    def densities(self, layers: Sequence[SparseLayer]) -> dict[str, float]:
        """Return the densities of the weights before the first step."""
        return self._spread(layers, 1 - self.weights)

    def activation_densities(self, layers: Sequence[SparseLayer]) -> dict[str, float]:
        """Return the densities of the saved activations that are pruned, by weight.

        Spread as those of the weights, over all layers: those of fully connected ones are left out afterwards.
        """
        densities = self._spread(layers, 1 - self.activations)
        return {layer.weight: densities[layer.weight] for layer in layers if self.linear or len(layer.shape) > 2}

    def _spread(self, layers: Sequence[SparseLayer], density: float) -> dict[str, float]:
        return DISTRIBUTIONS["erk" if self.variant == "erk" else "uniform"](shapes_of(layers), density)

    def capacity(self, layer: SparseLayer, density: float) -> int:
        """Return the most weights that a layer will have: the momentum variant moves them between layers."""
        if self.variant == "momentum":
            return layer.size
        taps = layer.taps if self.variant == "structured" else 1
        return taps * entries(layer.size // taps, density)

    def densities_for(self, layers: Sequence[SparseLayer], arrays: Mapping[str, Floats]) -> dict[str, float]:
        """Return the densities for given arrays; the momentum variant leaves no layer dense, here either."""
        densities = super().densities_for(layers, arrays)
        if self.variant != "momentum" or self.weights == 0:
            return densities
        return {name: min(density, _DENSEST) for name, density in densities.items()}

    def initial(
        self, layer: SparseLayer, array: Floats, density: float, rng: np.random.Generator, trained: bool
    ) -> tuple[Mask, float]:
        """Return the pattern of the largest weights, and what gives them the norm that all weights had."""
        mask = self._mask(layer, array, density)
        squares = np.square(array, dtype=np.float64)
        whole = float(squares.sum())
        squares[~mask] = 0
        kept = float(squares.sum())
        return mask, math.sqrt(whole / kept) if self._rescales(trained) and kept else 1.0

    def beginning(self, trained: bool) -> str:
        """Return whether ``initial`` scales, as text."""
        if self._rescales(trained):
            return "begins with the largest weights, scaled to the norm of all (rescale=false leaves them as they are)"
        return "begins with the largest of the given weights as they are (rescale=true scales them)"

    def _rescales(self, trained: bool) -> bool:
        return not trained if self.rescale is None else self.rescale

    @property
    def needs_lists(self) -> bool:
        """Whether activations are pruned by vectors of samples."""
        return self.group == "lanes"

    def rewrite(self, train: TrainingGraph, layers: Sequence[SparseLayer], lanes: int) -> dict[str, int]:
        """Let weight gradients read pruned activations."""
        densities = {n: d for n, d in self.activation_densities(layers).items() if d < 1}
        densest = 1.0 if self.variant == "momentum" else None
        records = compress_activations(train, densities, self.refresh, densest, self.group, lanes)
        if self.group == "element":
            others = {name: density for name, density in densities.items() if name not in records}
            records |= mask_activations(train, others, self.refresh, merge=lanes > 0)
        if records:  # of Relus' outputs that no weight gradient reads any more, bits are enough
            # Where lanes hold channels, residual normalisations have no kernels for bits.
            for keep in (keep_masks, keep_residual_masks) if lanes else (keep_masks,):
                train.forward_count += keep(train.graph, train.forward_count)
        return records

    def prunes_activations(self, layers: Sequence[SparseLayer]) -> bool:
        """Whether a layer's saved activations lose anything."""
        return any(density < 1 for density in self.activation_densities(layers).values())

    def change_bytes(self, size: int, count: int) -> int:
        """Return about how much memory a change takes: sizes and their order, or the index beside the mask.

        The former are 8.5 bytes a weight (measured, as for ``INDEX_BYTES``).
        """
        return max(9 * size, size + INDEX_BYTES * count)

    def changes_before(self, step: int) -> bool:
        """At the end of a period."""
        return step % self._period(step) == 0

    def before_step(self, topology: Topology, step: int) -> None:
        """Choose the largest weights of every layer anew."""
        if self.variant == "momentum" and step:
            topology.densities |= momentum_densities(topology, 1 - self.weights)
            topology.prune_activations(momentum_densities(topology, 1 - self.activations))
        fade = np.float32(self.fade ** (self._period(step) / _FADING))
        for layer in topology.layers:
            master = topology.master(layer)
            mask = self._mask(layer, master, topology.densities[layer.weight])
            topology.set(layer, np.flatnonzero(mask))
            # A product with ones and ``fade``: ``where=~mask`` took 0.42 ms for 48,000 weights, this takes 0.02.
            master *= np.maximum(mask, fade, dtype=np.float32)

    def _period(self, step: int) -> int:
        """Return the steps between choices at a time: 10 up to step 400, 20 up to 800, and so on up to ``refresh``."""
        return min(self.refresh, _SHORTEST << (step // (40 * _SHORTEST)).bit_length())

    def _mask(self, layer: SparseLayer, array: Floats, density: float) -> Mask:
        if self.variant != "structured" or layer.taps == 1:
            return largest(np.abs(array), entries(layer.size, density))
        norms = np.abs(array).reshape(*layer.shape[:2], layer.taps).sum(2)
        kernels = largest(norms, entries(norms.size, density))
        return np.broadcast_to(kernels.reshape(*kernels.shape, *[1] * (len(layer.shape) - 2)), layer.shape)


def momentum_densities(topology: Topology, density: float) -> dict[str, float]:
    """Return densities by which layers share all weights in proportion to their mean momentum over existing weights.

    No layer gets more than 0.99 of its weights; what is left over goes to the others, each as much as it can take.
    Source: the reference code of SWAT-M, after Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019.
    """
    sizes = {layer.weight: layer.size for layer in topology.layers}
    means = {layer.weight: topology.mean_momentum(layer) for layer in topology.layers}
    total = sum(means.values()) or 1.0
    wanted = density * sum(sizes.values())
    most = {name: _DENSEST * size for name, size in sizes.items()}
    counts = {name: min(most[name], means[name] / total * wanted) for name in sizes}
    rest = wanted - sum(counts.values())
    while rest > 1e-6 * wanted:
        room = [name for name in sizes if counts[name] < most[name]]
        for name in room:
            counts[name] = min(most[name], counts[name] + rest / len(room))
        rest = wanted - sum(counts.values())
        if not room:
            break
    return {name: counts[name] / sizes[name] for name in sizes}
