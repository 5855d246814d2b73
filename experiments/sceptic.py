"""What can be got out of a backbone? By a sceptic who didn't read how disposal works: filters get unit norm,
dead ones and closed channels are revived, BatchNorm's statistics estimated anew, in some variants its scales
and shifts reset or the last block drawn anew, too; a head on the 2x2 means of every layer begins as ridge
regression; every variant is trained for SCOUT steps, a fifth of the training images held out; the best two go
on with all of them; their log-probabilities, over both flips, are added up. Filters learn by Muon (Jordan,
2024), whose steps are no smaller where the gradient is small. Work is done by seed, model, then task."""

import base64
import itertools
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl  # noqa: E402

SCOUT, MORE = 60, 900  # 4 * 60 + 900 steps of Muon, 1.15 plain ones each; the rest of 1800 is for forwards
VARIANTS = {  # blocks kept, whether BatchNorm's scales and shifts are, the filters' rate, share of MORE
    "gentle": (3, True, 0.007, 1), "bold": (3, True, 0.03, 2),
    "reset": (3, False, 0.05, 2), "early": (2, False, 0.05, 2)}


class Member(nn.Module):
    @torch.no_grad()
    def __init__(self, run, model, part, variant, seed):
        super().__init__()
        device = part.x.device
        self.seed, self.generator = seed, torch.Generator(device).manual_seed(seed)
        blocks, affine, self.rate, self.share = VARIANTS[variant]
        self.backbone = net = dtl.new_backbone(run.config.network, seed, device)
        old, new = ([m for m in nn.Sequential(n.stem, n.blocks[:blocks]).modules()
                     if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] for n in (run.model(model).backbone, net))
        for conv, bn, new_conv, new_bn in zip(old[::2], old[1::2], new[::2], new[1::2]):
            norm, scale = conv.weight.flatten(1).norm(dim=1), bn.weight.abs()
            live = (norm > norm.median() / 20 + 1e-6) & ((scale > scale.median() / 20 + 0.01) | (not affine))
            if affine:  # a shift of at least -2 scales lets something through ReLU
                new_bn.weight[live], new_bn.bias[live] = bn.weight[live], bn.bias.maximum(-2 * scale)[live]
            new_conv.weight[live] = conv.weight[live]
            new_conv.weight /= new_conv.weight.flatten(1).norm(dim=1)[:, None, None, None]
        net.train().apply(lambda module: setattr(module, "momentum", 1.0))(dtl.normalise(part.x[::2]))
        x, held = (torch.cat([net.eval().every_layer(dtl.normalise(images)) for images in split.split(500)])
                   for split in (part.x, part.x_test))
        n, width, onehot = *x.shape, torch.eye(part.classes, device=device)[part.y]
        self.norm = nn.BatchNorm1d(width, eps=1e-4, momentum=1.0, affine=False, device=device)
        x, held = self.norm(x), self.norm.eval()(held)
        self.head = nn.Linear(width, part.classes, bias=False, device=device)
        ridges = [torch.linalg.solve(x.T @ x + n * strength * torch.eye(width, device=device), x.T @ onehot)
                  for strength in (0.03, 0.1, 0.3, 1, 3)]  # x is centred: it needs no constant
        best = min((scale * ridge for ridge in ridges for scale in (2, 4, 8, 16)),
                   key=lambda weight: nn.functional.cross_entropy(held @ weight, part.y_test).item())
        self.head.weight.copy_(8 * best.T)
        self.apply(lambda module: setattr(module, "momentum", 0.1)).speed = [0 * p for p in self.parameters()]

    def forward(self, x):
        maps = [self.backbone.every_layer(v) for v in ([x] if self.training else [x, x.flip(3)])]
        return sum(self.head(self.norm(m) / 8).log_softmax(1) / len(maps) for m in maps)

    def learn(self, task, steps):
        most, parameters = min(0.5, steps * 64 / len(task.y) / 80), list(self.train().parameters())
        device = task.x.device

        def step(index, rate):
            x, y = dtl.batch(task, index, "crop,flip", self.generator)
            target = 0.9 * torch.eye(task.classes, device=device)[y] + 0.1 / task.classes
            share = most * torch.rand((), generator=self.generator, device=device)
            x, target = (v.lerp(v.flip(0), share) for v in (x, target))  # mixup, more where images come often
            gradients = torch.autograd.grad(nn.functional.cross_entropy(self(x), target), parameters)
            for p, m, g in zip([p.data for p in parameters], self.speed, gradients):
                g = g + 0.9 * m.mul_(0.9).add_(g)  # Nesterov's
                if p.ndim < 4:
                    p -= 0.05 * rate * (g + 5e-4 * p)
                    continue
                o = g.flatten(1) / (g.norm() + 1e-12)
                for _ in range(5):  # towards the nearest orthogonal matrix
                    o = 3.4445 * o + (2.0315 * (square := o @ o.T) @ square - 4.775 * square) @ o
                p -= self.rate * rate * o.view_as(p)
                p /= p.flatten(1).norm(dim=1)[:, None, None, None]
            return rate

        step = dtl.Graph(step, self.generator) if device.type == "cuda" else step
        for k in range(steps):
            rate = torch.full((), min((k + 1) / 15, 1) * (1 - k / steps), dtype=torch.float64, device=device)
            step(dtl.batch_index(task, 64, k, self.seed), rate)


