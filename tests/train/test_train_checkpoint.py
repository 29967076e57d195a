"""Checkpoints: whole or not there, kept by policy, damage found, and the same on every mesh."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.checkpoint import Checkpointer, find_verified
from qwen3_jax.train.metrics import MetricsLog
from qwen3_jax.train.run_directory import RunDirectory, check_writable


def weights(devices: int = 1, rows: int = 64) -> dict[str, jax.Array]:
    """Arrays whose rows are spread over the first devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    return {
        "kernel": jax.device_put(jax.random.normal(jax.random.key(0), (rows, 48)), spread),
        "scale": jax.device_put(jnp.arange(16.0), whole),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(directory: Path, steps: list[int], keep: int = 3, keep_every: int | None = None) -> None:
    with Checkpointer(directory, keep, keep_every) as checkpointer:
        for step in steps:
            checkpointer.save(step, weights(), {"moment": weights()}, {"0": {"read": step}}, {"step": step})


def steps_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_stay_and_every_fourth_for_good(tmp_path: Path) -> None:
    save(tmp_path, list(range(1, 12)), keep=2, keep_every=4)
    assert steps_of(tmp_path) == ["10", "11", "4", "8"]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, [5])
    with Checkpointer(tmp_path, 3) as checkpointer:
        assert checkpointer.newest_verified(pytest.fail) == 5
        params, optimizer, data, run = checkpointer.restore(5, abstract(weights()), {"moment": abstract(weights())})
    for got in (params, optimizer["moment"]):
        jax.tree.map(np.testing.assert_array_equal, got, weights())
    assert (data, run) == ({"0": {"read": 5}}, {"step": 5})


def test_from_eight_devices_to_four_to_two_to_eight_no_bit_changes(tmp_path: Path) -> None:
    held: dict[str, jax.Array] = weights(8)
    for step, (devices, after) in enumerate([(8, 4), (4, 2), (2, 8)]):
        with Checkpointer(tmp_path, 1) as checkpointer:
            assert len(held["kernel"].sharding.device_set) == devices
            checkpointer.save(step, held, {"moment": held["scale"]}, {}, {})
        with Checkpointer(tmp_path, 1) as checkpointer:
            scale = abstract(weights(after)["scale"])
            held, *_ = checkpointer.restore(step, abstract(weights(after)), {"moment": scale})
    assert len(held["kernel"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, held, weights(8))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """Each file of a checkpoint in turn, but for the two that hold only the time and Orbax's own mark."""
    save(tmp_path, [1])
    rng = random.Random(0)
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    files = [path for path in files if path != tmp_path / "1" / "commit_success.txt" and "_CHECKPOINT" not in path.name]
    assert {"digests.json", "metadata", "process_00000.json", "manifest.ocdbt"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), whole[:-1], b"", None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            said: list[str] = []
            with pytest.raises(ValueError, match="no verified checkpoint"):
                find_verified(tmp_path, said.append)
            assert said[0].startswith("checkpoint 1 is damaged: ")
        path.write_bytes(whole)
    assert find_verified(tmp_path, pytest.fail) is not None


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_another_models(tmp_path: Path) -> None:
    save(tmp_path, [1])
    (tmp_path / "1" / "run" / "metadata").write_text("{")
    with Checkpointer(tmp_path, 3) as checkpointer, pytest.raises(OSError, match=rf"^checkpoint 1: '{tmp_path}': "):
        checkpointer.restore(1, abstract(weights()), {"moment": abstract(weights())})


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path) -> None:
    save(tmp_path, [1, 2, 3])
    for step, number in ((3, 0), (2, 1)):
        victim = sorted((tmp_path / str(step) / "params").rglob("d/*"))[number]
        victim.write_bytes(victim.read_bytes()[:-3])
    said: list[str] = []
    with Checkpointer(tmp_path, 3) as checkpointer:
        assert checkpointer.newest_verified(said.append) == 1
        assert [line.split(":")[0] for line in said] == ["checkpoint 3 is damaged", "checkpoint 2 is damaged"]
        assert steps_of(tmp_path) == ["1", "2.damaged", "3.damaged"]
        checkpointer.save(2, weights(), {"moment": weights()}, {}, {})
    assert find_verified(tmp_path, pytest.fail) == tmp_path / "2"
    (tmp_path / "2" / "digests.json").unlink()
    with Checkpointer(tmp_path, 3) as checkpointer:
        assert checkpointer.newest_verified(said.append) == 1
    assert steps_of(tmp_path) == ["1", "2.damaged", "2.damaged-2", "3.damaged"]


