"""Classifiers as other code bases write them, with their public attribute names, from what is known of their functions.

``bare``: whether a pre-activation block's shortcut takes its bare input, as in some of those code bases.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def chain(block, inputs, outputs, count, stride):
    return nn.Sequential(*(block(outputs if i else inputs, outputs, 1 if i else stride) for i in range(count)))


class Post(nn.Module):
    """A block of a ResNet; ``skip`` is what the code base calls its shortcut, ``expansion`` 4 makes a bottleneck.

    ``skip`` None: option A of He et al. (2016), every other pixel between as many channels of zeros.
    """

    def __init__(self, inputs, outputs, stride, skip="shortcut", expansion=1, widen=1):
        super().__init__()
        inner, self.skip, self.stride = widen * outputs // expansion, skip, stride
        if expansion == 1:
            shapes = [(inputs, inner, 3, stride), (inner, outputs, 3)]
        else:
            shapes = [(inputs, inner, 1), (inner, inner, 3, stride), (inner, outputs, 1)]
        self.count = len(shapes)
        for i, shape in enumerate(shapes, 1):
            setattr(self, f"conv{i}", conv(*shape))
            setattr(self, f"bn{i}", nn.BatchNorm2d(shape[1]))
        if skip and (stride != 1 or inputs != outputs):
            self.add_module(skip, nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)))

    def shortcut_of(self, x, channels):
        if self.skip:
            return getattr(self, self.skip)(x) if hasattr(self, self.skip) else x
        zeros = x.new_zeros(len(x), (channels - x.shape[1]) // 2, *x.shape[2:])
        return torch.cat([zeros, x, zeros], 1)[:, :, :: self.stride, :: self.stride]

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + self.shortcut_of(x, y.shape[1]))


class ResNet(nn.Module):
    """``imagenet``: with torchvision's stem, a 7x7 convolution and a 3x3 maximum, each of stride 2."""

    def __init__(
        self,
        counts,
        width,
        classes=10,
        skip="shortcut",
        expansion=1,
        head="linear",
        channels=3,
        imagenet=False,
        widen=1,
    ):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, *((7, 2) if imagenet else (3,))), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        block = lambda i, o, s: Post(i, o, s, skip, expansion, widen)
        inputs, self.head, self.depth = width, head, len(counts)
        for n, count in enumerate(counts):
            outputs = expansion * width * 2**n
            setattr(self, f"layer{n + 1}", chain(block, inputs, outputs, count, 2 if n else 1))
            inputs = outputs
        setattr(self, head, nn.Linear(inputs, classes))

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for n in range(self.depth):
            x = getattr(self, f"layer{n + 1}")(x)
        return getattr(self, self.head)(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Pre(nn.Module):
    def __init__(self, inputs, outputs, stride, bare=False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.bare = bare
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x):
        a = F.relu(self.bn1(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x if self.bare else a)
        return x + self.conv2(F.relu(self.bn2(self.conv1(a))))


class PreActResNet(nn.Module):
    """``closing``: what the norm before pooling is called; none leaves it and its activation out."""

    def __init__(self, counts, width, classes=10, closing="bn", bare=False):
        super().__init__()
        self.conv1, self.closing, self.depth = conv(3, width, 3), closing, len(counts)
        block = lambda i, o, s: Pre(i, o, s, bare)
        inputs = width
        for n, count in enumerate(counts):
            setattr(self, f"layer{n + 1}", chain(block, inputs, width * 2**n, count, 2 if n else 1))
            inputs = width * 2**n
        if closing:
            setattr(self, closing, nn.BatchNorm2d(inputs))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.conv1(x)
        for n in range(self.depth):
            x = getattr(self, f"layer{n + 1}")(x)
        if self.closing:
            x = F.relu(getattr(self, self.closing)(x))
        return self.linear(F.avg_pool2d(x, x.shape[2]).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs, 3, stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(outputs), nn.ReLU(), conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        a = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(a))))
        return y + (x if self.convShortcut is None else self.convShortcut(a))


class WideGroup(nn.Module):
    def __init__(self, inputs, outputs, count, stride):
        super().__init__()
        self.layer = chain(WideBlock, inputs, outputs, count, stride)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """``sub_block``: with the group of blocks that some files hold and no output depends on."""

    def __init__(self, depth, widen, classes=10, sub_block=False, bias=True):
        super().__init__()
        count, (a, b, c) = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv(3, 16, 3)
        self.block1, self.block2 = WideGroup(16, a, count, 1), WideGroup(a, b, count, 2)
        self.block3 = WideGroup(b, c, count, 2)
        if sub_block:
            self.sub_block1 = WideGroup(16, a, count, 1)
        self.bn1, self.fc = nn.BatchNorm2d(c), nn.Linear(c, classes, bias=bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class DeepMindBlock(nn.Module):
    """Of DeepMind's networks; ``names``: of the convolutions.

    The wide network's shortcut is 1x1 from the activated input, the other's 3x3 from the bare one.  Their TensorFlow
    ancestors pad an even size for a stride of 2 with one row at the bottom and one column on the right.
    """

    def __init__(self, inputs, outputs, stride, act, names, wide):
        super().__init__()
        self.names, self.stride, self.act, self.wide = names, stride, act, wide
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.add_module(names[0], nn.Conv2d(inputs, outputs, 3, stride, 0, bias=False))
        self.add_module(names[1], conv(outputs, outputs, 3))
        if inputs != outputs or (stride > 1 and not wide):
            self.shortcut = nn.Conv2d(inputs, outputs, 1 if wide else 3, stride, 0, bias=False)

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.names)
        framed = lambda z: F.pad(z, (0, 1, 0, 1) if self.stride == 2 else (1, 1, 1, 1))
        a = self.act(self.batchnorm_0(x))
        y = second(self.act(self.batchnorm_1(first(framed(a)))))
        if hasattr(self, "shortcut"):
            x = self.shortcut(a if self.wide else framed(x))
        return x + y


