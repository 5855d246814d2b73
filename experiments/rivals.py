"""Other ways to forget: one forget loss each, beside the same retain loss and allowance.

    python experiments/rivals.py all --methods gc,random-labels,random-labels-fresh

What the papers leave open is OUR READING. It has the attackers of attackers.py and sceptic.py, too.
"""

import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and that of dtl.py
import sceptic  # noqa: E402, F401

import dtl  # noqa: E402


def source_answers(model, context):
    """Log-probabilities (B, source classes) of a Model through the frozen source head."""
    logits = context.source_head(model.backbone(context.x))
    return F.log_softmax(logits, 1)


def divergence(student, teacher):
    """KL(teacher || student) of log-probabilities (B, classes), an image each, (B,)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def negative_gradient(context):
    """Ascent on cross entropy. An image whose loss has reached that of guessing counts no more, or
    it would run away."""
    answers = source_answers(context.student, context)
    loss = F.nll_loss(answers, context.y, reduction="none")
    return -loss.clamp(max=math.log(answers.shape[1])).mean()


def random_labels(context):
    """Cross entropy with labels drawn anew at every step."""
    answers, labels = source_answers(context.student, context), context.y
    how = dict(generator=context.generator, device=labels.device)
    return F.nll_loss(answers, torch.randint(0, answers.shape[1], labels.shape, **how))


@functools.cache
def stranger(network, device):
    """A random backbone, made once: every step and every seed has the same."""
    backbone = dtl.new_backbone(network, dtl.stream("stranger"), device)
    return backbone.eval().requires_grad_(False)


def bad_teacher(context):
    """Chundawat et al. 2023: distillation from a randomly initialised model."""
    model = dtl.Model(stranger(context.config.network, context.x.device), context.source_head)
    teacher = source_answers(model, context)
    return divergence(source_answers(context.student, context), teacher).mean()


def scrub(context):
    """Kurmanji et al. 2023: away from the teacher's answers, clamped like the negative gradient."""
    student, teacher = (source_answers(m, context) for m in (context.student, context.teacher))
    return -divergence(student, teacher).clamp(max=math.log(student.shape[1])).mean()


def fresh_head(context):
    """A random one of the source head's shape, drawn anew at every step."""
    trained = context.source_head
    return dtl.new_head(trained.in_features, trained.out_features, context.generator)


def gradient_norm(context):
    """Squared norm of the whole batch's gradient. The mean of GC over batches is that of the source
    task's own gradient; this holds the noise of one batch, too, which is many times as much."""
    head, backbone = fresh_head(context), context.student.backbone
    loss = F.cross_entropy(head(backbone(context.x)), context.y)
    gradients = torch.autograd.grad(loss, list(backbone.parameters()), create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)


def collision_through(context, head, *more):
    """GC through a head, over the backbone's gradients and those of `more` parameters."""
    c, backbone = context.config, context.student.backbone
    losses = dtl.chunk_losses(backbone, head, context.x, context.y, c.chunks)
    params = [*backbone.parameters(), *more]
    return dtl.gradient_collision_loss(losses, params, similarity=c.similarity)


def collision_with_head(context):
    """GC over the fresh head's gradients, too."""
    head = fresh_head(context)
    return collision_through(context, head, *head.parameters())


def collision_through_source_head(context):
    """GC through the trained head, whose nearest stationary point is the source optimum itself."""
    return collision_through(context, context.source_head)


dtl.METHODS |= {
    "neggrad": negative_gradient,
    "random-labels": random_labels,
    "bad-teacher": bad_teacher,
    "scrub": scrub,
    "gradient-norm": gradient_norm,
    "gc-head": collision_with_head,
    "gc-source-head": collision_through_source_head,
    "random-labels-fresh": random_labels,
    "gradient-norm-fresh": gradient_norm,
}

if __name__ == "__main__":
    dtl.main(prog_name="rivals.py")
