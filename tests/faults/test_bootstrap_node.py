"""install/bootstrap where a step fails, is interrupted, or finds what others have done meanwhile."""

from bootstrap.survey import mark, survey


def test_that_formatting_was_begun_counts_until_the_next_boot():
    assert survey([], [mark("one"), "two@another-boot", "three"]).being_formatted == {"one"}
