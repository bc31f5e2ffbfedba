"""What the DiT is told about the wanted sound: prompt tokens, duration, and what is kept of given audio."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_convert.runtime.prompts import Tokens
from sa3_convert.session import Session

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Inputs of the DiT that stay the same in all steps, under one prompt."""

    cross_attn_cond: Floats
    """[1, tokens + 1, D]: the prompt's tokens, then the duration's."""
    global_embed: Floats
    """[1, D], of the duration."""

    def without_prompt(self) -> "Conditioning":
        """Return what guidance compares with when there is no negative prompt: zeros for every token."""
        return Conditioning(np.zeros_like(self.cross_attn_cond), self.global_embed)


def prompt_embedding(text_encoder: Session, tokens: Tokens) -> Floats:
    """Return [1, tokens, D] float32; at padded positions it is the learned padding."""
    return text_encoder.run({"input_ids": tokens.ids, "attention_mask": tokens.mask})["last_hidden_state"]


def seconds_embedding(number_conditioner: Session, seconds: float) -> Floats:
    """Return [1, 1, D] float32 for a duration."""
    return number_conditioner.run({"seconds": np.array([seconds], np.float32)})["embedding"]


def conditioning(prompt: Floats, seconds: Floats) -> Conditioning:
    """Join the embeddings of prompt and duration."""
    return Conditioning(np.concatenate((prompt, seconds), axis=1), seconds[:, 0])


def negative_conditioning(prompt: Floats, tokens: Tokens, seconds: Floats) -> Conditioning:
    """Join the embeddings of a negative prompt and the duration; padded positions are zero, not the learned padding."""
    return conditioning(prompt * tokens.mask[:, :, np.newaxis].astype(np.float32), seconds)


def local_conditioning(channels: int, length: int, mask: Floats | None = None, latents: Floats | None = None) -> Floats:
    """Return the DiT's `local_add_cond`, [1, channels + 1, T] float32: inpainting mask and what it keeps.

    Args:
        channels: of the latents, C.
        length: T.
        mask: [1, 1, T], 1 = keep; without inpainting everything is zero.
        latents: [1, C, T], of the audio that is inpainted.

    """
    if mask is None or latents is None:
        return np.zeros((1, channels + 1, length), np.float32)
    return np.concatenate((mask, latents * mask), axis=1)
