"""Blocks as timm, torchvision and others write them, in plain torch: name -> module and batch."""

import torch
import torch.nn.functional as F
from torch import nn


class Calls(nn.Module):
    """Parts, and a function of the module and its inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def norm(channels):
    """With running statistics other than 0 and 1."""
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_(0, 0.3)
    layer.running_var.uniform_(0.5, 1.5)
    return layer


def conv(ins, outs, kernel=3, act=True, **options):
    layers = [nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False, **options), norm(outs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Basic(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool = conv(3, 4, stride=2), nn.MaxPool2d(3, 2, 1)
        self.one, self.two = conv(4, 6, stride=2), conv(6, 6, act=False)
        self.skip, self.head = conv(4, 6, 1, act=False, stride=2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(self.stem(x))
        out = self.two(self.one(x))
        out += self.skip(x)
        return self.head(F.adaptive_avg_pool2d(F.relu_(out), 1).flatten(1))


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            conv(4, 4, 1), conv(4, 4, groups=2, dilation=1), conv(4, 8, 1, act=False)
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2, 1, ceil_mode=True), conv(4, 8, 1, act=False))

    def forward(self, x):
        return torch.relu(self.layers(x)[..., 1:, 1:] + self.skip(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(scale), inplace=True)))


class InvertedResidual(nn.Module):
    """MobileNet's (hard swish, ReLU6), or EfficientNet's (SiLU, squeeze and excite, depth)."""

    def __init__(self, act, excite=False):
        super().__init__()
        wide = [nn.Conv2d(4, 12, 1, bias=False), norm(12), act()]
        deep = [nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), norm(12), act()]
        narrow = [nn.Conv2d(12, 4, 1, bias=False), norm(4)]
        middle = [SqueezeExcite(12)] if excite else []
        self.layers, self.rate = nn.Sequential(*wide, *deep, *middle, *narrow), 0.2

    def forward(self, x):
        out = self.layers(x)
        if self.training:  # stochastic depth
            keep = 1 - self.rate
            out = out * out.new_empty((len(x), 1, 1, 1)).bernoulli_(keep).div_(keep)
        return x + out


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep, self.norm = nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.LayerNorm(4, eps=1e-6)
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        out = self.norm(self.deep(x).permute(0, 2, 3, 1))
        out = self.gamma * self.narrow(F.gelu(self.wide(out)))
        return x + out.permute(0, 3, 1, 2)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(norm(n), nn.ReLU(), nn.Conv2d(n, 2, 3, padding=1)) for n in (4, 6)
        )
        self.down = nn.Sequential(norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2, 2))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.down(torch.cat(features, 1))


class UNet(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.down, self.deep = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = up, nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = F.gelu(self.down(x))
        x = self.up(torch.tanh(self.deep(F.max_pool2d(skip, 2, ceil_mode=True))))
        short = skip.shape[-1] - x.shape[-1]
        return self.out(torch.cat([skip, F.pad(x, (0, short, 0, short))], 1))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(4, 8, 3, 3), nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        n, t, d = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = x + self.out((F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(n, t, d))
        return x[:, 0]


class Swin(nn.Module):
    """Shifted windows of 2 by 2, their mask made as the block does, and a relative bias."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(9, 1))
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
        apart = (grid.flatten(1)[:, :, None] - grid.flatten(1)[:, None]).permute(1, 2, 0) + 1
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])

    def windows(self, x):
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)

    def forward(self, x):
        x = torch.roll(x.permute(0, 2, 3, 1)[:, :6, :6], (-1, -1), (1, 2))
        n, h, w, c = x.shape
        regions, count = torch.zeros((1, h, w, 1)), 0
        for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            for columns in (slice(0, -2), slice(-2, -1), slice(-1, None)):
                regions[:, rows, columns, :] = count
                count += 1
        regions = self.windows(regions).view(-1, 4)
        mask = regions.unsqueeze(1) - regions.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        q, k, v = self.qkv(self.windows(x)).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / 2 + self.table[self.index.view(-1)].view(4, 4)
        scores = scores.view(n, -1, 4, 4) + mask.to(scores.dtype).unsqueeze(0)
        x = self.out(scores.view(-1, 4, 4).softmax(-1) @ v)
        x = x.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, shifts=(1, 1), dims=(1, 2))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(4), nn.Linear(49, 49)
        self.channels = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        x = x.flatten(2).mT
        x = x + self.tokens(self.norm(x).mT).tanh().mT
        return (x + self.channels(x)).mean(1)


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        kind = x.dtype
        x = self.linear(x).to(torch.float64)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * x).type_as(x).to(kind)


