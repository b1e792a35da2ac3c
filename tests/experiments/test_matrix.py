"""The matrix: what is trained and measured has one name each, and one seed has every study."""

from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.matrix import Measurement, Term, Training, measurements, on


def _trainings(seeds: tuple[int, ...]) -> list[Training]:
    return [
        model
        for measurement in measurements(seeds)
        for model in (measurement.base, *(term.model for term in measurement.terms))
        if isinstance(model, Training)
    ]


def test_no_two_measurements_share_a_name() -> None:
    names = [measurement.name for measurement in measurements()]
    assert len(names) == len(set(names)) > 60


def test_trainings_of_one_name_are_trained_alike() -> None:
    """Labels are for tables: without them, a name stands for one training."""
    by_name: dict[str, Training] = {}
    for training in _trainings(matrix.SEEDS):
        plain = training._replace(label="")
        assert by_name.setdefault(plain.name, plain) == plain
    assert len(by_name) > 30


def test_every_field_of_a_training_is_in_its_name() -> None:
    plain = Training("")
    changed = [
        plain._replace(bases=("L",)),
        plain._replace(method="sft"),
        plain._replace(connection="cascade"),
        plain._replace(init="scratch"),
        plain._replace(init_model="L"),
        plain._replace(penalty=("l1", 0.5)),
        plain._replace(learning_rate=1e-3),
        plain._replace(depths=2),
        plain._replace(chosen_by="exact_match"),
        plain._replace(seed=1),
    ]
    assert len({training.name for training in (plain, *changed)}) == len(changed) + 1
    assert len(changed) + 1 == len(Training._fields)


def test_one_seed_covers_every_study_and_the_headline_comes_first() -> None:
    names = [measurement.name for measurement in measurements((0,))]
    recipe = matrix.recipe(0)
    assert names.index(on("L", Term(recipe)).name) < names.index(
        on("L", Term(matrix.schemes(0)[1])).name
    )
    expected = [
        *(on("L", Term(each)) for each in (*matrix.schemes(0), *matrix.penalties(0))),
        *(on("L", Term(each)) for each in (*matrix.initialisations(0), *matrix.base_choices(0))),
        Measurement("X", (Term(recipe),), "dtw", True),
        Measurement(matrix.fine_tuned("X")),
        on("S", Term(matrix.large_value(0))),
        matrix.proxy("L", 0),
    ]
    assert {measurement.name for measurement in expected} <= set(names)


def test_only_x_is_reached_through_a_map() -> None:
    for measurement in measurements():
        assert (measurement.map_method is not None) == (
            measurement.base == "X" and bool(measurement.terms)
        )
