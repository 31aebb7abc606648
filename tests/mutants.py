"""Hand-made mutants: each flips a sign, drops a term, changes a scale or forgets to restore, and some test must fail.

``make mutants`` copies the package, applies one mutant at a time and runs the tests that should notice.  A mutant that
survives means that a test is missing.  ``python tests/mutants.py WORD`` runs those whose name holds WORD.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # file of tests/ that should notice


MUTANTS = [
    # energies
    Mutant("joint: sign", "energies.py", "return -logits.gather", "return logits.gather", "energies"),
    Mutant("marginal: sign", "energies.py", "return -logits.logsumexp", "return logits.logsumexp", "energies"),
    Mutant(
        "conditional: marginal dropped",
        "energies.py",
        "joint(logits, y) - marginal(logits)",
        "joint(logits, y)",
        "energies",
    ),
    Mutant(
        "conditional: marginal added",
        "energies.py",
        "joint(logits, y) - marginal",
        "joint(logits, y) + marginal",
        "energies",
    ),
    Mutant(
        "similarity: temperature dropped",
        "energies.py",
        "reference).sum(1) / temperature",
        "reference).sum(1)",
        "energies",
    ),
    Mutant(
        "infonce: positive left out",
        "energies.py",
        "torch.cat([near, z @ negatives.T / temperature], 1)",
        "(z @ negatives.T / temperature)",
        "energies",
    ),
    Mutant("crowding: itself counted", "energies.py", ".masked_fill(itself, -torch.inf)", "", "energies"),
    Mutant("binary: sign", "energies.py", "return -logit.reshape", "return logit.reshape", "energies"),
    # descent
    Mutant("descent: uphill", "descent.py", "x = x - at(self.size", "x = x + at(self.size", "descent"),
    Mutant("descent: noise scale", "descent.py", "x = x + noise * randn", "x = x + noise**2 * randn", "descent"),
    Mutant(
        "descent: constraint from the iterate",
        "descent.py",
        "x = self.constraint(x, origin)",
        "x = self.constraint(x, x)",
        "descent",
    ),
    Mutant(
        "descent: schedule off by one",
        "descent.py",
        "at(self.size, k / self.steps)",
        "at(self.size, (k + 1) / self.steps)",
        "descent",
    ),
    Mutant(
        "unit: not normalised",
        "descent.py",
        "return gradient / per_sample(gradient.flatten(1).norm(dim=1), gradient).clamp_min(1e-12)",
        "return gradient",
        "descent",
    ),
    Mutant(
        "unit: normalised over the batch",
        "descent.py",
        "gradient / per_sample(gradient.flatten(1).norm(dim=1), gradient)",
        "gradient / gradient.norm()",
        "descent",
    ),
    Mutant(
        "heavy ball: decay", "descent.py", 'decay * memory["velocity"] + step', 'memory["velocity"] + step', "descent"
    ),
    Mutant(
        "linf ball: radius doubled",
        "descent.py",
        "clamp(-self.radius, self.radius)",
        "clamp(-2 * self.radius, 2 * self.radius)",
        "descent",
    ),
    Mutant(
        "l2 ball: grows to the radius",
        "descent.py",
        "(self.radius / length).clamp(max=1.0)",
        "(self.radius / length)",
        "descent",
    ),
    Mutant("box: upper end", "descent.py", "x.clamp(self.low, self.high)", "x.clamp_min(self.low)", "descent"),
    Mutant(
        "hold: mask inverted",
        "descent.py",
        "torch.where(self.mask, origin, x)",
        "torch.where(self.mask, x, origin)",
        "descent",
    ),
    Mutant(
        "gradient: of the mean",
        "descent.py",
        "autograd.grad(value.sum(), x)",
        "autograd.grad(value.mean(), x)",
        "descent",
    ),
    # modes
    Mutant("searching: modes not restored", "modes.py", "            m.training = was", "            pass", "modes"),
    Mutant(
        "searching: parameters stay frozen", "modes.py", "p.requires_grad_(True)", "p.requires_grad_(False)", "modes"
    ),
    Mutant(
        "searching: thaws what was frozen",
        "modes.py",
        "[p for p in model.parameters() if p.requires_grad]",
        "list(model.parameters())",
        "modes",
    ),
    Mutant(
        "searching: statistics move",
        "modes.py",
        "norm.track_running_stats = False",
        "norm.track_running_stats = True",
        "modes",
    ),
    Mutant("searching: always eval", "modes.py", "model.train(training)", "model.eval()", "modes"),
    Mutant("using: branch not restored", "modes.py", "            norm.branch = name", "            pass", "modes"),
    # starts
    Mutant(
        "uniform: half the ball",
        "starts.py",
        "self.eps * (2 * rand(x, generator) - 1)",
        "self.eps * rand(x, generator)",
        "starts",
    ),
    Mutant("uniform l2: not by volume", "starts.py", " ** (1 / x[0].numel())", "", "starts"),
    Mutant("gaussians: covariance scale", "starts.py", "/ (len(images) - 1) ** 0.5", "/ len(images)", "starts"),
    Mutant(
        "gaussians: shrinkage forgotten", "starts.py", "(1 - self.shrinkage) ** 0.5 * coloured", "coloured", "starts"
    ),
    Mutant(
        "gaussians: white part not scaled",
        "starts.py",
        "self.shrinkage**0.5 * isotropic",
        "self.shrinkage * isotropic",
        "starts",
    ),
    Mutant("gaussians: classes mixed up", "starts.py", "self.means[k].to(x)", "self.means[-1 - k].to(x)", "starts"),
    Mutant("gaussians: not clamped", "starts.py", "*self.x.shape[1:]).clamp(0, 1)", "*self.x.shape[1:])", "starts"),
    Mutant(
        "replay: restarts the others",
        "starts.py",
        ", noise, self.chains[slots])",
        ", self.chains[slots], noise)",
        "starts",
    ),
    Mutant(
        "replay: slots with repetition",
        "starts.py",
        "torch.randperm(len(self.chains), generator=generator, device=where)[:count]",
        "torch.randint(len(self.chains), (count,), generator=generator)",
        "starts",
    ),
    Mutant("replay: nothing stored", "starts.py", "self.chains[slots] = x.detach().to(self.chains)", "pass", "starts"),
    # attacks
    Mutant(
        "attack: sign of the cross-entropy",
        "attacks/projected.py",
        "lambda x: -energies.conditional",
        "lambda x: energies.conditional",
        "attacks",
    ),
    Mutant(
        "attack: sign of the energy",
        "attacks/projected.py",
        "lambda x: -energies.joint",
        "lambda x: energies.joint",
        "attacks",
    ),
    Mutant("attack: no box", "attacks/projected.py", "both(ball, box())", "ball", "attacks"),
    Mutant("attack: no ball", "attacks/projected.py", "both(ball, box())", "box()", "attacks"),
    Mutant(
        "attack: default step",
        "attacks/projected.py",
        "2.5 * self.eps / self.steps",
        "self.eps / self.steps",
        "attacks",
    ),
    Mutant("attack: worst restart kept", "attacks/projected.py", ".argmin(0)", ".argmax(0)", "attacks"),
    Mutant(
        "attack: directions swapped",
        "attacks/projected.py",
        "(linf_ball(self.eps), sign)",
        "(linf_ball(self.eps), unit)",
        "attacks",
    ),
    Mutant("attack: origin lost", "attacks/projected.py", "start, origin=x, generator", "start, generator", "attacks"),
    Mutant(
        "survives: wrong images repaired",
        "metrics/robustness.py",
        "standing = correct(f, x, y)",
        "standing = torch.ones_like(y, dtype=torch.bool)",
        "attacks",
    ),
    Mutant(
        "survives: last restart decides",
        "metrics/robustness.py",
        "left = standing.nonzero().squeeze(1)",
        "left = torch.arange(len(y))",
        "attacks",
    ),
    # objectives and samplers
    Mutant(
        "AT: trains on clean images",
        "objectives/at.py",
        "cross_entropy(model, found, batch.y)",
        "cross_entropy(model, batch.x, batch.y)",
        "objectives",
    ),
    Mutant(
        "AT: search mode ignored",
        "objectives/at.py",
        'training=self.search_mode == "train"',
        "training=False",
        "objectives",
    ),
    Mutant(
        "noise: variance for deviation",
        "objectives/standard.py",
        "self.std * randn",
        "self.std**0.5 * randn",
        "objectives",
    ),
    Mutant(
        "cross-entropy: sum",
        "objectives/standard.py",
        "energies.conditional(logits, y).mean()\n",
        "energies.conditional(logits, y).sum()\n",
        "objectives",
    ),
    Mutant(
        "cross-entropy: the joint energy alone",
        "objectives/standard.py",
        "total = energies.conditional",
        "total = energies.joint",
        "objectives",
    ),
    Mutant(
        "TA: descends the joint energy",
        "samplers.py",
        "lambda x: energies.conditional",
        "lambda x: energies.joint",
        "samplers",
    ),
    Mutant(
        "CS: descends the conditional energy",
        "samplers.py",
        "lambda x: energies.joint",
        "lambda x: energies.conditional",
        "samplers",
    ),
    Mutant("sampler: no ball", "samplers.py", "both(l2_ball(self.radius), box())", "box()", "samplers"),
    Mutant("sampler: noise dropped", "samplers.py", "constraint, self.noise)", "constraint)", "samplers"),
    Mutant(
        "sampler: global seeds know the class", "samplers.py", 'if self.start == "global":', "if False:", "samplers"
    ),
    Mutant(
        "film: does not end at the sample",
        "generation.py",
        "path.append(end.cpu())",
        "path.append(path[0])",
        "samplers",
    ),
    Mutant("generate: one seed for all chunks", "generation.py", '"sample", number,', '"sample",', "samplers"),
    # metrics
    Mutant(
        "frechet: means dropped", "metrics/distances.py", "(a.mean - b.mean).square().sum() + first", "first", "metrics"
    ),
    Mutant("frechet: cross term halved", "metrics/distances.py", "- 2 * cross", "- cross", "metrics"),
    Mutant(
        "covariance: divided by N",
        "metrics/distances.py",
        "return centred / (self.count - 1)",
        "return centred / self.count",
        "metrics",
    ),
    Mutant(
        "kernel: diagonal kept",
        "metrics/distances.py",
        "return kernel_sum(a, a) - ",
        "return kernel_sum(a, a) - 0 * ",
        "metrics",
    ),
    Mutant("kernel: dimension dropped", "metrics/distances.py", "b.T / b.shape[1] + 1", "b.T + 1", "metrics"),
    Mutant("kernel: sign of the cross term", "metrics/distances.py", "- 2 * ab", "+ 2 * ab", "metrics"),
    Mutant("jackknife: scale", "metrics/distances.py", "((groups - 1) * left", "(left", "metrics"),
    Mutant(
        "quality: samples compared with themselves",
        "metrics/quality.py",
        "[kernel_sum(part, real.features) for part in parts]",
        "[kernel_sum(part, fake) for part in parts]",
        "metrics",
    ),
    Mutant("proportion: error", "metrics/base.py", "p * (1 - p) / n)", "p * (1 - p)) / n", "metrics"),
    Mutant("energies: sign", "metrics/energy.py", "energies.marginal(f(", "-energies.marginal(f(", "metrics"),
    Mutant(
        "curve: radius not scaled",
        "metrics/robustness.py",
        "eps = attack.eps * factor if",
        "eps = attack.eps if",
        "metrics",
    ),
    # data and models
    Mutant(
        "loader: one order for all epochs", "data/loader.py", "self.seed, *keys, epoch)", "self.seed, *keys)", "data"
    ),
    Mutant("loader: streams read the same share", "data/loader.py", "seen + stream * share", "seen", "data"),
    Mutant("augment: one offset for all", "data/augment.py", "(count,), generator", "(1,), generator", "data"),
    Mutant("augment: flips vertically", "data/augment.py", "x.flip(3)", "x.flip(2)", "data"),
    Mutant("digits: scale", "data/sources.py", "pixels * (255 / 16)", "pixels * 15", "data"),
    Mutant(
        "split: validation from test",
        "data/sources.py",
        "sum(shares[: i + 1])",
        "sum(shares[:1])",
        "data",
    ),
    Mutant(
        "normalise: mean forgotten",
        "models/network.py",
        "return (x - self.mean) / self.std",
        "return x / self.std",
        "models",
    ),
    Mutant("ema: decay", "models/ema.py", "0.5 ** (batch / half_life)", "0.5 ** (half_life / batch)", "models"),
    Mutant(
        "ema: statistics left out",
        "models/ema.py",
        "if average.dtype.is_floating_point:",
        "if average.requires_grad:",
        "models",
    ),
    Mutant(
        "load: train mode",
        "models/network.py",
        "return model.eval(), architecture",
        "return model, architecture",
        "models",
    ),
    Mutant(
        "load: plain weights preferred", "models/network.py", "if ema and (folder", "if not ema and (folder", "models"
    ),
    Mutant(
        "resnet: shortcut dropped",
        "models/resnet.py",
        "self.act(self.residual(x) + self.shortcut(x))",
        "self.act(self.residual(x))",
        "backbones",
    ),
    Mutant(
        "resnet: closing norm dropped",
        "models/resnet.py",
        "nn.Sequential(norm2d(norm, widths[-1]), ACTIVATIONS[activation]()),",
        "ACTIVATIONS[activation](),",
        "backbones",
    ),
    Mutant(
        "resnet: stride on the first 1x1",
        "models/resnet.py",
        "*unit(inputs, inner, 1), act(), *unit(inner, inner, 3, stride)",
        "*unit(inputs, inner, 1, stride), act(), *unit(inner, inner, 3)",
        "backbones",
    ),
    Mutant(
        "resnet: shortcut of the bare input",
        "models/resnet.py",
        "else self.shortcut(a))",
        "else self.shortcut(x))",
        "backbones",
    ),
    Mutant(
        "resnet: activated input kept as it is",
        "models/resnet.py",
        "(x if self.shortcut is None",
        "(a if self.shortcut is None",
        "backbones",
    ),
    Mutant(
        "resnet: width grows by a summand",
        "models/resnet.py",
        "expansion * width * 2**i",
        "expansion * width * (i + 1)",
        "backbones",
    ),
    Mutant("resnet: first stage halves too", "models/layers.py", "2 if made else 1", "2", "backbones"),
    Mutant("resnet: pooled by the maximum", "models/layers.py", ".mean((2, 3))", ".amax((2, 3))", "backbones"),
    Mutant("resnet: biases beside a norm", "models/layers.py", 'bias=norm == "none"', "bias=True", "backbones"),
    Mutant("resnet: weights by fan-in", "models/layers.py", "fan_out", "fan_in", "backbones"),
    Mutant(
        "resnet: one branch for both",
        "models/layers.py",
        "return DualBatchNorm2d(channels)",
        "return nn.BatchNorm2d(channels)",
        "backbones",
    ),
    Mutant(
        "resnet: maps of images not normalised",
        "models/network.py",
        "feature_maps(self.normalise(x))",
        "feature_maps(x)",
        "backbones",
    ),
    Mutant("gaussians: mean not taken off", "starts.py", " - draw.sum(1, keepdim=True) * mean)", ")", "starts"),
    Mutant(
        "parquet: labels not those kept",
        "data/files.py",
        "torch.tensor(table[label].to_pylist(), dtype=torch.int64)[kept]",
        "torch.tensor(table[label].to_pylist(), dtype=torch.int64)[: len(kept)]",
        "sources",
    ),
    Mutant(
        "archive: channels last",
        "data/files.py",
        "np.uint8).reshape(-1, 3, 32, 32)",
        "np.uint8).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)",
        "sources",
    ),
    Mutant(
        "archive: any class",
        "data/files.py",
        'raise pickle.UnpicklingError(f"{module}.{name} is refused")',
        "return super().find_class(module, name)",
        "sources",
    ),
    Mutant(
        "decode: not the middle",
        "data/decode.py",
        "(left, top, left + edge, top + edge)",
        "(0, 0, edge, edge)",
        "sources",
    ),
    Mutant(
        "decode: gaps where images are bad",
        "data/decode.py",
        "pixels[len(kept)] = result",
        "pixels[position] = result",
        "sources",
    ),
    Mutant(
        "cache: content ignored",
        "data/decode.py",
        "        digest.update(",
        "        hashlib.sha256().update(",
        "sources",
    ),
    Mutant(
        "precision: logits stay short",
        "models/network.py",
        "return self.head(self.features(x)).float()",
        "return self.head(self.features(x))",
        "models",
    ),
    Mutant(
        "precision: ignored",
        "models/network.py",
        "torch.autocast(x.device.type, self.precision)",
        "torch.autocast(x.device.type, self.precision, enabled=False)",
        "models",
    ),
    Mutant("init: body left fresh", "models/network.py", "target.load_state_dict({**own, **fits})", "pass", "training"),
    # training
    Mutant(
        "resume: optimiser forgotten",
        "training/checkpoint.py",
        "        optimizer.load_state_dict",
        "        (lambda state: None)",
        "training",
    ),
    Mutant(
        "resume: average forgotten",
        "training/checkpoint.py",
        "network.load_weights(ema.module",
        "network.load_weights(model",
        "training",
    ),
    Mutant(
        "resume: log not rewound",
        "training/loop.py",
        "            run.rewind(progress.images, progress.attempt, engine.main)\n        clock",
        "        clock",
        "training",
    ),
    Mutant(
        "checkpoint: digests not compared",
        "training/checkpoint.py",
        "or _digest(path / file) != digest",
        "",
        "training",
    ),
    Mutant(
        "checkpoint: best not kept",
        "training/checkpoint.py",
        "- {name, previous, str(progress.best_images)}",
        "- {name, previous}",
        "training",
    ),
    Mutant(
        "checkpoint: named before it is whole",
        "training/checkpoint.py",
        '        draft.rename(target)\n        files.write(self.folder / "LATEST", name + "\\n")',
        '        files.write(self.folder / "LATEST", name + "\\n")',
        "training",
    ),
    Mutant(
        "rollback: same random numbers",
        "training/loop.py",
        "progress.attempt, progress.rate = attempt, rate",
        "progress.rate = rate",
        "training",
    ),
    Mutant(
        "rollback: same learning rate",
        "training/loop.py",
        "progress.attempt, progress.rate = attempt, rate",
        "progress.attempt = attempt",
        "training",
    ),
    Mutant(
        "rollback: non-finite loss unnoticed",
        "training/loop.py",
        "if self.sound is not None and",
        "if False and",
        "training",
    ),
    Mutant("streams: gradients added", "training/loop.py", "loss.total / len(streams)", "loss.total", "training"),
    Mutant(
        "cosine: does not end at zero", "training/optim.py", "0.5 * (1 + math.cos(", "0.5 * (2 + math.cos(", "training"
    ),
    Mutant(
        "signal: handlers not restored",
        "training/loop.py",
        "    finally:\n        restore()",
        "    finally:\n        pass",
        "training",
    ),
    # configuration and borders
    Mutant(
        "config: fractions refused",
        "config.py",
        "_fraction(value) if isinstance(value, str)",
        "float(value) if isinstance(value, str)",
        "config",
    ),
    Mutant(
        "config: defaults out of reach",
        "training/recipe.py",
        'described = config.describe(config.construct(Recipe, plain, where="recipe"))',
        "described = plain",
        "config",
    ),
    Mutant("config: foreign code allowed", "config.py", "        if not foreign:\n", "        if False:\n", "config"),
    Mutant("checks: range", "checks.py", "if not (low >= 0 and high <= 1)", "if not (low >= -1 and high <= 1)", "api"),
    Mutant(
        "checks: probabilities", "checks.py", "torch.allclose(sums, torch.ones_like(sums), atol=1e-4)", "False", "api"
    ),
    Mutant(
        "api: target ignored", "api.py", "            lowered = lambda v: read(f(v), goal)", "            pass", "api"
    ),
    # augmentation
    Mutant(
        "autoaugment: first operation only",
        "data/autoaugment.py",
        "for turn in range(2):",
        "for turn in range(1):",
        "augment",
    ),
    Mutant(
        "autoaugment: sign dropped",
        "data/autoaugment.py",
        "magnitude = base + plan.sign * span",
        "magnitude = base + span",
        "augment",
    ),
    Mutant(
        "autoaugment: magnitudes of other images",
        "data/autoaugment.py",
        "function(pixels[members], magnitude[members, turn])",
        "function(pixels[members], magnitude[: len(members), turn])",
        "augment",
    ),
    Mutant(
        "autoaugment: probability complemented",
        "data/autoaugment.py",
        "chance < _PROBABILITY",
        "chance > _PROBABILITY",
        "augment",
    ),
    Mutant(
        "autoaugment: global randomness",
        "data/autoaugment.py",
        "torch.randint(len(POLICY), (count,), generator=generator, device=device)",
        "torch.randint(len(POLICY), (count,), device=device)",
        "augment",
    ),
    Mutant(
        "autoaugment: a level of the table",
        "data/autoaugment.py",
        '(("Color", 0.9, 9), ("Equalize", 0.6, 6))',
        '(("Color", 0.9, 9), ("Equalize", 0.6, 5))',
        "augment",
    ),
    Mutant(
        "autoaugment: contrast with the batch's mean",
        "data/autoaugment.py",
        "luma.sum((1, 2, 3), dtype=torch.int64)",
        "luma.sum(dtype=torch.int64)",
        "augment",
    ),
    Mutant(
        "augment: cutout a cross",
        "data/augment.py",
        "rows[:, :, None] & columns[:, None, :]",
        "rows[:, :, None] | columns[:, None, :]",
        "augment",
    ),
    Mutant(
        "augment: cutout a pixel too wide",
        "data/augment.py",
        "(offset < self.cutout)",
        "(offset <= self.cutout)",
        "augment",
    ),
    # weights from elsewhere
    Mutant("foreign: stages counted from 1", "models/foreign.py", "{int(found[1]) - 1}", "{int(found[1])}", "foreign"),
    Mutant("foreign: pickles run", "models/foreign.py", "weights_only=True", "weights_only=False", "foreign"),
    Mutant(
        "foreign: bare shortcuts accepted",
        "models/foreign.py",
        "return 3 * bare < activated",
        "return False",
        "foreign",
    ),
    Mutant(
        "foreign: no closing norm accepted",
        "models/foreign.py",
        '"backbone.stem.weight" in named and not any(',
        "False and not any(",
        "foreign",
    ),
    Mutant("foreign: activation not compared", "models/foreign.py", 'if kinds != {"ReLU"}', "if False", "foreign"),
    Mutant("hub: the folder's other files travel", "models/hub.py", "            allow_patterns=FILES,\n", "", "hub"),
    Mutant(
        "hub: an old average stays",
        "models/hub.py",
        "            delete_patterns=FILES,",
        "            delete_patterns=None,",
        "hub",
    ),
    Mutant(
        "own modules from elsewhere",
        "config.py",
        'if not foreign and getattr(cls, "imports", False):',
        "if False:",
        "models",
    ),
    # roles and stages
    Mutant(
        "feed: the view drawn like x",
        "training/loop.py",
        "(roles.x, roles.view or roles.x)",
        "(roles.x, roles.x)",
        "training",
    ),
    Mutant(
        "feed: every role in one order",
        "data/loader.py",
        '("order", self.role) if self.role else ("order",)',
        '("order",)',
        "training",
    ),
    Mutant(
        "stages: the second begins fresh",
        "training/loop.py",
        "begin(model, str(prepare(recipe, run, device, report).folder), data, recipe)",
        "prepare(recipe, run, device, report)",
        "training",
    ),
    Mutant(
        "stages: inherit nothing",
        "training/recipe.py",
        "merged = config.merge(inherited, stage)",
        "merged = dict(stage)",
        "training",
    ),
    Mutant(
        "merge: another kind keeps its options",
        "config.py",
        'same = "kind" not in block or block["kind"] == before.get("kind")',
        "same = True",
        "comparison",
    ),
    # supervised objectives
    Mutant(
        "trades: the other divergence",
        "objectives/trades.py",
        "gap = divergence(log_softmax(clean, 1), log_softmax(adversarial, 1))",
        "gap = divergence(log_softmax(adversarial, 1), log_softmax(clean, 1))",
        "supervised",
    ),
    Mutant(
        "trades: one branch detached",
        "objectives/trades.py",
        "gap = divergence(log_softmax(clean, 1), ",
        "gap = divergence(log_softmax(clean.detach(), 1), ",
        "supervised",
    ),
    Mutant(
        "trades: search descends",
        "objectives/trades.py",
        "lambda x: -divergence(target",
        "lambda x: divergence(target",
        "supervised",
    ),
    Mutant("trades: beta dropped", "objectives/trades.py", "(first + self.beta * gap)", "(first + gap)", "supervised"),
    Mutant(
        "weat: high energies weigh more",
        "objectives/trades.py",
        "return 1 / torch.nn.functional.softplus(",
        "return torch.nn.functional.softplus(",
        "supervised",
    ),
    Mutant(
        "weat: always on clean images",
        "objectives/trades.py",
        'clean if self.on == "clean" else adversarial',
        "clean",
        "supervised",
    ),
    Mutant(
        "fast: in eval mode",
        "objectives/fast.py",
        'search_mode: Literal["eval", "train"] = "train"',
        'search_mode: Literal["eval", "train"] = "eval"',
        "supervised",
    ),
    Mutant(
        "fast: looks at every step",
        "objectives/fast.py",
        "ctx.images - state.images < self.watch_every",
        "ctx.images - state.images < 0",
        "supervised",
    ),
    Mutant(
        "fast: stops when it rises",
        "objectives/fast.py",
        "if previous - accuracy > self.fall",
        "if accuracy - previous > self.fall",
        "supervised",
    ),
    Mutant(
        "free: perturbation descends",
        "objectives/free.py",
        "found.detach() + step * found.grad.sign()",
        "found.detach() - step * found.grad.sign()",
        "supervised",
    ),
    Mutant(
        "free: begins anew",
        "objectives/free.py",
        "return state.delta.to(batch.x).clone()",
        "return torch.zeros_like(batch.x)",
        "supervised",
    ),
    Mutant(
        "free: no ball",
        "objectives/free.py",
        "found.grad.sign()).clamp(-self.eps, self.eps)",
        "found.grad.sign())",
        "supervised",
    ),
    Mutant(
        "awp: lowers the loss",
        "objectives/awp.py",
        "name: self.gamma * w.detach()",
        "name: -self.gamma * w.detach()",
        "supervised",
    ),
    Mutant(
        "awp: norms move too",
        "objectives/awp.py",
        ' if "weight" in n and p.ndim > 1 and p.requires_grad}',
        "}",
        "supervised",
    ),
    Mutant(
        "awp: weights not moved in the loss",
        "objectives/awp.py",
        "moved = {name: p + found.moves[name]",
        "moved = {name: p",
        "supervised",
    ),
    Mutant(
        "awp: statistics move in the search",
        "objectives/awp.py",
        "with searching(model, training=True), torch.enable_grad():",
        "with torch.enable_grad():",
        "supervised",
    ),
    Mutant("awp: never warm", "objectives/awp.py", "if ctx.images < self.warmup:", "if False:", "supervised"),
    Mutant(
        "negatives: chains forgotten",
        "objectives/langevin.py",
        "            state.put(found.slots, found.negative)",
        "            pass",
        "supervised",
    ),
    Mutant(
        "negatives: no noise",
        "objectives/langevin.py",
        "box() if self.clamp else free, self.noise)",
        "box() if self.clamp else free)",
        "supervised",
    ),
    Mutant("negatives: clamp ignored", "objectives/langevin.py", "box() if self.clamp else free", "free", "supervised"),
    Mutant(
        "likelihood: sign of the negatives",
        "objectives/langevin.py",
        "total = positive.mean() - negative.mean()",
        "total = positive.mean() + negative.mean()",
        "supervised",
    ),
    Mutant(
        "likelihood: squares of the data alone",
        "objectives/langevin.py",
        "energy_l2 * (positive.square().mean() + negative.square().mean())",
        "energy_l2 * positive.square().mean()",
        "supervised",
    ),
    Mutant("jem: weight dropped", "objectives/langevin.py", "+ self.weight * likelihood", "+ likelihood", "supervised"),
    Mutant(
        "jeat: clean images for adversarial ones",
        "objectives/langevin.py",
        "found._replace(positive=moved, adversarial=moved)",
        "found._replace(adversarial=moved)",
        "supervised",
    ),
    Mutant(
        "prejeat: a full step of another size",
        "objectives/at.py",
        "return stepped(self.attack, 1.0)",
        "return self.attack",
        "supervised",
    ),
    Mutant(
        "fast: step of eps",
        "objectives/fast.py",
        "stepped(self.attack, 1.25)",
        "stepped(self.attack, 1.0)",
        "supervised",
    ),
    Mutant(
        "switch: an attack is taken over whole",
        "config.py",
        "if isinstance(value, Mapping) and carried:",
        "if False:",
        "supervised",
    ),
    Mutant(
        "switch: wrappers begin empty",
        "config.py",
        "if role in fields and data and role not in data:",
        "if False:",
        "supervised",
    ),
    Mutant(
        "init: normalisation that is asked for is lost",
        "training/loop.py",
        "if getattr(recipe.normalise, name) is not None:",
        "if False:",
        "training",
    ),
    Mutant(
        "dropout: unseeded",
        "training/loop.py",
        'torch.manual_seed(seeds.derive(*keys, replay, "global"))',
        "None",
        "training",
    ),
    Mutant(
        "early stop: goes on when resumed",
        "training/loop.py",
        'if any(line.get("event") == "early stop" for line in run.history()):',
        "if False:",
        "supervised",
    ),
    Mutant(
        "comparison: any attack of that name",
        "comparison.py",
        'settings["attack"] = config.describe(attack)',
        "pass",
        "comparison",
    ),
    Mutant(
        "comparison: any samples of that name",
        "comparison.py",
        '{"samples": samples, **manifests[samples]}',
        '{"samples": samples}',
        "comparison",
    ),
    Mutant(
        "comparison: any judge of that name",
        "comparison.py",
        '{**about, "judge": judge}',
        "about",
        "comparison",
    ),
    Mutant(
        "rst: true order lost",
        "objectives/rst.py",
        "torch.cat([batch.y, labels])",
        "torch.cat([labels, batch.y])",
        "supervised",
    ),
    Mutant(
        "shift: update measured at clean images",
        "training/instruments.py",
        '("update", after, self.before)',
        '("update", after, self.clean)',
        "supervised",
    ),
    Mutant(
        "shift: sign of the attack",
        "training/instruments.py",
        "difference = to[name] - of[name]",
        "difference = of[name] - to[name]",
        "supervised",
    ),
    Mutant(
        "early stop: weights kept",
        "training/loop.py",
        "            except EarlyStop as reason:\n                progress = run.checkpoints.load(model, ema, optimizer, states)\n",
        "            except EarlyStop as reason:\n",
        "supervised",
    ),
    # comparisons
    Mutant(
        "targeted: the true class",
        "metrics/robustness.py",
        "torch.randint(1, classes,",
        "torch.randint(0, 1,",
        "comparison",
    ),
    Mutant(
        "targeted: away from the class",
        "metrics/robustness.py",
        "return lambda x: energies.conditional(f(x), goal)",
        "return lambda x: -energies.conditional(f(x), goal)",
        "comparison",
    ),
    Mutant(
        "part: the rest overlaps",
        "data/sources.py",
        "data._replace(train=parts[self.rest])",
        "data._replace(train=parts[0])",
        "comparison",
    ),
    Mutant("seeds: deviation of the mean", "comparison.py", "statistics.stdev(r", "statistics.pstdev(r", "comparison"),
    Mutant("comparison: measures again", "comparison.py", "if not held(*key, metric)", "if key", "comparison"),
    Mutant(
        "cyclic: peak ignored",
        "training/optim.py",
        "share / self.peak if share < self.peak",
        "share / self.peak if share < 0.5",
        "training",
    ),
    # models by name
    Mutant("find_model: files taken for code", "evaluation.py", 'return ":" in str(where) and', "return", "api"),
    Mutant("find_model: train mode", "evaluation.py", "make(), nn.Identity()).eval()", "make(), nn.Identity())", "api"),
    # doctor
    Mutant("doctor: three errors of one proportion", "doctor.py", "math.sqrt(2 * pooled", "math.sqrt(pooled", "doctor"),
    Mutant("doctor: difference turned round", "doctor.py", "return a - b > SIGMAS", "return b - a > SIGMAS", "doctor"),
    Mutant(
        "doctor: chance: the rarest label", "doctor.py", "self.y.bincount().max()", "self.y.bincount().min()", "doctor"
    ),
    Mutant(
        "doctor: threat's other settings kept",
        "doctor.py",
        "steps=max(self.threat.steps, 20)",
        "steps=self.threat.steps",
        "doctor",
    ),
    Mutant(
        "doctor: state not put back",
        "doctor.py",
        "                        v.copy_(state[name])",
        "                        pass",
        "doctor",
    ),
    Mutant(
        "doctor: global random state moved",
        "doctor.py",
        "with torch.random.fork_rng(devices=devices):",
        "with torch.random.fork_rng(enabled=False):",
        "doctor",
    ),
    Mutant(
        "doctor: faults hide nothing",
        "doctor.py",
        'findings.append(Finding(title(check), "skipped"',
        '(Finding(title(check), "skipped"',
        "doctor",
    ),
    Mutant(
        "doctor: warnings hide checks",
        "doctor.py",
        'found is not None and found.severity == "fault"',
        "found is not None",
        "doctor",
    ),
    Mutant(
        "doctor: a failing check crashes",
        "doctor.py",
        "except Exception as error:  # somebody else's code\n                found",
        "except KeyError as error:  # somebody else's code\n                found",
        "doctor",
    ),
    Mutant(
        "doctor: a failing model crashes",
        "doctor.py",
        "except Exception as error:  # somebody else's code\n        fix = f",
        "except KeyError as error:  # somebody else's code\n        fix = f",
        "doctor",
    ),
    Mutant("doctor: not finite: all rows", "doctor.py", ".isfinite()).any(1)", ".isfinite()).all(1)", "doctor"),
    Mutant(
        "doctor: classes: one too many",
        "doctor.py",
        "(most := int(p.y.max())) >= out",
        "(most := int(p.y.max())) > out",
        "doctor",
    ),
    Mutant("doctor: state unseen", "doctor.py", "not torch.equal(v, p.state[name])]", "False]", "doctor"),
    Mutant("doctor: randomness tolerated", "doctor.py", "if gap <= 1e-4 *", "if gap <= 1e4 *", "doctor"),
    Mutant("doctor: batch: not alone", "doctor.py", "p.x[:8].split(1)]", "p.x[:8].split(8)]", "doctor"),
    Mutant(
        "doctor: modes: by train mode",
        "doctor.py",
        "if p.above(training, p.accuracy):",
        "if p.above(p.accuracy, training):",
        "doctor",
    ),
    Mutant(
        "doctor: train mode unmentioned",
        "doctor.py",
        "if p.training and (p.trained",
        "if not p.training and (p.trained",
        "doctor",
    ),
    Mutant("doctor: probabilities tolerated", "doctor.py", "p.logits.max() <= 1:", "p.logits.max() <= 0:", "doctor"),
    Mutant(
        "doctor: log-probabilities: sign",
        "doctor.py",
        "normalisers.abs().max() < 1e-3",
        "normalisers.abs().min() > 1e-3",
        "doctor",
    ),
    Mutant(
        "doctor: precision: float16 is fine",
        "doctor.py",
        "(torch.float32, torch.float64)",
        "(torch.float32, torch.float16)",
        "doctor",
    ),
    Mutant("doctor: missing: mean added", "doctor.py", "((p.x - mean) / std", "((p.x + mean) / std", "doctor"),
    Mutant("doctor: twice: mean subtracted", "doctor.py", "(p.x * std + mean,", "(p.x * std - mean,", "doctor"),
    Mutant("doctor: range: not symmetric", "doctor.py", "(2 * p.x - 1, ", "(2 * p.x, ", "doctor"),
    Mutant("doctor: range: worst explains", "doctor.py", "name = min(better,", "name = max(better,", "doctor"),
    Mutant(
        "doctor: range: batch norm forgotten",
        "doctor.py",
        "if p.above(p.accuracy_of(p.trained), better[name][1]):",
        "if False:",
        "doctor",
    ),
    Mutant(
        "doctor: range: luck explains",
        "doctor.py",
        "p.above(accuracy, p.accuracy) and p.learnt(accuracy)",
        "p.above(accuracy, p.accuracy)",
        "doctor",
    ),
    Mutant(
        "doctor: labels: classes confused", "doctor.py", "and len(renamed.unique()) == classes", "and classes", "doctor"
    ),
    Mutant(
        "doctor: labels: seen twice",
        "doctor.py",
        "held, hits = share(told[1::2] == p.y[1::2]), share(told[1::2] == renamed[p.y[1::2]])",
        "hits, held = share(told[1::2] == p.y[1::2]), share(told[1::2] == renamed[p.y[1::2]])",
        "doctor",
    ),
    Mutant(
        "doctor: chance tolerated",
        "doctor.py",
        "if not p.above(p.accuracy, p.chance):",
        "if p.above(p.chance, 2 * p.accuracy):",
        "doctor",
    ),
    Mutant("doctor: gradient: NaN is fine", "doctor.py", "p.above(nan + zero, 0.0)", "p.above(zero, 0.0)", "doctor"),
    Mutant("doctor: gradient: zero is fine", "doctor.py", "p.above(nan + zero, 0.0)", "p.above(nan, 0.0)", "doctor"),
    Mutant("doctor: gradient: other leaves", "doctor.py", "allow_unused=True", "allow_unused=False", "doctor"),
    Mutant("doctor: flat loss: scaled up", "doctor.py", "p.f(x) * (LEAD / lead)", "p.f(x) * (lead / LEAD)", "doctor"),
    Mutant(
        "doctor: one step: turned round",
        "doctor.py",
        "p.above(p.under_many, single)",
        "p.above(single, p.under_many)",
        "doctor",
    ),
    Mutant(
        "doctor: noise: turned round",
        "doctor.py",
        "p.above(p.under_many, share(standing))",
        "p.above(share(standing), p.under_many)",
        "doctor",
    ),
    Mutant("doctor: noise: radius", "doctor.py", "p.many.eps * drawn", "0 * drawn", "doctor"),
    Mutant(
        "doctor: noise: not on the sphere",
        "doctor.py",
        "drawn = drawn / per_sample(",
        "drawn = drawn * per_sample(",
        "doctor",
    ),
    Mutant(
        "doctor: square: turned round",
        "doctor.py",
        "p.above(p.under_many, searched)",
        "p.above(searched, p.under_many)",
        "doctor",
    ),
    Mutant(
        "doctor: autoattack: turned round",
        "doctor.py",
        "p.above(adaptive, p.under_many)",
        "p.above(p.under_many, adaptive)",
        "doctor",
    ),
    Mutant(
        "doctor: radius: chance tolerated",
        "doctor.py",
        "p.above(min(left), p.chance)",
        "p.above(min(left), 1.0)",
        "doctor",
    ),
    Mutant("doctor: attacks need nothing", "doctor.py", "(*BASIS, *ATTACKS[:i])", "(outputs,)", "doctor"),
    Mutant(
        "doctor: modes before inputs",
        "doctor.py",
        "modes: (outputs, state, randomness, inputs)",
        "modes: (outputs, state, randomness)",
        "doctor",
    ),
    Mutant(
        "doctor: images in order",
        "doctor.py",
        'torch.randperm(len(split), generator=seeds.generator(seed, "doctor", "images"))[: max(count, 0)]',
        "torch.arange(len(split))[:count]",
        "doctor",
    ),
    Mutant(
        "doctor: exit status",
        "cli.py",
        'int(any(finding.severity == "fault"',
        'int(all(finding.severity == "fault"',
        "doctor",
    ),
    Mutant(
        "doctor: a run without its threat",
        "cli.py",
        "plain = config.describe(Run.open(args.model).recipe)",
        "plain = {**config.describe(Run.open(args.model).recipe), 'threat': {}}",
        "doctor",
    ),
]


def apply(mutant: Mutant, package: Path) -> None:
    path = package / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"mutant {mutant.name!r}: its text stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def run(mutant: Mutant) -> tuple[Mutant, str]:
    """The test that killed the mutant, or the empty string."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        apply(mutant, source / "advebm")
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile"):
            shutil.copy(ROOT / name, folder)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/test_{mutant.tests}.py",
        ]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        killer = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
        if done.returncode not in (0, 1) or (done.returncode == 1 and not killer):
            raise SystemExit(
                f"mutant {mutant.name!r}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return mutant, killer[1] if killer else ""


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(word in m.name for word in words)]
    for mutant in chosen:
        text = (ROOT / "src" / "advebm" / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"mutant {mutant.name!r}: its text stands {text.count(mutant.old)} times in {mutant.file}")
    begun, survivors = time.perf_counter(), []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, killer in pool.map(run, chosen):
            print(f"{'killed  ' if killer else 'SURVIVED'}  {mutant.name:45} {killer}", flush=True)
            survivors += [] if killer else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed in {time.perf_counter() - begun:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
