"""How the operators of ``ops/pruning.py`` become kernel calls."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgetrain import lowering_winograd as winograd
from edgetrain.choice import Sizes, choose
from edgetrain.graph import Node
from edgetrain.kernels.codes import SAMPLES
from edgetrain.lowering_products import ProductLowering
from edgetrain.ops.pruning import IMPORTANCE
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.ops.conv import Phase, Product


class PrunedLowering(ProductLowering):
    """Lowers products of a part of the error maps; lanes hold samples."""

    def kept_channels(self, node: Node, g: Product) -> None:
        """Emit the scores of an error map's channels, and the choice of the best."""
        grad, how = self.layout(node.x), IMPORTANCE[node.get("importance", "error")]
        scores, sources = self.workspace(8 * g.channels_out), g.forward_sources()
        self.emit(
            "channel_scores", (self.lanes, how), g.channels_out, grad_out=self.address(node.x),
            weight=self.address(node.input(1)), scores=scores, state=Ref("state"), stream=int(node.get("stream", 0)),
            channels=g.channels_out, blocks=self.blocks, rows=grad.rows, columns=grad.columns, grad_block=grad.block,
            grad_channel=grad.channel, grad_row=grad.row, weight_channel=g.weight_out, sources=self.table(sources),
            source_count=len(sources),
        )  # fmt: skip
        self.emit(
            "keep_channels", (), 1, scores=scores, kept=self.address(node.y), channels=g.channels_out,
            kept_count=node.y.size,
        )  # fmt: skip

    def pruned_input_grad(self, node: Node, g: Product) -> None:
        """As the dense gradient: Winograd, or one gather-multiply per phase over terms that are listed at run time."""
        kept = replace(g, channels_out=node.input(2).size)
        if self._winograd(kept, node.input(1), g.size):
            winograd.input_grad(self, node, kept, self.address(node.input(2)))
            return
        grad, out = self.layout(node.x), self.layout(node.y)
        weight = self.dense_weight(node.input(1), g)
        for phase in g.phases():
            pixels, blocks = self.merge_blocks(phase.pixels(grad, out), grad, out)
            terms, sources, count = self._listed_terms(node, g, phase)
            with self.chosen(Sizes("multiply", SAMPLES, self.lanes, g.channels_in, len(pixels), count, 1)) as tile:
                width, tiles = tile[0], -(-g.channels_in // tile[0])
                packed = self.workspace(4 * tiles * width * max(1, count))
                self.emit(
                    "pack_weights", (width,), tiles, weight=weight, packed=packed, sources=sources, term_count=count,
                    channel_count=g.channels_in, group_bytes=0, packed_group=0, channel_bytes=g.weight_in, tiles=tiles,
                    groups=1,
                )  # fmt: skip
                self.emit_multiply(
                    self.address(node.x), self.address(node.y), pixels, tile, terms=terms, term_count=count,
                    kind=SAMPLES, lanes=self.lanes, blocks=blocks, groups=1, channel_count=g.channels_in,
                    weight=packed, weight_group=0, weight_tile=4 * width * count, weight_step=4 * width,
                    bias=self.zeros(g.channels_in + width), x_block=grad.block, y_block=out.block, x_group=0, y_group=0,
                    y_channel=out.channel,
                )  # fmt: skip

    def _listed_terms(self, node: Node, g: Product, phase: Phase) -> tuple[Ref, Ref, int]:
        """Emit the tables of a phase for the kept channels; return terms, sources, and how many they are."""
        grad, kept, taps = self.layout(node.x), node.input(2), len(phase.taps)
        count = kept.size * taps
        terms, sources = self.workspace(8 * max(1, count)), self.workspace(8 * max(1, count))
        if count:
            first = list(zip(phase.terms(grad)[:taps], phase.sources()[:taps], strict=True))
            self.emit(
                "listed_terms", (), kept.size, kept=self.address(kept), kept_count=kept.size, taps=self.table(first),
                tap_count=taps, grad_channel=grad.channel, weight_channel=g.weight_out, terms=terms, sources=sources,
            )  # fmt: skip
        return terms, sources, count

    def pruned_weight_grad(self, node: Node, g: Product) -> None:
        """Zeros for the channels that are not kept; for the others as the dense gradient."""
        x, grad, kept = self.layout(node.x), self.layout(node.input(1)), node.input(2)
        sources = g.forward_sources()
        self.emit(
            "zero_unlisted", (), g.channels_out, target=self.address(node.y), kept=self.address(kept),
            kept_count=kept.size, weight_channel=g.weight_out, sources=self.table(sources), source_count=len(sources),
        )  # fmt: skip
        pixels = g.forward_pixels(x, grad)
        tile = choose(Sizes("correlate", SAMPLES, self.lanes, kept.size, len(pixels), len(sources))).tile
        few = replace(g, channels_out=kept.size)
        if self._winograd(few, node.get("like"), g.out):
            winograd.weight_grad(self, node, few, self.address(kept))
            return
        pixels, terms = g.forward_pixels(x, grad), list(zip(g.forward_terms(x), sources, strict=True))
        count = len(self.merge_blocks(pixels, x, grad)[0])
        with self.chosen(Sizes("correlate", SAMPLES, self.lanes, kept.size, count, len(terms), 1)) as tile:
            self.emit_correlate(
                self.address(node.x), x, self.address(node.input(1)), grad, self.address(node.y), pixels, terms, tile,
                kind=SAMPLES, groups=1, channel_count=kept.size, kernel="correlate_listed", kept=self.address(kept),
                weight_channel=g.weight_out,
            )  # fmt: skip

    def pruned_bias_grad(self, node: Node) -> None:
        """The sums of the kept channels."""
        grad, kept = self.layout(node.x), node.input(1)
        self.emit(
            "bias_gradient_listed", (self.lanes,), grad.channels, grad_out=self.address(node.x),
            grad_bias=self.address(node.y), kept=self.address(kept), kept_count=kept.size, blocks=self.blocks,
            rows=grad.rows, columns=grad.columns, grad_block=grad.block, grad_channel=grad.channel, grad_row=grad.row,
        )  # fmt: skip
