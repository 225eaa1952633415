"""Reading packs through the mounted pack filesystem."""

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.packfs import Packfs, wait_for

from floe.fuse import descriptors, protocol

MIB = 1 << 20


@pytest.fixture
def packfs(tmp_path):
    fs = Packfs(tmp_path)
    yield fs
    fs.close()


def content(fs, pack_id):
    return (fs.packs_dir / pack_id).read_bytes()


@pytest.mark.parametrize("slow", [False, True])
def test_reads_equal(packfs, slow):
    pack = packfs.add_pack(5 * MIB + 4096, slow=slow)
    packfs.start()
    data = content(packfs, pack)
    path = packfs.mountpoint / pack
    assert path.read_bytes() == data
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset, length in [(0, 1), (4095, 2), (MIB - 1, 2), (3 * MIB + 7, MIB), (len(data) - 5, 100)]:
            assert os.pread(fd, length, offset) == data[offset : offset + length]
        assert os.pread(fd, 10, len(data)) == b""
        assert os.pread(fd, 10, len(data) + MIB) == b""
    finally:
        os.close(fd)


def test_o_direct_reads_equal(packfs):
    pack = packfs.add_pack(2 * MIB)
    packfs.start()
    fd = os.open(packfs.mountpoint / pack, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 2 * MIB) as buffer:
        assert os.preadv(fd, [buffer], 0) == 2 * MIB
        assert buffer[:] == content(packfs, pack)
    os.close(fd)
    with (packfs.mountpoint / pack).open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        assert mapped[:] == content(packfs, pack)


def test_attributes_names_and_listing(packfs):
    pack = packfs.add_pack(8192)
    packfs.start()
    assert list(packfs.mountpoint.iterdir()) == []
    found = (packfs.mountpoint / pack).stat()
    assert (found.st_size, found.st_mode, found.st_ino) == (8192, 0o100400, protocol.node_id(pack))
    assert [path.name for path in packfs.mountpoint.iterdir()] == [pack]
    for name in ("0" * 64, "x", pack[:-1], pack.upper()):
        assert not (packfs.mountpoint / name).exists()
    with pytest.raises(OSError, match="Read-only") as caught:
        (packfs.mountpoint / "new").touch()
    assert caught.value.errno == errno.EROFS
    assert os.statvfs(packfs.mountpoint).f_bsize == 4096


def test_many_packs_are_listed(packfs):
    packs = {packfs.add_pack(4096, seed) for seed in range(150)}
    packfs.start()
    for pack in packs:
        assert (packfs.mountpoint / pack).stat().st_size == 4096
    assert {path.name for path in packfs.mountpoint.iterdir()} == packs


def test_a_failed_read_is_an_error_and_a_later_one_works(packfs):
    pack = packfs.add_pack(MIB, slow=True)
    packfs.start()
    packfs.gate(pack, "fail")
    path = packfs.mountpoint / pack
    with pytest.raises(OSError, match="Input/output") as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    packfs.open_gate(pack, "fail")
    assert path.read_bytes() == content(packfs, pack)


def test_a_short_answer_of_the_reader_is_eio_and_never_short(packfs):
    pack = packfs.add_pack(MIB, slow=True)
    packfs.start()
    packfs.gate(pack, "short")
    with pytest.raises(OSError, match="Input/output"):
        (packfs.mountpoint / pack).read_bytes()


def test_limits_that_the_kernel_took(packfs):
    packfs.start()
    status = packfs.client.status()
    assert status["max_background"] >= 4096
    assert status["congestion_threshold"] == status["max_background"] * 3 // 4


def test_sixty_four_stalled_reads_do_not_delay_another(packfs):
    stalled = packfs.add_pack(64 * 4096, seed=1, shut=True)
    other = packfs.add_pack(4 * MIB, seed=2, slow=True)
    packfs.start()
    readers = [packfs.reader(stalled, offset=4096 * n) for n in range(64)]
    packfs.wait_inflight(stalled, 64)
    assert (packfs.mountpoint / other).read_bytes() == content(packfs, other)
    assert packfs.client.inflight([stalled]) == 64
    assert packfs.client.inflight([other]) == 0
    packfs.open_gate(stalled)
    data = content(packfs, stalled)
    for number, reader in enumerate(readers):
        out, err = reader.communicate(timeout=20)
        assert out == data[4096 * number : 4096 * (number + 1)], err
    assert packfs.client.inflight([stalled, other]) == 0


