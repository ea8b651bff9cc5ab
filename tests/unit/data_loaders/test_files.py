"""Files that are written whole or not at all, and locks."""

import errno
import fcntl
import os
import stat

import pytest

from data_loaders.files import locked, replacing, write_text


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "new" / "text", "x")
        write_text(tmp_path / "script", "x", executable=True)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new" / "text") == 0o666 & ~umask
    assert mode_of(tmp_path / "script") == (0o666 & ~umask) | ((0o444 & ~umask) >> 2)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_after_an_error_the_old_file_stands_alone(tmp_path, monkeypatch, name):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left on device"), replacing(path) as temporary:
            temporary.write_text("new")
        if name == "replace":
            with pytest.raises(OSError, match=r"a\.txt cannot be written: No space left on device"):
                write_text(path, "new")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_a_file_is_on_the_disk_before_it_replaces_another_and_its_name_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    for synced, expected in ((True, ["file", "replace", "folder"]), (False, ["replace"])):
        with replacing(tmp_path / "a.txt", sync=synced) as temporary:
            temporary.write_text("new")
        assert calls == expected
        calls.clear()


def test_one_process_holds_a_lock(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with locked(path, wait=True) as is_held:
        assert is_held
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
    with locked(path, wait=False) as is_held:
        assert is_held

    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with locked(path, wait=False) as is_held:
        assert not is_held
