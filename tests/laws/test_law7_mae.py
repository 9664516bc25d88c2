"""Law 7: our MAE equals the published MAE on the same weights, image and mask.

The published computation (He et al. 2022, arXiv 2111.06377, sections 3 and A.1) is written out
here in float64 from its formulas, with nothing of ours and nothing of timm's but the tensors by
name.
"""

import math

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.vit import patchify, position_embedding, unpatchify

SMALL = [
    "model.width=48", "model.depth=3", "model.num_heads=4", "model.decoder_width=32",
    "model.decoder_depth=2", "model.decoder_num_heads=4", "data.image_size=32",
    "model.patch_size=8", "parallel.precision=fp32",
]  # fmt: skip


def make(*overrides):
    torch.manual_seed(3)
    model = MaskedAutoencoder(load_config(None, [*SMALL, *overrides]))
    with torch.no_grad():  # trained biases and norms are not zero and one
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def norm(x, w, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def block(x, w, name, heads):
    tokens, width = x.shape
    qkv = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    q, k, v = qkv.reshape(tokens, 3, heads, width // heads).permute(1, 2, 0, 3)
    attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), dim=-1)
    x = x + linear((attention @ v).transpose(0, 1).reshape(tokens, width), w, f"{name}.attn.proj")
    hidden = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, w, f"{name}.mlp.fc2")


def published_loss(w, image, noise, p, mask_ratio, norm_pix_loss, heads, decoder_heads):
    """Loss of one image (3, S, S), patch by patch."""
    side = image.shape[1] // p
    patches, embedded = [], []
    for row in range(side):
        for column in range(side):
            patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            patches.append(patch.permute(1, 2, 0).reshape(-1))
            kernel = w["patch_embed.proj.weight"]
            embedded.append((kernel * patch).sum(dim=(1, 2, 3)) + w["patch_embed.proj.bias"])
    x = torch.stack(embedded) + w["pos_embed"][0, 1:]
    shuffle = sorted(range(side**2), key=lambda i: float(noise[i]))
    visible = shuffle[: int(side**2 * (1 - mask_ratio))]
    tokens = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], x[visible]])
    for i in range(sum(name.endswith("norm1.weight") and name.startswith("blocks") for name in w)):
        tokens = block(tokens, w, f"blocks.{i}", heads)
    latent = linear(norm(tokens, w, "norm"), w, "decoder_embed")
    full = w["mask_token"][0].repeat(side**2, 1)
    for position, patch in enumerate(visible):
        full[patch] = latent[1 + position]
    full = torch.cat([latent[:1], full]) + w["decoder_pos_embed"][0]
    for i in range(sum(name.startswith("decoder_blocks") and "norm1.weight" in name for name in w)):
        full = block(full, w, f"decoder_blocks.{i}", decoder_heads)
    prediction = linear(norm(full, w, "decoder_norm"), w, "decoder_pred")[1:]
    losses = []
    for i in set(range(side**2)) - set(visible):
        target = patches[i]
        if norm_pix_loss:
            target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
        losses.append(((prediction[i] - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_loss_equals_the_published_formula(norm_pix_loss, mask_ratio):
    model = make(f"model.norm_pix_loss={norm_pix_loss}".lower(), f"model.mask_ratio={mask_ratio}")
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=draws, dtype=torch.float64)
    noise = torch.rand(3, 16, generator=draws, dtype=torch.float64)
    model.double()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    ours = model(images, noise)
    for image, its_noise, loss in zip(images, noise, ours, strict=True):
        expected = published_loss(
            weights, image, its_noise, 8, mask_ratio, norm_pix_loss, heads=4, decoder_heads=4
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_float32_is_near_float64():
    model = make()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    single = model(images, noise)
    double = model.double()(images.double(), noise.double())
    assert torch.allclose(single.double(), double, rtol=1e-5)


def test_positions_are_the_published_sines_and_cosines():
    width, side = 16, 3
    table = position_embedding(side, width)[0]
    assert (table[0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for at in (column, row):  # the published grid runs over columns first
                angles = [at / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            value = table[1 + row * side + column]
            assert torch.allclose(value, torch.tensor(expected), atol=1e-6)


def test_planted_mistakes_are_caught():
    model = make().double()
    images, noise = torch.randn(1, 3, 32, 32).double(), torch.rand(1, 16).double()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    loss = model(images, noise).item()
    arguments = (images[0], noise[0], 8, 0.75, True, 4, 4)
    assert published_loss(weights, *arguments).item() == pytest.approx(loss, rel=1e-12)
    weights["pos_embed"] = weights["pos_embed"].roll(1, dims=1)
    assert published_loss(weights, *arguments).item() != pytest.approx(loss, rel=1e-6)


def test_patch_order_is_channels_last():
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    patches = patchify(images, 2)
    # first patch of the first image: pixels (0,0) (0,1) (1,0) (1,1), each red green blue
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert unpatchify(patches, 2).equal(images)
