"""Tasks by name, the archives, a user's own data, batches and augmentation."""

import errno
import functools
import hashlib
import http.server
import io
import os
import shutil
import socketserver
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

CPU = torch.device("cpu")


def task(name, seed=0, image_size=0):
    return dtl.load_task(str(name), seed, Path("no-archives-here"), CPU, image_size=image_size)


def numbers(images):
    """Which images of the `npz` fixture these are."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


# ---------------------------------------- task names


@pytest.mark.parametrize(("classes", "expected"), [
    ("", [0, 1, 2]), ("[0:2]", [0, 1]), ("[1:]", [1, 2]), ("[0:3:2]", [0, 2]), ("[2,0]", [2, 0]),
])  # fmt: skip
def test_classes_are_chosen_and_renumbered(npz, classes, expected):
    """And labels stay with their images."""
    chosen = task(f"{npz()}{classes}")
    assert chosen.classes == len(expected)
    for images, labels, per_class, first in (
        (chosen.x, chosen.y, 10, 0),
        (chosen.x_test, chosen.y_test, 4, 30),
    ):
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


def test_the_fingerprint_covers_images_and_labels_of_both_parts(npz):
    y, y_test = np.repeat(np.arange(3), 10), np.repeat(np.arange(3), 4)
    plain = np.zeros((30, 8, 8, 3), np.uint8)
    changed, other, other_test = plain.copy(), y.copy(), y_test.copy()
    changed[7, 3, 3, 1], other[0], other_test[0] = 1, 1, 1
    arrays = dict(x_train=plain, x_test=plain[:12], y_train=y, y_test=y_test)
    prints = set()
    for change in (
        {},
        dict(x_train=changed),
        dict(x_test=changed[:12]),
        dict(y_train=other),
        dict(y_test=other_test),
    ):
        dtl.load_set.cache_clear()
        prints.add(task(npz(**arrays | change)).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize(("name", "named"), [
    ("", "''"), ("shapes[0:4", "shapes[0:4"), ("shapes@", "shapes@"), ("shapes[0:4]@-1", "shapes[0:4]@-1"),
    ("nosuch[0:4]", "nosuch"), ("nosuch.npz[0:2]", "nosuch.npz: no such file"), ("shapes[a:b]", "[a:b]"),
    ("shapes[0:1.5]", "[0:1.5]"), ("shapes[0:33]", "[0:33]"), ("shapes[32,33]", "[32,33]"),
    ("shapes[-1:4]", "[-1:4]"), ("shapes[5:5]", "[5:5]"), ("shapes[4:0]", "[4:0]"), ("shapes[3]", "[3]"),
    ("shapes[1,1]", "[1,1]"), ("shapes[0:1:1:1]", "[0:1:1:1]"), ("shapes[0:4:0]", "[0:4:0]"),
    ("shapes[]", "[]"),
    ("shapes[0:4]@0", "shapes[0:4]@0"), ("shapes[0:4]@9999", "400 training"),
    ("shapes[0:99999999999]", "[0:99999999999]"), ("shapes[0:999999999]", "[0:999999999]"),
    ("shapes@" + "9" * 5000, "shapes@9999"), ("shapes[" + "1," * 5000 + "2]", "1,1,1"), ("x" * 5000, "xxx"),
])  # fmt: skip
def test_unknown_task_is_named(name, named):
    """In one line of a reasonable length, whatever the length of the name, and at once."""
    with pytest.raises(dtl.DTLError) as error:
        task(name)
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@given(st.text(st.sampled_from("shape[]@:,-0123456789.nz \0é"), max_size=30))
@settings(max_examples=300)
def test_any_text_is_a_task_or_one_error(text):
    try:
        found = dtl.select_classes(text, 9)
    except dtl.DTLError as error:
        assert "\n" not in str(error)
    else:
        assert len(set(found)) == len(found) >= 2 and set(found) <= set(range(9))
    try:
        task(f"shapes[{text}")
    except dtl.DTLError as error:
        assert len(str(error).splitlines()) == 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_validation_images_are_taken_from_the_training_images(seed):
    """Every image carries its own number; the set's test images carry 200 and above."""
    y = np.random.default_rng(seed).integers(0, 3, 100)
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtl, "read_npz", lambda path: (x, y, x[:9] + 200, y[:9]))
        train, y_train, held, y_held = dtl.load_set.__wrapped__("own.npz", None, "validation")
    for images, labels in ((train, y_train), (held, y_held)):
        assert (y[images[:, 0, 0, 0]] == labels).all()
    train, held = set(train[:, 0, 0, 0]), set(held[:, 0, 0, 0])
    assert not train & held and train | held == set(range(100))
    for c in range(3):
        assert sum(y_held == c) == max(1, sum(y == c) // 10)
    assert sorted([*y_train, *y_held]) == sorted(y)


# ---------------------------------------- a user's own data

X, Y = np.zeros((30, 8, 8, 3), np.uint8), np.repeat(np.arange(3), 10)


@pytest.mark.parametrize(("changes", "named"), [
    (dict(y_train=None), "y_train.*found x_train, x_test, y_test"),
    (dict(x_test=None, y_test=None), "x_test, y_test.*found x_train, y_train"),
    (dict(x_train=X.astype(np.float32)), "x_train.*float32"),
    (dict(x_train=X[..., 0]), r"x_train.*\(30, 8, 8\)"),
    (dict(x_train=X.transpose(0, 3, 1, 2)), r"x_train.*\(30, 3, 8, 8\)"),
    (dict(x_train=X[:0], y_train=Y[:0]), r"x_train.*\(0, 8, 8, 3\)"),
    (dict(x_train=X[:, :4]), r"x_train.*\(30, 4, 8, 3\)"),
    (dict(y_train=Y - 1), "y_train.*-1"),
    (dict(y_train=Y.astype(float)), "y_train.*float64"),
    (dict(y_train=Y[:29]), r"y_train.*\(30,\).*\(29,\)"),
    (dict(y_train=Y[:, None]), "y_train"),
    (dict(y_test=Y[:11]), r"y_test.*\(12,\).*\(11,\)"),
    (dict(y_train=np.array([None] * 30)), "own.npz"),
    (dict(y_train=np.where(Y == 1, 2, Y)), "class 1 has 0 training"),
    (dict(y_train=Y + 1, y_test=np.repeat([1, 2, 3], 4)), "class 0 has 0 training.*labels count from 0"),
])  # fmt: skip
def test_a_bad_npz_is_one_error_naming_the_array(npz, changes, named):
    with pytest.raises(dtl.DTLError, match=named) as error:
        task(npz(**changes))
    assert "own.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]]
)
def test_a_file_that_is_no_npz_is_named(npz, damage):
    path = npz()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(dtl.DTLError, match="own.npz: not a readable"):
        task(path)


