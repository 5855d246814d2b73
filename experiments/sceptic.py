"""What can be got out of a backbone? By a sceptic who did not read how disposal works.

    python experiments/sceptic.py all --attackers fixed,sceptic

Filters get unit norm, dead ones and closed channels are revived, BatchNorm's statistics estimated
anew, in some variants its scales and shifts reset or the last block drawn anew, too. A head on the
2x2 means of every layer begins as ridge regression. Every variant is trained a little, a fifth of
the training images held out; the best two go on with all of them, and their log-probabilities, over
both flips, are added up. Filters learn by Muon (Jordan, 2024), whose steps are no smaller where the
gradient is small. It has the attackers of attackers.py, too.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and that of dtl.py
import attackers  # noqa: E402

import dtl  # noqa: E402

# Of steps of `fixed`: 4 * 0.3 + 4.5 of Muon, which take 1.15 plain ones each; with all the forwards
# about nine times the budget of `fixed`, or less than twice that of `long`.
SCOUT, MORE = 0.3, 4.5
BATCH = 64


@dataclass(frozen=True)
class Variant:
    blocks_drawn_anew: int  # the last ones
    affine_kept: bool  # BatchNorm's scales and shifts
    rate: float  # of the filters
    share: int  # of MORE


VARIANTS = {
    "gentle": Variant(0, True, 0.007, 1),
    "bold": Variant(0, True, 0.03, 2),
    "reset": Variant(0, False, 0.05, 2),
    "early": Variant(1, False, 0.05, 2),
}


def layers_of(backbone):
    """Stem and blocks of one of dtl.py's networks, without the pooling at their end."""
    return [backbone[:2], *backbone[2:-2]]


def convolutions(layers):
    """Pairs of a convolution and its BatchNorm, in the order of the network."""
    found = [
        m for m in nn.Sequential(*layers).modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    ]
    return zip(found[::2], found[1::2])


@torch.no_grad()
def revive(backbone, new, variant):
    """Brings what lives of a backbone's filters into a new one, with unit norm."""
    kept = len(layers_of(backbone)) - variant.blocks_drawn_anew
    pairs = zip(convolutions(layers_of(backbone)[:kept]), convolutions(layers_of(new)[:kept]))
    for (conv, bn), (new_conv, new_bn) in pairs:
        norm, scale = conv.weight.flatten(1).norm(dim=1), bn.weight.abs()
        live = norm > norm.median() / 20 + 1e-6
        if variant.affine_kept:
            live &= scale > scale.median() / 20 + 0.01
            new_bn.weight[live] = bn.weight[live]
            # A shift of at least -2 scales lets something through ReLU.
            new_bn.bias[live] = bn.bias.maximum(-2 * scale)[live]
        new_conv.weight[live] = conv.weight[live]
        new_conv.weight /= unit(new_conv.weight)


def unit(filters):
    return filters.flatten(1).norm(dim=1)[:, None, None, None]


def momentum(module, share):
    """How much of BatchNorm's running statistics the next batch replaces."""
    for norm in module.modules():
        norm.momentum = share


@torch.no_grad()
def ridge_head(x, labels, x_held, labels_held, classes):
    """Weights (F, classes) of a ridge regression on features (N, F), which are centred and need no
    constant, with the penalty and the scale that are best on the held-out images."""
    n, width = x.shape
    onehot, identity = F.one_hot(labels, classes).float(), torch.eye(width, device=x.device)
    best, least = None, float("inf")
    for penalty in (0.03, 0.1, 0.3, 1, 3):
        weights = torch.linalg.solve(x.T @ x + n * penalty * identity, x.T @ onehot)
        for scale in (2, 4, 8, 16):
            loss = F.cross_entropy(x_held @ (scale * weights), labels_held).item()
            if best is None or loss < least:
                best, least = scale * weights, loss
    return best


def orthogonal(gradient):
    """Towards the nearest orthogonal matrix of filters as rows, by Newton and Schulz; Muon's."""
    o = gradient.flatten(1) / (gradient.norm() + 1e-12)
    for _ in range(5):
        square = o @ o.T
        o = 3.4445 * o + (2.0315 * square @ square - 4.775 * square) @ o
    return o.view_as(gradient)


