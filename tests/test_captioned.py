"""Images with captions: which pairs are used, what is counted, and that the order survives everything."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile

import ml_collections
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from deco_jax.data import captioned_folder, captioned_pairs, webdataset
from deco_jax.data.captioned_folder import CaptionedFolder
from deco_jax.data.captioned_pairs import parse_caption
from deco_jax.data.pipeline import epoch, read_one
from deco_jax.data.sources import Digits, check_classes, open_source
from deco_jax.data.webdataset import WebDataset
from deco_jax.errors import UserError
from deco_jax.run import files
from tests.helpers import ROOT, first_batches

pytestmark = pytest.mark.fast

SIZE = (8, 10)  # height, width


def encoded(level: int = 0, height: int = 8, width: int = 10, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level,) * 3).save(file, kind)
    return file.getvalue()


def bomb(pixels: int = 10**9) -> bytes:
    """A PNG of a few bytes whose header promises a side of `pixels`."""
    head = pixels.to_bytes(4, "big") + (1).to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, os.SEEK_END)
    for name, data in ((b"IHDR", head), (b"IDAT", b""), (b"IEND", b"")):
        PngImagePlugin.putchunk(file, name, data)
    return file.getvalue()


def write_tar(path: pathlib.Path, members: list, form: int = tarfile.PAX_FORMAT) -> None:
    """Members as (name, bytes), or as TarInfo for links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))


def link(name: str, kind: bytes, target: str = "a.png") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def numbered(first: int, count: int) -> list:
    """Pairs whose image is of level i and whose caption is "number i"."""
    rows = []
    for i in range(first, first + count):
        caption = (f"{i:04}.txt", f"number {i}".encode())
        if i % 3 == 0:
            caption = (f"{i:04}.json", json.dumps({"url": "x", "caption": f"number {i}"}).encode())
        rows += [(f"{i:04}.png", encoded(i)), caption]
    return rows


def unpack(members: list, folder: pathlib.Path) -> None:
    for name, data in members:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def tars(tmp_path):
    """40 pairs in three archives, one of them further down."""
    write_tar(tmp_path / "data" / "00000.tar", numbered(0, 15))
    write_tar(tmp_path / "data" / "00001.tar", numbered(15, 5))
    write_tar(tmp_path / "data" / "more" / "00000.tar", numbered(20, 20))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path):
    """40 pairs in two folders."""
    for name, first in (("a", 0), ("a/deep", 20)):
        for i in range(first, first + 20):
            unpack([(f"{i:04}.png", encoded(i)), (f"{i:04}.txt", f"number {i}\n".encode())], tmp_path / "data" / name)
    return tmp_path / "data"


def section(source: str, path: object, size: object = SIZE, split: str = "") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"source": source, "path": str(path), "split": split, "image_size": size})


def captions(source) -> list[str]:
    return [source[i]["caption"] for i in range(len(source))]


def skips(source) -> dict[str, int]:
    """The counts of the line that is said."""
    said = source.notes().split("; skipped: ")[1]
    assert "\n" not in source.notes()
    return {part.split(" ", 1)[1]: int(part.split(" ")[0]) for part in said.split(", ")} if said != "nothing" else {}


# ---------------------------------------------------------------------------------------- which pairs


@pytest.mark.parametrize("kind", ["captioned_folder", "webdataset"])
def test_pairs(kind, request):
    root = request.getfixturevalue("tars" if kind == "webdataset" else "folder")
    source = open_source(section(kind, root))
    assert len(source) == 40
    assert captions(source) == [f"number {i}" for i in range(40)]
    for i in range(len(source)):
        assert source[i]["label"] == 0
        assert read_one(source, i, SIZE)["image"].mean() == i
        assert f"{i:04}.png" in source.name(i)
    assert source.next_of_class(3) == 4
    assert source.next_of_class(39) == 0
    assert skips(source) == {}
    assert source.notes().startswith("40 images with captions in " + ("3 arch" if kind == "webdataset" else "2 fold"))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(40)] == [source[i] for i in range(40)]
    check_classes(source, 0)
    with pytest.raises(UserError, match="the data has captions, but the model has 10 classes"):
        check_classes(source, 10)
    with pytest.raises(UserError, match="the data has 10 classes, but the model takes captions"):
        check_classes(Digits(), 0)