def test_where_none_is_whole_none_is_moved(tmp_path: Path) -> None:
    save(tmp_path, [1, 2])
    for step in "12":
        (tmp_path / step / "digests.json").write_text("{")
    with Checkpointer(tmp_path, 3) as checkpointer, pytest.raises(ValueError, match="no verified checkpoint"):
        checkpointer.newest_verified(lambda text: None)
    assert steps_of(tmp_path) == ["1", "2"]


def mount(kind: str, target: Path, *options: str) -> None:
    """Skips where the system lets nobody mount."""
    target.mkdir()
    done = subprocess.run(["mount", *options, kind, str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def unmount(target: Path) -> None:
    """Also where a file is still open: an error's traceback may hold one."""
    subprocess.run(["umount", "--lazy", str(target)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    mount("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m")
    yield tmp_path / "disk"
    unmount(tmp_path / "disk")


def test_a_disk_that_fills_up_is_named_and_nothing_half_written_counts(small_disk: Path) -> None:
    """Two checkpoints fit on it. The third is refused by the save after it at the latest, and with the room that a
    deleted file gives, the run goes on."""
    many, moment = weights(rows=3000), {"moment": jnp.zeros(1)}

    def fill() -> None:
        with Checkpointer(small_disk, keep=10) as checkpointer:
            for step in range(1, 8):
                checkpointer.save(step, many, moment, {}, {})

    with pytest.raises(OSError, match=rf"^checkpoint (\d+): '{small_disk}': No space left on device; it was not saved"):
        fill()
    found = find_verified(small_disk, pytest.fail)
    assert found is not None
    newest = int(found.name)
    assert 1 <= newest < 7
    assert any(name.startswith(f"{newest + 1}.") for name in steps_of(small_disk)), "it was not while saving"
    with Checkpointer(small_disk, keep=1) as checkpointer:
        assert checkpointer.newest_verified(pytest.fail) == newest
        assert all("tmp" not in name for name in steps_of(small_disk))
        assert checkpointer.restore(newest, abstract(many), abstract(moment))[0]["kernel"].shape == (3000, 48)


def test_metrics_that_no_longer_fit_on_the_disk_end_the_run(small_disk: Path) -> None:
    """None are lost in silence, nor does the run wait for room that never comes."""

    def fill() -> None:
        log = MetricsLog(small_disk, 0)
        try:
            for step in range(1, 10_000):
                log.write(step, {f"number_{i}": 0.5 for i in range(100)})
        finally:
            log.close()

    with pytest.raises(OSError, match=rf"^metrics: '{small_disk}': No space left on device$"):
        fill()


def test_a_bucket_with_one_slash_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^output_dir: 'gs:/bucket/run'; use gs://bucket/run$"):
        check_writable("gs:/bucket/run")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^output_dir: '.*file/out': Not a directory; use a directory that can be"):
        check_writable(str(tmp_path / "file" / "out"))
    (tmp_path / "source").mkdir()
    mount(str(tmp_path / "source"), tmp_path / "readonly", "--bind", "-o", "ro")
    try:
        with pytest.raises(ValueError, match=r"^output_dir: '.*readonly': Read-only file system; use a directory"):
            check_writable(str(tmp_path / "readonly"))
    finally:
        unmount(tmp_path / "readonly")


def test_a_directory_is_that_of_one_run_at_a_time(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with RunDirectory(output):
        with pytest.raises(
            ValueError, match=f"^output_dir: '{output}' is in use by another run; use another directory$"
        ):
            RunDirectory(output)
        RunDirectory(str(tmp_path / "other"))
    with RunDirectory(output):
        pass
