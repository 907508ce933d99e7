"""Downloads against a local server that supports ranges, changes its mind, and breaks off;
COCO's archives unpacked from it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

from query_detr.batch import InputError
from query_detr.data import download as downloads
from query_detr.data.coco import coco_split
from query_detr.data.download import fetch
from query_detr.data.shapes import ShapesDataset

CONTENT = bytes(range(251)) * 4000  # 1,004,000 bytes whose place can be told


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, and behaves as `server` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path)
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if server.status or content is None:
            self.answer(server.status or 404, b"<html>")
            return
        start = self.start(len(content))
        if start and start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        extra = (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        )
        if server.tag:
            extra["ETag"] = server.tag
        self.answer(206 if start else 200, content[start:], extra, server.kind)

    def start(self, length):
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        if not self.server.ranges or not wanted or version not in (None, self.server.tag):
            return 0
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def answer(self, status, body, extra=(), kind="application/octet-stream"):
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            **({"Content-Length": str(len(body))} if self.server.tells_length else {}),
            **dict(extra),
        }.items():
            self.send_header(name, value)
        if not self.server.tells_length:
            self.send_header("Connection", "close")
        self.end_headers()
        breaks, pace = self.server.breaks_after, self.server.pace
        body = body[:breaks]
        for at in range(0, len(body), 50_000):
            self.wfile.write(body[at : at + 50_000])
            if pace:
                self.wfile.flush(), time.sleep(pace)
        self.close_connection = (
            self.close_connection or breaks is not None or not self.server.tells_length
        )


@pytest.fixture
def server():
    """A web server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vars(server).update(
        files={"/file.bin": CONTENT},
        asked=[],
        status=None,
        tag='"one"',
        ranges=True,
        kind="application/octet-stream",
        breaks_after=None,
        tells_length=True,
        pace=0,
    )
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(
        target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
    ).start()
    yield server
    server.shutdown(), server.server_close()


def ranges(server):
    return [wanted for _, wanted, _ in server.asked]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def md5(content):
    return hashlib.md5(content).hexdigest()


def broken(server, path, after=400_000, **how):
    """Break a download off and give what the user is told."""
    server.breaks_after = after
    with pytest.raises(InputError) as error:
        fetch(f"{server.address}/file.bin", path, **how)
    server.breaks_after = None
    server.asked.clear()
    return str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(size=len(CONTENT)),
        dict(checksum=md5(CONTENT)),
        dict(checksum=hashlib.sha256(CONTENT).hexdigest().upper()),
    ],
)
def test_a_file_arrives_whole_with_a_progress_bar(server, tmp_path, capsys, how):
    path = fetch(f"{server.address}/file.bin", tmp_path / "new" / "file.bin", **how)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]
    assert "file.bin: 100%" in capsys.readouterr().err
    fetch(f"{server.address}/file.bin", path, **how)  # there already
    assert len(server.asked) == 1


def test_a_broken_download_is_continued(server, tmp_path):
    said = broken(server, tmp_path / "file.bin")
    assert "broke off after 400,000 bytes of 1,004,000" in said
    assert "running it again continues" in said
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.version"]
    assert "800,000" in broken(server, tmp_path / "file.bin")  # once more
    assert fetch(f"{server.address}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT
    assert ranges(server) == ["bytes=800000-"]
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("change", [dict(tag='"two"'), dict(ranges=False), dict(tag=None)])
def test_a_part_of_another_version_or_a_server_without_ranges_begins_anew(server, tmp_path, change):
    broken(server, tmp_path / "file.bin")
    server.files["/file.bin"] = CONTENT[::-1]
    vars(server).update(change)
    if change == dict(tag=None):
        (tmp_path / "file.bin.part.version").write_text("")  # the server never named a version
    assert fetch(f"{server.address}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT[::-1]


def test_with_a_checksum_a_part_is_continued_without_a_version(server, tmp_path):
    server.tag = None
    broken(server, tmp_path / "file.bin", checksum=md5(CONTENT))
    assert (
        fetch(
            f"{server.address}/file.bin", tmp_path / "file.bin", checksum=md5(CONTENT)
        ).read_bytes()
        == CONTENT
    )
    assert ranges(server) == ["bytes=400000-"]


def test_a_part_that_is_too_long_begins_anew(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert (
        fetch(
            f"{server.address}/file.bin", tmp_path / "file.bin", len(CONTENT), md5(CONTENT)
        ).read_bytes()
        == CONTENT
    )


def test_a_whole_part_is_only_checked(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert (
        fetch(
            f"{server.address}/file.bin", tmp_path / "file.bin", len(CONTENT), md5(CONTENT)
        ).read_bytes()
        == CONTENT
    )
    assert not server.asked
    assert names(tmp_path) == ["file.bin"]


def test_a_length_that_nobody_tells_is_no_hindrance(server, tmp_path):
    server.tells_length = False
    assert fetch(f"{server.address}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(server, tmp_path):
    address, path = f"{server.address}/file.bin", tmp_path / "file.bin"
    with pytest.raises(InputError, match="has the checksum .* instead of 0000.* deleted"):
        fetch(address, path, checksum="0" * 32)
    with pytest.raises(InputError, match="1,004,000 bytes instead of 1,000"):
        fetch(address, path, size=1000)
    server.tells_length = False
    with pytest.raises(InputError, match="1,004,000 bytes instead of 1,000,000,.* deleted"):
        fetch(address, path, size=1_000_000_000)
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="has 4 bytes instead of 1,004,000.* move it away"):
        fetch(address, path, size=len(CONTENT))
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(status=404), "404 Not Found"),
        (dict(status=503), "503 Service Unavailable"),
        (dict(kind="text/html; charset=utf-8"), "a web page instead of a file"),
    ],
)
def test_wrong_answers_are_told(server, tmp_path, change, said):
    vars(server).update(change)
    with pytest.raises(InputError, match=said):
        fetch(f"{server.address}/file.bin", tmp_path / "file.bin")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "address, said",
    [
        ("http://127.0.0.1:9/x", "cannot be reached.*refused"),
        ("/data/x.pth", "no address"),
        ("file:///etc/hosts", "no address"),
        ("https://", "cannot be reached"),
    ],
)
def test_wrong_addresses_are_told(tmp_path, address, said):
    with pytest.raises(InputError, match=said):
        fetch(address, tmp_path / "x")