def test_one_tar_and_a_subfolder(tars):
    assert len(open_source(section("webdataset", tars / "00001.tar"))) == 5
    assert len(open_source(section("webdataset", tars, split="more"))) == 20
    assert sorted(p.name for p in tars.iterdir() if p.name.startswith(".")) == [".00001.tar.webdataset.index.npz"]


BAD_PAIRS = [
    ("good.png", encoded(9)),
    ("good.txt", b"\xef\xbb\xbf good \n"),
    ("UPPER.JPG", encoded(9, kind="JPEG")),
    ("UPPER.txt", b"fine"),
    ("w.webp", encoded(9, kind="WEBP")),
    ("w.txt", "\U0001f98a".encode()),
    ("low.png", encoded(1, height=7)),
    ("low.txt", b"x"),
    ("thin.jpeg", encoded(1, width=9, kind="JPEG")),
    ("thin.txt", b"x"),
    ("alone.png", encoded()),
    ("word.txt", b"x"),
    ("latin.png", encoded()),
    ("latin.txt", "é".encode("latin-1")),
    ("blank.png", encoded()),
    ("blank.txt", b" \n"),
    ("text.jpg", b"<html>404</html>"),
    ("text.txt", b"x"),
    ("empty.png", b""),
    ("empty.txt", b"x"),
    ("gif.jpg", encoded(kind="GIF")),
    ("gif.txt", b"x"),
    ("bomb.png", bomb()),
    ("bomb.txt", b"x"),
    ("wide.png", bomb(captioned_pairs.MAX_PIXELS + 1)),
    ("wide.txt", b"x"),
    ("notes.csv", b"x"),
    ("mask.npy", b"x"),
    ("long.png", encoded()),
    ("long.txt", b"x" * (captioned_pairs.MAX_CAPTION_BYTES + 1)),
]
BAD_COUNTS = {
    "images smaller than 8x10": 2,
    captioned_pairs.NO_CAPTION: 1,
    captioned_pairs.NO_IMAGE: 1,
    captioned_pairs.BAD_CAPTION: 3,
    captioned_pairs.BROKEN: 3,
    captioned_pairs.OVERSIZED: 2,
    captioned_pairs.OTHER: 2,
}


def test_bad_files_are_counted(tmp_path):
    unpack([*BAD_PAIRS, (".git/x.png", encoded()), (".hidden.png", encoded())], tmp_path / "data")
    for name in ("pipe.png", "text_pipe.txt"):
        os.mkfifo(tmp_path / "data" / name)
    unpack([("pipe.txt", b"x"), ("text_pipe.png", encoded())], tmp_path / "data")
    source = open_source(section("captioned_folder", tmp_path / "data"))
    assert captions(source) == ["fine", "good", "\U0001f98a"]
    counts = {**BAD_COUNTS, captioned_pairs.BAD_CAPTION: 4, captioned_pairs.BROKEN: 4}
    assert skips(source) == counts
    # The same index serves another size.
    source = open_source(section("captioned_folder", tmp_path / "data", (7, 9)))
    assert len(source) == 5
    assert skips(source) == {reason: n for reason, n in counts.items() if "smaller" not in reason}
    with pytest.raises(UserError, match=r"no pair .* \(skipped: 5 images smaller than 64x64, 1 images without"):
        open_source(section("captioned_folder", tmp_path / "data", 64))


