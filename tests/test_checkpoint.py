"""A checkpoint is the state that was saved, to the last bit, or it is not used."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import checkpoint, durable
from jaxrl.checkpoint import CheckpointError, restore_newest, save

HOST = {"cursor": 17, "version": 3, "text": "ü", "none": None, "big": 2**63}


def mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("a", "b")[: len(shape)])


def state(step: int, where: Mesh | None = None, spec: P | None = None) -> dict:
    """Parameters, real optimizer state and a key; contents differ from step to step."""
    where = where or mesh(8)
    rng = np.random.default_rng(step)
    sharded = NamedSharding(where, spec or P())
    copied = NamedSharding(where, P())
    params = {
        "dense": {"kernel": jax.device_put(rng.normal(size=(64, 64)).astype(np.float32), sharded)},
        "scale": jax.device_put(jnp.asarray(rng.normal(size=5), jnp.bfloat16), copied),
    }
    return {
        "params": params,
        "optimizer": jax.tree.map(
            lambda x: x if x.ndim else jax.device_put(x, copied), optax.adamw(1e-3).init(params)
        ),
        "key": jax.device_put(jax.random.key_data(jax.random.key(step)), copied),
    }


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (10, 20):
        save(root, step, state(step), {**HOST, "step": step}, keep=2)
    return root


def test_what_comes_back_is_what_was_saved(tmp_path):
    saved = state(4, mesh(2, 4), P("a", "b"))
    path = save(tmp_path / "c", 4, saved, HOST, keep=1)
    assert path == tmp_path / "c" / "step_00000004"
    restored = restore_newest(tmp_path / "c", abstract(saved))
    assert (restored.step, restored.host, restored.rejected) == (4, HOST, [])
    assert_same_bits(restored.arrays, saved)
    for a, b in zip(jax.tree.leaves(restored.arrays), jax.tree.leaves(saved), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("shape, spec", [((4, 2), P("b", "a")), ((8,), P("a")), ((8,), P())])
def test_arrays_come_back_on_another_mesh(tmp_path, shape, spec):
    saved = state(4, mesh(2, 4), P("a", "b"))
    save(tmp_path, 4, saved, {}, keep=1)
    wanted = state(99, mesh(*shape), spec)  # other values, the placement that is asked for
    restored = restore_newest(tmp_path, abstract(wanted))
    assert_same_bits(restored.arrays, saved)
    for a, b in zip(jax.tree.leaves(restored.arrays), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_manifest_lists_every_file_with_its_digest(two_steps):
    path = two_steps / "step_00000020"
    manifest = json.loads((path / "MANIFEST.json").read_text())
    files = {
        p.relative_to(path).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in path.rglob("*")
        if p.is_file() and not p.name.startswith("MANIFEST")
    }
    assert manifest["files"] == files and len(files) > 5
    assert manifest["schema"] == 1 and manifest["step"] == 20
    assert set(manifest["libraries"]) == {"jax", "flax", "orbax-checkpoint"}
    subprocess.run(["sha256sum", "--quiet", "-c", "MANIFEST.sha256"], cwd=path, check=True)


def flip(at: float):
    def harm(data: bytes) -> bytes:
        place = min(int(at * len(data)), len(data) - 1)
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return harm


def zero_page(data: bytes) -> bytes:
    """4 KiB in the middle, or all of a file that is smaller."""
    start = max(0, len(data) // 2 - 2048)
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


HARMS = {
    "flip first byte": flip(0.0),
    "flip in the middle": flip(0.5),
    "flip last byte": flip(1.0),
    "zeroed 4 KiB": zero_page,
    "truncated": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "appended": lambda data: data + b"\0",
    "deleted": None,
}


@pytest.mark.parametrize("harm", HARMS)
def test_any_harm_to_any_file_is_found_and_the_older_checkpoint_used(two_steps, tmp_path, harm):
    """One file of the newest at a time; the older one must be restored, and the file named."""
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    newest = root / "step_00000020"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert len(files) > 7
    for file in files:
        intact = file.read_bytes()
        if HARMS[harm] is None:
            file.unlink()
        else:
            harmed = HARMS[harm](intact)
            assert harmed != intact, file
            file.write_bytes(harmed)
        restored = restore_newest(root, abstract(state(0)))
        assert restored.step == 10 and restored.host["step"] == 10, file
        (reason,) = restored.rejected
        assert reason.startswith("step_00000020: "), reason
        assert file.name.split(".")[0] in reason, (file, reason)
        file.write_bytes(intact)
    assert_same_bits(restored.arrays, state(10))
    assert restore_newest(root, abstract(state(0))).step == 20  # whole again


def test_without_the_digests_orbax_would_restore_a_flipped_bit(two_steps, tmp_path, monkeypatch):
    """The reason for the digests; if Orbax begins to check, this says so."""
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    file = max(
        (root / "step_00000020" / "arrays").rglob("*"),
        key=lambda p: p.stat().st_size * p.is_file() * ("d/" in p.as_posix()),
    )
    monkeypatch.setattr(durable, "damage", lambda path: None)
    intact, wrong = file.read_bytes(), 0
    for at in np.linspace(0.02, 0.98, 25):
        file.write_bytes(flip(at)(intact))
        try:
            arrays = restore_newest(root, abstract(state(0))).arrays
        except CheckpointError:
            continue
        wrong += any(
            np.asarray(a).tobytes() != np.asarray(b).tobytes()
            for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(state(20)), strict=True)
        )
    assert wrong > 0


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path, _: path.mkdir(), "MANIFEST.json: No such file"),
        (lambda path, _: path.write_text(""), "Not a directory"),
        (lambda path, good: shutil.copytree(good, path), "MANIFEST.json: is that of step 20"),
        (
            lambda path, good: shutil.copytree(good / "arrays", path / "arrays"),
            "MANIFEST.json: No such file",
        ),
        (
            lambda path, good: shutil.copytree(
                good, path, ignore=shutil.ignore_patterns("ocdbt.process_0")
            ),
            "is missing",
        ),
    ],
    ids=["empty directory", "a file", "renamed copy", "copy without manifest", "partial copy"],
)
def test_a_false_newer_step_is_passed_over(two_steps, tmp_path, make, reason):
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    make(root / "step_00000030", root / "step_00000020")
    restored = restore_newest(root, abstract(state(0)))
    assert restored.step == 20
    assert len(restored.rejected) == 1 and reason in restored.rejected[0], restored.rejected
    # The run goes on from 20 and comes past 30 again: the false one must not be in the way.
    save(root, 30, state(30), HOST, keep=2)
    assert restore_newest(root, abstract(state(0))).step == 30


def test_extra_files_and_links_are_found(two_steps, tmp_path):
    for number, make in enumerate(
        [
            lambda path: (path / "arrays" / "extra").write_text("x"),
            lambda path: (path / "arrays" / "link").symlink_to("/"),
            lambda path: (
                ((path / "host.json").rename(path.parent / "away"))
                and (path / "host.json").symlink_to(path.parent / "away")
            ),
        ]
    ):
        root = tmp_path / str(number)
        shutil.copytree(two_steps, root)
        make(root / "step_00000020")
        restored = restore_newest(root, abstract(state(0)))
        assert restored.step == 10
        assert any(
            word in restored.rejected[0] for word in ("not in the manifest", "not a regular")
        )


def test_no_checkpoints_is_none_and_only_damaged_ones_is_an_error(tmp_path):
    assert restore_newest(tmp_path / "nowhere", abstract(state(0))) is None
    assert restore_newest(tmp_path, abstract(state(0))) is None
    save(tmp_path, 1, state(1), {}, keep=2)
    save(tmp_path, 2, state(2), {}, keep=2)
    for path in tmp_path.glob("step_*"):
        (path / "host.json").unlink()
    with pytest.raises(CheckpointError) as error:
        restore_newest(tmp_path, abstract(state(0)))
    for text in ("step_00000001: host.json: is missing", "step_00000002: host.json: is missing"):
        assert text in str(error.value)
    assert f"or remove {tmp_path}: --resume then starts from the first step" in str(error.value)


def test_leftovers_of_killed_saves_are_ignored_and_removed(two_steps, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    shutil.copytree(root / "step_00000020", root / "tmp.step_00000030")
    (root / "notes.txt").write_text("mine")
    assert restore_newest(root, abstract(state(0))).step == 20
    assert {p.name for p in root.iterdir()} == {"step_00000010", "step_00000020", "notes.txt"}


def test_another_tree_is_an_error_that_names_the_leaves(two_steps):
    wanted = abstract(state(0))
    sharding = wanted["key"].sharding
    wanted["params"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)
    wanted["params"]["scale"] = jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=sharding)
    wanted["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct(
        (64, 64), jnp.bfloat16, sharding=sharding
    )
    del wanted["key"]
    with pytest.raises(CheckpointError) as error:
        restore_newest(two_steps, wanted)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert sorted(lines) == [
        "key: is in the checkpoint only",
        "params/dense/kernel: is float32[64, 64] in the checkpoint, bfloat16[64, 64] here",
        "params/extra: is not in the checkpoint",
        "params/scale: is bfloat16[5] in the checkpoint, bfloat16[6] here",
    ]


def test_another_schema_is_an_error_and_not_a_fall_back(two_steps, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    path = root / "step_00000020"
    text = (path / "MANIFEST.json").read_bytes().replace(b'"schema": 1,', b'"schema": 2,')
    (path / "MANIFEST.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (path / "MANIFEST.sha256").write_text(f"{digest}  MANIFEST.json\n")
    with pytest.raises(CheckpointError, match="schema 2, this program reads schema 1"):
        restore_newest(root, abstract(state(0)))


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, state(step), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize("keep, stay", [(1, [12]), (2, [9, 12]), (3, [8, 9, 12])])
@pytest.mark.parametrize("harmed", [(10,), (10, 11)])
def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path, keep, stay, harmed):
    """It is newer than the one that the run goes on from, and older than the next."""
    for step in (7, 8, 9, *harmed):
        save(tmp_path, step, state(step), {}, keep=5)
    for step in harmed:
        file = tmp_path / f"step_{step:08d}" / "host.json"
        file.write_bytes(file.read_bytes()[:-1])
    assert restore_newest(tmp_path, abstract(state(0))).step == 9
    save(tmp_path, 12, state(12), {}, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{step:08d}" for step in stay]
    for step in stay:
        assert checkpoint.open_whole(tmp_path / f"step_{step:08d}").step == step


def test_a_damaged_checkpoint_below_the_newest_takes_no_place_either(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step, state(step), {}, keep=3)
    (tmp_path / "step_00000009" / "host.json").unlink()
    save(tmp_path, 11, state(11), {}, keep=3)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [8, 10, 11]


def test_a_checkpoint_that_was_found_whole_is_not_read_at_every_save(tmp_path, monkeypatch):
    """Of a big model that takes minutes."""
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), {}, keep=3)
    read, damage = [], durable.damage
    monkeypatch.setattr(durable, "damage", lambda path: read.append(path.name) or damage(path))
    whole = {"step_00000003"}
    for step in (4, 5, 6):
        save(tmp_path, step, state(step), {}, keep=3, whole=whole)
    new = [f"tmp.step_{step:08d}" for step in (4, 5, 6)]
    assert read == [new[0], "step_00000002", *new[1:]]
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [4, 5, 6]


def test_a_removal_that_is_killed_half_way_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1), {}, keep=1)
    rmtree = shutil.rmtree

    def killed(path):
        next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, state(2), {}, keep=1)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000002"]
    assert restore_newest(tmp_path, abstract(state(0))).rejected == []
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_a_whole_checkpoint_is_never_overwritten(tmp_path):
    save(tmp_path, 5, state(5), {}, keep=2)
    for step in (5, 4):
        with pytest.raises(CheckpointError, match="step_00000005 is a whole checkpoint already"):
            save(tmp_path, step, state(6), {}, keep=2)
    assert_same_bits(restore_newest(tmp_path, abstract(state(0))).arrays, state(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_new_checkpoint_that_reads_back_wrong_removes_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1), {}, keep=1)
    seal = durable.seal

    def seal_and_flip(path, facts):
        seal(path, facts)
        file = next(p for p in (path / "arrays").rglob("*") if p.is_file())
        file.write_bytes(flip(0.5)(file.read_bytes()))

    monkeypatch.setattr(durable, "seal", seal_and_flip)
    with pytest.raises(CheckpointError, match="reads back differently"):
        save(tmp_path, 2, state(2), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_every_file_is_flushed_before_the_name_appears_and_the_name_after(tmp_path, monkeypatch):
    """A power cut after `save` must find the bytes; a test cannot cut power, but it can watch."""
    events = []
    fsync, rename = os.fsync, os.rename

    def watch_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watch_rename(source, target):
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    path = save(tmp_path / "c", 1, state(1), {}, keep=1)
    named = events.index(("rename", str(path)))
    temporary = str(path.with_name("tmp.step_00000001"))
    flushed = [name for kind, name in events[:named] if kind == "fsync"]
    everything = [temporary, *(f"{temporary}/{p.relative_to(path)}" for p in path.rglob("*"))]
    assert set(everything) <= set(flushed)
    assert ("fsync", str(path.parent)) in events[named:]


def full_disk_message(error: Exception) -> None:
    text = str(error)
    assert "step 2 was not saved" in text and "MiB are free there" in text
    assert "step_00000001" in text and "--resume" in text


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small tmpfs; the file size limit is tested instead")
    try:
        root = disk / "c"
        save(root, 1, state(1), {}, keep=2)
        big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=4_000_000))}
        for _ in range(2):
            with pytest.raises(CheckpointError, match="No space left") as error:
                save(root, 2, big, {}, keep=2)
            full_disk_message(error.value)
            assert [p.name for p in root.iterdir()] == ["step_00000001"]
        small = {"w": big["w"][:1000]}
        save(root, 2, small, {}, keep=2)  # space is back
        assert restore_newest(root, abstract(small)).step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_size_limit_leaves_the_last_good_checkpoint(tmp_path):
    save(tmp_path, 1, state(1), {}, keep=2)
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            save(tmp_path, 2, big, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    full_disk_message(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


SAVER = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from jaxrl import checkpoint

    root, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        arrays = {"w": jnp.full((64, 1024), step, jnp.float32), "n": jnp.int32(step)}
        checkpoint.save(root, step, arrays, {"step": step}, keep=2)
        print(step, flush=True)
"""


