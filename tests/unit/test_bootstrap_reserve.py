"""What kubelet would not like a cache to take: from its configuration and its command line."""

import pytest
from bootstrap.node import Kubelet
from bootstrap.reserve import highest_threshold, read_config, room_for_others

KUBEADM = """apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous:
    enabled: false
clusterDNS:
- 10.96.0.10
evictionHard:
  imagefs.available: "20%"  # of the image file system
  memory.available: 100Mi
  nodefs.available: 10%
imageGCHighThresholdPercent: 75
"""


@pytest.mark.parametrize(
    ("config", "arguments", "total", "room"),
    [
        ("", (), 0, "20%"),
        (KUBEADM, (), 0, "30%"),  # images are removed when three quarters are full
        (KUBEADM.replace("75", "90"), (), 0, "25%"),
        ('{"evictionHard": {"nodefs.available": "40%"}}', (), 0, "45%"),
        ("evictionSoft:\n  nodefs.available: 33%\n", (), 0, "38%"),
        ("evictionHard:\n  nodefs.available: 100Gi\n", (), 1 << 40, "20%"),
        ("evictionHard:\n  nodefs.available: 100Gi\n", (), 200 << 30, "55%"),
        ("evictionHard:\n  nodefs.available: 100Gi\n", (), 0, "35%"),
        ("", ("kubelet", "--eviction-hard=nodefs.available<22%,memory.available<1Gi"), 0, "27%"),
        ("", ("kubelet", "--eviction-soft", "imagefs.available<31%"), 0, "36%"),
        ("", ("kubelet", "--image-gc-high-threshold=60"), 0, "45%"),
        ("evictionHard: {}\n", (), 0, "20%"),
        ("evictionHard:\n  nodefs.available: a lot\n", (), 0, "20%"),
        ("evictionHard:\n  nodefs.available: 99%\n", (), 0, "90%"),
        ("{", (), 0, "20%"),
    ],
)
def test_room_for_others(config, arguments, total, room):
    assert room_for_others(highest_threshold(Kubelet(config, arguments)), total) == room


def test_a_block_of_yaml_ends_with_the_next_key():
    assert read_config(KUBEADM)["evictionHard"] == {
        "imagefs.available": "20%",
        "memory.available": "100Mi",
        "nodefs.available": "10%",
    }