def test_bad_members_are_counted(tmp_path):
    members = [
        *BAD_PAIRS,
        ("both.png", encoded()),
        ("both.json", b"not JSON"),
        ("both.txt", b"both"),
        ("text.png", encoded()),
        ("text.json", b'{"text": "from text", "caption": " "}'),
        ("prompt.png", encoded()),
        ("prompt.json", b'{"prompt": "from prompt"}'),
        ("sub/./dot..s.png", encoded()),
        ("sub/./dot..s.txt", b"dots are no way out"),
        ("json.png", encoded()),
        ("json.json", b"{'caption': 1}"),
        ("list.png", encoded()),
        ("list.json", b'["x"]'),
        ("field.png", encoded()),
        ("field.json", b'{"caption": 3}'),
        ("deep.png", encoded()),
        ("deep.json", b"[" * 200_000),
        ("half.png", encoded()),
        ("half.json", b'{"caption": "\\ud83d"}'),
        ("/etc/a.png", encoded()),
        ("/etc/a.txt", b"x"),
        ("../b.png", encoded()),
        ("x/../../b.txt", b"x"),
        ("..\\c.png", encoded()),
        ("C:/d.png", encoded()),
        link("s.png", tarfile.SYMTYPE, "/etc/passwd"),
        link("h.png", tarfile.LNKTYPE),
        link("f.png", tarfile.FIFOTYPE),
        link("folder", tarfile.DIRTYPE),
    ]
    expected = {**BAD_COUNTS, captioned_pairs.BAD_CAPTION: 8, captioned_pairs.UNSAFE: 6, captioned_pairs.SPECIAL: 3}
    good = ["good", "fine", "\U0001f98a", "both", "from text", "from prompt", "dots are no way out"]
    # "text" is there twice, as two samples one after the other may be.
    write_tar(tmp_path / "data.tar", members)
    source = open_source(section("webdataset", tmp_path / "data.tar"))
    assert captions(source) == good
    assert skips(source) == expected
    for i in range(len(source)):
        assert read_one(source, i, SIZE)["unreadable"] == -1


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_long_and_not_ascii(tmp_path, form):
    stems = ["folder/" * 20 + "name" * 30, "é \U0001f98a", "./here"]
    members = [(stem + end, data) for stem in stems for end, data in ((".png", encoded()), (".txt", stem.encode()))]
    write_tar(tmp_path / "1.tar", members, form)
    source = WebDataset(str(tmp_path), SIZE)
    assert captions(source) == stems
    name = "? ?" if form == tarfile.PAX_FORMAT else "é \U0001f98a"
    assert source.name(1).startswith(f"{tmp_path}/1.tar: {name}.png (at byte ")


def test_members_in_any_order(tmp_path):
    members = numbered(0, 12)
    write_tar(tmp_path / "1.tar", [*members[::2], *members[1::2]])
    write_tar(tmp_path / "2.tar", [*members[1::2], *members[-2::-2]])
    source = WebDataset(str(tmp_path), SIZE)
    assert captions(source) == [f"number {i}" for i in (*range(12), *reversed(range(12)))]
    assert skips(source) == {}


@pytest.mark.parametrize("cut", ["member", "header", "noise", "no_end"])
def test_damaged_archives(tmp_path, cut):
    """What lies before the damage is used; the rest is counted once."""
    path = tmp_path / "1.tar"
    write_tar(path, numbered(1, 3), tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        image = tar.getmembers()[4]
    data = path.read_bytes()
    whole = image.offset
    data = {
        "member": data[: image.offset_data + 20],
        "header": data[: image.offset + 100],
        "noise": data[:whole] + b"noise" * 1000,
        "no_end": data[:whole],  # nothing is wrong with it
    }[cut]
    path.write_bytes(data)
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"no archive at all" * 100)
    source = WebDataset(str(tmp_path), SIZE)
    assert captions(source) == ["number 1", "number 2"]
    counts = skips(source)
    assert counts.pop(captioned_pairs.DAMAGED) == (2 if cut == "no_end" else 3)
    assert counts == ({captioned_pairs.BROKEN: 1} if cut == "member" else {})


@pytest.mark.parametrize("data", [b"", b"\xff", b'"x"', b"{}", b'{"caption": null}', b"{"])
def test_no_caption_in_it(data):
    with pytest.raises(ValueError):  # noqa: PT011  UnicodeDecodeError and JSONDecodeError among them
        parse_caption(data, is_json=True)


