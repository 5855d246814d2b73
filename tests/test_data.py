"""Tasks by name, the archives, a user's own data, augmentation."""

import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl
import dtl_data

CPU = torch.device("cpu")


def task(name, seed=0):
    return dtl.load_task(str(name), seed, Path("no-archives-here"), CPU)


def numbers(images):
    """Which images of the `npz` fixture these are."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


# ----------------------------------------------------------------------------------------------------------- task names


@pytest.mark.parametrize(("classes", "expected"), [
    ("", [0, 1, 2]), ("[0:2]", [0, 1]), ("[1:]", [1, 2]), ("[0:3:2]", [0, 2]), ("[2,0]", [2, 0]),
])  # fmt: skip
def test_classes_are_chosen_and_renumbered(npz, classes, expected):
    chosen = task(f"{npz()}{classes}")
    assert chosen.classes == len(expected)
    for images, labels, per_class, first in ((chosen.x, chosen.y, 10, 0), (chosen.x_test, chosen.y_test, 4, 30)):
        assert images.dtype == torch.uint8 and images.shape == (per_class * len(expected), 3, 8, 8)
        for new, old in enumerate(expected):
            begin = first + per_class * old
            assert sorted(numbers(images[labels == new])) == list(range(begin, begin + per_class))


def test_draws_are_nested_and_by_seed(npz):
    path = npz()
    small, large, other = (task(f"{path}@{n}", seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
    for c in range(3):
        assert sum(small.y == c) == 3 and sum(large.y == c) == 5
        assert set(numbers(small.x[small.y == c])) < set(numbers(large.x[large.y == c]))
    assert set(numbers(small.x)) != set(numbers(other.x))
    assert small.x_test.equal(large.x_test) and len(small.y_test) == 12
    assert small.fingerprint == task(f"{path}@3").fingerprint != other.fingerprint


@pytest.mark.parametrize("name", [
    "", "shapes[0:4", "shapes@", "shapes[0:4]@-1", "nosuch[0:4]", "nosuch.npz[0:2]", "shapes[a:b]", "shapes[0:1.5]",
    "shapes[0:33]", "shapes[32,33]", "shapes[-1:4]", "shapes[5:5]", "shapes[4:0]", "shapes[3]", "shapes[1,1]",
    "shapes[0:1:1:1]", "shapes[0:4]@0", "shapes[0:4]@9999",
])  # fmt: skip
def test_unknown_task_is_named(name):
    with pytest.raises(dtl.DTLError) as error:
        task(name)
    assert name.split("[")[0].split("@")[0] in str(error.value) and "\n" not in str(error.value)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_validation_images_are_taken_from_the_training_images(seed):
    """Every image carries its own number; the set's test images carry 200 and above."""
    y = np.random.default_rng(seed).integers(0, 3, 100)
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtl_data, "read_npz", lambda path: (x, y, x[:9] + 200, y[:9]))
        train, y_train, held, y_held = dtl_data.load_set.__wrapped__("own.npz", None, "validation")
    train, held = set(train[:, 0, 0, 0]), set(held[:, 0, 0, 0])
    assert not train & held and train | held == set(range(100))
    for c in range(3):
        assert sum(y_held == c) == max(1, sum(y == c) // 10)
    assert sorted([*y_train, *y_held]) == sorted(y)


# ---------------------------------------------------------------------------------------------------- a user's own data

X, Y = np.zeros((30, 8, 8, 3), np.uint8), np.repeat(np.arange(3), 10)


@pytest.mark.parametrize(("changes", "named"), [
    (dict(y_train=None), "y_train"),
    (dict(x_test=None, y_test=None), "x_test, y_test"),
    (dict(x_train=X.astype(np.float32)), "x_train.*float32"),
    (dict(x_train=X[..., 0]), r"x_train.*\(30, 8, 8\)"),
    (dict(x_train=X.transpose(0, 3, 1, 2)), r"x_train.*\(30, 3, 8, 8\)"),
    (dict(x_train=X[:0], y_train=Y[:0]), r"x_train.*\(0, 8, 8, 3\)"),
    (dict(x_train=X[:, :4]), r"x_train.*\(4, 8, 3\).*\(8, 8, 3\)"),
    (dict(y_train=Y - 1), "y_train.*-1"),
    (dict(y_train=Y.astype(float)), "y_train.*float64"),
    (dict(y_train=Y[:29]), r"y_train.*\(30,\).*\(29,\)"),
    (dict(y_train=Y[:, None]), "y_train"),
    (dict(y_train=np.array([None] * 30)), "own.npz"),
    (dict(y_train=np.where(Y == 1, 2, Y)), "class 1 is empty"),
])  # fmt: skip
def test_a_bad_npz_is_one_error_naming_the_array(npz, changes, named):
    with pytest.raises(dtl.DTLError, match=named) as error:
        task(npz(**changes))
    assert "own.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]])
def test_a_file_that_is_no_npz_is_named(npz, damage):
    path = npz()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(dtl.DTLError, match="own.npz: not a readable"):
        task(path)


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_minus_one_in_an_unsigned_type_is_no_label(npz, kind):
    path = npz(y_train=np.where(np.arange(30) == 29, -1, Y).astype(kind))
    with pytest.raises(dtl.DTLError, match="own.npz: y_train"):
        dtl_data.read_npz(path)


def test_tasks_of_different_image_sizes(npz, tmp_path, tiny):
    def check(image_size):
        config = dtl.Config(**tiny | dict(target=f"{npz()}[0:2]@4", image_size=image_size))
        return dtl.Experiment(config, 0, CPU, tmp_path, tmp_path).check_tasks()

    with pytest.raises(dtl.DTLError, match=r"\(16, 16\).*\(8, 8\).*--image-size"):
        check(0)
    assert {t.x.shape[2:] for t in check(8).values()} == {(8, 8)}
    with pytest.raises(dtl.DTLError, match="own.npz.*8x8, smaller than --image-size 12"):
        check(12)


# --------------------------------------------------------------------------------------------------------- the archives

SIZES = {"cifar10": ({f"data_batch_{i}.bin": 2 for i in range(1, 6)}, 1), "cifar100": ({"train.bin": 10}, 2)}


def made_up(name):
    """What the files of a small archive of that kind hold: file -> (n, label bytes + 3072) uint8."""
    train, label_bytes = SIZES[name]
    rng = np.random.default_rng(0)
    files = train | {"test.bin" if name == "cifar100" else "test_batch.bin": 2}
    return {f: rng.integers(0, 10, (n, label_bytes + 3072), dtype=np.uint8) for f, n in files.items()}


def packed(members):
    """A .tar.gz of (name, bytes) files and of ready TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(name, archive, sha256) makes `name`'s archive come from a server on this machine; returns its folder."""
    site = tmp_path / "site"
    site.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    monkeypatch.setattr(dtl_data, "ARCHIVE_RECORDS", 2)

    def offer(name, archive, sha256=None):
        file = dtl.ARCHIVES[name][0].rsplit("/", 1)[1]
        (site / file).write_bytes(archive)
        address = f"http://127.0.0.1:{server.server_port}/{file}"
        entry = (address, sha256 or hashlib.sha256(archive).hexdigest(), *dtl.ARCHIVES[name][2:])
        monkeypatch.setitem(dtl.ARCHIVES, name, entry)
        return tmp_path / "data" / entry[2]

    yield offer
    server.shutdown()
    thread.join()
    server.server_close()


def left(tmp_path):
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "site"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_is_fetched_and_read(name, tmp_path, serve):
    files = made_up(name)
    folder = serve(name, packed((f"any/{f}", d.tobytes()) for f, d in files.items()))
    (tmp_path / "data").mkdir()
    stale = tmp_path / "data" / (dtl.ARCHIVES[name][0].rsplit("/", 1)[1] + ".0123abcd.partial")
    stale.write_bytes(b"of a download that was killed")
    os.utime(stale, (1e9, 1e9))
    x, y, x_test, y_test = dtl.read_archive(name, tmp_path / "data")
    assert not stale.exists() and {p.name for p in folder.iterdir()} == set(files)
    *train, test = files.values()
    for records, images, labels in ((np.concatenate(train), x, y), (test, x_test, y_test)):
        assert images.shape == (len(records), 3, 32, 32) and images.dtype == np.uint8 and labels.dtype == np.int64
        pixels, label = records[:, -3072:], records[:, -3073]  # the label before the pixels: cifar100's fine one
        np.testing.assert_array_equal(labels, label)
        np.testing.assert_array_equal(images[:, 1, 2, 3], pixels[:, 1024 + 2 * 32 + 3])  # planes, then rows
        np.testing.assert_array_equal(images.reshape(len(records), -1), pixels)


def test_an_unpacked_folder_is_used_as_it_is(tmp_path, serve):
    folder = serve("cifar100", b"never asked for")
    folder.mkdir(parents=True)
    for file, data in made_up("cifar100").items():
        data.tofile(folder / file)
    assert len(dtl.read_archive("cifar100", tmp_path / "data")[1]) == 10
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    with pytest.raises(dtl.DTLError, match="train.bin: 30739 bytes, not 30740"):
        dtl.read_archive("cifar100", tmp_path / "data")
    (folder / "train.bin").unlink()
    with pytest.raises(dtl.DTLError, match="train.bin missing"):
        dtl.read_archive("cifar100", tmp_path / "data")


def test_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, serve):
    good = packed((f, d.tobytes()) for f, d in made_up("cifar100").items())
    folder = serve("cifar100", good, sha256="0" * 64)
    for _ in range(2):  # the second time must not find anything to take for data
        with pytest.raises(dtl.DTLError, match="cifar-100-binary.tar.gz.*hash"):
            dtl.read_archive("cifar100", tmp_path / "data")
        assert left(tmp_path) == ["data"]
    serve("cifar100", good)
    dtl.read_archive("cifar100", tmp_path / "data")
    assert folder.is_dir()