def test_no_room_is_told_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        downloads.shutil, "disk_usage", lambda folder: SimpleNamespace(free=900_000)
    )
    with pytest.raises(InputError, match="file.bin needs 0.00 GB.* free"):
        fetch(f"{server.address}/file.bin", tmp_path / "file.bin")
    broken_part = tmp_path / "file.bin.part"
    broken_part.write_bytes(CONTENT[:200_000])
    fetch(
        f"{server.address}/file.bin", tmp_path / "file.bin", checksum=md5(CONTENT)
    )  # the rest fits


def test_two_processes_do_not_write_one_file(server, tmp_path):
    server.pace = 0.05
    first = threading.Thread(
        target=fetch, args=(f"{server.address}/file.bin", tmp_path / "file.bin")
    )
    first.start()
    while not (tmp_path / "file.bin.part.version").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process"):
        fetch(f"{server.address}/file.bin", tmp_path / "file.bin")
    first.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def packed(files):
    """Pack a zip archive."""
    content = io.BytesIO()
    with ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def coco_server(server, tmp_path_factory):
    """The server, with COCO's archives, which hold drawn scenes."""
    drawn = tmp_path_factory.mktemp("drawn")
    for split, length in (("train2017", 6), ("val2017", 4)):
        ShapesDataset(length).write_coco(drawn, split)

    def read(pattern):
        return {str(p.relative_to(drawn)): p.read_bytes() for p in drawn.glob(pattern)}

    annotations = {**read("annotations/*"), "annotations/captions_val2017.json": b"{}"}
    server.files = {
        "/zips/val2017.zip": packed({"val2017/": b"", **read("val2017/*")}),
        "/zips/train2017.zip": packed(read("train2017/*")),
        "/annotations/annotations_trainval2017.zip": packed(annotations),
    }
    return server


