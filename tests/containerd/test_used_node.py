"""A node that was used before Floe came, and one that Floe leaves: what starts afterwards, and what is refused for it."""

import json
from types import SimpleNamespace

import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, each_version, versions
from support.floe_daemons import Daemons
from support.images import build_oci, busybox, files
from support.mounts import until

WORD = ["cat", "/etc/word"]


@pytest.fixture
def node(version, tmp_path):
    """Both daemons, a containerd with overlayfs, a registry with `old`, which is not indexed, and `lazy`, which is."""
    registry = BlobHost()
    daemons = Daemons(tmp_path / "h")
    containerd = None
    try:
        old, lazy = (
            registry.add(build_oci(tmp_path / name, [busybox(), files({"etc/word": f"{name}\n"})], tag="1"), name)
            for name in ("old", "lazy")
        )
        daemons.floe("image", "index", "--plain-http", lazy)
        containerd = Containerd(version, tmp_path, registries=(registry.address,))

        def floe(command, *flags, code=0):
            argv = ("containerd", command, "--containerd-config", containerd.config)
            return daemons.floe(*argv, "--containerd", version.bin / "containerd", *flags, code=code)

        def move(command, cri, *flags):
            floe(command, *flags)
            containerd.terminate()
            containerd.start()
            until(cri.ready)

        yield SimpleNamespace(containerd=containerd, floe=floe, move=move, old=old, lazy=lazy)
    finally:
        if containerd is not None:
            containerd.stop()
        daemons.close()
        registry.close()


@pytest.mark.slow
@each_version()
def test_earlier_images_start_after_configure_and_lazy_ones_are_refused_or_fetched_before_unconfigure(version, node):
    containerd = node.containerd
    cri = containerd.cri()
    cri.pull(node.old)
    before = cri.run_pod("before")
    plan = json.loads(node.floe("configure", "--dry-run", "--json").stdout)
    assert plan["stranded"] == {"asked": True, "containers": [], "images": []}
    assert any("2 images are not Floe's" in note for note in plan["notes"])  # it, and that of the sandbox
    node.move("configure", cri)
    # Images of before, in a pod of before and in a new one, by CRI and by ctr.
    assert cri.run(before, node.old, WORD) == (0, "old\n")
    assert cri.run(cri.run_pod("after"), node.old, WORD) == (0, "old\n")
    assert containerd.ctr("run", "--snapshotter", "floe", "--rm", node.old, "x", *WORD).stdout == "old\n"
    cri.pull(node.lazy)
    assert cri.run(cri.run_pod("lazy"), node.lazy, WORD) == (0, "lazy\n")

    # Containers and the lazy image stand against going back, and nothing is changed.
    text = containerd.config.read_bytes()
    said = node.floe("unconfigure", code=1).stderr
    assert f"image {node.lazy} (k8s.io)" in said
    assert f"image {node.old}" not in said
    assert f" of {node.lazy} (k8s.io)" in said
    assert " of floe.test/pause:1 (k8s.io)\n" in said
    assert "hint: drain the node" in said
    assert containerd.config.read_bytes() == text
    found = json.loads(node.floe("unconfigure", "--dry-run", "--json").stdout)
    assert [(i["name"], i["complete"]) for i in found["stranded"]["images"]] == [(node.lazy, False)]
    running = {c["id"] for c in found["stranded"]["containers"] if c["running"]}
    assert len(running) == 2  # the sandboxes of after and lazy, not that of before
    assert running < {c["id"] for c in found["stranded"]["containers"]}

    # As the hint says: pods removed, layers fetched. Then all start without Floe.
    cri.clean_up()
    assert "image" in node.floe("unconfigure", code=1).stderr
    containerd.ctr("content", "fetch", "--plain-http", node.lazy)
    node.move("unconfigure", cri)
    for image, word in ((node.old, "old\n"), (node.lazy, "lazy\n")):
        assert cri.run(cri.run_pod(word.strip()), image, WORD) == (0, word)
    assert {info["Snapshotter"] for info in map(json.loads, _infos(containerd))} == {"overlayfs"}
    cri.clean_up()


@pytest.mark.slow
@each_version()
def test_unconfigure_by_force_and_what_it_says_is_true(version, node):
    containerd = node.containerd
    cri = containerd.cri()
    node.move("configure", cri)
    cri.pull(node.lazy)
    containerd.ctr("container", "create", "--snapshotter", "floe", node.lazy, "stopped", *WORD)
    assert containerd.ctr("task", "start", "stopped").stdout == "lazy\n"
    containerd.ctr("task", "rm", "stopped", check=False)
    # The running system is asked: one that does not answer is no empty one.
    containerd.terminate()
    said = node.floe("unconfigure", code=1).stderr
    assert "is not known" in said
    assert str(containerd.address) in said
    assert "systemctl start containerd" in said
    containerd.start()
    until(cri.ready)
    node.floe("unconfigure", code=1)
    node.move("unconfigure", cri, "--force")
    assert "snapshotter" in containerd.ctr("task", "start", "stopped", check=False).stderr
    assert "not loaded" in containerd.ctr("container", "rm", "stopped", check=False).stderr
    with pytest.raises(Exception, match="not found"):
        cri.run(cri.run_pod("p"), node.lazy, WORD)
    cri.pull(node.lazy)  # by which it is mended
    assert cri.run(cri.run_pod("q"), node.lazy, WORD) == (0, "lazy\n")
    cri.clean_up()
    node.move("configure", cri)  # back, and what was stranded can be taken away
    containerd.ctr("container", "rm", "stopped")


@pytest.mark.parametrize(
    "version",
    [pytest.param(one, marks=() if one == versions()[-1] else pytest.mark.slow) for one in versions()]
    or [pytest.param(None, marks=pytest.mark.skip("no containerd here: run install/setup.sh test"))],
    ids=str,
)
def test_images_whose_layers_were_thrown_away_are_refused_by_configure(version, node):
    containerd = node.containerd
    text = containerd.config.read_text()
    containerd.config.write_text(
        text.replace('snapshotter = "overlayfs"\n', 'snapshotter = "overlayfs"\ndiscard_unpacked_layers = true\n', 1)
    )
    containerd.terminate()
    containerd.start()
    cri = containerd.cri()
    cri.pull(node.old)
    until(lambda: "incomplete" in containerd.ctr("images", "check").stdout)
    text = containerd.config.read_bytes()
    said = node.floe("configure", code=1).stderr
    assert f"image {node.old} (k8s.io)" in said
    assert "pause" not in said
    assert "content fetch" in said
    assert containerd.config.read_bytes() == text
    assert json.loads(node.floe("configure", "--dry-run", "--json").stdout)["stranded"]["images"]
    containerd.ctr("content", "fetch", "--plain-http", node.old)
    node.move("configure", cri)
    assert cri.run(cri.run_pod("p"), node.old, WORD) == (0, "old\n")
    cri.clean_up()
    containerd.ctr("images", "rm", "--sync", node.old)


def _infos(containerd):
    return [
        containerd.ctr("containers", "info", name).stdout
        for name in containerd.ctr("containers", "ls", "-q").stdout.split()
    ]