def test_truncated_archive_is_refused(tmp_path, serve):
    good = packed((f, d.tobytes()) for f, d in made_up("cifar100").items())
    folder = serve("cifar100", good)
    folder.parent.mkdir()
    (folder.parent / "cifar-100-binary.tar.gz").write_bytes(good[: len(good) // 2])
    with pytest.raises(dtl.DTLError, match="cifar-100-binary.tar.gz: sha256.*truncated"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert not folder.exists()


def test_nothing_in_an_archive_lands_elsewhere(tmp_path, serve):
    """As could be, were the checksum of an archive like this ever the right one."""
    files = {f: d.tobytes() for f, d in made_up("cifar100").items()}
    link, hard = tarfile.TarInfo("test.bin"), tarfile.TarInfo("train.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../outside"
    (tmp_path / "outside").write_bytes(b"untouched")
    members = [link, hard, ("../evil", b"!"), (f"{tmp_path}/absolute", b"!"), ("evil.bin", b"!"),
               ("../../train.bin", files["train.bin"]), ("x/test.bin", files["test.bin"])]  # fmt: skip
    folder = serve("cifar100", packed(members))
    assert len(dtl.read_archive("cifar100", tmp_path / "data")[1]) == 10
    unpacked = [f"data/cifar-100-binary/{f}" for f in sorted(files)]
    assert left(tmp_path) == ["data", "data/cifar-100-binary", "data/cifar-100-binary.tar.gz", *unpacked, "outside"]
    assert not any((folder / f).is_symlink() for f in files) and (tmp_path / "outside").read_bytes() == b"untouched"


def test_no_network(tmp_path, serve, monkeypatch):
    folder = serve("cifar100", b"")
    address = "http://127.0.0.1:9/cifar-100-binary.tar.gz"  # nothing listens there
    monkeypatch.setitem(dtl.ARCHIVES, "cifar100", (address, *dtl.ARCHIVES["cifar100"][1:]))
    with pytest.raises(dtl.DTLError, match=f"cannot download {address}"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert not folder.exists() and left(tmp_path) == ["data"]


# ----------------------------------------------------------------------------------------------------------- the images


def test_shapes_are_deterministic_and_whole():
    (x, y), (again, _), (other, _) = (dtl_data.draw_shapes(2, seed) for seed in (1, 1, 2))
    assert x.shape == (64, 3, 16, 16) and x.dtype == np.uint8
    assert np.bincount(y).tolist() == [2] * 32
    assert (x == again).all() and (x != other).any()
    assert len(np.unique(x.reshape(64, -1), axis=0)) == 64


def test_training_and_test_shapes_differ(tmp_path):
    x, y, x_test, y_test = dtl_data.load_set("shapes", tmp_path, "test")
    assert set(y) == set(y_test) == set(range(32))
    assert not {i.tobytes() for i in x} & {i.tobytes() for i in x_test}


def test_shrinking_is_the_mean_over_areas():
    x = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    expected = x.numpy().reshape(5, 3, 4, 4, 4, 4).mean((3, 5)).round().astype(np.uint8)
    np.testing.assert_array_equal(dtl_data.shrink(x, 4, "t").numpy(), expected)
    assert dtl_data.shrink(x, 0, "t") is x and dtl_data.shrink(x, 16, "t") is x
    assert dtl_data.shrink(x[..., :8], 8, "t").shape == (5, 3, 8, 8)  # 16x8


def variants(image):
    """Every crop of the image, padded by an eighth of its side, and of each its mirror image."""
    height, width = image.shape[1:]
    pad = max(1, height // 8)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    for top in range(2 * pad + 1):
        for left_ in range(2 * pad + 1):
            crop = padded[:, top : top + height, left_ : left_ + width]
            yield crop.tobytes()
            yield crop[:, :, ::-1].tobytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 4), (8, 8), (8, 5), (16, 16)]))
@settings(max_examples=20)
def test_augmented_images_are_crops_and_flips_of_their_own_image(seed, size):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8, generator=generator)
    changed = dtl_data.augment(images, generator)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    for image, result in zip(images.numpy(), changed.numpy()):
        assert result.tobytes() in set(variants(image))


def test_every_crop_and_flip_occurs_image_by_image():
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    first, again = (dtl_data.augment(image.expand(500, -1, -1, -1), torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.equal(again)
    assert {i.numpy().tobytes() for i in first} == set(variants(image[0].numpy()))


def test_npz_with_a_pickle_does_not_run_it(tmp_path):
    """A pickle in the archive that would make a file were it loaded."""
    evil = b"cbuiltins\nopen\n(S'" + str(tmp_path / "ran").encode() + b"'\nS'w'\ntR."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|O", fortran_order=False, shape=(1,)))
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(key + ".npy", header.getvalue() + evil)
    with pytest.raises(dtl.DTLError, match="own.npz"):
        dtl_data.read_npz(tmp_path / "own.npz")
    assert not (tmp_path / "ran").exists()
