"""Tasks by name, a user's own data, the archives, the drawings, augmentation and batches."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl


def task(name, seed=0, **how):
    return dtl.load_task(str(name), seed, "no-archives-here", **how)


def numbers(images):
    """Which images of the `npz` fixture these are."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def refused(call, *args, **how):
    """The message of a DTLError, which is one line of a reasonable length."""
    with pytest.raises(dtl.DTLError) as error:
        call(*args, **how)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) <= 600
    return message


# ---------------------------------------- a task by its name

SLICES = {"": [0, 1, 2], "[0:2]": [0, 1], "[1:]": [1, 2], "[:]": [0, 1, 2]}


@pytest.mark.parametrize(
    "name", ["own.npz", "a[0:2].npz", "b@5.npz", "c[1:].npz@7.npz", "d@[0:2]/e.NPZ"]
)
@pytest.mark.parametrize("chosen", SLICES)
def test_classes_are_chosen_and_renumbered(npz, name, chosen):
    """Labels stay with their images, whatever the file's name looks like."""
    found, classes = task(f"{npz(name)}{chosen}"), SLICES[chosen]
    assert found.classes == len(classes) and found.y.dtype == found.y_test.dtype == torch.int64
    parts = ((found.x, found.y, 10, 0), (found.x_test, found.y_test, 4, 30))
    for images, labels, per_class, first in parts:
        assert images.dtype == torch.uint8 and images.shape == (per_class * len(classes), 3, 8, 8)
        for new, old in enumerate(classes):
            begin = first + per_class * old
            assert sorted(numbers(images[labels == new])) == list(range(begin, begin + per_class))


