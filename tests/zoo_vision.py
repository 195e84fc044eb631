"""Vision models: transformers, windows, depthwise and transposed convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import Mean, with_statistics
from zoo import N_CLASSES, WIDTH, Entry, Net, batches, classes, head, labelled
from zoo_attention import heads, linears


def vision_transformer(m: Net, x: Tensor) -> Tensor:  # [N, 3, 4, 6]
    """Patches, a class token, learned positions, layer scale (Touvron et al. 2021)."""
    patches = m.patches(x).flatten(2).transpose(1, 2)  # [N, 6, D]
    h = torch.cat([m.token.expand(len(x), -1, -1), patches], dim=1) + m.positions
    q, k, v = m.qkv(m.norm1(h)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    h = h + m.scale1 * m.out(y)
    h = h + m.scale2 * m.down(F.gelu(m.up(m.norm2(h))))
    return m.head(m.norm3(h)[:, 0])


def make_vision_transformer() -> nn.Module:
    return Net(
        vision_transformer,
        patches=nn.Conv2d(3, WIDTH, 2, 2), token=torch.randn(1, 1, WIDTH), positions=torch.randn(1, 7, WIDTH),
        scale1=torch.rand(WIDTH), scale2=torch.rand(WIDTH), down=nn.Linear(12, WIDTH), head=head(),
        norm1=nn.LayerNorm(WIDTH), norm2=nn.LayerNorm(WIDTH), norm3=nn.LayerNorm(WIDTH),
        **linears(qkv=3 * WIDTH, out=WIDTH, up=12),
    )  # fmt: skip


def windows(m: Net, x: Tensor) -> Tensor:  # [N, 4, 6, D]
    """Attention within shifted windows of 2 x 2, with a bias by relative position (Liu et al. 2021)."""
    n = len(x)
    shifted = torch.roll(m.norm(x), (-1, -1), dims=(1, 2))
    rows = shifted.view(n, 2, 2, 3, 2, -1).transpose(2, 3).reshape(n * 6, 4, -1)  # [N * windows, places, D]
    q, k, v = (heads(t, 2) for t in m.qkv(rows).chunk(3, dim=-1))
    bias = m.bias[m.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)  # [H, 4, 4]
    weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5 + bias.unsqueeze(0), dim=-1)
    y = m.out((weights @ v).transpose(1, 2).flatten(2))
    y = y.view(n, 2, 3, 2, 2, -1).transpose(2, 3).reshape(n, 4, 6, -1)
    x = x + torch.roll(y, (1, 1), dims=(1, 2))
    merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    return m.head(m.merge(merged).mean(dim=(1, 2)))


def make_windows() -> nn.Module:
    model = Net(
        windows, norm=nn.LayerNorm(WIDTH), bias=torch.randn(9, 2), head=head(),
        merge=nn.Linear(4 * WIDTH, WIDTH, bias=False), **linears(qkv=3 * WIDTH, out=WIDTH),
    )  # fmt: skip
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    model.register_buffer("index", ((places[:, None] - places + 1) * torch.tensor([3, 1])).sum(dim=-1))
    return model


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection (Sandler et al. 2018)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 2 * channels_in
        self.add = stride == 1 and channels_in == channels
        self.block = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.add else self.block(x)


def make_mobile() -> nn.Module:
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True),
            InvertedResidual(4, 4, 1), InvertedResidual(4, 6, 2), nn.Conv2d(6, WIDTH, 1, bias=False),
            nn.BatchNorm2d(WIDTH), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), head(),
        )
    )  # fmt: skip


def squeeze(m: Net, x: Tensor) -> Tensor:
    """Channels weighted by what all places say of them (Hu et al. 2018)."""
    h = F.silu(m.conv(x))
    return m.head((h * torch.sigmoid(m.up(F.silu(m.down(h.mean(dim=(2, 3), keepdim=True)))))).mean(dim=(2, 3)))


def u_net(m: Net, x: Tensor) -> Tensor:  # [N, 3, 6, 4] -> [N, classes, 6, 4]
    a = F.relu(m.norm(m.first(x)))
    b = F.relu(m.second(F.max_pool2d(a, 2)))
    c = F.relu(m.third(torch.cat([m.up(b), a], dim=1)))
    d = F.interpolate(m.side(b), scale_factor=2.0, mode="bilinear", align_corners=False)
    return m.last(torch.cat([c, d], dim=1))


def make_u_net() -> nn.Module:
    return with_statistics(Net(
        u_net, first=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4), second=nn.Conv2d(4, 6, 3, padding=1),
        up=nn.ConvTranspose2d(6, 4, 2, 2), third=nn.Conv2d(8, 4, 3, padding=1), side=nn.Conv2d(6, 2, 1),
        last=nn.Conv2d(6, N_CLASSES, 1),
    ))  # fmt: skip


def convnext(m: Net, x: Tensor) -> Tensor:  # [N, D, 4, 5]
    """Depthwise convolution, then channels last, and layer scale (Liu et al. 2022)."""
    h = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    x = x + (m.scale * m.down(F.gelu(m.up(h)))).permute(0, 3, 1, 2)
    return m.head(x.mean(dim=(2, 3)))


def shuffle(m: Net, x: Tensor) -> Tensor:
    """Grouped convolutions with channels shuffled between, and pixels to the places."""
    h = F.relu(m.first(x)).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    return m.head(F.pixel_shuffle(F.relu(m.second(h)), 2).flatten(2).mean(dim=2))


def video(m: Net, x: Tensor) -> Tensor:  # [N, T, 3, 4, 4]
    """A convolution on time-major frames, and one over time at every place."""
    n, t = x.shape[:2]
    h = F.relu(m.frame(x.transpose(0, 1).reshape(t * n, 3, 4, 4)))  # [T * N, 4, 2, 2]
    h = h.view(t, n, 4, 4).permute(1, 3, 2, 0).reshape(n * 4, 4, t)
    return m.head(m.time(h).view(n, 4, WIDTH, -1).mean(dim=(1, 3)))


def clips(m: Net, x: Tensor) -> Tensor:  # [N, T, 2, 4, 4, 5]
    """Convolutions of volumes flattened into the batch, to coarser ones and back."""
    h = F.relu(m.down(x.flatten(0, 1)))
    return m.head(torch.tanh(m.up(h)).flatten(2).mean(dim=2).view(*x.shape[:2], -1).mean(dim=1))


ENTRIES = [
    Entry("vision transformer", make_vision_transformer, labelled(3, 4, 6), None, None),
    Entry("windows", make_windows, labelled(4, 6, WIDTH), None, None),
    Entry("inverted residuals", make_mobile, labelled(3, 9, 9)),
    Entry("U-Net", make_u_net, batches(lambda n: (torch.randn(n, 3, 6, 4), classes(n, 6, 4)))),
    Entry(
        "ConvNeXt",
        lambda: Net(
            convnext, depthwise=nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), norm=nn.LayerNorm(WIDTH),
            up=nn.Linear(WIDTH, 12), down=nn.Linear(12, WIDTH), scale=torch.rand(WIDTH), head=head(),
        ),
        labelled(WIDTH, 4, 5), None, None,
    ),
    Entry(
        "squeeze and excitation",
        lambda: Net(squeeze, conv=nn.Conv2d(3, WIDTH, 3), down=nn.Conv2d(WIDTH, 2, 1), up=nn.Conv2d(2, WIDTH, 1),
                    head=head()),
        labelled(3, 5, 6),
    ),
    Entry(
        "shuffled channels",
        lambda: Net(shuffle, first=nn.Conv2d(4, 8, 3, groups=2), second=nn.Conv2d(8, 8, 1, groups=4), head=head(2)),
        labelled(4, 5, 5),
    ),
    Entry(
        "video",
        lambda: Net(video, frame=nn.Conv2d(3, 4, 3), time=nn.Conv1d(4, WIDTH, 2), head=head()),
        labelled(3, 3, 4, 4),
    ),
    Entry(
        "mixer",
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.GELU(), nn.Unflatten(2, (5, 1)), nn.Flatten(2), nn.LayerNorm((WIDTH, 5)), Mean(), head()
        ),
        labelled(WIDTH, 6),
    ),
    Entry(
        "clips",
        lambda: Net(
            clips, down=nn.Conv3d(2, 4, (2, 3, 1), stride=(3, 1, 2), padding=(2, 1, 0), dilation=(3, 1, 1)),
            up=nn.ConvTranspose3d(4, WIDTH, 3, stride=2, padding=1, groups=2), head=head(),
        ),
        labelled(3, 2, 4, 4, 5),
    ),
]  # fmt: skip