class DeepMindGroup(nn.Module):
    def __init__(self, block, inputs, outputs, count, stride):
        super().__init__()
        self.block = chain(block, inputs, outputs, count, stride)

    def forward(self, x):
        return self.block(x)


class DeepMindWide(nn.Module):
    """Gowal et al. (2020), without its normalisation, which is no part of its files."""

    def __init__(self, depth, widen, classes=10, act=F.silu):
        super().__init__()
        block = lambda i, o, s: DeepMindBlock(i, o, s, act, ("conv_0", "conv_1"), wide=True)
        count, widths, self.act = (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen), act
        self.init_conv = conv(3, 16, 3)
        groups = [DeepMindGroup(block, widths[n], widths[n + 1], count, 2 if n else 1) for n in range(3)]
        self.layer, self.batchnorm = nn.Sequential(*groups), nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], classes)

    def forward(self, x):
        return self.logits(self.act(self.batchnorm(self.layer(self.init_conv(x)))).mean((2, 3)))


class DeepMindPreAct(nn.Module):
    """Rebuffi et al. (2021) and Rade & Moosavi-Dezfooli (2021), without its normalisation."""

    def __init__(self, counts, width, classes=10, act=F.silu):
        super().__init__()
        block = lambda i, o, s: DeepMindBlock(i, o, s, act, ("conv_2d_1", "conv_2d_2"), wide=False)
        self.conv_2d, self.depth, self.act, inputs = conv(3, width, 3), len(counts), act, width
        for n, count in enumerate(counts):
            setattr(self, f"layer_{n}", chain(block, inputs, width * 2**n, count, 2 if n else 1))
            inputs = width * 2**n
        self.batchnorm, self.logits = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.conv_2d(x)
        for n in range(self.depth):
            x = getattr(self, f"layer_{n}")(x)
        return self.logits(self.act(self.batchnorm(x)).mean((2, 3)))


class JEMBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, stride, 1)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*([nn.Conv2d(inputs, outputs, 1, stride)] if changes else []))

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))


class JEMBody(nn.Module):
    """Its own ``linear`` is not used."""

    def __init__(self, depth, widen):
        super().__init__()
        count, (a, b, c) = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.conv1, self.layer1 = nn.Conv2d(3, 16, 3, 1, 1), chain(JEMBlock, 16, a, count, 1)
        self.layer2, self.layer3 = chain(JEMBlock, a, b, count, 2), chain(JEMBlock, b, c, count, 2)
        self.linear = nn.Linear(c, 10)

    def forward(self, x):
        return F.leaky_relu(self.layer3(self.layer2(self.layer1(self.conv1(x)))), 0.2).mean((2, 3))


class JEM(nn.Module):
    """Grathwohl et al. (2020) without norm; the logits are of one head, another one is for the unconditional energy."""

    def __init__(self, depth, widen, classes=10):
        super().__init__()
        self.f = JEMBody(depth, widen)
        self.energy_output, self.class_output = nn.Linear(64 * widen, 1), nn.Linear(64 * widen, classes)

    def forward(self, x):
        return self.class_output(self.f(x))


class Halving(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, inputs, 3, 1, 1), nn.Conv2d(inputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.conv1x1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        y = F.avg_pool2d(self.conv1(F.leaky_relu(x, 0.2)), 2)
        y = self.conv2(F.leaky_relu(y, 0.2))
        return (F.avg_pool2d(self.conv1x1(x) if hasattr(self, "conv1x1") else x, 2) + y) / math.sqrt(2)


class Discriminator(nn.Module):
    """Of StarGAN v2, with a linear layer at its end as in AT-EBMs, Yin et al. (2022)."""

    def __init__(self, size, width, widest, classes=10):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, 1, 1)]
        while size > 4:
            layers.append(Halving(width, outputs := min(2 * width, widest)))
            width, size = outputs, size // 2
        self.main = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4), nn.LeakyReLU(0.2))
        self.linear = nn.Linear(width, classes)

    def forward(self, x):
        return self.linear(self.main(x).flatten(1))


class Normalised(nn.Module):
    """A network inside of another that normalises; ``layout`` says how the code base keeps the constants."""

    def __init__(self, net, mean, std, layout):
        super().__init__()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        constants = nn.Module()
        names = {"robustness": ("new_mean", "new_std"), "buffers": ("mu", "sigma")}.get(layout, ("mean", "std"))
        if layout == "robustness":  # twice, and the network too
            mean, std = mean[0], std[0]
            self.normalizer, self.attacker = constants, nn.Module()
            self.attacker.normalize, self.attacker.model = constants, net
        elif layout == "named":
            self.normalize = constants
        elif layout == "sequential":
            self.add_module("0", constants)
        target = net if layout == "buffers" else constants
        for name, value in zip(names, (mean, std), strict=True):
            target.register_buffer(name, value)
        self.add_module("1" if layout == "sequential" else "model", net)
        self.constants, self.net = [mean, std], [net]

    def forward(self, x):
        mean, std = self.constants
        return self.net[0]((x - mean) / std)


def randomise(net, generator):
    """Weights and statistics that no network begins with."""
    for key, value in net.state_dict().items():
        if key.endswith("running_var") or (key.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim == 1:
            value.normal_(0, 0.3, generator=generator)
        elif value.is_floating_point() and value.ndim:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(7)
    return net.eval()


def settle(net, x):
    """Running statistics become those of images, as training makes them."""
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        net(x)
    return net.eval()