def test_nothing_to_use(tmp_path):
    write_tar(tmp_path / "one" / "1.tar", [("a.png", encoded())])
    (tmp_path / "none").mkdir()
    unpack([("a.txt", b"x")], tmp_path / "text")
    for kind, name, message in [
        ("webdataset", "one", r"no pair .*\(skipped: 1 images without a caption\)"),
        ("webdataset", "none", "none holds no .tar archive"),
        ("webdataset", "missing.tar", "no such folder: .*missing.tar"),
        ("captioned_folder", "none", r"no pair .*\(skipped: nothing, it is empty\)"),
        ("captioned_folder", "text", r"no pair .*\(skipped: 1 captions without an image\)"),
        ("captioned_folder", "text/a.txt", "no such folder"),
        ("captioned_folder", "missing", "no such folder: .*missing"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(section(kind, tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.npz"))


# ---------------------------------------------------------------------------------------- the index file


@pytest.fixture
def looked_into(monkeypatch):
    """The names of archives and the images in folders whose headers are read, from here on."""
    seen: list[str] = []
    look_into_tar, look_at_pair = webdataset.look_into_tar, captioned_folder._look_at_pair

    def tar(path, **options):
        seen.append(os.path.basename(path))
        return look_into_tar(path, **options)

    def pair(path, **options):
        seen.append(os.path.basename(path))
        return look_at_pair(path, **options)

    monkeypatch.setattr(webdataset, "look_into_tar", tar)
    monkeypatch.setattr(captioned_folder, "_look_at_pair", pair)
    return seen


def reopened(seen: list[str], kind: str, root: object, size: object = SIZE) -> tuple[list[str], list[str]]:
    """What was looked into when the source was opened, and its captions."""
    seen.clear()
    found = captions(open_source(section(kind, root, size)))
    return sorted(seen), found


def test_index_of_archives(tars, looked_into):
    names, found = reopened(looked_into, "webdataset", tars)
    assert names == ["00000.tar", "00000.tar", "00001.tar"]
    assert reopened(looked_into, "webdataset", tars) == ([], found)
    assert reopened(looked_into, "webdataset", tars, (4, 4)) == ([], found)
    assert [p.name for p in tars.iterdir() if "index" in p.name] == [".webdataset.index.npz"]

    write_tar(tars / "00001.tar", numbered(60, 2))
    expected = [*found[:15], "number 60", "number 61", *found[20:]]
    assert reopened(looked_into, "webdataset", tars) == (["00001.tar"], expected)
    status = os.stat(tars / "00001.tar")
    os.utime(tars / "00001.tar", ns=(0, status.st_mtime_ns + 1))
    assert reopened(looked_into, "webdataset", tars) == (["00001.tar"], expected)

    (tars / "00001.tar").unlink()
    assert reopened(looked_into, "webdataset", tars) == ([], [*found[:15], *found[20:]])
    write_tar(tars / "00002.tar", numbered(70, 1))
    assert reopened(looked_into, "webdataset", tars) == (["00002.tar"], [*found[:15], "number 70", *found[20:]])


def test_index_of_folders(folder, looked_into):
    names, found = reopened(looked_into, "captioned_folder", folder)
    assert names == [f"{i:04}.png" for i in range(40)]
    assert reopened(looked_into, "captioned_folder", folder) == ([], found)
    (folder / "a" / "deep" / "0021.txt").write_text("changed, and longer")
    names, changed = reopened(looked_into, "captioned_folder", folder)
    assert names == [f"{i:04}.png" for i in range(20, 40)]
    assert changed == [*found[:21], "changed, and longer", *found[22:]]
    (folder / "a" / "0000.txt").unlink()
    names, changed = reopened(looked_into, "captioned_folder", folder)
    assert len(names) == 19
    assert changed[0] == "number 1"


def test_damaged_index_is_made_again(tars, looked_into, caplog):
    _, found = reopened(looked_into, "webdataset", tars)
    index = tars / ".webdataset.index.npz"
    whole = index.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"nonsense"):
        index.write_bytes(data)
        with caplog.at_level("WARNING", "absl"):
            names, again = reopened(looked_into, "webdataset", tars)
        assert "can't be read" in caplog.text
        assert (len(names), again) == (3, found)
        assert reopened(looked_into, "webdataset", tars) == ([], found)


def test_index_where_the_data_can_t_be_written(tars, looked_into, monkeypatch, tmp_path, caplog):
    real = files.whole
    refused = [str(tars)]

    def write(path, **options):
        if any(path.startswith(place) for place in refused):
            raise PermissionError(13, "read-only", path)
        return real(path, **options)

    monkeypatch.setattr(files, "whole", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, found = reopened(looked_into, "webdataset", tars)
    assert not list(tars.rglob("*index*"))
    assert reopened(looked_into, "webdataset", tars) == ([], found)
    assert len(list((tmp_path / "cache" / "deco_jax").iterdir())) == 1

    refused.append(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with caplog.at_level("WARNING", "absl"):
        assert len(reopened(looked_into, "webdataset", tars)[0]) == 3
    assert "rebuilt each time" in caplog.text


def test_an_old_index_beside_the_data_does_not_hide_a_new_one(tars, looked_into, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, found = reopened(looked_into, "webdataset", tars)
    write_tar(tars / "00001.tar", numbered(60, 2))
    real = files.whole

    def write(path, **options):
        if path.startswith(str(tars)):
            raise PermissionError(13, "read-only", path)
        return real(path, **options)

    monkeypatch.setattr(files, "whole", write)
    assert reopened(looked_into, "webdataset", tars)[0] == ["00001.tar"]
    assert reopened(looked_into, "webdataset", tars) == ([], [*found[:15], "number 60", "number 61", *found[20:]])


def test_a_broken_off_index_is_gone_on_with(tars, looked_into, monkeypatch):
    monkeypatch.setattr(captioned_pairs, "SECONDS_BETWEEN_SAVES", 0.0)
    look = webdataset.look_into_tar

    def fail(path, **options):
        if "more" in path:
            raise OSError("the disk went away")
        return look(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "look_into_tar", fail)
        with pytest.raises(UserError, match=r"cannot read the archives in .*the disk went away"):
            open_source(section("webdataset", tars))
    names, found = reopened(looked_into, "webdataset", tars)
    assert names == ["00000.tar"]
    assert found == [f"number {i}" for i in range(40)]


def test_several_processes_at_once(tars):
    program = (
        "import sys\nfrom deco_jax.data.webdataset import WebDataset\n"
        "s = WebDataset(sys.argv[1], (8, 10))\nprint([s[i]['caption'] for i in range(len(s))])"
    )
    command = [sys.executable, "-c", program, str(tars)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    outputs = {process.communicate(timeout=100)[0].strip() for process in started}
    assert outputs == {str([f"number {i}" for i in range(40)])}
    assert not list(tars.rglob("*.part"))
    assert captions(WebDataset(str(tars), SIZE)) == [f"number {i}" for i in range(40)]


def test_headers_read_in_processes(tars, folder, monkeypatch):
    monkeypatch.setattr(webdataset, "MANY_BYTES_OF_TARS", 0)
    monkeypatch.setattr(captioned_folder, "MANY_PAIRS_OF_FILES", 0)
    made: list[int] = []
    pool = captioned_pairs.ProcessPoolExecutor
    monkeypatch.setattr(captioned_pairs, "ProcessPoolExecutor", lambda n, *rest: made.append(n) or pool(n, *rest))
    (folder / "a" / "0000.png").write_text("damaged")
    for kind, pairs in (("webdataset", 40), ("captioned_folder", 39)):
        assert len(open_source(ml_collections.ConfigDict({**section(kind, folder), "num_workers": 2}))) == pairs
    assert made == [2, 2]


def test_a_copy_for_a_worker_is_small(tmp_path, monkeypatch):
    """Bytes a pair: 25 of an archive; of a folder the name and 8."""
    for layout in (webdataset, captioned_folder):
        monkeypatch.setattr(layout, "header_size", lambda file, size: (10, 8))
    members = [(f"{i:05}{end}", b"x") for i in range(2000) for end in (".png", ".txt")]
    write_tar(tmp_path / "1.tar", members)
    unpack(members, tmp_path / "folder")
    assert len(pickle.dumps(WebDataset(str(tmp_path / "1.tar"), SIZE))) < 2000 * 25 + 2000
    assert len(pickle.dumps(CaptionedFolder(str(tmp_path / "folder"), SIZE))) < 2000 * 17 + 2000


# ---------------------------------------------------------------------------------------- in batches


def encode(index: int, caption: str) -> dict[str, np.ndarray]:
    return {"tokens": np.array([index, int(caption.split()[1])], np.int32), "mask": np.array([True, False])}


def take(count: int, source, **options) -> list[dict]:
    options = {"image_size": SIZE, "batch_size": 4, "seed": 1, "encode_caption": encode, **options}
    return first_batches(count, source, **options)


def same(first: list[dict], second: list[dict]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(params=["captioned_folder", "webdataset"])
def source(request):
    root = request.getfixturevalue("tars" if request.param == "webdataset" else "folder")
    return open_source(section(request.param, root))


def test_captions_in_batches(source):
    for batch in take(10, source):
        assert set(batch) == {"image", "label", "unreadable", "tokens", "mask"}
        assert batch["tokens"].shape == (4, 2)
        assert batch["tokens"].dtype == np.int32
        assert batch["mask"].dtype == bool
        np.testing.assert_array_equal(batch["tokens"][:, 1], batch["image"][:, 0, 0, 0])
        np.testing.assert_array_equal(batch["tokens"][:, 0], batch["tokens"][:, 1])
        assert not batch["label"].any()
    assert set(take(1, source, encode_caption=None)[0]) == {"image", "label", "unreadable"}
    read = list(epoch(source, SIZE, batch_size=16, encode_caption=encode))
    assert np.concatenate([batch["tokens"][:, 0] for batch in read]).tolist() == list(range(40))


def test_order(source):
    """The same on any number of workers and hosts, from any step, with the index made or read, over two epochs."""
    whole = take(20, source)
    numbers = np.concatenate([batch["tokens"][:, 1] for batch in whole]).tolist()
    assert sorted(numbers[:40]) == sorted(numbers[40:]) == list(range(40))
    if isinstance(source, WebDataset):  # it opens files in each worker
        same(take(20, source, num_workers=2), whole)
    again = type(source)(source._root, SIZE)
    same(take(9, again, start_step=11), whole[11:])
    hosts = [take(20, source, host_index=host, host_count=2) for host in range(2)]
    for a, b, batch in zip(*hosts, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([a["tokens"], b["tokens"]]), batch["tokens"])
        assert not set(a["tokens"][:, 1]) & set(b["tokens"][:, 1])


def test_unreadable_during_training(source):
    """Damage behind the header is found only now; the caption is that of the image taken instead."""
    path = source.name(5) if isinstance(source, CaptionedFolder) else source.name(5).split(": ")[0]
    data = pathlib.Path(path).read_bytes()
    image = encoded(5)
    at = data.index(image) + len(image) - 40
    pathlib.Path(path).write_bytes(data[:at] + bytes(10) + data[at + 10 :])
    sample = read_one(source, 5, SIZE, encode)
    assert sample["unreadable"] == 5
    assert sample["tokens"].tolist() == [6, 6]
    assert sample["image"].mean() == 6
    if isinstance(source, CaptionedFolder):  # the image is there, the caption no longer
        pathlib.Path(source.name(7)).with_suffix(".txt").unlink()
        assert read_one(source, 7, SIZE, encode)["tokens"].tolist() == [8, 8]
    else:
        pathlib.Path(path).unlink()
        fresh = pickle.loads(pickle.dumps(source))
        assert read_one(fresh, 3, SIZE, encode)["tokens"].tolist() == [15, 15]


def test_when_nothing_can_be_read(tmp_path):
    unpack(numbered(1, 2), tmp_path / "data")
    source = CaptionedFolder(str(tmp_path / "data"), SIZE)
    for file in (tmp_path / "data").glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"no image can be read, .*0001\.png for one"):
        read_one(source, 0, SIZE)


def test_many_archives_with_few_open(tmp_path, monkeypatch):
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", numbered(i, 1))
    monkeypatch.setattr(webdataset, "MAX_OPEN_TARS", 2)
    source = WebDataset(str(tmp_path), SIZE)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in (0, 5, 2, 2, 4, 1, 0, 3):
        assert source[i]["caption"] == f"number {i}"
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 2
