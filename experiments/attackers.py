"""More attackers, beside the three of dtl.py: other learning rates, optimisers and budgets.

    python experiments/attackers.py all --attackers fixed,long,low,high,adamw,few,ridge

`longer` and `gentle` take twenty times the steps of `fixed`.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl  # noqa: E402


def adamw(backbone, task, config, seed, times=5, lr=0.002):
    """`long` with AdamW in place of SGD."""
    model = dtl.with_new_head(backbone, task, config, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=dtl.WEIGHT_DECAY)
    generator = torch.Generator(task.x.device)
    for step, rate in enumerate(dtl.one_cycle(times * config.attack_steps, lr)):
        optimizer.param_groups[0]["lr"] = rate
        generator.manual_seed(dtl.stream(seed, step))
        x, y = dtl.batch(task, config.batch_size, config.augment, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), dtl.CLIP)
        optimizer.step()
    return model


def gentle(backbone, task, config, seed, times=20, lr=0.1):
    """`longer` with mixup and smoothed labels, which make much of few images."""
    model = dtl.with_new_head(backbone, task, config, seed)

    def step_loss(generator):
        x, y = dtl.batch(task, config.batch_size, config.augment, generator)
        share = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
        logits = model(torch.lerp(x.flip(0), x, share))  # each image with the one opposite to it
        how = dict(label_smoothing=0.1, reduction="none")
        opposite, own = F.cross_entropy(logits, y.flip(0), **how), F.cross_entropy(logits, y, **how)
        loss = torch.lerp(opposite, own, share.flatten()).mean()
        loss.backward()
        return {"loss": loss}

    schedule = dtl.one_cycle(times * config.attack_steps, lr)
    dtl.train(model, step_loss, schedule, seed)
    return model


def few(backbone, task, config, seed):
    """`long` with ten images a class. Where there are no more than ten anyway, it is `long`."""
    kept = torch.cat([torch.nonzero(task.y == c).flatten()[:10] for c in range(task.classes)])
    task = replace(task, x=task.x[kept], y=task.y[kept])
    return dtl.attack(backbone, task, config, seed, times=5, lr=0.1)


def every_layer(layers, x):
    """What each of the layers in a row gives, (B, F): maps as means over their four quarters, and
    vectors (B, features) as they are."""
    found = []
    for layer in layers:
        x = layer(x)
        if x.dim() == 4 and x.shape[2] > 1:
            found.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        elif x.dim() == 2:
            found.append(x)
    return torch.cat(found, 1)


class Ridge(nn.Module):
    """Answers by linear regression on standardised features of all layers of a frozen backbone."""

    def __init__(self, backbone, centre, spread, weights, constant):
        super().__init__()
        self.backbone, self.numbers = backbone, (centre, spread, weights, constant)

    def forward(self, x):
        centre, spread, weights, constant = self.numbers
        features = every_layer(self.backbone, x).cpu().double()
        return ((features - centre) / spread @ weights + constant).to(x.device)


@torch.no_grad()
def ridge(backbone, task, config, seed):
    """Ridge regression of the labels on the features of all layers, with the penalty that is best
    where each image in turn is left out. Nothing of the backbone is trained but BatchNorm's running
    statistics, which become those of the attacker's images."""
    if not isinstance(backbone, nn.Sequential):
        raise dtl.DTLError(f"ridge: the backbone is a {type(backbone).__name__}, not a Sequential")
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # of one batch, of all images where memory allows it
    backbone.train()(dtl.normalise(task.x[:: 1 + len(task.x) // 5000]))
    backbone.eval()
    known = [every_layer(backbone, dtl.normalise(x)) for x in task.x.split(500)]
    known = torch.cat(known).cpu().double()  # (N, F)
    centre, spread, n = known.mean(0), known.std(0) + 1e-6, len(known)
    labels = task.y.cpu()
    y = F.one_hot(labels, task.classes).double()  # (N, classes)
    constant = y.mean(0)
    u, s, v = torch.linalg.svd((known - centre) / spread, full_matrices=False)
    along = u.T @ (y - constant)
    best, most = None, -1
    for penalty in (0.01, 0.1, 1.0, 10.0):
        kept = s.square() / (s.square() + penalty * n)
        fitted = u @ (kept[:, None] * along) + constant
        leverage = (u.square() @ kept + 1 / n)[:, None]  # of an image on the fit at itself, < 1
        left_out = y - (y - fitted) / (1 - leverage)
        right = (left_out.argmax(1) == labels).sum()
        if right > most:
            weights = v.T @ ((kept / s.clamp(min=1e-12))[:, None] * along)
            best, most = Ridge(backbone, centre, spread, weights, constant), right
    return best


dtl.ATTACKERS |= {
    "low": functools.partial(dtl.attack, times=5, lr=0.03),
    "high": functools.partial(dtl.attack, times=5, lr=0.3),
    "longer": functools.partial(dtl.attack, times=20, lr=0.1),
    "adamw": adamw,
    "gentle": gentle,
    "few": few,
    "ridge": ridge,
}

if __name__ == "__main__":
    dtl.main(prog_name="attackers.py")