def test_what_is_not_a_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder.npz", "pipe.npz"):
        with pytest.raises(dtl.DTLError, match=f"{name}: not a file"):
            task(tmp_path / name)


@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_a_member_that_is_no_array_is_named(tmp_path, suffix):
    """numpy hands such a member out as bytes."""
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(key + suffix, b"no magic")
    with pytest.raises(dtl.DTLError, match="own.npz"):
        dtl.read_npz(tmp_path / "own.npz")


def test_a_bomb_is_refused_before_it_is_unpacked(npz, monkeypatch):
    path = npz()
    assert len(dtl.read_npz(path)[1]) == 30
    monkeypatch.setattr(dtl, "MOST_BYTES", 1000)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(dtl.DTLError, match="own.npz.*GiB"):
        dtl.read_npz(path)


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_minus_one_in_an_unsigned_type_is_no_label(npz, kind):
    path = npz(y_train=np.where(np.arange(30) == 29, -1, Y).astype(kind))
    with pytest.raises(dtl.DTLError, match="own.npz: y_train"):
        dtl.read_npz(path)


def test_npz_with_a_pickle_does_not_run_it(tmp_path):
    """A pickle in the archive that would make a file were it loaded."""
    evil = b"cbuiltins\nopen\n(S'" + str(tmp_path / "ran").encode() + b"'\nS'w'\ntR."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|O", fortran_order=False, shape=(1,)))
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(key + ".npy", header.getvalue() + evil)
    with pytest.raises(dtl.DTLError, match="own.npz"):
        dtl.read_npz(tmp_path / "own.npz")
    assert not (tmp_path / "ran").exists()