def recurrent(kind, **options):
    cell = kind(4, 3, batch_first=True, **options)
    return Calls(lambda self, x: self.cell(x)[0], cell=cell)


PADDING = torch.tensor([[False] * 3, [False, False, True]])


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def decode(self, x):
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
    memory = x.flip(1)
    return self.layer(x, memory, tgt_mask=causal, memory_key_padding_mask=PADDING)


def attend(self, x):
    return self.layer(x, x, x, key_padding_mask=PADDING)[0]


def image():
    return torch.randn(2, 4, 7, 7)


def sequence(width=8):
    return torch.randn(2, 3, width)


MODELS = {
    "resnet-basic": lambda: (Basic(), torch.randn(2, 3, 17, 17)),
    "resnet-bottleneck": lambda: (Bottleneck(), image()),
    "mobilenet-relu6": lambda: (InvertedResidual(nn.ReLU6), image()),
    "mobilenet-hardswish": lambda: (InvertedResidual(nn.Hardswish), image()),
    "efficientnet": lambda: (InvertedResidual(nn.SiLU, excite=True), image()),
    "convnext": lambda: (ConvNeXt(), image()),
    "densenet": lambda: (Dense(), image()),
    "group-norm": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.Mish()),
        image(),
    ),
    "unet-transposed": lambda: (UNet(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)), image()),
    "unet-bilinear": lambda: (UNet(nn.Upsample(size=(7, 7), mode="bilinear")), image()),
    "unet-aligned": lambda: (
        UNet(nn.Upsample(scale_factor=1.75, mode="bilinear", align_corners=True)),
        image(),
    ),
    "unet-nearest": lambda: (UNet(nn.Upsample(scale_factor=1.5)), image()),
    "unet-shuffle": lambda: (
        UNet(nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.AvgPool2d(2, 1))),
        image(),
    ),
    "vit": lambda: (ViT(), image()),
    "swin": lambda: (Swin(), image()),
    "mixer": lambda: (Mixer(), image()),
    "rms-norm": lambda: (RMSNorm(), sequence(4)),
    "lstm": lambda: (recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequence(4)),
    "lstm-projected": lambda: (recurrent(nn.LSTM, proj_size=2), sequence(4)),
    "gru": lambda: (recurrent(nn.GRU, bidirectional=True), sequence(4)),
    "rnn-relu": lambda: (recurrent(nn.RNN, nonlinearity="relu", bias=False), sequence(4)),
    "encoder": lambda: (encoder(), sequence()),
    "encoder-padded": lambda: (
        Calls(lambda self, x: self.layers(x, src_key_padding_mask=PADDING), layers=encoder()),
        sequence(),
    ),
    "encoder-causal": lambda: (
        Calls(
            lambda self, x: self.layers(
                x, nn.Transformer.generate_square_subsequent_mask(3), is_causal=True
            ),
            layers=encoder(norm_first=True, activation="gelu"),
        ),
        sequence(),
    ),
    "decoder": lambda: (
        Calls(decode, layer=nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)),
        sequence(),
    ),
    "attention": lambda: (
        Calls(attend, layer=nn.MultiheadAttention(8, 2, batch_first=True)),
        sequence(),
    ),
    "attention-extras": lambda: (
        Calls(
            attend,
            layer=nn.MultiheadAttention(
                8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True
            ),
        ),
        sequence(),
    ),
}
