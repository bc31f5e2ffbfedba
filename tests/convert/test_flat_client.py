"""The flat folder is driven as the existing client drives it: MNN's session API, inputs resized and set by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.bundle.reader import Bundle
from sa3_convert.publish.export import export_bundles

MNN = pytest.importorskip("MNN")


class Client:
    """One model behind MNN's Interpreter, without anything of this package."""

    def __init__(self, path: Path) -> None:
        self.interpreter = MNN.Interpreter(str(path))
        self.session = self.interpreter.createSession({"numThread": 2})

    def run(self, output: str, resized: dict[str, tuple[int, ...]], feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
        inputs = self.interpreter.getSessionInputAll(self.session)
        for name, shape in resized.items():
            self.interpreter.resizeTensor(inputs[name], shape)
        self.interpreter.resizeSession(self.session)
        inputs = self.interpreter.getSessionInputAll(self.session)
        for name, array in feeds.items():
            kind = MNN.Halide_Type_Int if array.dtype == np.int32 else MNN.Halide_Type_Float
            data = np.ascontiguousarray(array)
            host = MNN.Tensor(array.shape, kind, data, MNN.Tensor_DimensionType_Caffe)
            assert inputs[name].getShape() == tuple(array.shape), name
            inputs[name].copyFrom(host)
        self.interpreter.runSession(self.session)
        tensor = self.interpreter.getSessionOutputAll(self.session)[output]
        shape = tensor.getShape()
        host = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), MNN.Tensor_DimensionType_Caffe)
        tensor.copyToHostTensor(host)
        return np.array(host.getNumpyData(), copy=True).reshape(shape)


def test_a_client_generates_from_the_flat_folder(toy_int8: Bundle, tmp_path: Path) -> None:
    export_bundles([toy_int8], tmp_path / "flat", "flat")
    flat = tmp_path / "flat" / "music"
    layout = toy_int8.layout
    assert layout.dit is not None
    assert layout.text_encoder is not None
    tokens, width, channels = layout.text_encoder.max_length, layout.dit.cond_token_dim, layout.dit.io_channels
    latents = 12

    ids = np.zeros((1, tokens), np.int32)
    ids[0, :3] = (5, 17, 40)
    text = Client(flat / "text_encoder_int4.mnn").run(
        "last_hidden_state", {}, {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int32)}
    )
    seconds = Client(flat / "number_conditioner_music_int8.mnn").run(
        "embedding", {}, {"seconds": np.array([0.5], np.float32)}
    )
    condition = np.concatenate([text, seconds], axis=1)
    dit = Client(flat / "dit_music_int8.mnn")
    x = np.random.default_rng(0).standard_normal((1, channels, latents), dtype=np.float32)
    lengths = {
        "x": (1, channels, latents),
        "local_add_cond": (1, channels + 1, latents),
        "padding_mask": (1, latents),
    }
    for sigma, following in ((1.0, 0.5), (0.5, 0.0)):
        velocity = dit.run(
            "out",
            lengths,
            {
                "x": x,
                "t": np.array([sigma], np.float32),
                "cross_attn_cond": condition,
                "global_embed": seconds[:, 0],
                "local_add_cond": np.zeros((1, channels + 1, latents), np.float32),
                "padding_mask": np.ones((1, latents), np.float32),
            },
        )
        x = x - (sigma - following) * velocity
    audio = Client(flat / "decoder_fused_wn.mnn").run("audio", {"latents": x.shape}, {"latents": x})
    assert condition.shape == (1, tokens + 1, width)
    assert audio.shape == (1, 2, 4096 * latents)
    assert np.isfinite(audio).all()
    assert audio.std() > 1e-4

    patches = layout.autoencoder.encoder.stride * latents
    patched = audio.reshape(1, 2, patches, 256).transpose(0, 1, 3, 2).reshape(1, 512, patches)
    latent = Client(flat / "encoder_int8.mnn").run(
        "encoder_latent", {"patched_audio": patched.shape}, {"patched_audio": patched}
    )
    assert latent.shape == (1, channels, latents)
    params = json.loads((flat / "bottleneck_params.json").read_text())
    assert np.shape(params["scaling_factor"]) == np.shape(params["bias"]) == (1, channels, 1)
    assert np.shape(params["running_std"]) == (1,)
    assert json.loads((flat / "tokenizer.json").read_text())["model"]
