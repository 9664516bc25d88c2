"""Which runs a study needs, what they share, how long they train, and in which order."""

import itertools

import pytest

from moce_dist.config import identity
from moce_dist.cost.sizes import training_flop
from moce_dist.settings import ConfigError
from moce_dist.study.forecast import forecast
from moce_dist.study.plan import wanted_sources
from moce_dist.study.runner import Runner

from .conftest import STUDY


def runs_of(plan, arm, seed=0):
    return list(dict.fromkeys(c.run for c in plan.cells if (c.arm, c.seed) == (arm, seed)))


def test_arms_that_learn_the_same_are_one_run(read, plan):
    found = plan(read())
    (main,) = runs_of(found, "moce")
    for arm in ("mae", "average", "largest"):
        assert runs_of(found, arm) == [main]
    others = [runs_of(found, arm)[0] for arm in ("soft", "four", "own", "own_steps")]
    assert len({main, *others}) == 5
    assert main not in runs_of(found, "moce", seed=1)
    assert len(found.runs) == 10


def test_runs_that_begin_alike_share_their_first_stages(read, plan):
    found = plan(read())
    (main,), (soft,), (four,) = (runs_of(found, arm) for arm in ("moce", "soft", "four"))
    makers = {name: found.runs[name].makers for name in (soft, four)}
    assert makers[soft] == {"mae": main, "features": main, "cluster": soft, "moce": soft}
    assert makers[four] == {"mae": main, "features": main, "cluster": main, "moce": four}
    (own,) = runs_of(found, "own")
    assert found.runs[own].makers == {"mae": own}


@pytest.mark.parametrize(
    ("path", "value", "shared"),
    [
        ("gate.noise", 0, ("mae", "features", "cluster")),
        ("moce.base_lr", 1, ("mae", "features", "cluster")),
        ("cluster.num_clusters", 8, ("mae", "features")),
        ("cluster.batch_size", 7, ("mae",)),
        ("mae.base_lr", 1, ()),
        ("data.hflip", False, ()),
        ("model.mask_ratio", 0.5, ()),
    ],
)
def test_a_stage_is_shared_until_a_field_that_it_learns_from_differs(
    read, plan, path, value, shared
):
    found = plan(
        read(arms={"mae": {"backbone": "mae"}, "moce": {}, "other": {"set": {path: value}}})
    )
    (main,), (other,) = runs_of(found, "moce"), runs_of(found, "other")
    taken = [stage for stage, maker in found.runs[other].makers.items() if maker == main]
    assert tuple(taken) == shared


def test_images_decide_the_steps(read, plan):
    found = plan(read())
    (main,), (own,), (steps,) = (runs_of(found, arm) for arm in ("moce", "own", "own_steps"))
    assert [found.runs[main].images(stage) for stage in ("mae", "moce")] == [1000, 5000]
    # 250 of 1,000 images are of the domain
    assert found.runs[own].images("mae") == 250
    assert found.runs[steps].images("mae") == 1000
    config = found.runs[steps].config
    assert (config.mae.epochs, config.mae.warmup_epochs) == (4, 0.4)
    assert (found.runs[main].config.moce.warmup_epochs) == 1


def test_without_images_the_epochs_decide(read, plan):
    found = plan(read(images={}))
    (main,), (own,), (steps,) = (runs_of(found, arm) for arm in ("moce", "own", "own_steps"))
    assert found.runs[main].config.mae.epochs == 10
    assert found.runs[main].images("mae") == 10_000
    assert found.runs[own].images("mae") == 2500
    assert found.runs[steps].images("mae") == 10_000


def test_pieces_come_after_what_they_need(read, plan):
    found = plan(read())
    places = {piece.id: place for place, piece in enumerate(found.pieces)}
    assert len(places) == len(found.pieces)
    for piece in found.pieces:
        assert all(places[need] < places[piece.id] for need in piece.needs)
        links = {stage for stage, _ in piece.links}
        made = {
            stage for stage, maker in found.runs[piece.run].makers.items() if maker == piece.run
        }
        assert not links & made
    (main,) = runs_of(found, "moce")
    (transfer,) = [p for p in found.pieces if p.id == f"{main}/transfer/emoji"]
    assert transfer.request.backbones == ("mae", "moce", "moce:average")
    assert set(transfer.needs) == {f"{main}/{s}" for s in ("mae", "features", "cluster", "moce")}


