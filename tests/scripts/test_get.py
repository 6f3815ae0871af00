"""`scripts.get` takes members out of archives of every registry, joins them, and keeps nothing else."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from jaxattn.errors import Corrupt, UserError
from scripts import get
from scripts.get import Entry, Part

PARTS = [b"first part, ", b"second, ", b"third"]
digest = lambda raw: hashlib.sha256(raw).hexdigest()


def archives(folder):
    """A wheel, an npm tarball and a Debian package, each with one part."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
        wheel.writestr("a/x.bin", PARTS[0])
    with tarfile.open(folder / "b.tgz", "w:gz") as ball:
        info = tarfile.TarInfo("package/x.bin")
        info.size = len(PARTS[1])
        ball.addfile(info, io.BytesIO(PARTS[1]))
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: c\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "x.bin").write_bytes(PARTS[2])
    subprocess.run(["dpkg-deb", "--build", tree, folder / "c.deb"], check=True, capture_output=True)


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A registry of archives in a folder, and an entry of three parts."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("Debian packages need dpkg-deb")
    archives(tmp_path / "registry")
    places = {"a": "a.whl", "b": "b.tgz", "c": "c.deb"}

    def download(part, place):
        return shutil.copy(tmp_path / "registry" / places[part.requirement], place / places[part.requirement])

    monkeypatch.setattr(get, "_download", lambda part, place: place / download(part, place).name)
    parts = (
        Part("a", "a/x.bin", digest(PARTS[0])),
        Part("b", "package/x.bin", digest(PARTS[1]), "npm"),
        Part("c", "./usr/x.bin", digest(PARTS[2]), "apt"),
    )
    entry = Entry("x.bin", "a test", "none", parts, digest(b"".join(PARTS)), 1)
    monkeypatch.setitem(get.ENTRIES, "x", entry)
    return entry


def test_the_parts_of_three_registries_become_one_file(offered, tmp_path, monkeypatch):
    path = get.fetch("x", tmp_path / "kept")
    assert path.read_bytes() == b"".join(PARTS)
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]
    monkeypatch.setattr(get, "_download", None)  # what is there is not downloaded again
    assert get.fetch("x", tmp_path / "kept") == path


def test_an_archive_itself_may_be_what_is_kept(offered, tmp_path, monkeypatch):
    raw = (tmp_path / "registry" / "a.whl").read_bytes()
    entry = Entry("y.whl", "a test", "none", (Part("a", "", digest(raw)),), digest(raw), 1)
    monkeypatch.setitem(get.ENTRIES, "y", entry)
    assert get.fetch("y", tmp_path / "kept").read_bytes() == raw
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["y.whl"]


@pytest.mark.parametrize("wrong", ["part", "whole", "member", "archive"])
def test_what_is_not_what_it_was_is_refused_and_not_kept(wrong, offered, tmp_path, monkeypatch):
    import dataclasses

    parts = list(offered.parts)
    if wrong == "part":
        parts[1] = dataclasses.replace(parts[1], sha256="0" * 64)
    if wrong == "member":
        parts[1] = dataclasses.replace(parts[1], member="package/y.bin")
    if wrong == "archive":
        path = tmp_path / "registry" / "a.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("a/x.bin", PARTS[0])
        raw = bytearray(path.read_bytes())
        raw[30 + len("a/x.bin")] ^= 255  # the first byte of what is compressed
        path.write_bytes(raw)
    entry = dataclasses.replace(offered, parts=tuple(parts), sha256="0" * 64 if wrong == "whole" else offered.sha256)
    monkeypatch.setitem(get.ENTRIES, "x", entry)
    said = {"member": "b has no readable package/y", "archive": "a has no readable a/x.bin"}.get(wrong, "expected 000")
    with pytest.raises(Corrupt, match=said):
        get.fetch("x", tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_kept_file_that_was_damaged_is_refused(offered, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"damaged")
    with pytest.raises(Corrupt, match=r"x\.bin has sha256"):
        get.fetch("x", tmp_path)


@pytest.mark.parametrize(("value", "place"), [("", ".cache/jaxattn"), ("~/mine", "mine"), (None, ".cache/jaxattn")])
def test_all_that_is_kept_is_kept_in_one_folder(value, place, tmp_path, monkeypatch):
    import jax

    from jaxattn.compile_cache import prepare_jax
    from train.data.cache_files import cache_root

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXATTN_CACHE", value) if value is not None else monkeypatch.delenv("JAXATTN_CACHE", False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    said = {}
    monkeypatch.setattr(type(jax.config), "update", lambda _, key, value: said.update({key: value}))
    prepare_jax()
    assert said["jax_compilation_cache_dir"] == str(tmp_path / place / "xla")
    assert cache_root() == tmp_path / place
    assert get.path_of("smollm2").parent == tmp_path / place


def test_a_folder_that_cannot_be_is_refused(offered, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x.* cannot be written \(.*\): name another folder as DST"):
        get.fetch("x", tmp_path / "file" / "x")


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        get.fetch("smollm")
    done = subprocess.run([sys.executable, "-m", "scripts.get", "--list"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in get.ENTRIES)


def test_every_entry_pins_every_member():
    for entry in get.ENTRIES.values():
        assert all(len(part.sha256) == 64 for part in entry.parts)
        assert len(entry.sha256) == 64
        assert all("==" in part.requirement for part in entry.parts if part.registry == "pip")