def test_tasks_of_different_image_sizes(npz, new_run):
    given = dict(target=f"{npz()}[0:2]@4")
    with pytest.raises(dtl.DTLError, match=r"(16, 16.*8, 8|8, 8.*16, 16).*--image-size"):
        new_run(**given, image_size=0)
    sizes = {
        new_run(**given, image_size=8).task(name).x.shape[2:] for name in ("source", "target", "downstream")
    }
    assert sizes == {(8, 8)}
    with pytest.raises(dtl.DTLError, match="own.npz.*8.*smaller than --image-size 12"):
        new_run(**given, image_size=12)


# ---------------------------------------- the archives

FILES = {"cifar10": {f"data_batch_{i}.bin": 2 for i in range(1, 6)} | {"test_batch.bin": 2},
         "cifar100": {"train.bin": 10, "test.bin": 2}}  # fmt: skip
LABEL_BYTES = {"cifar10": 1, "cifar100": 2}


def made_up(name):
    """What the files of a small archive of that kind hold: file -> (n, label bytes + 3072) uint8."""
    rng = np.random.default_rng(0)
    return {
        f: rng.integers(0, 10, (n, LABEL_BYTES[name] + 3072), dtype=np.uint8) for f, n in FILES[name].items()
    }


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


def archive_of(name):
    folder = dtl.ARCHIVES[name][2]
    return packed((f"{folder}/{f}", d.tobytes()) for f, d in made_up(name).items())


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(name, archive, sha256) makes `name`'s archive come from a server on this machine; returns its
    folder."""
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

    def offer(name, archive, sha256=None, port=server.server_port):
        file = dtl.ARCHIVES[name][0].rsplit("/", 1)[1]
        if archive is not None:
            (site / file).write_bytes(archive)
        sha256 = sha256 or hashlib.sha256(archive or b"").hexdigest()
        address, _, folder, _, *labels = dtl.ARCHIVES[name]
        monkeypatch.setitem(
            dtl.ARCHIVES, name, (f"http://127.0.0.1:{port}/{file}", sha256, folder, FILES[name], *labels)
        )
        return tmp_path / "data" / folder

    yield offer
    server.shutdown()
    thread.join()
    server.server_close()


def left(tmp_path):
    return sorted(
        str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "site")
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_is_fetched_and_read(name, tmp_path, serve):
    files = made_up(name)
    folder = serve(name, archive_of(name))
    x, y, x_test, y_test = dtl.read_archive(name, tmp_path / "data")
    assert {p.name for p in folder.iterdir()} == set(files)
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, dtl.ARCHIVES[name][0].rsplit("/", 1)[1]}
    *train, test = files.values()
    for records, images, labels in ((np.concatenate(train), x, y), (test, x_test, y_test)):
        assert (
            images.shape == (len(records), 3, 32, 32)
            and images.dtype == np.uint8
            and labels.dtype == np.int64
        )
        pixels, label = (
            records[:, -3072:],
            records[:, -3073],
        )  # the label before the pixels: cifar100's fine one
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
    with pytest.raises(dtl.DTLError, match="train.bin.*missing"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert not list(folder.parent.glob("*.gz"))  # nothing was asked for


def test_wrong_checksum_is_refused_and_never_opened(tmp_path, serve):
    """An altered archive stays where it is, is refused again, and deleting it, as is said, is enough."""
    folder = serve("cifar100", archive_of("cifar100"), sha256="0" * 64)
    for _ in range(2):  # the second time must not find anything to take for data
        with pytest.raises(dtl.DTLError, match="cifar-100-binary.tar.gz: sha256.*delete it"):
            dtl.read_archive("cifar100", tmp_path / "data")
        assert left(tmp_path) == ["data", "data/cifar-100-binary.tar.gz"]
    (tmp_path / "data" / "cifar-100-binary.tar.gz").unlink()
    serve("cifar100", archive_of("cifar100"))
    dtl.read_archive("cifar100", tmp_path / "data")
    assert folder.is_dir()


def test_truncated_archive_is_refused(tmp_path, serve):
    good = archive_of("cifar100")
    folder = serve("cifar100", good)
    folder.parent.mkdir()
    (folder.parent / "cifar-100-binary.tar.gz").write_bytes(good[: len(good) // 2])
    with pytest.raises(dtl.DTLError, match="cifar-100-binary.tar.gz: sha256.*truncated"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert not folder.exists()


def test_nothing_of_a_forged_archive_lands_anywhere(tmp_path, serve):
    link = tarfile.TarInfo("cifar-100-binary")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    serve("cifar100", packed([link, ("../evil", b"!"), (f"{tmp_path}/absolute", b"!")]), sha256="1" * 64)
    with pytest.raises(dtl.DTLError, match="sha256"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert left(tmp_path) == ["data", "data/cifar-100-binary.tar.gz"]


def test_a_full_disk_while_unpacking_leaves_no_folder(tmp_path, serve, monkeypatch):
    folder = serve("cifar100", archive_of("cifar100"))

    def full(archive, where, *more):
        (Path(where) / folder.name).mkdir(parents=True)
        (Path(where) / folder.name / "train.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        patch.setattr(shutil, "unpack_archive", full)
        dtl.read_archive("cifar100", tmp_path / "data")
    assert left(tmp_path) == ["data", "data/cifar-100-binary.tar.gz"]
    assert len(dtl.read_archive("cifar100", tmp_path / "data")[1]) == 10


def test_no_network(tmp_path, serve):
    folder = serve("cifar100", b"", port=9)  # nothing listens there
    with pytest.raises(dtl.DTLError, match="cannot download http://127.0.0.1:9/cifar-100-binary.tar.gz"):
        dtl.read_archive("cifar100", tmp_path / "data")
    assert not folder.exists() and left(tmp_path) == ["data"]


@pytest.mark.parametrize("answer", [
    None, b"", b"\0\xff\xfe nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: nowhere:7\r\n\r\n",
])  # fmt: skip
def test_a_server_that_answers_nonsense(tmp_path, serve, answer):
    """None: it has no such file. Whatever comes, it is one of our errors, and nothing is taken for data."""

    class Nonsense(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Nonsense) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            folder = serve(
                "cifar100", None, "2" * 64, **({} if answer is None else dict(port=server.server_address[1]))
            )
            with pytest.raises(dtl.DTLError, match="cifar-100-binary.tar.gz") as error:
                dtl.read_archive("cifar100", tmp_path / "data")
        finally:
            server.shutdown()
            thread.join()
    assert "http" in str(error.value) or "sha256" in str(error.value)
    assert not folder.exists()


# ---------------------------------------- the images


def test_shapes_are_deterministic_and_whole():
    (x, y), (again, _), (other, _) = (dtl.draw_shapes(2, seed) for seed in (1, 1, 2))
    assert x.shape == (64, 3, 16, 16) and x.dtype == np.uint8
    assert np.bincount(y).tolist() == [2] * 32
    assert (x == again).all() and (x != other).any()
    assert len(np.unique(x.reshape(64, -1), axis=0)) == 64


def test_training_and_test_shapes_differ(tmp_path):
    x, y, x_test, y_test = dtl.load_set("shapes", tmp_path, "test")
    assert set(y) == set(y_test) == set(range(32))
    assert not {i.tobytes() for i in x} & {i.tobytes() for i in x_test}
    drawn = hashlib.sha256(b"".join(array.tobytes() for array in (x, y, x_test, y_test)))
    assert drawn.hexdigest().startswith("60950e1aca6c423f"), "published results are of other drawings"


def test_shrinking_is_the_mean_over_areas(npz):
    x = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    path = npz(x_train=x, x_test=x[:12])
    expected = x.reshape(30, 4, 4, 4, 4, 3).mean((2, 4)).round().astype(np.uint8).transpose(0, 3, 1, 2)
    small = task(path, image_size=4)  # class 0 has the images 0 to 9, in the order of the draw
    assert sorted(i.tobytes() for i in small.x.numpy()) == sorted(i.tobytes() for i in expected)
    assert (small.x_test.numpy() == expected[:12]).all()
    assert task(path).x.shape == task(path, image_size=16).x.shape == (30, 3, 16, 16)
    dtl.load_set.cache_clear()
    wide = task(npz(x_train=x[:, :, :8], x_test=x[:12, :, :8]), image_size=8)
    assert wide.x.shape == (30, 3, 8, 8)  # from 16x8


def variants(image, flips=(False, True)):
    """Every crop of the image, padded by an eighth of its side, and of each its mirror image."""
    height, width = image.shape[1:]
    pad = max(1, height // 8)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    for top in range(2 * pad + 1):
        for left_ in range(2 * pad + 1):
            crop = padded[:, top : top + height, left_ : left_ + width]
            for flip in flips:
                yield (crop[:, :, ::-1] if flip else crop).tobytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 4), (8, 8), (8, 5), (16, 16)]))
@settings(max_examples=20)
def test_augmented_images_are_crops_and_flips_of_their_own_image(seed, size):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8, generator=generator)
    changed = dtl.augmented(images, "crop,flip", generator)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    for image, result in zip(images.numpy(), changed.numpy()):
        assert result.tobytes() in set(variants(image))


@pytest.mark.parametrize(("how", "flips"), [("crop,flip", (False, True)), ("crop", (False,))])
def test_every_crop_and_flip_occurs_image_by_image(how, flips):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    first, again = (
        dtl.augmented(image.expand(500, -1, -1, -1), how, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.equal(again)
    assert {i.numpy().tobytes() for i in first} == set(variants(image[0].numpy(), flips))


def test_without_augmentation_images_stay_as_they_are():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert dtl.augmented(images, "none", torch.Generator()).equal(images)


def test_normalised_images_lie_about_zero():
    found = dtl.normalise(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(
        [-2, -0.5 / 63.75, 0.5 / 63.75, 2]
    )


# ---------------------------------------- the batches


def numbered(count, classes=7):
    """A task whose images carry their numbers, and whose labels are these modulo `classes`."""
    x = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    y = torch.arange(count) % classes
    return dtl.Task(x=x, y=y, x_test=x[:1] + 100, y_test=y[:1], classes=classes, fingerprint="")


def drawn(task, size, step, seed=0, augment="none"):
    """The numbers of the images of a step, after checking that their labels go with them."""
    x, y = dtl.batch(task, dtl.batch_index(task, size, step, seed), augment, torch.Generator().manual_seed(step))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    found = (x * 63.75 + 127.5).round().long().amax((1, 2, 3))
    assert (found % task.classes == y).all()
    return found.tolist()


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 2**62),
    st.sampled_from(["none", "crop", "crop,flip"]),
)
@settings(max_examples=40)
def test_an_epoch_has_every_image_at_most_once_with_its_label(count, size, seed, augment):
    task, epoch = numbered(count), count // min(size, count)
    for first in (0, epoch):
        found = [drawn(task, size, first + k, seed, augment) for k in range(epoch)]
        assert {len(f) for f in found} == {min(size, count)}  # the same at every step
        assert len(set(sum(found, []))) == epoch * min(size, count)


def test_every_step_has_another_batch_every_epoch_and_every_seed_another_order():
    task = numbered(60)
    epochs = [[drawn(task, 20, 3 * epoch + k) for k in range(3)] for epoch in range(4)]
    assert all(sorted(sum(e, [])) == list(range(60)) for e in epochs)
    flat = [tuple(batch) for e in epochs for batch in e]
    assert len(set(flat)) == len({frozenset(b) for b in flat}) == 12
    assert (
        epochs[0] == [drawn(task, 20, k) for k in range(3)] != [drawn(task, 20, k, seed=1) for k in range(3)]
    )


def test_training_batches_are_augmented_as_asked_for(monkeypatch):
    seen, augmented = [], dtl.augmented
    monkeypatch.setattr(
        dtl, "augmented", lambda x, how, g: (seen.append((len(x), how, g)), augmented(x, how, g))[1]
    )
    task, generator = numbered(9), torch.Generator()
    x, _ = dtl.batch(task, dtl.batch_index(task, 9, 0, 0), "crop,flip", generator)
    assert seen == [(9, "crop,flip", generator)]
    assert (x == dtl.normalise(torch.tensor(0, dtype=torch.uint8))).flatten(1).any(
        1
    ).sum() > 4  # padding came in