def test_kill_9_during_continuous_saving_loses_at_most_the_step_being_saved(tmp_path):
    """Twelve kills of a real process; the parent knows which saves had returned."""
    root = tmp_path / "c"
    script = tmp_path / "saver.py"
    script.write_text(textwrap.dedent(SAVER))
    rng = random.Random(0)
    on_cpu = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        "w": jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=on_cpu),
        "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=on_cpu),
    }
    step, leftovers = 0, 0
    for _ in range(12):
        log = tmp_path / "log"
        with log.open("w") as output:
            saver = subprocess.Popen(
                [sys.executable, str(script), str(root), str(step)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
            )
        deadline = time.monotonic() + 60
        while not log.read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        lines = log.read_text().split()
        assert lines and lines[-1].isdigit(), log.read_text()
        returned = int(lines[-1])
        leftovers += any(p.name.startswith("tmp.") for p in root.iterdir())
        restored = restore_newest(root, wanted)
        assert returned <= restored.step <= returned + 1
        assert restored.rejected == []
        assert restored.host == {"step": restored.step}
        assert int(restored.arrays["n"]) == restored.step
        assert bool((restored.arrays["w"] == restored.step).all())
        assert len(list(root.glob("step_*"))) <= 3 and not list(root.glob("tmp.*"))
        step = restored.step
    assert step > 12
    assert leftovers >= 3, "too few kills struck a save: the test proves nothing"


def test_orbax_stays_silent_and_its_logger_is_given_back(tmp_path, caplog):
    import logging

    level = logging.getLogger("absl").level
    with caplog.at_level(logging.DEBUG):
        save(tmp_path, 1, state(1), {}, keep=1)
        restore_newest(tmp_path, abstract(state(1)))
    assert [r for r in caplog.records if r.name == "absl"] == []
    assert logging.getLogger("absl").level == level


def test_a_host_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        save(tmp_path / "c", 1, state(1), {"x": float("nan")}, keep=1)
    assert not (tmp_path / "c").exists()


def test_a_typed_key_survives(tmp_path):
    key = {"key": jax.device_put(jax.random.key(7), NamedSharding(mesh(8), P()))}
    checkpoint.save(tmp_path, 1, key, {}, keep=1)
    restored = restore_newest(tmp_path, abstract(key))
    assert jax.random.normal(restored.arrays["key"]) == jax.random.normal(key["key"])


def test_some_arrays_are_read_without_the_others(two_steps):
    stored = checkpoint.open_whole(two_steps / "step_00000010")
    assert (stored.step, stored.host["cursor"]) == (10, 17)
    assert stored.arrays["params/scale"] == ("bfloat16", (5,))
    found = checkpoint.read_arrays(stored, ["params/scale", "params/dense/kernel"])
    assert found.keys() == {"params/scale", "params/dense/kernel"}
    expected = state(10)["params"]
    assert_same_bits(found["params/scale"], np.asarray(expected["scale"]))
    assert_same_bits(found["params/dense/kernel"], np.asarray(expected["dense"]["kernel"]))
    assert all(type(array) is np.ndarray for array in found.values())
    with pytest.raises(CheckpointError, match="holds no params/nothing"):
        checkpoint.read_arrays(stored, ["params/nothing"])


def test_opening_the_newest_passes_damaged_ones_over_and_removes_nothing(two_steps, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(two_steps, root)
    shutil.copytree(root / "step_00000020", root / "tmp.step_00000030")
    assert checkpoint.open_newest(root)[0].step == 20
    (root / "step_00000020" / "host.json").unlink()
    stored, rejected = checkpoint.open_newest(root)
    assert stored.step == 10
    assert [line.partition("c/")[2] for line in rejected] == [
        "step_00000020: is damaged: host.json: is missing"
    ]
    assert (root / "tmp.step_00000030").is_dir()
    (root / "step_00000010").rename(root / "step_00000011")  # a name that is not its own
    with pytest.raises(CheckpointError, match=r"step_00000011: is damaged: .* step 10"):
        checkpoint.open_newest(root)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.open_newest(tmp_path)


def test_a_checkpoint_alone_is_sealed_with_the_files_beside_it(tmp_path):
    (tmp_path / "notes").write_text("mine")
    path = tmp_path / "alone"
    files = {"model/notes": tmp_path / "notes"}
    checkpoint.save_alone(path, {"params": state(3)["params"]}, HOST, files)
    stored = checkpoint.open_whole(path)
    assert (stored.step, stored.host) == (0, HOST)
    found = checkpoint.read_arrays(stored, stored.arrays)
    assert_same_bits(
        found["params/dense/kernel"], np.asarray(state(3)["params"]["dense"]["kernel"])
    )
    assert (path / "model" / "notes").read_text() == "mine"
    checkpoint.save_alone(path, {"w": jnp.zeros(2)}, {}, files)
    assert checkpoint.open_whole(path).arrays.keys() == {"w"}
    (path / "model" / "notes").write_text("yours")
    with pytest.raises(CheckpointError, match="is damaged: model/notes: has 5 bytes"):
        checkpoint.open_whole(path)
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "alone"}


def test_a_checkpoint_alone_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="was not written"):
        checkpoint.save_alone(tmp_path / "x", {"w": jnp.zeros(2)}, {}, {"a": tmp_path / "no"})
    assert list(tmp_path.iterdir()) == []
