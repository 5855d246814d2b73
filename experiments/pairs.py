"""Four pairs of tasks as a user brings them, .npz files, at the program's own defaults.

    python experiments/pairs.py c100-c10 --seeds 20,21,22 --attackers all --data-dir data

The first argument is the pair, what follows goes to `dtl.py all`. The files are made in the folder
pairs/ unless they are there. Of `c100-c10` and `c10-c100` at 16 pixels, `v-` before the name
measures on training images that are kept apart, for whatever is chosen; of `digits` (scikit-learn)
and `shapes` as well. It has the attackers of attackers.py and sceptic.py, too.
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and that of dtl.py
import sceptic  # noqa: E402, F401

import dtl  # noqa: E402

FOLDER = Path("pairs")
# file: (set, classes, training images a class, of the rest those kept apart for validation)
FILES = {
    "c100_0_40": ("cifar100", range(40), 450, 50),
    "c10_120": ("cifar10", range(10), 120, 300),
    "c10": ("cifar10", range(10), 4700, 300),
    "c100_0_20": ("cifar100", range(20), 70, 150),
    "c100_80_100": ("cifar100", range(80, 100), 50, 100),
    "digits_0_6": ("digits", range(6), 80, 45),
    "digits_6_10": ("digits", range(6, 10), 80, 45),
}
PAIRS = {  # source, target, downstream
    "c100-c10": ("c100_0_40.npz", "c10_120.npz@40", "c100_80_100.npz"),
    "c10-c100": ("c10.npz", "c100_0_20.npz@25", "c100_80_100.npz"),
    "digits": ("digits_0_6.npz", "digits_6_10.npz@20", ""),
    "shapes": ("shapes[0:16]", "shapes[16:24]@30", "shapes[24:32]@50"),
}


def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    x = (found.images * 15.9).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    return x, found.target


def make(name, data_dir):
    """FOLDER/NAME.npz, measured on test images, and FOLDER/v-NAME.npz on others."""
    dataset, classes, train, apart = FILES[name]
    if dataset == "digits":
        (x, y), x_test, y_test = digits(), None, None
    else:
        x, y, x_test, y_test = dtl.load_set(dataset, Path(data_dir))
    rng, parts = np.random.default_rng(7), {"train": [], "v-": [], "": []}
    for c in classes:
        of_class = rng.permutation(np.flatnonzero(y == c))
        parts["train"].append(of_class[:train])
        if x_test is None:
            parts["v-"].append(of_class[train : train + apart])
            parts[""].append(of_class[train + apart :])
        else:
            parts["v-"].append(of_class[-apart:])
            parts[""].append(np.flatnonzero(y_test == c))

    def arrays(part, images):
        index = np.concatenate(parts[part])
        small = dtl.gather(images, index, 16) if images.shape[2] > 16 else images[index]
        labels = np.repeat(np.arange(len(classes)), [len(i) for i in parts[part]])
        return np.moveaxis(np.asarray(small), 1, 3), labels

    FOLDER.mkdir(exist_ok=True)
    x_train, y_train = arrays("train", x)
    for prefix, images in (("v-", x), ("", x if x_test is None else x_test)):
        found, labels = arrays(prefix, images)
        path = FOLDER / f"{prefix}{name}.npz"
        np.savez(path, x_train=x_train, y_train=y_train, x_test=found, y_test=labels)


def arguments(pair, *more):
    """Those of dtl.py; the shapes' oracle gets fewer images than there are, to come near."""
    prefix = "v-" if pair.startswith("v-") else ""
    data_dir = more[more.index("--data-dir") + 1] if "--data-dir" in more else "data"
    found = ["all", "--preset", "own", "--out", f"runs/{pair}", *more]
    for option, task in zip(("source", "target", "downstream"), PAIRS[pair.removeprefix("v-")]):
        if ".npz" in task:
            if not (FOLDER / f"{prefix}{task.split('@')[0]}").exists():
                make(task.split(".")[0], data_dir)
            task = f"{FOLDER}/{prefix}{task}"
        found += [f"--{option}", task] if task else []
    if pair.endswith("shapes"):
        found += ["--oracle-per-class", "240"]
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].removeprefix("v-") not in PAIRS:
        sys.exit(f"{__doc__}\nPairs: {', '.join(PAIRS)}")
    if sys.argv[1] == "v-shapes":  # other drawings to measure on
        dtl.DATASETS["shapes"] = lambda data_dir: (
            dtl.draw_shapes(400, seed=1) + dtl.draw_shapes(100, seed=3)
        )
    dtl.main(arguments(*sys.argv[1:]), prog_name="pairs.py")