def test_a_choice_by_evidence_has_a_control_to_try_and_pays_for_it(read, plan):
    arms = {"mae": {"backbone": "mae"}, "moce": {}, "validate": {"backbone": "moce:validate"}}
    found = plan(read(arms=arms))
    (main,) = runs_of(found, "validate")
    assert found.runs[main].makers["control"] == main
    lines = [line.strip() for line in forecast(found)]
    assert any(line.startswith("moce: ") and "1,000 + 5,000 images" in line for line in lines)
    assert any(line.startswith("validate: ") and "1,000 + 10,000 images" in line for line in lines)


def test_steps_of_a_tasks_own_are_counted_and_shared_ones_come_first(read, plan):
    further = {"continue_images": 2000}
    arms = {
        "mae": {"backbone": "mae"},
        "own": {"backbone": "control+own", **further},
        "all": {"backbone": "control+all", **further},
        "less": {"backbone": "control+own", "continue_images": 500},
    }
    found = plan(read(arms=arms, seeds=[0]))
    (main,) = found.runs
    assert set(found.runs[main].makers) == {"mae", "features", "cluster", "control"}
    assert [found.cost(arm, found.runs[main]).moce_images for arm in arms] == [0, 7000, 7000, 5500]
    assert found.cost("own", found.runs[main]).clustering > 0
    assert found.cost("all", found.runs[main]).clustering == 0
    pieces = {piece.request.folder: piece for piece in found.pieces if piece.request}
    assert set(pieces) == {f"{t}{n}" for t in ("sprites", "emoji") for n in ("", "-2000", "-500")}
    assert pieces["emoji-2000"].request.continue_images == 2000
    assert pieces["sprites-2000"].id in pieces["emoji-2000"].needs
    assert pieces["sprites-2000"].needs == pieces["emoji-500"].needs


def test_further_steps_of_the_mae_need_clusters_and_no_control(read, plan):
    further = {"continue_images": 2000}
    arms = {
        "mae": {"backbone": "mae"},
        "own": {"backbone": "mae+own", **further},
        "all": {"backbone": "mae+all", **further},
    }
    found = plan(read(arms=arms, seeds=[0]))
    (main,) = found.runs
    assert set(found.runs[main].makers) == {"mae", "features", "cluster"}
    costs = [found.cost(arm, found.runs[main]) for arm in arms]
    assert [cost.moce_images for cost in costs] == [0, 2000, 2000]
    assert [cost.clustering > 0 for cost in costs] == [False, True, False]
    arms |= {"more": {"backbone": "control+all", **further}, "control": {"backbone": "control"}}
    pieces = {p.request.folder: p for p in plan(read(arms=arms, seeds=[0])).pieces if p.request}
    assert pieces["sprites-2000"].request.backbones == ("mae+own", "mae+all", "control+all")
    assert pieces["emoji-2000"].needs[-1] == pieces["sprites-2000"].id
    assert pieces["sprites"].needs == pieces["sprites-2000"].needs


def test_steps_on_a_tasks_training_images_alone_need_no_clusters(read, plan):
    further = {"continue_images": 2000}
    names = ("mae+train", "control+train", "moce+train")
    arms = {"mae": {"backbone": "mae"}, **{name: {"backbone": name, **further} for name in names}}
    found = plan(read(arms={name: arms[name] for name in ("mae", "mae+train")}, seeds=[0]))
    (main,) = found.runs
    assert set(found.runs[main].makers) == {"mae"}
    # experts have been made with clusters, whatever they are trained on later
    found = plan(read(arms=arms, seeds=[0]))
    costs = [found.cost(name, found.runs[main]) for name in names]
    assert [cost.clustering > 0 for cost in costs] == [False, False, True]
    assert [cost.moce_images for cost in costs] == [2000, 7000, 7000]


def test_further_steps_of_the_control_are_trained_one_after_the_other(read, plan):
    arms = {
        "mae": {"backbone": "mae"},
        "some": {"backbone": "control+all", "continue_images": 500},
        "many": {"backbone": "control+all", "continue_images": 2000},
    }
    found = plan(read(arms=arms, seeds=[0]))
    pieces = {piece.request.folder: piece for piece in found.pieces if piece.request}
    assert pieces["sprites-500"].id in pieces["sprites-2000"].needs
    assert not any("transfer" in need for need in pieces["sprites-500"].needs)
    assert pieces["emoji-2000"].needs[-1] == pieces["sprites-2000"].id