class Member(nn.Module):
    """One variant: (B, 3, H, W) -> log-probabilities (B, classes)."""

    def __init__(self, backbone, part, variant, config, seed):
        super().__init__()
        self.variant, self.config, device = variant, config, part.x.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.backbone = dtl.new_backbone(config.network, seed, device)
        revive(backbone, self.backbone, variant)
        momentum(self, 1.0)
        with torch.no_grad():
            self.backbone.train()(dtl.normalise(part.x[::2]))
            self.backbone.eval()
            x, held = (
                torch.cat([self.features(dtl.normalise(images)) for images in split.split(500)])
                for split in (part.x, part.x_test)
            )
        how = dict(eps=1e-4, momentum=1.0, affine=False, device=device)
        self.norm = nn.BatchNorm1d(x.shape[1], **how)
        x, held = self.norm(x), self.norm.eval()(held)
        self.head = nn.Linear(x.shape[1], part.classes, bias=False, device=device)
        weights = ridge_head(x, part.y, held, part.y_test, part.classes)
        self.head.weight.data.copy_(8 * weights.T)
        momentum(self, 0.1)
        self.speed = [torch.zeros_like(p) for p in self.parameters()]

    def features(self, x):
        return attackers.every_layer(layers_of(self.backbone), x)

    def forward(self, x):
        both = not self.training and "flip" in self.config.augment
        views = [x, x.flip(3)] if both else [x]
        answers = [self.head(self.norm(self.features(v)) / 8).log_softmax(1) for v in views]
        return sum(answers) / len(views)

    def learn(self, task, steps):
        self.train()
        most = min(0.5, steps * BATCH / len(task.y) / 80)  # mixup, more where images come often
        for k in range(steps):
            x, y = dtl.batch(task, BATCH, self.config.augment, self.generator)
            target = 0.9 * F.one_hot(y, task.classes) + 0.1 / task.classes
            share = most * torch.rand((), generator=self.generator, device=x.device)
            x, target = (v.lerp(v.flip(0), share) for v in (x, target))
            self.step(F.cross_entropy(self(x), target), min((k + 1) / 15, 1) * (1 - k / steps))
        self.eval()

    def step(self, loss, rate):
        parameters = list(self.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, speed, gradient in zip(parameters, self.speed, gradients):
                ahead = gradient + 0.9 * speed.mul_(0.9).add_(gradient)  # Nesterov's
                if p.dim() < 4:
                    p -= 0.05 * rate * (ahead + 5e-4 * p)
                    continue
                p -= self.variant.rate * rate * orthogonal(ahead)
                p /= unit(p)


class Sum(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return sum(member(x) for member in self.members)


def sceptic(backbone, task, config, seed):
    """The attacker: four variants begin, the two best on held-out images go on."""
    if not (isinstance(backbone, nn.Sequential) and isinstance(backbone[-3], dtl.Block)):
        raise dtl.DTLError(
            f"sceptic: it knows residual networks of dtl.resnet, not {config.network}"
        )
    held = torch.arange(len(task.y), device=task.y.device) % 5 == 4  # a class's images lie together
    kept = dict(x=task.x[~held], y=task.y[~held], x_test=task.x[held], y_test=task.y[held])
    part = replace(task, **kept)
    members, loss = {}, {}
    for name, variant in VARIANTS.items():
        member = Member(backbone, part, variant, config, dtl.stream(seed, "sceptic", name))
        member.learn(part, max(2, round(SCOUT * config.attack_steps)))
        with torch.no_grad():
            answers = member(dtl.normalise(part.x_test))
        members[name], loss[name] = member, F.cross_entropy(answers, part.y_test).item()
    dtl.LOG.info({f"held-out loss of {name}": value for name, value in loss.items()})
    best = [members[name] for name in sorted(loss, key=loss.get)[:2]]
    steps = max(6, round(MORE * config.attack_steps))
    for member in best:
        member.learn(task, steps * member.variant.share // sum(m.variant.share for m in best))
    return Sum(best)


dtl.ATTACKERS["sceptic"] = sceptic

if __name__ == "__main__":
    dtl.main(prog_name="sceptic.py")
