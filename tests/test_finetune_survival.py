"""Survival, regression and grades: labels and folds, one update however a step is cut, runs, planted rules learned."""

import csv
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_bags import SIDE
from made_cohort import NARROW, write_csv, write_slide

from gigapath.cli.main import main
from gigapath.evaluation.calibration import fit_scale, outputs, target_scale
from gigapath.evaluation.compare import compare
from gigapath.evaluation.intervals import evaluate
from gigapath.evaluation.labels import Task, load_task, new_task, read_labels
from gigapath.evaluation.results import read_results
from gigapath.evaluation.scores import Predictions, Scorer
from gigapath.evaluation.splits import Fold, check_classes, draw_folds
from gigapath.finetune import ModelOptions, TrainingOptions, load_head
from gigapath.finetune.data import Bag, Inputs, Settings, prepare, vector_bags
from gigapath.finetune.heads import CumulativeLogits, VectorHead, build_head
from gigapath.finetune.loop import Processes
from gigapath.finetune.training import Trainer, fit_linear, task_loss
from gigapath.report.results import collect_results

CPU = Processes(torch.device("cpu"))
COX = Task(
    "made", "survival", ("risk",), time_column="days", event_column="dead", horizons=(2.0, 5.0, 10.0), loss="cox"
)
DISCRETE = replace(COX, loss="discrete")
AMOUNT = Task("made", "regression", ("amount",), label_column="amount", loss="mse")


