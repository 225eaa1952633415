"""However many images and models start on a node, its metrics stay few."""

from floe.cli.packfs_metrics import packfs_metrics
from floe.fuse.starts import Starts
from floe.store.recorder import Recorder


class Events:
    def add(self, kind, **fields):
        pass


def series(status):
    return sum(len(metric.values) for metric in packfs_metrics(status))


def after(images):
    """A worker's status after the starts of so many images."""
    recorder = Recorder(clock=iter(range(10**9)).__next__)
    starts = Starts(recorder, Events(), lambda tree: [f"pack of {tree}"], dict)
    for number in range(images):
        recording = recorder.follow(f"key-{number}", ["p"])
        recording.reads.append(("p", 0, 1, recording.began))
        start = type(
            "Start",
            (),
            {"recording": recording, "name": f"app-{number}", "trees": ["t"], "key": "k", "at": 1.0, "trace": {}},
        )()
        starts._tell(start, {})
        recorder.unfollow(recording)
    return {"starts": starts.status(), "counters": {}}


def test_a_thousand_images_make_no_more_series_than_sixty_four():
    many = series(after(1000))
    assert many == series(after(64))
    assert many > series(after(10))  # they are told while they are few
    assert many < 200