def test_reads_that_no_thread_has_taken_count_as_in_flight(packfs):
    busy, other = packfs.add_pack(64 * 4096, seed=1), packfs.add_pack(4096, seed=2)
    packfs.start()
    assert (packfs.mountpoint / other).stat()
    packfs.gate(busy, "disk")
    readers = [packfs.reader(busy, offset=4096 * n) for n in range(8)]
    packfs.wait_inflight(busy, 8)
    assert packfs.client.status()["inflight"] < 8  # as many as there are threads; the kernel has the rest
    readers.append(packfs.reader(other))
    wait_for(lambda: packfs.client.status()["waiting"] > 8, "the kernel's queue")
    assert packfs.client.inflight([other]) > 0
    packfs.open_gate(busy, "disk")
    for reader in readers:
        out, err = reader.communicate(timeout=20)
        assert len(out) == 4096, err
    assert packfs.client.inflight([busy, other]) == 0


def test_an_unmount_is_not_held_up_by_traffic_on_other_packs(packfs):
    busy, other = packfs.add_pack(MIB, seed=1), packfs.add_pack(4096, seed=2)
    packfs.start()
    assert (packfs.mountpoint / other).read_bytes()
    code = (
        "import os,sys\nwhile 1:\n fd=os.open(sys.argv[1],os.O_RDONLY)\n while os.read(fd,65536): pass\n os.close(fd)"
    )
    traffic = [subprocess.Popen([sys.executable, "-c", code, str(packfs.mountpoint / busy)]) for _ in range(6)]
    try:
        wait_for(lambda: packfs.client.status()["reads"] > 200, "traffic")
        assert [packfs.client.inflight([other]) for _ in range(20)] == [0] * 20
    finally:
        for process in traffic:
            process.kill()
            process.wait(20)


def test_a_reader_killed_against_a_silent_store_is_gone(packfs):
    pack = packfs.add_pack(MIB, shut=True)
    packfs.start()
    reader = packfs.reader(pack)
    packfs.wait_inflight(pack, 1)
    reader.kill()
    assert reader.wait(10) == -signal.SIGKILL
    wait_for(lambda: packfs.client.inflight([pack]) == 0, "the read to be forgotten")
    wait_for(lambda: packfs.client.status()["counters"]["cancelled"] == 1, "the fetch to be cancelled")
    assert packfs.client.status()["interrupts"] == 1


def test_a_colliding_node_id_is_refused(packfs):
    first = packfs.add_pack(4096)
    second = first[:16] + "0" * 48
    (packfs.packs_dir / second).write_bytes(bytes(4096))
    packfs.start()
    assert (packfs.mountpoint / first).stat().st_size == 4096
    with pytest.raises(OSError, match="Input/output"):
        (packfs.mountpoint / second).stat()
    assert (packfs.mountpoint / first).read_bytes() == content(packfs, first)


def test_an_aborted_connection_is_replaced(packfs):
    pack = packfs.add_pack(4096)
    packfs.start()
    assert (packfs.mountpoint / pack).exists()
    worker = packfs.pid_in("worker.pid")
    descriptors.abort(descriptors.mounted_device(packfs.run_dir))
    wait_for(lambda: packfs.pid_in("worker.pid") not in (0, worker), "the next worker")
    packfs.wait_ready()
    assert packfs.client.status()["workers"] == 1  # the first of a new mount
    assert (packfs.mountpoint / pack).read_bytes() == content(packfs, pack)


def test_keeper_and_worker_lock_their_memory(packfs):
    keeper = packfs.start()
    for pid in (keeper.pid, packfs.pid_in("worker.pid")):
        lines = Path(f"/proc/{pid}/status").read_text().split("\n")
        assert next(int(line.split()[1]) for line in lines if line.startswith("VmLck:")) > 0


def test_memory_of_keeper_and_worker(packfs):
    pack = packfs.add_pack(16 * MIB)
    keeper = packfs.start()
    assert len((packfs.mountpoint / pack).read_bytes()) == 16 * MIB

    def resident(pid):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    assert resident(keeper.pid) < 25
    assert resident(packfs.pid_in("worker.pid")) < 100
    assert len(list(Path(f"/proc/{keeper.pid}/task").iterdir())) == 1
