"""Token ids to a WAV with MNN and NumPy alone, by a folder's contract.json: what an app has to do, in its order.

    python client.py FOLDER out.wav --ids 335,358,74,347 --seconds 0.5 --seed 7

FOLDER is one that `sa3-convert bundle export` wrote, of a post-trained model. The samples are those of
`sa3-convert run`.
"""

import argparse
import itertools
import json
import math
import wave
from pathlib import Path

import MNN
import numpy as np


class Model:
    """A `.mnn` behind MNN's session API; lengths may change from run to run."""

    def __init__(self, path):
        self.interpreter = MNN.Interpreter(str(path))
        self.session = self.interpreter.createSession({"numThread": 4, "precision": 1})

    def run(self, **feeds):
        """Return the one output for inputs by name."""
        inputs = self.interpreter.getSessionInputAll(self.session)
        for name, array in feeds.items():
            self.interpreter.resizeTensor(inputs[name], array.shape)
        self.interpreter.resizeSession(self.session)
        for name, array in feeds.items():
            inputs[name].copyFrom(_tensor(np.ascontiguousarray(array)))
        self.interpreter.runSession(self.session)
        (output,) = self.interpreter.getSessionOutputAll(self.session).values()
        host = _tensor(np.zeros(output.getShape(), np.float32))
        output.copyToHostTensor(host)
        return np.array(host.getNumpyData()).reshape(output.getShape())


def _tensor(array):
    kind = MNN.Halide_Type_Int if array.dtype == np.int32 else MNN.Halide_Type_Float
    return MNN.Tensor(array.shape, kind, array, MNN.Tensor_DimensionType_Caffe)


def normals(seed):
    """Return what draws standard normal numbers: contract.json, `noise`."""
    draws = np.random.MT19937()
    draws._legacy_seeding(seed & 0xFFFFFFFF)

    def blocks(size):
        u = ((draws.random_raw(size) & 0xFFFFFF) * 2.0**-24).astype(np.float32).reshape(-1, 2, 8)
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), np.float32(2 * np.pi) * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    def draw(size):
        if size % 16 == 0:
            return blocks(size)
        # The uniforms behind the last whole block are drawn, and thrown away.
        whole = blocks(size - size % 16)
        draws.random_raw(size % 16)
        return np.concatenate([whole[: size - 16], blocks(16)])

    return draw


def generate(folder, ids, seconds, seed, steps=None):
    """Return samples [2, N] within ±1."""
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    base, models = folder / contract["base"], contract["components"]
    assert contract["sampler"]["name"] == "pingpong", "a base model needs Euler steps and guidance"
    lengths, schedule, chunks = contract["lengths"], contract["schedule"], contract["autoencoder"]["chunks"]["decoder"]
    rate, ratio, padding = lengths["sample_rate"], lengths["samples_per_latent"], lengths["padding_seconds"]
    channels, steps = contract["autoencoder"]["latent_dim"], steps or schedule["steps"]

    # Lengths: of the output, of the latents, and of those that count.
    samples, align = int(seconds * rate), lengths["align"]
    latents = math.ceil(math.ceil(int((seconds + padding) * rate) / ratio) / align) * align
    latents = min(latents, lengths["max_samples"] // ratio)
    valid = min(math.ceil(samples / ratio) + int(padding * rate / ratio), latents)

    # Conditioning. Each model is gone before the next one is loaded.
    tokens = models["text_encoder"]["inputs"][0]["shape"][1]
    padded = np.array([(ids + [0] * tokens)[:tokens]], np.int32)
    mask = (np.arange(tokens) < len(ids)).astype(np.int32)[None]
    prompt = Model(base / models["text_encoder"]["file"]).run(input_ids=padded, attention_mask=mask)
    duration = Model(base / models["number_conditioner"]["file"]).run(seconds=np.array([seconds], np.float32))
    constant = {
        "cross_attn_cond": np.concatenate([prompt, duration], axis=1),
        "global_embed": duration[:, 0],
        "local_add_cond": np.zeros((1, channels + 1, latents), np.float32),
        "padding_mask": (np.arange(latents) < valid).astype(np.float32)[None],
    }

    # Denoising, in ping-pong steps.
    u = np.linspace(1, 0, steps + 1).astype(np.float32)
    sigmas = 1 / (1 + np.exp(np.float32(schedule["logsnr_at_0"]) - np.float32(schedule["logsnr_span"]) * u))
    sigmas[0], sigmas[-1] = 1, 0
    noise, shape = normals(seed), (1, channels, latents)
    x, dit = noise(math.prod(shape)).reshape(shape), Model(base / models["dit"]["file"])
    for sigma, following in itertools.pairwise(sigmas):
        denoised = x - sigma * dit.run(x=x, t=np.array([sigma], np.float32), **constant)
        x = (1 - following) * denoised + following * noise(math.prod(shape)).reshape(shape)
    del dit

    # Decoding, a chunk and its context at a time.
    x = np.pad(x, ((0, 0), (0, 0), (0, -latents % chunks["align"])))
    decoder, audio = Model(base / models["decoder"]["file"]), []
    size = chunks["at_most"] - chunks["context_left"] - chunks["context_right"]
    for start in range(0, math.ceil(samples / ratio), size):
        first = max(0, start - chunks["context_left"])
        piece = decoder.run(latents=x[:, :, first : start + size + chunks["context_right"]])
        audio.append(piece[0, :, (start - first) * ratio : (start - first + size) * ratio])
    return np.clip(np.concatenate(audio, axis=1)[:, :samples], -1, 1)


def main():
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("wav")
    parser.add_argument("--ids", required=True, type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    samples = generate(given.folder, given.ids, given.seconds, given.seed)
    with wave.open(given.wav, "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(np.rint(samples.T * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