def test_a_control_is_trained_once_for_arms_that_differ_in_experts(read, plan):
    tried = {"backbone": "moce:validate"}
    arms = {
        "mae": {"backbone": "mae"},
        "few": {**tried, "set": {"moe.num_experts": 4}},
        "random": {**tried, "set": {"cluster.source": "random"}},
        "many": tried,
    }
    found = plan(read(arms=arms, seeds=[0]))
    (few,), (random,), (many,) = (runs_of(found, arm) for arm in ("few", "random", "many"))
    makers = {name: found.runs[name].makers["control"] for name in (few, random, many)}
    assert makers[few] == makers[many] in (few, many)
    assert makers[random] == random
    other = many if makers[many] == few else few
    pieces = {p.id: {stage for stage, _ in p.links} for p in found.pieces if p.run == other}
    assert "control" not in pieces[f"{other}/moce"]
    assert "control" in pieces[f"{other}/transfer/{found.cells[0].request.folder}"]


def test_an_arm_may_have_only_some_seeds_and_tasks(read, plan):
    few = {"backbone": "moce", "seeds": [1], "tasks": ["emoji"]}
    found = plan(read(arms={"mae": {"backbone": "mae"}, "few": few}))
    assert [(c.seed, c.task) for c in found.cells if c.arm == "few"] == [(1, "emoji")]
    assert len(found.runs) == 2


def test_a_selection_has_a_folder_of_its_own(read, plan):
    found = plan(read())
    folders = {c.arm: c.request.folder for c in found.cells if (c.task, c.seed) == ("emoji", 0)}
    assert folders["moce"] == folders["mae"] == "emoji"
    assert folders["largest"].startswith("emoji-")


def test_validation_and_test_never_share_a_folder(read, plan):
    test, validation = (plan(read(), split) for split in ("test", "val"))
    folders = [{c.request.folder for c in found.cells} for found in (test, validation)]
    assert not folders[0] & folders[1]
    assert {c.config.transfer.evaluate for c in validation.cells} == {"val"}


def test_names_of_runs_do_not_depend_on_other_arms(read, plan):
    few = read(arms={"mae": {"backbone": "mae"}, "moce": {}})
    assert runs_of(plan(few), "moce") == runs_of(plan(read()), "moce")
    for one, other in itertools.combinations(plan(read()).runs.values(), 2):
        assert identity(one.config) != identity(other.config)


def test_a_task_cannot_change_what_its_run_learns(read, plan):
    study = read(
        tasks=[{"task": "digits", "set": ["mae.base_lr=1"]}], arms={"mae": {"backbone": "mae"}}
    )
    with pytest.raises(ConfigError, match=r"digits\.set: mae\.base_lr is of a run"):
        plan(study)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["transfer.evaluate=test"], r"digits\.set: --final decides transfer\.evaluate"),
        (
            ["parallel.num_workers=10", "transfer.finetune.batch_size=16"],
            r"parallel\.num_workers \(10\): must be at most 8 to fit digits",
        ),
    ],
)
def test_a_task_cannot_change_the_split_or_leave_workers_without_images(
    read, plan, fields, message
):
    arms = {"control": {"backbone": "control"}}
    tasks = [{"task": "digits", "set": fields}]
    study = read(tasks=tasks, arms=arms, protocols=["finetune"], reference="control")
    with pytest.raises(ConfigError, match=message):
        plan(study, "val")


def test_forecast_names_runs_and_counts_shared_stages_once(read, plan):
    study = read(flop_per_s=1e9)
    lines = forecast(plan(study))
    assert lines[0].startswith("runs       10, ")
    assert sum("takes mae of" in line for line in lines) == 4
    assert any("moce of 2 runs, 2 tasks; 1,000 + 5,000 images" in line for line in lines)
    assert "h on 1 workers" in lines[-1]
    twice = forecast(plan(read(flop_per_s=1e9, seeds=[0, 1, 2, 3])))
    total, double = (float(found[-1].split()[2].replace(",", "")) for found in (lines, twice))
    assert double == pytest.approx(2 * total, abs=0.2)


def test_forecast_counts_further_steps_and_shared_ones_once(read, plan):
    arms = {"control": {"backbone": "control"}}
    more = {
        "own": {"backbone": "control+own", "continue_images": 10**6},
        "all": {"backbone": "control+all", "continue_images": 10**6},
    }
    plain, further = (
        plan(read(arms=chosen, seeds=[0], reference="control"))
        for chosen in (arms, {**arms, **more})
    )
    config = further.pieces[0].config
    # two tasks of their own, and one continued control for both
    expected = 3 * 10**6 * training_flop(config)
    rest = []
    for found in (plain, further):
        (line,) = [line for line in forecast(found) if line.startswith("in all")]
        stages = sum(run.cost(tuple(run.makers)).flop for run in found.runs.values())
        rest.append(float(line.split()[2].replace(",", "")) * 1e12 - stages)
    assert rest == pytest.approx([0, expected], rel=0.01, abs=2e11)