def test_tasks_and_labels_are_read_and_folds_share_events_and_quarters(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [[f"s{n:02d}", n + 1, int(n % 3 == 0), round(float(random.normal()), 3)] for n in range(60)]
    labels = write_csv(tmp_path / "l.csv", ["slide_id", "days", "dead", "amount"], rows)
    task, counts = new_task(labels, tmp_path / "s.yaml", survival=("days", "dead"))
    assert task == load_task(tmp_path / "s.yaml") and counts == {"event": 20, "censored": 40}
    assert task.horizons == pytest.approx((15.2, 29.5, 43.8), abs=0.1)
    read = read_labels(labels, task)
    assert read.truth[3].tolist() == [4.0, 1.0]
    for fold in draw_folds(read, 5, seed=0):
        assert read.truth[fold.test, 1].sum() == 4
    amounts, _ = new_task(labels, tmp_path / "r.yaml", regression="amount")
    assert amounts == load_task(tmp_path / "r.yaml")
    read = read_labels(labels, amounts)
    for fold in draw_folds(read, 5, seed=0):
        assert np.bincount(read.kinds[fold.test], minlength=4).tolist() == [3, 3, 3, 3]
    no_event = replace(read, truth=np.stack([np.ones(60), np.arange(60) >= 48], axis=1).astype(float))
    with pytest.raises(ValueError, match="no training slide has an event"):
        check_classes([Fold(0, np.arange(40), np.arange(0), np.arange(40, 60))], no_event.truth, ("risk",))
    with pytest.raises(ValueError, match="expected one of them"):
        new_task(labels, tmp_path / "x.yaml", survival=("days", "dead"), regression="amount")


def test_amounts_that_do_not_differ_are_no_task_and_said(tmp_path: Path) -> None:
    labels = write_csv(tmp_path / "l.csv", ["slide_id", "amount"], [[f"s{n}", 5] for n in range(4)])
    with pytest.raises(ValueError, match="expected amounts that differ under amount, all are 5"):
        new_task(labels, tmp_path / "r.yaml", regression="amount")
    assert (
        "the same amount" in evaluate(Predictions(np.full(4, 5.0), np.ones((4, 1)), ("amount",)), replicates=0).notes[0]
    )


def test_the_order_of_grades_in_words_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = write_csv(
        tmp_path / "l.csv", ["slide_id", "word", "number"], [["a", "low", 1], ["b", "mid", 10], ["c", "high", 2]]
    )
    new_task(labels, tmp_path / "n.yaml", columns=["number"], ordinal=True)
    assert "alphabet" not in caplog.text
    new_task(labels, tmp_path / "w.yaml", columns=["word"], ordinal=True)
    assert "order of the alphabet, high < low < mid" in caplog.text


def test_a_key_that_stands_twice_in_a_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("name: a\nsetting: binary\nlabel_dict: {a: 0, b: 1, a: 1}\n")
    with pytest.raises(ValueError, match="without the key a twice"):
        load_task(tmp_path / "t.yaml")


def test_follow_up_that_is_none_is_refused(tmp_path: Path) -> None:
    for days, dead, match in (
        ("-1", "1", r"row 3 has '-1' under days, expected a number of at least 0"),
        ("soon", "1", "row 3 has 'soon' under days"),
        ("inf", "1", "row 3 has 'inf' under days"),
        ("", "1", "row 3 has no days"),
        ("3", "2", "row 3 has '2' under dead, expected 0 or 1"),
        ("3", "", "row 3 has no dead"),
    ):
        labels = write_csv(tmp_path / "l.csv", ["slide_id", "days", "dead"], [["a", 5, 1], ["b", days, dead]])
        with pytest.raises(ValueError, match=match):
            read_labels(labels, COX)


def test_cumulative_logits_are_differences_of_sigmoids() -> None:
    raw = torch.tensor([[0.4, 1.0, -2.0], [-30.0, 5.0, 60.0]], dtype=torch.float64)
    shares = CumulativeLogits()(raw).exp()
    above = raw[:, :1] - torch.cat([torch.zeros(2, 1), torch.nn.functional.softplus(raw[:, 1:]).cumsum(1)], dim=1)
    above = torch.cat([torch.ones(2, 1), above.sigmoid(), torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(shares, above[:, :-1] - above[:, 1:], atol=1e-12, rtol=0)
    assert shares.sum(dim=1).tolist() == pytest.approx([1, 1])


def made_survival(score: np.ndarray, seed: int) -> np.ndarray:
    """(N, 2): exponential times with hazard exp(score), about a third censored."""
    random = np.random.default_rng(seed)
    times, ends = 5 * random.exponential(np.exp(-score)), random.uniform(0, 40, len(score))
    return np.stack([np.minimum(times, ends), times <= ends], axis=1).astype(np.float64)


@pytest.mark.parametrize("cuts", [(1, 12), (4, 3)])
def test_cox_takes_one_update_however_a_step_is_cut(tmp_path: Path, cuts: tuple[int, int]) -> None:
    """The risk set is the step's, not the pass's; dropout is drawn alike in both passes (loss and gradient agree)."""
    random = np.random.default_rng(1)
    vectors = random.standard_normal((12, 6)).astype(np.float32)
    truth = made_survival(vectors[:, 0], 0)
    weights = {}
    for batch, passes in ((12, 1), cuts):
        options = TrainingOptions(epochs=1, warmup_epochs=0, batch_size=batch, gradient_accumulation=passes, base_lr=1)
        torch.manual_seed(0)
        model = VectorHead(6, 1).double()
        trainer = Trainer(COX, vector_bags(vectors), truth, options, "fp32", CPU, dtype=torch.float64)
        history = trainer.train(model, Fold(0, np.arange(12), np.arange(0), np.arange(0)), tmp_path / f"{batch}", {})
        weights[batch] = model.classifier[0].weight.detach()
        torch.manual_seed(0)
        before = VectorHead(6, 1).double()
        logits = torch.from_numpy(trainer.logits(before, np.arange(12)))
        assert history[0].train_loss * 12 == pytest.approx(float(task_loss(logits, truth, COX)), abs=1e-5)
    torch.testing.assert_close(weights[12], weights[cuts[0]], atol=1e-9, rtol=0)


def test_dropout_is_drawn_alike_in_both_passes_of_cox() -> None:
    random = np.random.default_rng(1)
    vectors, truth = random.standard_normal((8, 6)).astype(np.float32), made_survival(np.zeros(8), 0)
    model = VectorHead(6, 1).double()
    model.classifier.insert(0, torch.nn.Dropout(0.5))
    trainer = Trainer(COX, vector_bags(vectors), truth, TrainingOptions(), "fp32", CPU, dtype=torch.float64)
    batches = [([trainer.bags[row] for row in rows], np.array(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    torch.manual_seed(3)
    loss_of = trainer.loss_of_risk_set(model, batches)
    torch.manual_seed(3)
    seeds, said = torch.randint(1 << 62, (2,)).tolist(), []
    for seed, (bags, _) in zip(seeds, batches, strict=True):
        torch.manual_seed(seed)
        said.append(trainer._forward(model, bags))
    whole = task_loss(torch.cat(said), truth, COX)
    expected = torch.autograd.grad(whole, model.classifier[1].weight)[0]
    losses = [loss_of(model, batch) for batch in batches]
    found = torch.autograd.grad(sum(losses), model.classifier[1].weight)[0]
    torch.testing.assert_close(found, expected)
    assert float(sum(losses).detach()) == pytest.approx(float(whole.detach()))


class Shared(Processes):
    """A process whose others have said what they gathered."""

    def gather(self, value: Any) -> list[Any]:
        SAID[self.rank] = value
        return [SAID.get(rank, value) for rank in range(2)]


SAID: dict[int, Any] = {}


def test_the_risk_set_of_cox_spans_processes() -> None:
    random = np.random.default_rng(2)
    vectors, truth = random.standard_normal((7, 6)).astype(np.float32), made_survival(np.zeros(7), 4)
    model, bags = VectorHead(6, 1).double(), vector_bags(vectors)
    weight = model.classifier[0].weight
    logits = model.forward_packed(torch.from_numpy(vectors).double(), torch.zeros(0), [1] * 7)
    whole = task_loss(logits, truth, COX)
    expected = torch.autograd.grad(whole, weight)[0]
    shares, total, losses = ([0, 2, 4, 6], [1, 3, 5]), torch.zeros_like(weight), 0.0
    for again in range(2):  # the first round only fills in what each process says
        for rank, rows in enumerate(shares):
            processes = Shared(torch.device("cpu"), rank, 2)
            trainer = Trainer(COX, bags, truth, TrainingOptions(), "fp32", processes, dtype=torch.float64)
            batch = ([bags[row] for row in rows], np.array(rows))
            loss = trainer.loss_of_risk_set(model, [batch])(model, batch)
            if again:
                total += torch.autograd.grad(loss, weight)[0]
                losses += float(loss.detach())
    torch.testing.assert_close(total, expected)
    assert losses == pytest.approx(float(whole.detach()))


def write_cohort(folder: Path, count: int = 24) -> None:
    random, rows = np.random.default_rng(0), []
    for n in range(count):
        z = float(random.normal())
        features = random.standard_normal((6, 8)).astype(np.float32)
        features[:, 0] += 2 * z
        cells = np.stack([np.arange(6) + 3, np.full(6, n % 7 + 1)], axis=1)
        write_slide(folder / "features" / f"slide-{n:03d}.h5", features, cells)
        time, event = made_survival(np.array([2 * z]), n)[0]
        grade = int(np.digitize(z, [-0.5, 0.5]))
        rows.append([f"slide-{n:03d}", f"p{n}", "ab"[n % 2], round(time, 3), int(event), round(z, 3), grade])
    write_csv(folder / "labels.csv", ["slide_id", "patient_id", "site", "days", "dead", "amount", "grade"], rows)


@pytest.mark.parametrize("setting", ["survival", "discrete", "regression", "ordinal"])
def test_a_run_of_each_setting_leaves_scores_predictions_pictures_and_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path)
    of_time = ["--survival", "days", "dead"]
    how = {"regression": ["--regression", "amount"], "ordinal": ["--ordinal", "--label", "grade"]}.get(setting, of_time)
    assert main(["init-task", "labels.csv", *how, "--to", "task.yaml"]) == 0
    task_file = Path("task.yaml")
    if setting == "discrete":
        task_file.write_text(task_file.read_text().replace("loss: cox", "loss: discrete"))
    task = load_task(task_file)
    small = ["--model-arch", NARROW, "--feat-layer", "2", "--pretrained", "", "--epochs", "1", "--replicates", "10"]
    small += ["--folds", "3", "--device", "cpu", "--gradient-accumulation", "8"]
    files = ["--features", "features", "--labels", "labels.csv"]
    more = ["--controls"] if setting == "survival" else ["--freeze"]
    assert main(["finetune", "--task", "task.yaml", *files, "--out", "tuned", *small, *more]) == 0
    first = read_results(Path("tuned/results.json"))
    scores = next(iter(first.scores.values()))
    named = {"regression": "r2", "ordinal": "kappa_quadratic"}.get(setting, "harrell_c")
    assert named in scores.headline.estimates and scores.unit == "patients" and "site alone" in first.scores
    if setting == "discrete":  # of the run over its folds as of each fold
        late = load_task(task_file).horizons[-1] * 1000
        task_file.write_text(task_file.read_text().replace("loss:", f"- {late}\nloss:"))
        assert main(["finetune", "--task", "task.yaml", *files, "--out", "late", *small, *more]) == 0
        later = read_results(Path("late/results.json"))
        assert any("not before the end of the last follow-up" in note for note in later.notes)
        with pytest.raises(ValueError, match="the horizons differ"):
            compare(["tuned", "late"])
    fold, head = read_results(Path("tuned/fold_0/results.json")), load_head("tuned/fold_0")
    assert head.task == task
    picture = {"regression": "scatter.png", "ordinal": "confusion.png"}.get(setting, "survival.png")
    assert Path("tuned/fold_0", picture).read_bytes().startswith(b"\x89PNG")
    if task.setting == "survival":
        groups = fold.details["groups"]
        rows = next(iter(fold.scores.values())).headline.rows
        assert sum(curve["at_risk"][0] for curve in groups["curves"]) == rows
        assert set(first.scores) >= ({"tile mean + linear"} if setting == "survival" else set())
    # The head as a file says what the run said.
    with Path("tuned/fold_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert main(["predict", "tuned/fold_0", *(f"features/{row['slide_id']}.h5" for row in rows), "--out", "p.csv"]) == 0
    with Path("p.csv").open() as file:
        again = {row["slide_id"]: row for row in csv.DictReader(file)}
    for row in rows:
        for name, cell in again[row["slide_id"]].items():
            assert cell == row[name] or float(cell) == pytest.approx(float(row[name]), abs=1e-4), name
    assert main(["predict", "tuned/fold_0", "features", *files[2:], "--out", "t", "--allow-leakage"]) == 0
    assert named in read_results(Path("t/results.json")).scores["frozen head"].headline.estimates
    mapped = ["map", "features/slide-000.h5", "--kind", "gradient", "--checkpoint", "tuned/fold_0", "--out", "maps"]
    assert main([*mapped, "--device", "cpu"]) == 0
    if not task.of_classes:  # a risk or an amount is no class among others
        said = json.loads(Path(f"maps/slide-000/gradient_{task.classes[0]}.json").read_text())
        assert said["target"] == task.classes[0] and "class" not in said["title"] + said["check"]
    held = json.loads(Path("tuned/fold_0/head.json").read_text())
    if not task.of_classes:
        Path("tuned/fold_0/head.json").write_text(json.dumps({**held, "scale": held["scale"][1:]}))
        with pytest.raises(ValueError, match="damaged"):
            load_head("tuned/fold_0")
        wrong = {"balanced": TrainingOptions(balanced=True), "calibrate": TrainingOptions(calibrate=True)}
        if task.loss == "cox":
            wrong["gradient-accumulation"] = TrainingOptions(gradient_accumulation=1)
        for option, training in wrong.items():
            with pytest.raises(ValueError, match=f"--{option}"):
                prepare(Inputs("task.yaml", "features", "labels.csv"), Settings(training=training))


def test_commands_of_the_guide_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "guides" / "survival-and-regression.md").read_text()
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path)
    shutil.copytree("features", "other")
    shutil.copytree("features", "new")
    for path in Path("other").iterdir():
        path.rename(path.with_name(path.name.replace("slide-", "other-")))
    Path("other.csv").write_text(Path("labels.csv").read_text().replace("slide-", "other-"))
    commands = [shlex.split(line) for line in re.findall(r"^gigapath .*", page, re.M)]
    small = ["--head", "abmil-tiles", "--pretrained", "", "--epochs", "1", "--folds", "3", "--device", "cpu"]
    for _, verb, *words in commands:
        given = [word for word in words if word != "--controls"]  # another test's
        few = ["--replicates", "10"]
        more = {"finetune": [*small, *few], "predict": few, "probe": ["--folds", "3", "--repeats", "1", *few]}
        assert main([verb, *given, *more.get(verb, [])]) == 0, words
    assert len(commands) == 10 and Path("probed/survival.png").is_file() and Path("risks.csv").is_file()
    (run,) = collect_results(Path("survival"))
    assert [block["kind"] for block in run.blocks].count("picture") == 1
    assert "integrated_brier" in read_results(Path("tested/results.json")).scores["frozen head"].headline.estimates


def test_scores_of_amounts_equal_scikit_learn_and_scipy() -> None:
    from scipy import stats
    from sklearn import metrics

    random = np.random.default_rng(0)
    truth = np.round(random.normal(size=80), 1)
    said = np.round(truth + random.normal(size=80), 1)
    scorer = Scorer(Predictions(truth, said[:, None], ("amount",)))
    weights = random.integers(0, 4, (3, 80)).astype(float)
    for drawn, found in zip([np.ones(80), *weights], scorer(np.stack([np.ones(80), *weights])), strict=True):
        a, b = (np.repeat(each, drawn.astype(int)) for each in (truth, said))
        expected = [metrics.r2_score(a, b), metrics.mean_absolute_error(a, b)]
        expected += [stats.pearsonr(a, b)[0], stats.spearmanr(a, b)[0]]
        assert found == pytest.approx(expected, abs=1e-10)


def planted(count: int, seed: int, *, arrangement: bool, width: int = 16) -> tuple[list[Bag], np.ndarray]:
    """Bags of two kinds of tiles, and the score of each: the share of the first kind, or how far the first kind lies to
    the left, of equal numbers."""
    random = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2)
    bags, scores = [], []
    for _ in range(count):
        level = random.uniform(0, 1)
        if arrangement:
            left = places[:, 0] < SIDE // 2
            kind = np.where(left, random.uniform(size=len(places)) < level, random.uniform(size=len(places)) >= level)
        else:
            kind = random.uniform(size=len(places)) < level
        features = random.standard_normal((len(places), width)).astype(np.float32)
        features[:, 0] += np.where(kind, 2.0, -2.0)
        bags.append(Bag(features, (places + 20).astype(np.int64) * 256))
        scores.append(9 * (level - 0.5))
    return bags, np.array(scores)


def scored(task: Task, truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
    return Scorer(Predictions(truth, said, task.classes, times=task.times, horizons=task.horizons)).plain()


def linear(task: Task, vectors: np.ndarray, truth: np.ndarray, train: int) -> dict[str, float]:
    scale = target_scale(task, truth[:train])
    layer = fit_linear(vectors[:train], task.outputs, lambda logits: task_loss(logits, truth[:train], task, scale))
    with torch.no_grad():
        said = layer(torch.from_numpy(vectors)).numpy()
    how = fit_scale(task, scale, said[:train], truth[:train])
    return scored(task, truth[train:], outputs(said[train:], task, how))


@pytest.mark.parametrize("task", [COX, DISCRETE, AMOUNT], ids=["cox", "discrete", "regression"])
def test_a_planted_composition_is_learned_from_mean_vectors(task: Task) -> None:
    """200 patients to learn from and 400 others, 16 dimensions."""
    bags, score = planted(600, 0, arrangement=False)
    vectors = np.stack([bag.features.mean(axis=0, dtype=np.float64) for bag in bags])
    if task is AMOUNT:
        truth = score + np.random.default_rng(1).normal(size=600)
        rule = 1 - ((truth - score)[200:] ** 2).sum() / ((truth[200:] - truth[200:].mean()) ** 2).sum()
        assert linear(task, vectors, truth, 200)["r2"] >= 0.6 * rule > 0.4
        return
    truth = made_survival(score, 1)
    rule = scored(COX, truth[200:], np.concatenate([score[200:, None], np.full((400, len(COX.times)), 0.5)], axis=1))
    found = linear(task, vectors, truth, 200)
    assert 0.85 < rule["harrell_c"] < 0.92 and found["harrell_c"] >= 0.8, (rule, found)
    assert 0.7 < found["observed_over_expected_at_5"] < 1.4 and found["integrated_brier"] < 0.15, found


def test_permuted_follow_up_teaches_nothing() -> None:
    bags, score = planted(400, 2, arrangement=False)
    vectors = np.stack([bag.features.mean(axis=0, dtype=np.float64) for bag in bags])
    found = []
    for seed in range(10):
        truth = made_survival(score, seed)[np.random.default_rng(seed).permutation(400)]
        found.append(linear(COX, vectors, truth, 200)["harrell_c"])
    assert abs(np.mean(found) - 0.5) < 0.03, found


@pytest.mark.slow
@pytest.mark.parametrize("task", [COX, AMOUNT], ids=["cox", "regression"])
def test_a_planted_arrangement_is_learned_and_means_do_not_tell_it(tmp_path: Path, task: Task, capsys) -> None:
    """400 patients to learn from and 400 others; equal numbers of both kinds on the whole, only their places tell."""
    options = TrainingOptions(epochs=10, batch_size=16, gradient_accumulation=1, base_lr=0.032, layer_decay=1.0)
    model = ModelOptions(model_arch=NARROW, feat_layer="3", dropout=0.0, global_pool=True)
    bags, score = planted(800, 3, arrangement=True)
    vectors = np.stack([bag.features.mean(axis=0, dtype=np.float64) for bag in bags])
    truth = made_survival(score, 1) if task is COX else score + np.random.default_rng(1).normal(size=800)
    rows, scale = np.arange(800), target_scale(task, truth[:400])
    torch.manual_seed(0)
    head = build_head(model, task, pretrained="", input_dim=bags[0].features.shape[1])
    trainer = Trainer(task, bags, truth, options, "fp32", CPU, scale)
    trainer.train(head, Fold(0, rows[:400], rows[:0], rows[400:]), tmp_path, {})
    how = fit_scale(task, scale, trainer.logits(head, rows[:400]), truth[:400])
    found = scored(task, truth[400:], outputs(trainer.logits(head, rows[400:]), task, how))
    blind = linear(task, vectors, truth, 400)
    with capsys.disabled():
        print(f"\n{task.setting}: {found}, from means {blind}")
    if task is COX:
        assert found["harrell_c"] >= 0.8 and abs(blind["harrell_c"] - 0.5) < 0.1
    else:
        rule = 1 - ((truth - score)[400:] ** 2).sum() / ((truth[400:] - truth[400:].mean()) ** 2).sum()
        assert found["r2"] >= 0.6 * rule and blind["r2"] < 0.1
