"""The denoising loop of one generation: a model, a conditioning and noise to steps."""

from collections.abc import Iterator

import numpy as np

from sa3_convert.arrays import Floats, Session, constant, placed_like
from sa3_convert.runtime.conditioning import Conditioning, Lengths
from sa3_convert.runtime.request import ResolvedRequest
from sa3_convert.runtime.sampling import SAMPLERS, Noise, Step, Velocity


def denoised(
    velocity: Velocity,
    request: ResolvedRequest,
    channels: int,
    sizes: Lengths,
    noise: Noise,
    initial: Floats | None = None,
) -> Iterator[Step]:
    """Yield the steps of the denoising loop, whatever gives the velocity and the noise.

    Args:
        velocity: of the DiT, of a wrapper around it, or one that was recorded.
        request: gives sampler, schedule, and how much of the initial latents is replaced by noise.
        channels: of the latents, C.
        sizes: lengths of the generation.
        noise: drawn from once for the start, then as the sampler does.
        initial: latents [1, C, T] to start from.

    """
    start, level = noise((1, channels, sizes.latents)), request.init_noise_level
    if initial is not None:
        start = placed_like(initial, start) * np.float32(1 - level) + start * np.float32(level)
    return SAMPLERS[request.sampler](velocity, start, request.schedule(sizes), noise)


def velocity_of(dit: Session, condition: Conditioning, local: Floats, padding_mask: Floats) -> Velocity:
    """Return the velocity of a loaded DiT under a conditioning."""
    same = {
        "cross_attn_cond": constant(condition.cross_attn_cond),
        "global_embed": constant(condition.global_embed),
        "local_add_cond": constant(local),
        "padding_mask": constant(padding_mask),
    }

    def velocity(x: Floats, t: np.float32) -> Floats:
        return dit.run({"x": x, "t": np.array([t], np.float32), **same})["out"]

    return velocity