def attack(run, model, name, smoke=False):
    """Adds the line of results for this model and piggyback task, unless it is there."""
    path, task, began, s = run.path(model), run.task(name), time.monotonic(), run.seed
    if model != "random" and not path.exists():
        raise click.ClickException(f"there is no {path}")
    if key(run, model, name) in run.results:
        return
    held = torch.arange(len(task.y)) % 5 == 4  # a class's images lie together
    part = dtl.Task(task.x[~held], task.y[~held], task.x[held], task.y[held], task.classes, "")
    found, loss = {}, {}
    for v in VARIANTS:
        found[v] = one = Member(run, model, part, v, dtl.stream(s, "sceptic", name, v))
        one.learn(part, 2 if smoke else SCOUT)
        loss[v] = nn.functional.cross_entropy(one.eval()(dtl.normalise(part.x_test)), part.y_test).item()
    chosen = sorted(VARIANTS, key=loss.get)[:2]
    best = nn.ModuleList(found[v] for v in chosen)
    for member in best:
        member.learn(task, (6 if smoke else MORE) * member.share // sum(other.share for other in best))
    best.forward = lambda x: sum(member(x) for member in best)
    right = dtl.hits(best, task).cpu().numpy()
    run.results.add(dict(
        seed=s, model=model, metric="pl_accuracy", task=name, attacker="sceptic", attacker_seed=0,
        key=key(run, model, name),
        value=right.mean(), images=len(right), hits=base64.b64encode(np.packbits(right)).decode(),
        valid=loss, chosen=chosen, config=run.config.digest(), revision=dtl.git_revision(),
        seconds=time.monotonic() - began))
    click.echo(f"seed {s} {model} {name}: {100 * right.mean():.1f} % by {' and '.join(chosen)}")


def key(run, model, name):
    return f"sceptic {run.path(model).stem} {name}"


def report(runs, models):
    """Prints the tables of all that was measured of these models in these runs, by seed."""
    dtl.ATTACKERS["sceptic"] = None
    first, records = next(iter(runs.values())), []
    for r in first.results.values():
        which = [r[part] for part in ("model", "metric", "task", "attacker", "attacker_seed")]
        if (run := runs.get(r["seed"])) and r["model"] in ("pretrained", *models):
            by_sceptic = r["attacker"] == "sceptic"
            own = key(run, r["model"], r["task"]) if by_sceptic else run.number(*which)[0]["key"]
            records += [r] * (r["key"] == own)
    about = (f"python experiments/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}",
             f"seeds {','.join(map(str, runs))}, revision {dtl.git_revision()}, torch {torch.__version__}, "
             "CPU, 1 thread")
    click.echo(dtl.report(first.results.path.parent / "sceptic", first.config, about, records, models))


@click.command()
@click.option("--preset", default="cifar-cpu")
@click.option("--seeds", default="0")
@click.option("--models", default="oracle,transferred")
@click.option("--data-dir", type=Path, required=True)
@click.option("--out", type=Path, default="runs", help="of python dtl.py all")
@click.option("--precision", default="auto", help="of the models")
@click.option("--made-with", default="", help="of models made elsewhere, as in 2.11.0+cu130,cuda")
@click.option("--smoke", is_flag=True)
def main(preset, seeds, models, data_dir, out, precision, made_with, smoke):
    torch.set_num_threads(1)
    results, config = dtl.Results(out), dtl.Config(**dtl.PRESETS[preset] | dict(precision=precision))
    runs = {int(s): dtl.Run(config, int(s), data_dir, dtl.Progress(), results) for s in seeds.split(",")}
    for run in runs.values() if made_with else ():
        run.made_with = tuple(made_with.split(","))
    for s, m, t in itertools.product(runs, models.split(","), dtl.PIGGYBACK_TASKS):
        attack(runs[s], m, t, smoke)
    report(runs, (*dtl.REFERENCES, *(f"disposed:{m}" for m in dtl.METHODS)))


if __name__ == "__main__":
    main()