def test_a_study_that_begins_with_given_weights_has_a_stage_without_steps(read, plan, tmp_path):
    config = {
        **STUDY["config"],
        "mae": {"epochs": 0, "warmup_epochs": 0, "batch_size": 50},
        "model": {**STUDY["config"]["model"], "init": "weights.pth"},
    }
    found = plan(read(config=config, images={"moce": 5000}))
    mae = next(piece for piece in found.pieces if piece.kind == "mae")
    runner = Runner(found, tmp_path / "out", lambda: None)
    assert runner.seconds_left() is None
    runner.done = {piece.id for piece in found.pieces[:-1]}
    runner.journal.lines = {i: {"seconds": 3.0} for i in runner.done}
    assert mae.id in runner.done and 0 < runner.seconds_left() < 6
    with pytest.raises(ConfigError, match=r"images\.mae \(1000\): mae\.epochs is 0"):
        plan(read(config=config))


@pytest.mark.parametrize("empty", [{"tasks": []}, {"seeds": []}])
def test_an_arm_of_nothing_is_refused(read, empty):
    with pytest.raises(ConfigError, match=r"arms\.moce"):
        read(arms={"mae": {"backbone": "mae"}, "moce": empty})


def test_images_that_are_stored_smaller_are_another_data_set(read):
    arms = {"mae": {"backbone": "mae"}, "small": {"set": {"data.store_side": 64}}}
    assert len(wanted_sources(read(arms=arms))) == 2


def test_fields_of_a_study_are_overridden_from_the_command_line(read):
    study = read(
        "seeds=[3]",
        "arms.moce.seeds=[3]",
        'arms.more={"backbone": "mae", "set": {"mae.base_lr": 1e-3, "cluster.balance": "off"}}',
        "config.mae.base_lr=2e-3",
        "images.mae=77",
    )
    assert study.seeds == study.arms["moce"].seeds == (3,)
    assert study.arms["more"].set == {"mae.base_lr": 1e-3, "cluster.balance": "off"}
    assert (study.config["mae"]["base_lr"], study.images.mae) == (2e-3, 77)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": {"a": {"bakbone": "mae"}}, "reference": "a"}, "arms.a.bakbone"),
        ({"reference": "nobody"}, "reference = 'nobody': must be one of mae"),
        ({"seeds": [1, 1]}, "seeds: two are equal"),
        ({"seeds": []}, "seeds"),
        ({"protocols": ["kn"], "tasks": [{"task": "digits", "protocol": ["kn"]}]}, "--protocol kn"),
        ({"tasks": [{"task": "digits"}, {"task": "digits"}]}, "tasks: two are equal"),
        ({"arms": {"mae": {"backbone": "mea"}}}, "arms.mae, task sprites: --backbone mea"),
        ({"arms": {"mae": {"set": {"gate.nois": 1}}}}, "gate.nois"),
        ({"arms": {"m/e": {}}, "reference": "m/e"}, "arms.m/e: a name has letters"),
        ({"arms": {"mae": {"backbone": "mae", "seeds": [7]}}}, "arms.mae.seeds: 7 is none of"),
        ({"arms": {"mae": {"backbone": "mae", "tasks": ["x"]}}}, "arms.mae.tasks: x is none of"),
        ({"arms": {"mae": {"against": "x"}}}, "arms.mae.against: x is no other arm"),
        ({"arms": {"mae": {"against": "mae"}}}, "arms.mae.against: mae is no other arm"),
        (
            {"arms": {"mae": {"domains": "own_equal_steps"}}, "tasks": [{"task": "digits"}]},
            "no task names a domain",
        ),
    ],
)
def test_wrong_requests_are_named(read, fields, message):
    with pytest.raises(ConfigError) as error:
        read(**fields)
    assert message in str(error.value)


def test_a_small_domain_has_as_many_images_not_as_many_padded_steps(read, plan):
    found = plan(read(), sprites=110)
    (own,), (steps,) = (runs_of(found, arm) for arm in ("own", "own_steps"))
    # 110 of 1,000 images: epochs of 3 steps, the last of 10 images
    config = found.runs[own].config
    assert config.moce.epochs * 110 == pytest.approx(5000 * 110 / 1000)
    assert found.runs[steps].config.moce.epochs * 3 == pytest.approx(100)
