"""Other users of the machine: nothing of theirs is used, followed, overwritten or waited for."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from samples import COUNT, KEY, arrays, build, must_not_encode, raises

from nasfast.cache import CacheConfig, FeatureCache, places, trust
from nasfast.commands.cache import main
from nasfast.utils.errors import UserError

VICTIM, ATTACKER = 65534, 54321
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


def as_user(run, uid=VICTIM):
    """What a function returns or raises in a process of another user, which has a minute."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            answer = True, run()
        except BaseException as error:
            answer = False, error
        with open(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "it hung"
    done, result = pickle.loads(answer)
    if not done:
        raise result
    return result


def command(*argv):
    """Status and output of `nasfast cache`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(word) for word in argv])
    return status, out.getvalue()


@pytest.fixture
def shared(monkeypatch):
    """A directory that all users reach, and may write to; what stands for shared memory in it."""
    root = Path(tempfile.mkdtemp(prefix="nasfast-test-"))
    root.chmod(0o1777)
    (root / "shm").mkdir()
    (root / "shm").chmod(0o1777)
    monkeypatch.setattr(places, "ram_directory", lambda: root / "shm" / f"nasfast-{os.getuid()}")
    yield root
    shutil.rmtree(root)


def directory_of(path, owner=VICTIM, mode=0o700):
    path.mkdir(parents=True)
    os.chown(path, owner, owner)
    path.chmod(mode)
    return path


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


def read(directory, content, **config):
    """The samples from a cache that is there."""
    cache = FeatureCache.load_or_build(
        KEY, COUNT, must_not_encode, CacheConfig(directory, **config), chunk=2
    )
    assert torch.equal(cache.batch(torch.arange(COUNT))["labels"], content["labels"])
    return cache.paths[0]


def test_what_is_made_is_private(tmp_path, ram):
    before = os.umask(0)
    try:
        for placement in ("file", "ram"):
            cache = build(tmp_path / "a" / "b", placement=placement)
            (path,) = cache.paths
            assert mode_of(path) == 0o600
            assert mode_of(path.parent) == 0o700
        assert ram.is_dir()
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o770])
def test_where_others_may_write_a_private_folder_is_used(tmp_path, mode):
    tmp_path.chmod(mode)
    content = arrays()
    cache = build(tmp_path, content)
    cache.close()
    (path,) = cache.paths
    private = tmp_path / f"nasfast-{os.getuid()}"
    assert path.parent == private
    assert mode_of(private) == 0o700
    assert cache.config.directory == private  # workers attach there
    assert read(tmp_path, content) == path
    assert read(private, content) == path
    assert command("ls", "--cache-dir", tmp_path)[1].startswith(f"{path}\n  file, 5 of 5 ")
    assert command("verify", "--cache-dir", tmp_path) == (0, f"{path}: 5 samples OK\n")
    assert command("rm", "--all", "--cache-dir", tmp_path)[0] == 0
    assert not path.exists()


def test_a_link_of_this_user_is_followed(tmp_path):
    content = arrays()
    build(tmp_path / "there", content).close()
    (link := tmp_path / "link").symlink_to(tmp_path / "there")
    assert read(link, content).parent == tmp_path / "there"
    (tmp_path / "there").chmod(0o777)
    (path,) = build(link).paths
    assert path.parent == tmp_path / "there" / f"nasfast-{os.getuid()}"


def test_files_in_shared_memory_itself_are_no_ram_segments(tmp_path, monkeypatch):
    """The folder of --cache-dir /dev/shm has the name of the one for RAM."""
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(places, "ram_directory", lambda: tmp_path / f"nasfast-{os.getuid()}")
    cache = build(tmp_path, placement="file")
    cache.close()
    (path,) = cache.paths
    assert path.parent == places.ram_directory() / "files"
    build(tmp_path, key={"another": "one"}, placement="ram").close()
    assert path.exists()


@needs_root
def test_two_users_share_a_directory(shared):
    content = arrays()
    own = build(shared, content)

    def other():
        path = build(shared, content).paths[0]
        return (
            path,
            command("ls", "--cache-dir", shared),
            command("rm", "--all", "--cache-dir", shared),
        )

    path, (_, listed), (status, _) = as_user(other)
    assert path.parent == shared / f"nasfast-{VICTIM}"
    assert str(own.paths[0]) not in listed
    assert listed.startswith(str(path))
    assert status == 0
    assert own.paths[0].exists()


@needs_root
@pytest.mark.parametrize(
    ("kind", "got"),
    [
        ("theirs", f"owner {ATTACKER} and mode 0755"),
        ("theirs, open", f"owner {ATTACKER} and mode 0777"),
        ("open", "owner nobody and mode 0770"),
    ],
)
def test_a_private_folder_that_is_not(shared, kind, got):
    owner = VICTIM if kind == "open" else ATTACKER
    mode = {"theirs": 0o755, "theirs, open": 0o777, "open": 0o770}[kind]
    private = directory_of(shared / f"nasfast-{VICTIM}", owner, mode)
    message = (
        f"feature cache: expected {private} to be a directory that only you or root may write to, "
        f"got {got}; give another --cache-dir"
    )
    with raises(UserError, message):
        as_user(lambda: build(shared))
    assert as_user(lambda: command("ls", "--cache-dir", shared)) == (2, f"error: {message}\n")
    assert list(private.iterdir()) == []


@needs_root
def test_a_link_of_another_user(shared):
    target = directory_of(shared / "target")
    (link := shared / "link").symlink_to(target)
    (private := shared / f"nasfast-{VICTIM}").symlink_to(target)
    for path in (link, private):
        os.lchown(path, ATTACKER, ATTACKER)
    for asked, path in ((link, link), (shared, private)):
        with raises(
            UserError,
            f"feature cache: expected {path} to be a directory, got a symbolic link of {ATTACKER}; "
            "give another --cache-dir",
        ):
            as_user(lambda asked=asked: build(asked))
    assert list(target.iterdir()) == []


@needs_root
def test_a_directory_of_another_user_is_not_read(shared):
    content = arrays()
    directory = directory_of(shared / "theirs", ATTACKER, 0o755)
    as_user(lambda: build(directory, content).close(), ATTACKER)
    with raises(
        UserError,
        f"feature cache: expected {directory} to be a directory that only you or root may write "
        f"to, got owner {ATTACKER} and mode 0755; give another --cache-dir",
    ):
        as_user(lambda: read(directory, content))


@needs_root
def test_roots_directory_is_read(shared):
    """A cache that an administrator has put there for all."""
    content = arrays()
    directory = directory_of(shared / "roots", 0, 0o755)
    cache = build(directory, content)
    cache.close()
    cache.paths[0].chmod(0o644)
    assert as_user(lambda: read(directory, content)) == cache.paths[0]
    with raises(
        PermissionError,
        f"[Errno 13] feature cache: cannot write to {directory}: Permission denied; give another "
        "--cache-dir",
    ):
        as_user(lambda: build(directory, key={"data": "other"}))
    cache.paths[0].chmod(0o600)
    with raises(PermissionError, f"[Errno 13] Permission denied: '{cache.paths[0]}'"):
        as_user(lambda: read(directory, content))


@needs_root
@pytest.mark.parametrize(
    ("owner", "mode", "got"),
    [
        (ATTACKER, 0o644, f"owner {ATTACKER} and mode 0644"),
        (VICTIM, 0o666, "owner nobody and mode 0666"),
        (VICTIM, 0o664, "owner nobody and mode 0664"),
    ],
)
def test_a_file_that_others_may_write(shared, owner, mode, got):
    directory = directory_of(shared / "mine")
    path = as_user(lambda: build(directory).paths[0])
    os.chown(path, owner, owner)
    path.chmod(mode)
    before = path.read_bytes()
    with raises(
        UserError,
        f"feature cache {path}: expected a file that only you or root may write to, got {got}; "
        "delete it, or `chmod go-w` your own if you trust what it holds",
    ):
        as_user(lambda: build(directory))
    assert path.read_bytes() == before
    assert as_user(lambda: command("rm", "--all", "--cache-dir", directory))[0] == (owner != VICTIM)


def link(path, target):
    path.symlink_to(target)


def pipe(path, target):
    os.mkfifo(path)


def socket(path, target):
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (link, "a symbolic link of root"),
        (pipe, "a device, pipe or socket of root"),
        (socket, "a device, pipe or socket of root"),
        (lambda path, target: path.mkdir(), "a directory of root"),
    ],
    ids=["link", "pipe", "socket", "directory"],
)
@pytest.mark.parametrize("temporary", [False, True], ids=["file", "temporary"])
def test_what_is_no_plain_file(tmp_path, ram, make, kind, temporary):
    """It is not opened, followed, filled, repaired, overwritten or removed."""
    kind = kind.replace("root", trust.user_name(os.getuid()))
    target = build(tmp_path / "elsewhere", key={"another": "one"}).paths[0]
    before = target.read_bytes()
    directory = tmp_path / "caches"
    cache = build(directory)
    cache.close()
    (path,) = cache.paths
    path.unlink()
    wrong = path.with_name(f".{path.name}.tmp") if temporary else path
    make(wrong, target)
    message = f"feature cache {wrong}: expected a plain file, got {kind}; remove it"
    with raises(UserError, message):
        build(directory)
    for place in (directory, ram):
        places.sweep(place)
    if not temporary:
        assert command("ls", "--cache-dir", directory)[1].startswith(f"{wrong}\n  {message}\n")
        assert command("verify", "--repair", "--cache-dir", directory) == (1, f"{message}\n")
        for force in ([], ["--force"]):
            status, out = command("rm", "--all", *force, "--cache-dir", directory)
            assert (status, out) == (1, f"{message}\n0 B freed\n")
    assert os.path.lexists(wrong)
    assert target.read_bytes() == before


# ---- shared memory


def hostile_directory(place):
    directory_of(place, ATTACKER, 0o755)


def hostile_open_directory(place):
    directory_of(place, ATTACKER, 0o777)


def own_open_directory(place):
    directory_of(place, VICTIM, 0o777)


def hostile_link(place):
    target = directory_of(place.parent / "target", ATTACKER, 0o777)
    place.symlink_to(target)
    os.lchown(place, ATTACKER, ATTACKER)


def hostile_link_to_own(place):
    target = directory_of(place.parent / "target")
    place.symlink_to(target)
    os.lchown(place, ATTACKER, ATTACKER)


def hostile_file(place):
    place.write_bytes(b"")
    os.chown(place, ATTACKER, ATTACKER)


def hostile_pipe(place):
    os.mkfifo(place)
    os.chown(place, ATTACKER, ATTACKER)


@needs_root
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            hostile_directory,
            "feature cache: expected {ram} to be a directory that only you or root may write to, "
            f"got owner {ATTACKER} and mode 0755; give --placement file",
        ),
        (
            hostile_open_directory,
            "feature cache: expected {ram} to be a directory that only you or root may write to, "
            f"got owner {ATTACKER} and mode 0777; give --placement file",
        ),
        (
            own_open_directory,
            "feature cache: expected {ram} to be a directory that only you or root may write to, "
            "got owner nobody and mode 0777; give --placement file",
        ),
        *(
            (
                make,
                f"feature cache: expected {{ram}} to be a directory, got a symbolic link of "
                f"{ATTACKER}; give --placement file",
            )
            for make in (hostile_link, hostile_link_to_own)
        ),
        *(
            (
                make,
                f"feature cache: expected {{ram}} to be a directory, got a file of {ATTACKER}; "
                "give --placement file",
            )
            for make in (hostile_file, hostile_pipe)
        ),
    ],
)
def test_what_stands_where_ram_segments_live(shared, make, message):
    """Made and locked by somebody else: a cache on disk does without, one in RAM says so."""
    ram = shared / "shm" / f"nasfast-{VICTIM}"
    make(ram)
    directory = directory_of(shared / "disk")
    lock = os.open(ram, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        path = as_user(lambda: build(directory).paths[0])
        assert path.parent == directory
        status, out = as_user(lambda: command("ls", "--cache-dir", directory))
        assert (status, out.splitlines()[0]) == (0, str(path))
        assert as_user(lambda: command("verify", "--cache-dir", directory))[0] == 0
        assert as_user(lambda: command("rm", "--all", "--cache-dir", directory))[0] == 0
        with raises(UserError, message.format(ram=ram)):
            as_user(lambda: build(directory, placement="ram"))
    finally:
        os.close(lock)


@needs_root
def test_ram_of_the_user_itself(shared):
    content = arrays()
    directory = directory_of(shared / "disk")

    def run():
        cache = build(directory, content, placement="ram")
        assert torch.equal(cache.batch(torch.tensor([1]))["labels"], content["labels"][1:2])
        return cache.paths[0], mode_of(cache.paths[0].parent), cache.resident_bytes

    path, mode, size = as_user(run)
    assert path.parent == shared / "shm" / f"nasfast-{VICTIM}"
    assert mode == 0o700
    assert size > 0