def test_draws_are_nested_and_by_seed_and_class(npz):
    path = npz()
    small, large, other = (task(f"{path}@{n}", seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
    for c in range(3):
        assert sum(small.y == c) == 3 and sum(large.y == c) == 5
        assert set(numbers(small.x[small.y == c])) < set(numbers(large.x[large.y == c]))
    assert set(numbers(small.x)) != set(numbers(other.x))
    assert [n % 10 for n in numbers(large.x[:5])] != [n % 10 for n in numbers(large.x[5:10])]
    assert small.x_test.equal(large.x_test) and len(small.y_test) == 12
    alone = task(f"{path}[1:3]@3")  # the classes beside a class do not change its draw
    assert numbers(alone.x) == numbers(small.x[small.y > 0])
    assert alone.y.tolist() == [0] * 3 + [1] * 3


WRONG = """[0:2] @5 shapes[0:4 shapes@ shapes[0:4]@-1 shapes[0:4]@5@5 shapes[a:b] shapes[0:1.5]
    shapes[-1:4] shapes[0:33] shapes[32:33] shapes[5:5] shapes[4:5] shapes[4:0] shapes[3] shapes[]
    shapes[1,2] shapes[0:4:2] shapes[0:4]@0 shapes[0:4]@401 shapes[0:99999999] shapes[0:9999999999]
    nosuch nosuch.npz"""


@pytest.mark.parametrize("name", [*WRONG.split(), "", "shapes@" + "9" * 5000, "x" * 5000])
def test_what_is_no_task_is_named(name):
    message = refused(task, name)
    assert name[:40] in message
    assert name != "nosuch" or "there are shapes, cifar10, cifar100" in message


@given(st.text(st.sampled_from("shape[]@:,-0123456789.nz \0\n\té²٣"), max_size=30))
@settings(max_examples=150)
def test_any_text_is_a_task_or_one_error(text):
    for name in (text, f"shapes[{text}", f"shapes[30:32]{text}"):
        try:
            found = task(name)
        except dtl.DTLError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert found.classes >= 2 and found.y.unique().tolist() == [*range(found.classes)]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_validation_images_are_training_images_and_never_test_images(seed):
    """Images carry numbers, the set's own test images 200 and above. A script added the set."""
    y = np.random.default_rng(seed).integers(0, 3, 100)
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dtl.DATASETS, "added", lambda data_dir: (x, y, x[:9] + 200, y[:9]))
        dtl.load_set.cache_clear()
        found, drawn = (task(n, split="validation") for n in ("added", "added@5"))
        dtl.load_set.cache_clear()
    for images, labels in ((found.x, found.y), (found.x_test, found.y_test)):
        assert y[numbers(images)].tolist() == labels.tolist()
    assert sorted(numbers(found.x) + numbers(found.x_test)) == [*range(100)]
    for c in range(3):
        of_class = np.flatnonzero(y == c).tolist()
        held = of_class[-max(1, len(of_class) // 10) :]
        assert numbers(found.x_test[found.y_test == c]) == held
    assert set(numbers(drawn.x)) < set(numbers(found.x)) and drawn.x_test.equal(found.x_test)


def test_shrinking_is_the_mean_over_areas(npz):
    x = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    path, areas = npz(x_train=x, x_test=x[:12]), x.reshape(30, 4, 4, 4, 4, 3)
    means = areas.mean((2, 4)).round().astype(np.uint8).transpose(0, 3, 1, 2)
    small = task(path, image_size=4)
    assert sorted(i.tobytes() for i in small.x.numpy()) == sorted(i.tobytes() for i in means)
    assert (small.x_test.numpy() == means[:12]).all()
    assert task(path).x.shape == task(path, image_size=16).x.shape == (30, 3, 16, 16)
    wide = npz("wide.npz", x_train=x[:, :, :8], x_test=x[:12, :, :8])
    assert task(wide, image_size=8).x.shape == (30, 3, 8, 8)  # from 16x8
    assert "--image-size 12" in refused(task, wide, image_size=12)


def test_the_tasks_of_a_run(npz, tmp_path, capsys):
    """`oracle` is more of the target's images, the subset part of the source's; all of one size."""

    def tasks(**settings):
        return dtl.Run(tmp_path, dtl.Config(**given | settings), 3, "no-archives-here").tasks

    path, given = npz(), dict(oracle_per_class=6, subset_per_class=5)
    given |= dict(source=f"{path}[0:2]", target=f"{path}[1:]@4", downstream=f"{path}[0:2]@2")
    found = tasks(split="validation")
    sizes = {"source": 18, "source-subset": 10, "target": 8, "oracle": 12, "downstream": 4}
    assert {name: len(task.y) for name, task in found.items()} == sizes
    assert set(numbers(found["target"].x)) < set(numbers(found["oracle"].x))
    assert set(numbers(found["source-subset"].x)) < set(numbers(found["source"].x))
    assert {tuple(numbers(found[n].x_test)) for n in ("target", "oracle")} == {(19, 29)}
    assert len(tasks(oracle_per_class=0)["oracle"].y) == 20
    alike = tasks(source="shapes[0:2]@9", image_size=8)
    assert {task.x.shape[1:] for task in alike.values()} == {(3, 8, 8)}
    assert "downstream" not in tasks(downstream="") and not capsys.readouterr().err
    assert len(tasks(subset_per_class=11)["source-subset"].y) == 20


# ---------------------------------------- a user's own data

X, Y = np.arange(30 * 192, dtype=np.uint8).reshape(30, 8, 8, 3), np.repeat(np.arange(3), 10)
FORM = (
    "images x (N, H, W, 3) or grey (N, H, W) uint8 of 0 to 255, and labels y (N,) integers from 0"
)
GAP = "np.unique(y, return_inverse=True)[1] numbers them without a gap"


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def changed(change):
    """Writes a file whose bytes are change(those of a good file)."""

    def write(npz):
        path = npz()
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


BAD = {  # what is wrong: (changes of a good file, or what writes another; what the line must hold)
    "channels first": (dict(x_train=X.transpose(0, 3, 1, 2)), "x_train is uint8 (30, 3, 8, 8)"),
    "grey channel first": (dict(x_test=X[:12, None, :, :, 0]), "x_test is uint8 (12, 1, 8, 8)"),
    "RGBA": (dict(x_train=np.tile(X[..., :1], 4)), "x_train is uint8 (30, 8, 8, 4)"),
    "two channels": (dict(x_train=X[..., :2]), "x_train is uint8 (30, 8, 8, 2)"),
    "vectors": (dict(x_train=X[:, 0, 0]), "x_train is uint8 (30, 3)"),
    "no dimension": (dict(x_test=np.uint8(3)), "x_test is uint8 ()"),
    "floats": (dict(x_train=X / 255), "x_train is float64 (30, 8, 8, 3) of 0.0 to 1.0"),
    "bools": (dict(x_train=X > 9), "x_train is bool (30, 8, 8, 3)"),
    "int64 pixels": (dict(x_test=X[:12].astype(int)), "x_test is int64 (12, 8, 8, 3)"),
    "0/1 pixels": (dict(x_train=X // 128), "x_train is uint8 (30, 8, 8, 3) of 0 to 1"),
    "one-hot": (dict(y_train=np.eye(3, dtype=int)[Y]), "y_train is int64 (30, 3)"),
    "strings": (dict(y_train=Y.astype(str)), "y_train is <U21 (30,)"),
    "float labels": (dict(y_train=Y / 1), "y_train is float64 (30,)"),
    "one label": (dict(y_train=np.uint8(3)), "y_train is uint8 ()"),
    "labels in a cube": (dict(y_train=np.tile(Y[:, None, None], 2)), "y_train is int64 (30, 1, 2)"),
    "no images": (dict(x_train=X[:0], y_train=Y[:0]), "x_train is uint8 (0, 8, 8, 3)"),
    "no labels": (dict(y_train=Y[:0]), "y_train is int64 (0,)"),
    "pickled images": (dict(x_train=np.array([Evil()] * 30)), "allow_pickle=False"),
    "pickled labels": (dict(y_test=np.array([Evil()] * 12)), "allow_pickle=False"),
    "labels from 1": (
        dict(y_train=Y + 1, y_test=Y[9:21] + 1),
        f"3 labels of 1 to 3, not 0 to 2: {GAP}",
    ),
    "a gap": (dict(y_train=2 * Y, y_test=2 * Y[9:21]), f"3 labels of 0 to 4, not 0 to 2: {GAP}"),
    "negative labels": (dict(y_train=Y - 1), GAP),
    "huge labels": (dict(y_train=np.uint64(2**63) + Y.astype(np.uint64)), GAP),
    "no test images": (dict(y_test=np.repeat([0, 2], 6)), "class 1 has 10 images to train and 0"),
    "no training images": (dict(y_train=np.repeat([0, 2], 15)), "class 1 has 0 images to train"),
    "two sizes": (dict(x_train=X[:, :4]), "x_train (30, 4, 8, 3), y_train (30,), x_test (12, 8, 8"),
    "grey and not": (
        dict(x_test=X[:12, ..., 0]),
        "one size, are needed, not x_train (30, 8, 8, 3)",
    ),
    "29 labels": (dict(y_train=Y[:29]), "a label for each image, and one size, are needed, not"),
    "11 test labels": (dict(y_test=Y[:11]), "x_test (12, 8, 8, 3), y_test (11,)"),
    "one missing": (dict(y_train=None), "needs x_train, y_train, x_test, y_test; " + FORM),
    "all missing": (dict.fromkeys(("x_train", "x_test", "y_train", "y_test")), FORM),
    "an empty file": (changed(lambda data: b""), FORM),
    "no zip": (changed(lambda data: data[4:]), FORM),
    "a cut zip": (changed(lambda data: data[:5000]), FORM),
    "wrong bytes": (changed(lambda data: data.replace(b"\5" * 99, b"\6" * 99)), "Bad CRC"),
    "no array": (changed(lambda data: data.replace(b"\x93NUMPY", b"nothing")), FORM),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_npz_is_one_line_that_says_what_is_needed(npz, wrong):
    change, told = BAD[wrong]
    message = refused(task, change(npz) if callable(change) else npz(**change))
    assert "own.npz: " in message and told in message
    assert " is " not in told or FORM in message


GREY = X[..., :1]
GOOD = {
    "grey": dict(x_train=GREY[..., 0], x_test=GREY[:12, ..., 0]),
    "grey, with a channel": dict(x_train=GREY, x_test=GREY[:12]),
    "labels (N, 1)": dict(y_train=Y[:, None].astype(np.uint8), y_test=Y[9:21, None]),
    "in Fortran's order": dict(x_train=np.asfortranarray(np.tile(GREY, 3))),
    "MedMNIST's names": dict.fromkeys(("x_train", "x_test", "y_train", "y_test"))
    | dict(train_images=GREY[..., 0], train_labels=Y[:, None], val_images=X, val_labels=1)
    | dict(test_images=GREY[:12, ..., 0], test_labels=Y[9:21, None]),
}


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("form", GOOD)
def test_other_forms_give_the_task_of_the_plain_one(npz, form, size):
    plain = dict(x_train=np.tile(GREY, 3), y_train=Y, x_test=np.tile(GREY[:12], 3), y_test=Y[9:21])
    paths = npz(**plain), npz("other.NPZ", **plain | GOOD[form])
    expected, found = (vars(task(f"{path}[0:2]@9", image_size=size)) for path in paths)
    assert found.pop("classes") == expected.pop("classes") == 2
    assert all(found[name].equal(expected[name]) for name in expected)
    assert found["x"].shape == (18, 3, size or 8, size or 8) and found["x"].dtype == torch.uint8


# ---------------------------------------- CIFAR

CIFAR = {  # set: (folder, files to train on, file to measure on, label bytes)
    "cifar-10": ("batches-bin", [f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", 1),
    "cifar-100": ("binary", ["train.bin"], "test.bin", 2),
}


@pytest.mark.parametrize("archive", CIFAR)
def test_cifar_is_fetched_once_and_read(tmp_path, monkeypatch, archive):
    """From files of the right sizes that are empty but for the last record of each."""
    (folder, train, test, labels), name = CIFAR[archive], archive.replace("-", "")
    asked, size, folder = [], labels + 3072, tmp_path / f"{archive}-{folder}"
    each, pixels = 50000 // len(train), (np.arange(3072) % 251).astype(np.uint8)

    def download(address, sha256, folder):
        asked.append((address, len(sha256), folder))
        folder.mkdir()
        for k, file in enumerate([*train, test]):
            with (folder / file).open("wb") as opened:
                opened.truncate((each if k < len(train) else 10000) * size)
                opened.seek(-size, os.SEEK_END)
                opened.write(bytes([9, 10 + k][-labels:]) + np.roll(pixels, k).tobytes())

    monkeypatch.setattr(dtl, "download", download)
    x, y, x_test, y_test = dtl.load_set.__wrapped__(name, tmp_path)
    address = f"https://www.cs.toronto.edu/~kriz/{archive}-binary.tar.gz"
    assert asked == [(address, 64, folder)]
    assert x.shape == (50000, 3, 32, 32) and x_test.shape == (10000, 3, 32, 32)
    assert x.dtype == x_test.dtype == np.uint8 and y.dtype == y_test.dtype == np.int64
    assert np.flatnonzero(y).tolist() == [each * (k + 1) - 1 for k in range(len(train))]
    assert np.flatnonzero(y_test).tolist() == [9999]  # of two label bytes the last one counts
    images, labels = [*x[each - 1 :: each], x_test[-1]], [*y[each - 1 :: each], y_test[-1]]
    for k, image in enumerate(images):
        planes = np.roll(pixels, k)  # then rows
        assert labels[k] == 10 + k and image[1, 2, 3] == planes[1024 + 2 * 32 + 3]
        assert (image.flatten() == planes).all()
    os.truncate(folder / test, 10000 * size - 1)
    assert f"{10000 * size - 1} bytes" in refused(dtl.load_set, name, tmp_path)
    (folder / train[-1]).unlink()  # missing
    assert f"{folder}/{train[0][:5]}" in refused(dtl.load_set, name, tmp_path)
    assert len(asked) == 1


@pytest.fixture
def site(tmp_path):
    """The address of a small archive, its sha256, and the folder to download it to."""
    made, to = tmp_path / "site" / "folder", tmp_path / "to" / "folder"
    made.mkdir(parents=True)
    (made / "data.bin").write_bytes(b"data")
    archive = Path(shutil.make_archive(tmp_path / "site" / "a", "gztar", made.parent, made.name))
    return archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest(), to


def there(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("faster", [False, True])
def test_an_archive_is_downloaded_and_unpacked(site, monkeypatch, capsys, faster):
    """Unless another run was faster: those that start together all find the folder missing."""
    fetch = torch.hub.download_url_to_file

    def slow(*args, **how):
        fetch(*args, **how)
        site[2].mkdir()
        (site[2] / "data.bin").write_bytes(b"theirs")

    if faster:
        monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    dtl.download(*site)
    assert there(site[2].parent) == ["folder", "folder/data.bin"]
    assert (site[2] / "data.bin").read_bytes() == (b"theirs" if faster else b"data")
    assert site[0] in capsys.readouterr().err


def test_an_altered_archive_is_never_opened(site, monkeypatch):
    monkeypatch.setattr(shutil, "unpack_archive", lambda *a: pytest.fail("opened"))
    for _ in range(2):  # nor is it there the second time
        assert site[0] in refused(dtl.download, site[0], "0" * 64, site[2])
        assert there(site[2].parent) == []


# ---------------------------------------- the drawings


def test_shapes_are_those_of_the_published_results():
    arrays = dtl.load_set("shapes", Path())
    assert [len(a) for a in arrays] == [32 * 400, 32 * 400, 32 * 100, 32 * 100]
    drawn = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert drawn.startswith("60950e1aca6c423f")
    assert not {i.tobytes() for i in arrays[0]} & {i.tobytes() for i in arrays[2]}
    x, y = dtl.draw_shapes.__wrapped__(2, 1)
    assert x.shape == (64, 3, 16, 16) and x.dtype == np.uint8 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [2] * 32 and len(np.unique(x, axis=0)) == 64


def test_the_classes_of_shapes_differ(monkeypatch):
    """In more than what is drawn at random, of which every image gets the mean here."""

    class Means:
        def uniform(self, low, high, size):
            return np.full(size, (low + high) / 2)

        def normal(self, mean, spread, size):
            return np.full(size, mean)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Means())
    x = dtl.draw_shapes.__wrapped__(1, 0)[0].astype(float)
    apart = abs(x[:, None] - x[None]).mean((2, 3, 4)) + 1000 * np.eye(32)
    assert apart.min() > 2


# ---------------------------------------- augmentation and batches

FLIPS = {"crop,flip": (False, True), "crop": (False,)}


def variants(image, how):
    """Every crop of the image, padded by reflection, and of each its mirror image."""
    height, width = image.shape[1:]
    down, across = max(1, height // 8), max(1, width // 8)
    padded, found = np.pad(image, ((0, 0), (down, down), (across, across)), "reflect"), set()
    for top, left in np.ndindex(2 * down + 1, 2 * across + 1):
        crop = padded[:, top : top + height, left : left + width]
        found |= {(crop[:, :, ::-1] if flip else crop).tobytes() for flip in FLIPS[how]}
    return found


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40), st.sampled_from([*FLIPS]))
@settings(max_examples=30)
def test_augmented_images_are_crops_and_flips_of_their_own_image(seed, height, width, how):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 3, height, width), generator=generator).byte()
    changed = dtl.augmented(images, how, generator)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    for image, result in zip(images.numpy(), changed.numpy()):
        assert result.tobytes() in variants(image, how)


@pytest.mark.parametrize("how", FLIPS)
def test_every_crop_and_flip_occurs_image_by_image(how):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    batch, new = image.expand(500, -1, -1, -1), torch.Generator
    first, again = (dtl.augmented(batch, how, new().manual_seed(3)) for _ in range(2))
    assert first.equal(again)
    assert {i.numpy().tobytes() for i in first} == variants(image[0].numpy(), how)
    assert dtl.augmented(batch, "none", new()).equal(batch)


def drawn(size, seed, count=7, augment="none"):
    """The numbers of a batch's images, of a task whose images carry theirs plus one, beside a black
    column at their left; and how many have it there still."""
    x = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    x[..., 0] = 0
    task = dtl.Task(x, torch.arange(count) % 3, None, None, 3)
    x, y = dtl.batch(task, size, augment, torch.Generator().manual_seed(seed))
    assert x.shape == (size, 3, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    found = (x * 63.75 + 127.5).round().long()
    assert ((found.amax((1, 2, 3)) - 1) % 3 == y).all()  # labels go with their images
    return (found.amax((1, 2, 3)) - 1).tolist(), (found[..., 0].amax((1, 2)) == 0).sum().item()


@given(st.integers(1, 40), st.integers(0, 2**62), st.integers(2, 60))
@settings(max_examples=30)
def test_batches_are_drawn_by_the_generator_alone(size, seed, count):
    """Of more images than there are, if need be; augmented as asked for."""
    found, black = drawn(size, seed, count)
    assert set(found) <= set(range(count)) and black == size
    assert found == drawn(size, seed, count)[0] == drawn(size, seed, count, "crop,flip")[0]


def test_every_image_is_drawn_equally_often():
    found, black = drawn(7000, 0, augment="crop")
    assert abs(np.bincount(found, minlength=7) - 1000).max() < 5 * 1000**0.5
    assert abs(black - 7000 / 3) < 5 * 7000**0.5 / 2
    assert drawn(20, 1) != drawn(20, 2)
