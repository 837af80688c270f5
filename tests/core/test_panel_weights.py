"""Weights by teacher, domain, row and step; what cannot be one is refused."""

import pytest

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel import TeacherPanel
from kd_plugin.teachers import LocalTeacher

TEACHERS = {name: LocalTeacher(f"nowhere/{name}", name=name) for name in ("math", "code", "law")}


def panel(**options):
    return TeacherPanel(TEACHERS, **{"combine": "weighted_kl", **options})


def weights(panel, step=0, **row):
    return panel.weights_of(panel.assign(row), step)


def test_the_most_specific_weights_count():
    found = panel(weights={"math": 3, "code": 1}, domain_weights={"law": {"law": 1.0}})
    assert weights(found) == (0.75, 0.25, 0.0)
    assert weights(found, domain="other") == (0.75, 0.25, 0.0)
    assert weights(found, domain="law") == (0.0, 0.0, 1.0)
    assert weights(found, domain="law", teacher_weights={"math": 1, "law": 3, "code": None}) == (0.25, 0.0, 0.75)
    assert weights(found, teacher_id=["code", "math"]) == (0.25, 0.75)
    assert weights(found, teacher_id=["law", "code"], teacher_weights=[1, 4]) == (0.2, 0.8)
    assert weights(panel()) == pytest.approx((1 / 3,) * 3)


def test_schedules_depend_on_the_step_alone():
    found = panel(weights={"math": 1.0, "code": {"start": 0.0, "end": 1.0, "steps": 10, "begin": 10}})
    assert [weights(found, step)[1] for step in (0, 10, 15, 20, 99)] == pytest.approx([0, 0, 1 / 3, 0.5, 0.5])
    cosine = panel(weights={"math": 1.0, "code": {"start": 0.0, "end": 1.0, "steps": 10, "shape": "cosine"}})
    assert [weights(cosine, step)[1] for step in (0, 5, 10)] == pytest.approx([0, 1 / 3, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"math": 0.0, "code": 0}}, "teacher_weights sum to zero at step 0"),
        ({"weights": {"math": -1.0}}, r"weight of teacher 'math' in teacher_weights is -1.0.*at least 0"),
        ({"weights": {"mth": 1.0}}, "names 'mth', which is not on the panel.*Did you mean 'math'"),
        ({"weights": {"math": {"start": 1.0, "end": 0.0, "steps": 5}}}, "sum to zero at step 5"),
        ({"weights": {"math": {"start": 1.0, "ende": 0.0}}}, "'ende'.*Did you mean 'end'"),
        ({"domain_weights": {"law": {"math": 0.0}}}, r"domain_weights\['law'\] sum to zero"),
        ({"combine": "route", "weights": {"math": 1.0}}, "no meaning with combine='route'"),
        ({"combine": "mixtures"}, "Did you mean 'mixture'"),
        ({"confidence_temperature": 0.0}, "must be positive"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        panel(**options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"teacher_id": ["law"]}, "'law', have weights that sum to zero at step 0"),
        ({"teacher_weights": [0.0, 0.0, 0.0]}, "teacher_weights sum to zero"),
        ({"teacher_weights": [1.0]}, "1 teacher_weights for 3 teachers"),
        ({"teacher_weights": [1.0, -1.0, 1.0]}, "hold -1.0; expected numbers of at least 0"),
        ({"teacher_id": ["math"], "teacher_weights": {"code": 1.0}}, "names 'code', which does not score it"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        panel(weights={"math": 1, "code": 1}).assign(row)


def test_a_domain_without_a_teacher():
    routed = TeacherPanel(TEACHERS, routes={"maths": "math"})
    assert routed.assign({"domain": "maths"}).teachers == ("math",)
    with pytest.raises(DataError, match=r"No teacher for domain 'mths'.*Did you mean 'maths'"):
        routed.assign({"domain": "mths"})


def test_row_weights_where_one_teacher_judges_a_row():
    with pytest.raises(DataError, match="no meaning with combine='route'"):
        TeacherPanel(TEACHERS).assign({"teacher_id": "math", "teacher_weights": [1.0]})
