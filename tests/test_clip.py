"""models/clip.py against transformers with small random weights, and the score."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.errors import UserError
from deco_jax.evaluation.clip_score import cosines
from deco_jax.models import clip
from deco_jax.models.network import functional
from tests.helpers import relative_error
from tests.metric_files import END, write_tokenizer

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def saved(request, tmp_path_factory):
    """A tiny CLIP of transformers, and its folder."""
    torch.manual_seed(0)
    tower = {"intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": request.param}
    config = transformers.CLIPConfig(
        text_config={**tower, "hidden_size": 16, "vocab_size": 100, "max_position_embeddings": 12, "eos_token_id": END},
        vision_config={**tower, "hidden_size": 24, "image_size": 32, "patch_size": 8},
        projection_dim=20,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms and biases count
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model, folder


def pooled(output):
    """transformers 5 returns an object, earlier versions the features."""
    return (output if torch.is_tensor(output) else output.pooler_output).numpy()


def test_towers(saved):
    model, folder = saved
    sizes, image, text = clip.load(folder)
    assert (sizes.shared, sizes.length, sizes.image.activation) == (20, 12, model.config.vision_config.hidden_act)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(3, 90, (3, 12))
    tokens[0, 4], tokens[1, 11], tokens[2, 7:9] = END, END, END
    with torch.no_grad():
        images = pooled(model.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())))
        texts = pooled(model.get_text_features(torch.from_numpy(tokens)))

    class Features(clip.ImageTower):
        def __call__(self, images):
            return self.features(images)

    of_images = functional(lambda rngs: Features(sizes, rngs=rngs))
    of_texts = functional(lambda rngs: clip.TextTower(sizes, rngs=rngs))
    assert relative_error(jax.jit(of_images.apply)(image, pixels), images) < 1e-5
    assert relative_error(jax.jit(of_texts.apply)(text, jnp.asarray(tokens, jnp.int32)), texts) < 1e-5


def test_preparation_is_that_of_the_published_processor():
    """The shorter side becomes `side`, the middle is seen; theirs rounds to whole levels after resizing."""
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=32
    )
    smooth = np.linspace(0, 255, 64)[:, None, None] * np.linspace(0.2, 1, 48)[None, :, None] * np.array([1, 0.5, 0.8])
    image = smooth.astype(np.uint8)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    ours = (np.asarray(clip.square(jnp.asarray(image[None]), 32))[0] - clip.MEAN) / clip.STD
    assert np.abs(ours - theirs).max() < 1.5 / 255 / clip.STD.min()


def test_tokens(saved):
    encode = clip.tokenizer(saved[1], 6)
    np.testing.assert_array_equal(
        encode(["a fox", "a photo of a fox zero one"]), [[1, 3, 8, END, 0, 0], [1, 3, 4, 5, 3, END]]
    )


def test_cosines():
    a, b = np.random.default_rng(1).normal(size=(2, 5, 7))
    expected = [p @ q / np.sqrt((p @ p) * (q @ q)) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosines(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5, atol=1e-6)


def test_missing_files(saved, tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file.*huggingface.co/openai/clip-vit-large-patch14"):
        clip.load(tmp_path)
    config = json.loads((saved[1] / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the activation 'relu' is not one of quick_gelu, gelu"):
        clip.load(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        clip.tokenizer(tmp_path, 6)
