"""What `ctr images check` prints, read."""

from floe.containerd.used import Container, Image, checked, lost, told

DIGEST = "sha256:" + "a" * 64
TABLE = f"""REF TYPE DIGEST STATUS SIZE UNPACKED
sha256:{"c" * 64} application/vnd.oci.image.manifest.v1+json {DIGEST} incomplete (2/3) 1008.2 KiB/1008.4 KiB false
example.org/a@{DIGEST} application/vnd.oci.image.manifest.v1+json {DIGEST} incomplete (2/3) 1008.2 KiB/1008.4 KiB false
example.org/a:1 application/vnd.oci.image.manifest.v1+json {DIGEST} incomplete (2/3) 1008.2 KiB/1008.4 KiB false
example.org/b:1 application/vnd.oci.image.manifest.v1+json {DIGEST[:-1]}b complete (3/3)   1.0 MiB/1.0 MiB true
example.org/c:1 application/vnd.oci.image.manifest.v1+json {DIGEST[:-1]}d incomplete (1/3) 1.0 B/1.0 MiB true
example.org/other:1 application/vnd.oci.image.index.v1+json {DIGEST[:-1]}e unavailable (0/?) -/- false
"""


def test_each_image_once_by_the_name_that_people_use():
    found = checked("k8s.io", TABLE)
    assert found == [
        Image("k8s.io", "example.org/a:1", DIGEST, complete=False, unpacked=False),
        Image("k8s.io", "example.org/b:1", f"{DIGEST[:-1]}b", complete=True, unpacked=True),
        Image("k8s.io", "example.org/c:1", f"{DIGEST[:-1]}d", complete=False, unpacked=True),
    ]
    assert [image.name for image in lost(found)] == ["example.org/a:1"]  # c has no layers, and needs none


def test_a_node_with_many_is_told_in_few_lines():
    many = [Container("k8s.io", f"{number:064}", "a:1", running=number > 0) for number in range(30)]
    lines = list(told(many, []))
    assert len(lines) == 21
    assert lines[0].endswith(", stopped")
    assert lines[-1].startswith("and 10 more containers")
