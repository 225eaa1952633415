"""Policies of images: what settings may say, and which images are indexed by them."""

import pytest

from floe.cli import settings
from floe.cli.imagepolicies import ImagePolicies
from floe.store.errors import BadInputError
from floe.store.imagepolicy import ALL, ImageRule, rule_for

PROD = ImageRule("registry.example/prod/*", tags=("v*",), platforms=("linux/amd64", "linux/arm64"), max_size=40 << 30)
NEVER = ImageRule("registry.example/prod/secret", never=True)


def parsed(text):
    return settings.load({"image_policy": text}, {}, config="").image_policy


@pytest.mark.parametrize("rules", [(), (PROD,), (NEVER, PROD, ImageRule("*", min_size=1 << 20))])
def test_what_is_written_is_read_again(rules):
    assert parsed(str(ImagePolicies(rules))).rules == rules


def test_sizes_are_written_as_people_write_them():
    (rule,) = parsed('[{name = "*", min_size = "1MiB", max_size = "2GiB"}]').rules
    assert (rule.min_size, rule.max_size) == (1 << 20, 2 << 30)
    assert [rule.fits_size(size) for size in ((1 << 20) - 1, 1 << 20, 2 << 30, (2 << 30) + 1)] == [
        False,
        True,
        True,
        False,
    ]
    assert ImageRule("*").fits_size(0)
    assert ImageRule("*").fits_size(1 << 60)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[{}]", "no pattern of HOST/REPOSITORY"),
        ('[{name = "app"}]', "no pattern of HOST/REPOSITORY"),
        ('[{name = "a/b", keep = 1}]', "unknown key 'keep'"),
        ('[{name = "a/b", never = "yes"}]', "neither true nor false"),
        ('[{name = "a/b", platforms = "linux/amd64"}]', "no list of platforms"),
        ('[{name = "a/b", platforms = ["amd64"]}]', "no list of platforms"),
        ('[{name = "a/b", tags = ["a b"]}]', "no list of tags"),
        ('[{name = "a/b", max_size = "50%"}]', "max_size"),
        ('[{name = "a/b", min_size = 2, max_size = 1}]', "min_size is more than max_size"),
        ("7", "not a list of tables"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text, says):
    with pytest.raises(BadInputError, match=says):
        parsed(text)


def test_the_first_rule_that_fits_counts():
    rules = (NEVER, PROD)
    assert rule_for("registry.example/prod/app:v1", rules) is PROD
    assert rule_for("registry.example/prod/team/app:v1", rules) is PROD
    assert rule_for("registry.example/prod/secret:v1", rules) is None
    assert rule_for("registry.example/prod/app:latest", rules) is None
    assert rule_for("registry.example/prod/app@sha256:" + "0" * 64, rules) is None
    assert rule_for("registry.example/test/app:v1", rules) is None
    assert rule_for("registry.example:5000/prod/app:v1", rules) is None
    assert rule_for("anything/at:all", ()) is ALL


def test_a_port_is_no_tag():
    rule = ImageRule("registry.example:5000/app")
    assert rule_for("registry.example:5000/app:1", [rule]) is rule
    assert rule_for("registry.example:5000/app", [rule]) is rule


@pytest.mark.parametrize(
    ("text", "seconds"), [("none", 0.0), ("0", 0.0), ("7d", 604800.0), ("36h", 129600.0), ("90", 90.0)]
)
def test_grace_is_a_span_of_time(text, seconds):
    found = settings.load({"image_grace": text}, {}, config="")
    assert found.image_grace == seconds
    (flag,) = (word for word in found.as_flags("image_grace") if word.startswith("--image-grace="))
    assert settings.load({"image_grace": flag.partition("=")[2]}, {}, config="") == found


@pytest.mark.parametrize("text", ["", "-1d", "soon", True, False, -1])
def test_a_grace_that_is_no_span_is_refused(text):
    with pytest.raises(BadInputError):
        settings.load({"image_grace": text}, {}, config="")