def command(server, folder, *options, capsys):
    """Run the command within this process."""
    status = downloads.command_line(["download", str(folder), "--source", server.address, *options])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def started(server, folder, *options):
    """Start the command as a user does."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "query_detr.data.download",
            "download",
            str(folder),
            "--source",
            server.address,
            *options,
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_command_ends_in_cocos_layout_and_then_has_nothing_to_do(coco_server, tmp_path, capsys):
    status, said = command(coco_server, tmp_path / "coco", "--unchecked", capsys=capsys)
    assert status == 0, said
    assert names(tmp_path / "coco") == ["annotations", "train2017", "val2017"]
    assert names(tmp_path / "coco" / "annotations") == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    for split, length in (("train2017", 6), ("val2017", 4)):
        dataset = coco_split(tmp_path / "coco", split)
        assert len(dataset) == length
        assert all(dataset.open(i).size == (128, 128) for i in range(length))
    coco_server.asked.clear()
    status, said = command(coco_server, tmp_path / "coco", capsys=capsys)
    assert status == 0
    assert "train: already in" in said
    assert not coco_server.asked


def test_command_continues_after_a_break(coco_server, tmp_path, capsys):
    coco_server.breaks_after = 20_000
    status, said = command(coco_server, tmp_path, "--what", "val", "--unchecked", capsys=capsys)
    assert status == 2
    assert "error: the download of" in said
    assert "running it again continues it" in said
    assert names(tmp_path) == ["val2017.zip.part", "val2017.zip.part.version"]
    coco_server.breaks_after = None
    status, said = command(
        coco_server, tmp_path, "--what", "val", "--unchecked", "--keep", capsys=capsys
    )
    assert status == 0
    assert ranges(coco_server) == [None, "bytes=20000-"]
    assert names(tmp_path) == ["val2017", "val2017.zip"]


def test_command_refuses_what_is_not_cocos(coco_server, tmp_path, capsys):
    status, said = command(coco_server, tmp_path, "--what", "annotations", capsys=capsys)
    assert status == 2
    assert "bytes instead of 252,907,541" in said
    status, said = command(coco_server, tmp_path, "--what", "val,test", capsys=capsys)
    assert status == 2
    assert "no archive called 'test': choose from val, annotations, train" in said


def test_killed_command_leaves_nothing_half_done(coco_server, tmp_path):
    coco_server.pace = 0.2
    run = started(coco_server, tmp_path, "--what", "val", "--unchecked")
    part, deadline = tmp_path / "val2017.zip.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill(), run.communicate()
    assert not (tmp_path / "val2017").exists()
    assert 0 < part.stat().st_size < len(coco_server.files["/zips/val2017.zip"])
    coco_server.pace = 0
    run = started(coco_server, tmp_path, "--what", "val", "--unchecked")
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert said == f"val: unpacked into {tmp_path}\n"
    assert "unpacking val2017.zip: 100%" in errors
    assert ranges(coco_server)[-1].startswith("bytes=")
    assert len(names(tmp_path / "val2017")) == 4


def official(monkeypatch, server, name):
    """Make what the server has the official archive."""
    archive = downloads.ARCHIVES[name]
    content = server.files[f"/{archive.address}"]
    monkeypatch.setitem(
        downloads.ARCHIVES,
        name,
        downloads.Archive(archive.address, len(content), md5(content), len(content), archive.gives),
    )


def test_archives_are_checked_and_a_changed_byte_is_found(coco_server, tmp_path, monkeypatch):
    official(monkeypatch, coco_server, "val")
    whole = coco_server.files["/zips/val2017.zip"]
    coco_server.files["/zips/val2017.zip"] = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    with pytest.raises(InputError, match="checksum"):
        downloads.download(tmp_path, "val", coco_server.address)
    assert names(tmp_path) == []
    coco_server.files["/zips/val2017.zip"] = whole
    downloads.download(tmp_path, "val", coco_server.address)
    assert names(tmp_path) == ["val2017"]


def test_unpacking_that_fails_leaves_nothing_half_done(coco_server, tmp_path, monkeypatch):
    whole = coco_server.files["/zips/val2017.zip"]
    coco_server.files["/zips/val2017.zip"] = (
        whole[:20_000] + bytes([whole[20_000] ^ 1]) + whole[20_001:]
    )
    with pytest.raises(InputError, match="could not be unpacked .*delete it"):
        downloads.download(tmp_path, "val", coco_server.address, unchecked=True)
    assert not (tmp_path / "val2017").exists()
    (tmp_path / "val2017.zip").write_bytes(packed({"images/1.jpg": b""}))
    with pytest.raises(InputError, match="contains no val2017"):
        downloads.download(tmp_path, "val", coco_server.address, unchecked=True)
    (tmp_path / "val2017.zip").unlink()
    coco_server.files["/zips/val2017.zip"] = whole
    downloads.download(
        tmp_path, "val", coco_server.address, unchecked=True
    )  # and clears away what was left
    assert names(tmp_path) == ["val2017"]
    assert len(names(tmp_path / "val2017")) == 4


def test_unpacking_keeps_what_is_there(coco_server, tmp_path):
    (tmp_path / "val2017").mkdir()  # empty: made by hand
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("mine")
    downloads.download(tmp_path, "val,annotations", coco_server.address, unchecked=True)
    assert (tmp_path / "annotations" / "instances_val2017.json").read_text() == "mine"
    assert json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())["images"]
    assert len(names(tmp_path / "val2017")) == 4


def test_room_for_packed_and_unpacked_is_asked_for_beforehand(server, tmp_path, monkeypatch):
    free = 38_000_000_000  # enough for each of the archives, not for train2017 twice and the rest
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="needs 40.37 GB, but .* has 38.00 GB free"):
        downloads.download(tmp_path, source=server.address)
    assert not server.asked
    part = tmp_path / "train2017.zip.part"
    part.touch(), os.truncate(part, 15_000_000_000)  # a hole, which takes no room
    assert downloads.space_needed(
        tmp_path, list(downloads.ARCHIVES.values()), False
    ) == pytest.approx(25.37e9, rel=1e-3)
    assert downloads.space_needed(
        tmp_path, list(downloads.ARCHIVES.values()), True
    ) == pytest.approx(26.44e9, rel=1e-3)
