"""Windows over latents whose outputs, put side by side, are exactly what one run over all latents would give.

A SAME autoencoder sees a bounded neighbourhood, so it is enough to run it on windows with that much context and to
throw the context's output away.

Chunked form (SAME-S): the first half of the layers works in aligned windows of w latents (two), the second half in
windows shifted by w/2. A latent at the start a of an aligned chunk sits in the shifted window [a − w/2, a + w/2), which
rests on the aligned windows [a − w, a) and [a, a + w): w latents to the left, and likewise to the right, and the
decoder's convolution of three patches reaches no further than its neighbours in those windows. Sliding form (SAME-L):
each layer reaches its window further, so depth × window latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sa3_convert.checkpoint.layout import SameLayout


@dataclass(frozen=True, slots=True)
class Reach:
    """What a latent's output depends on, for chunks that start and end at multiples of `align`."""

    align: int
    """The model works on multiples of this many latents."""
    left: int
    """Latents of context before a chunk, a multiple of `align`."""
    right: int
    """Latents of context after a chunk, a multiple of `align`."""

    @classmethod
    def of_decoder(cls, half: SameLayout) -> "Reach":
        """Return the reach of a decoder, whose mapping stands after the layers."""
        if half.chunk_size is not None:
            return cls._chunked(half, 1)
        return cls._sliding(half)

    @classmethod
    def of_encoder(cls, half: SameLayout) -> "Reach":
        """Return the reach of an encoder, whose mapping stands before the layers, so that its reach adds to theirs."""
        if half.chunk_size is not None:
            return cls._chunked(half, 1 if half.mapping_kernel == 1 else 2)
        return cls._sliding(half)

    @classmethod
    def _chunked(cls, half: SameLayout, contexts: int) -> "Reach":
        assert half.chunk_size is not None
        align = half.chunk_size // half.stride
        return cls(align, contexts * align, contexts * align)

    @classmethod
    def _sliding(cls, half: SameLayout) -> "Reach":
        assert half.sliding_window is not None
        left, right = (half.depth * side + (half.mapping_kernel > 1) for side in half.sliding_window)
        return cls(1, left, right)

    def whole(self, latents: int) -> int:
        """Return `latents` rounded up to what the model works on."""
        return -(-latents // self.align) * self.align

    @property
    def smallest_window(self) -> int:
        """The shortest window that moves on at all."""
        return self.left + self.right + self.align


@dataclass(frozen=True, slots=True)
class Window:
    """One run of the model over latents [start, stop), of whose output [keep_start, keep_stop) counts."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def windows(total: int, wanted: int, size: int, reach: Reach) -> Iterator[Window]:
    """Yield windows whose kept parts are, one after the other, the output for latents [0, wanted).

    All windows have the same length (one shape for the model): the shortest that needs no more of them.

    Args:
        total: latents there are, a multiple of `reach.align`.
        wanted: latents whose output is needed, at most `total`.
        size: latents per window at most, rounded up to a multiple of `reach.align`.
        reach: of the model.

    Raises:
        ValueError: `size` is below `reach.smallest_window`, or `total` or `wanted` cannot be.

    """
    if total % reach.align or not 0 < wanted <= total:
        raise ValueError(f"{wanted} of {total} latents, which come in multiples of {reach.align}")
    if size < reach.smallest_window:
        raise ValueError(f"windows of {size} latents; the model needs at least {reach.smallest_window}")
    # Nothing beyond the right context of what is wanted can change it.
    end = min(total, reach.whole(wanted) + reach.right)
    context = reach.left + reach.right
    count = max(1, -(-(end - context) // (reach.whole(size) - context)))
    size = reach.whole(-(-(end + (count - 1) * context) // count))
    done = 0
    while done < wanted:
        # The last window ends where the latents end, and overlaps the one before it further.
        start = max(0, min(done - reach.left, end - size))
        stop = min(start + size, end)
        keep_stop = wanted if stop == end else stop - reach.right
        yield Window(start, stop, done, keep_stop)
        done = keep_stop
