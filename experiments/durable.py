"""Durable disposal, second round: what else keeps the target in a fresh backbone, and not the source? Each
trial changes one thing or two of gc-fresh. Of the models named it makes those that are not in OUT:

    python experiments/durable.py --models oracle,transferred,disposed:gc-fresh,disposed:top1 --data-dir data

Validation images, one seed, two attackers: `long` and the sceptic's."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sceptic  # noqa: E402

import dtl  # noqa: E402


@dataclass(frozen=True)
class Trial:
    gc: float = 0.0  # weights of the forget losses
    uniform: float = 0.0
    similarity: str = "dot"  # of gc
    top1: bool = False  # of the teacher's answer on a source image only which class it is
    per_class: int = 0  # source images a class that the teacher answers on; 0: all
    teachers: tuple[str, ...] = ("transferred",)  # their logits are averaged
    temperature: float = dtl.TEMPERATURE


SEVERAL = ("transferred", "transferred-2", "transferred-3")  # each with a head and batches of its own
TRIALS = {
    "uniform-300": Trial(uniform=300),
    "uniform-1000": Trial(uniform=1000),
    "top1": Trial(top1=True),
    "few-images": Trial(per_class=50),
    "fewer-images": Trial(per_class=10),
    "few-images-gc": Trial(gc=30, per_class=50),
    "gc-and-uniform": Trial(gc=30, uniform=100),
    "top1-gc": Trial(gc=30, top1=True),
    "several-teachers": Trial(teachers=SEVERAL),
    "several-teachers-gc": Trial(gc=60, teachers=SEVERAL),
    "second-generation": Trial(gc=30, teachers=("disposed:gc-fresh",)),
    "temperature-1": Trial(gc=30, temperature=1.0),
    "cos-10": Trial(gc=10, similarity="cos"),
    "cos-30": Trial(gc=30, similarity="cos"),
    "cos-100": Trial(gc=100, similarity="cos"),
}


def dispose(run, trial, schedule, seed):
    """dtl.dispose into a fresh backbone, as the trial has it."""
    c, device, source, target = run.config, run.device, run.task("source"), run.task("target")
    head = dtl.frozen(run.model("pretrained").head)
    teachers = [dtl.frozen(run.model(name)) for name in trial.teachers]
    backbone = dtl.new_backbone(c.network, dtl.stream(seed, "student"), device)
    features, source_seed = backbone.features, dtl.stream(seed, "source")
    student = dtl.Model(
        backbone, dtl.new_head(features, target.classes, dtl.stream(seed, "student head"), device))
    answered, per_class = source, len(source.y) // source.classes
    if trial.per_class:  # the last of each class: not those that the attacker has
        last = torch.arange(len(source.y)) % per_class >= per_class - trial.per_class
        answered = replace(source, x=source.x[last], y=source.y[last])

    def answers(x):
        return sum(teacher(x) for teacher in teachers) / len(teachers)

    def inputs(step):
        of_source, of_answered = (
            dtl.batch_index(task, c.chunks * c.chunk_size, step, source_seed) for task in (source, answered))
        ramp = min(1.0, (step + 1) / (dtl.RAMP * schedule.steps))
        return (dtl.batch_index(target, schedule.batch_size, step, seed), of_source, of_answered,
                torch.full((), ramp, dtype=torch.float64, device=device))

    def step_loss(generator, of_target, of_source, of_answered, ramp):
        x, _ = dtl.batch(target, of_target, schedule.augment, generator)
        terms = {"retain": dtl.distillation(student(x), answers(x), trial.temperature)}
        terms["retain"].backward()
        x, y = dtl.batch(source, of_source, schedule.augment, generator)
        with dtl.running_statistics_kept(student):
            seen = dtl.batch(answered, of_answered, schedule.augment, generator)[0] if trial.per_class else x
            terms["distill"] = (F.cross_entropy(student(seen), answers(seen).argmax(1)) if trial.top1 else
                                dtl.distillation(student(seen), answers(seen), trial.temperature))
            terms["distill"].backward()
            if trial.gc:
                fresh = dtl.new_head(features, source.classes, generator, device)
                terms["gc"] = dtl.gradient_collision(
                    backbone, fresh, x, y, trial.similarity, c.chunks, trial.gc * ramp)
            if trial.uniform:
                terms["uniform"] = dtl.uniform_labels(head(backbone(x)), y, None, None, None)
                (trial.uniform * ramp.float() * terms["uniform"]).backward()
        return terms

    dtl.train(student, inputs, step_loss, schedule, seed, run.progress)
    return student


class Trials(dtl.Run):
    """A run that knows `disposed:TRIAL`, and `transferred-K`: transferred again, with seeds of its own."""

    def recipe(self, name):
        if name.startswith("transferred-"):
            how = self.schedule(self.config.transfer_steps, self.config.transfer_lr)
            seed = dtl.stream(self.seed, name)
            return [self.key("pretrained"), name], how.steps, lambda: dtl.transfer(
                self.model("pretrained"), self.task("target"), how, seed, self.progress)
        if (trial := TRIALS.get(name.removeprefix("disposed:"))) is None:
            return super().recipe(name)
        how, seed = self.schedule(self.config.fresh_steps, self.config.fresh_lr), dtl.stream(
            self.seed, dtl.STAGE3)
        depends = [[self.key(teacher) for teacher in trial.teachers], asdict(trial), asdict(how)]
        return depends, 1.0, lambda: dispose(self, trial, how, seed)


@click.command()
@click.option("--preset", default="cifar-cpu")
@click.option("--seed", default=100)
@click.option("--models", required=True, help="MODEL,MODEL,...; none: the tables of what is there")
@click.option("--data-dir", type=Path, required=True)
@click.option("--out", type=Path, default="val")
@click.option("--made-with", default="", help="of models made elsewhere, as in 2.11.0+cu130,cuda")
@click.option("--smoke", is_flag=True)
def main(preset, seed, models, data_dir, out, made_with, smoke):
    torch.set_num_threads(1)
    config = dtl.Config(**dtl.PRESETS[preset] | dict(split="validation"))
    run = Trials(config, seed, data_dir, dtl.Progress(out), dtl.Results(out))
    run.made_with = tuple(made_with.split(",")) if made_with else run.made_with
    run.measure("pretrained", "source_accuracy")
    for m in filter(None, models.split(",")):
        for teacher in TRIALS.get(m.removeprefix("disposed:"), Trial()).teachers:
            run.model(teacher)  # a stage of its own, not within this one
        found = run.measure(m, "target_accuracy")
        click.echo(f"{m}: {100 * found['value']:.1f} % on the target")
        for task in dtl.PIGGYBACK_TASKS:
            run.measure(m, "pl_accuracy", task, "long", 0)
            sceptic.attack(run, m, task, smoke)
    names = [f"disposed:{m}" for m in (*dtl.METHODS, *TRIALS)]
    sceptic.report({seed: run}, ["oracle", "transferred", *names])


if __name__ == "__main__":
    main()
