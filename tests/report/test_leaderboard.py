"""Models rank by the union of their attacks; the page holds its evidence, and works in a browser."""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.records.images import Images, choose_images, load_images, save_images
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import RecordStore
from robustbench_deq.report.pages.commands import command_of
from robustbench_deq.report.pages.leaderboard import leaderboard_html
from robustbench_deq.report.supplements import Supplements, read_supplements
from robustbench_deq.report.tables.columns import COLUMNS
from robustbench_deq.report.tables.leaderboard import make_leaderboard
from robustbench_deq.report.tables.standings import standings_markdown

Run = tuple[Record, pd.DataFrame]
NASTY = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>"


def stored(runs: Sequence[Run], folder: Path, cards: dict | None = None) -> tuple[list[Record], Supplements]:
    store = RecordStore(folder)
    for record, samples in runs:
        store.append(record, samples)
    records = [record for record, _ in runs]
    return records, read_supplements({folder: records}, cards)


def card(name: str, sha256: str = "0123456789abcdef", threat: dict | None = None) -> dict:
    content = {"data": "digits", "threat": threat, "seed": 3, "robust_accuracy": 0.5, "robust_accuracy_ci": [0.4, 0.6]}
    described = {"name": name, "family": "deq-conv", "config": {"hidden": 8}, "sha256": sha256}
    return described | {"num_parameters": 12345, "card": content}


# ---------------------------------------------------------------- ranks


def test_robust_accuracy_is_the_union_of_the_attacks(make_run, tmp_path: Path) -> None:
    runs = [make_run("a", [0, 1, 2]), make_run("b", [2, 3]), make_run("c", [2])]
    (entry,) = make_leaderboard(*stored(runs, tmp_path))
    assert [record.label for record in entry.records] == ["a", "b", "c"]
    assert (entry.num_robust, entry.num_in_union, entry.sole_breaks) == (3, 3, (2, 1, 0))
    assert (entry.robust_accuracy, entry.clean_accuracy) == (3 / 8, 7 / 8)
    assert entry.robust_accuracy < min(record.robust_accuracy for record in entry.records)
    low, high = entry.robust_accuracy_ci
    assert low < 3 / 8 < high
    assert entry.total("cell_evals") == 3 * 41.0


def test_models_rank_within_data_and_threat_and_ties_share_a_place(make_run, tmp_path: Path) -> None:
    ball = {"norm": "l2", "epsilon": 0.25}
    runs = [
        make_run("1", [0, 1, 2, 3], model="weak"),
        make_run("2", [0, 1], model="tied"),
        make_run("3", [4, 5], model="also tied"),
        make_run("4", [0], model="strong until the second attack"),
        make_run("5", [1, 2, 3, 4], model="strong until the second attack"),
        make_run("6", [0, 1, 2, 3, 4], model="weak", threat=ball),
    ]
    records, supplements = stored(runs, tmp_path)
    expected = [
        (0.25, 1, "weak"),
        (1.0, 1, "also tied"),
        (1.0, 1, "tied"),
        (1.0, 3, "weak"),
        (1.0, 4, "strong until the second attack"),
    ]
    for order in (records, records[::-1]):
        entries = make_leaderboard(order, supplements)
        assert [(entry.setting.epsilon, entry.rank, entry.setting.model) for entry in entries] == expected


def test_a_red_flag_takes_a_row_out_of_the_ranking(make_record) -> None:
    records = [
        make_record("PGD", "random", robust=0.75, probes={"repeat_gap": 0.5}),
        make_record("PGD", "hard", robust=0.5, probes={"repeat_gap": 0.0}),
        make_record("PGD", "soft", robust=0.25),
        make_record("noise", "soft", robust=0.5),
        make_record("PGD", "warned", robust=0.25, probes={}, num_unconverged=200),
        make_record("PGD", "alone", probes={"batch_gap": 0.5}, threat={"norm": "l2", "epsilon": 0.25}),
    ]
    entries = make_leaderboard(records, Supplements())
    texts = [
        [column.text(entry) for column in COLUMNS if column.title in ("Rank", "Model", "Flags")] for entry in entries
    ]
    assert texts == [
        ["unreliable", "alone", "batch mates"],
        ["1", "hard", "none"],
        ["2", "soft", "–"],
        ["2", "warned", "unconverged"],
        ["unreliable", "random", "random output"],
    ]
    assert [entry.is_unreliable for entry in entries] == [True, False, False, False, True]
    (rank,) = [column for column in COLUMNS if column.title == "Rank"]
    assert rank.number is not None
    assert rank.number(entries[-1]) > max(rank.number(entry) for entry in entries if entry.rank)
    page = leaderboard_html(entries)
    assert page.count('class="row unreliable"') == 2 and "random output (unreliable)" in page
    assert "draws at random" in page


STAGES = [
    {
        "name": name,
        "num_attacked": left,
        "num_broken": broken,
        "cell_evals": 10.0,
        "cell_vjps": 5.0,
        "wall_seconds": 0.4,
    }
    for name, left, broken in (("joint-pgd", 224, 40), ("toward-1", 184, 8))
]


def test_versions_of_the_standard_evaluation_are_not_ranked_together(make_record) -> None:
    records = [
        make_record("a", "m", robust=0.5, protocol="v1 standard", stages=STAGES),
        make_record("a", "n", robust=0.6, protocol="v1 standard", stages=STAGES),
        make_record("b", "m", robust=0.7),
        make_record("a", "o", robust=0.55, protocol="v1 fast", stages=STAGES),
        make_record("a", "p", robust=0.1),
    ]
    entries = make_leaderboard(records, Supplements())
    found = {entry.setting.model: (entry.protocol, entry.rank) for entry in entries}
    assert found == {
        "n": ("v1 standard", 1),
        "m": ("v1 standard", 2),
        "o": ("v1 fast", 1),
        "p": ("", 1),
    }
    text = standings_markdown(entries)
    assert "## digits test, L2, ε = 1, v1 standard" in text and "## digits test, L2, ε = 1, v1 fast" in text
    both = make_leaderboard([records[0], make_record("c", "m", protocol="v1 fast", stages=STAGES)], Supplements())
    assert both[0].protocol == "v1 standard"


def test_page_shows_what_each_stage_broke(make_record) -> None:
    records = [make_record("a", "m", robust=0.6875, protocol="v1 fast", stages=STAGES), make_record("b", "n")]
    text = leaderboard_html(make_leaderboard(records, Supplements()))
    assert text.count("Stages of a<") == 1 and "Stages of b" not in text
    row = re.sub(r"\s+", " ", text[text.index('<th scope="row">toward-1</th>') :]).partition("</tr>")[0]
    assert re.findall(r"<td>(.*?)</td>", row) == ["184", "8", "68.8", "13.9", "6.96", "0.400"]


def test_without_verdicts_the_strongest_attack_bounds_the_union(make_run, tmp_path: Path) -> None:
    runs = [make_run("a", [0, 1]), make_run("b", [2]), make_run("c", [0, 1, 2, 3])]
    records, supplements = stored(runs, tmp_path)
    known = Supplements({name: supplements.verdicts[name] for name in "ab"})
    (entry,) = make_leaderboard(records, known)
    assert (entry.num_robust, entry.num_in_union) == (3, 2)
    assert entry.sole_breaks == (None, 2, 1)
    text = {column.title: column.text(entry) for column in COLUMNS}
    assert text["Robust %"].startswith("≤ 37.5 [")
    (entry,) = make_leaderboard(records, Supplements())
    assert (entry.num_robust, entry.num_in_union) == (3, 0)
    assert "At most 3 of 8" in leaderboard_html(make_leaderboard(records, known))


def test_samples_that_any_attack_left_without_verdict_are_counted_once(make_run, tmp_path: Path) -> None:
    (one, samples), (two, others) = make_run("a", [0, 1]), make_run("b", [1, 2])
    runs = [
        (
            one.model_copy(update={"num_unconverged": 2}),
            samples.assign(is_converged=~samples["sample_id"].isin([0, 1])),
        ),
        (two.model_copy(update={"num_unconverged": 2}), others.assign(is_converged=~others["sample_id"].isin([1, 2]))),
    ]
    (entry,) = make_leaderboard(*stored(runs, tmp_path))
    assert (entry.num_unconverged, entry.num_failed) == (3, 0)


def test_order_of_the_rows_in_a_file_does_not_matter(make_run, tmp_path: Path) -> None:
    record, samples = make_run("a", [0, 1])
    other, rows = make_run("b", [0, 1])
    (entry,) = make_leaderboard(*stored([(record, samples), (other, rows[::-1])], tmp_path))
    assert entry.num_robust == 5


def test_verdicts_of_many_records_are_each_their_own(make_run, tmp_path: Path) -> None:
    runs = [make_run(f"r{index}", [index % 3, 3]) for index in range(5)]
    verdicts = stored([*runs, make_run("short", [], num_samples=4)], tmp_path)[1].verdicts
    for record, samples in runs:
        np.testing.assert_array_equal(verdicts[record.record_id].is_robust, samples["is_robust"])
    assert len(verdicts["short"].is_robust) == 4


@pytest.mark.parametrize("spoil", ["missing", "torn", "other verdicts", "no column", "one is null"])
def test_verdicts_that_cannot_be_used_are_left_out(make_run, tmp_path: Path, caplog, spoil: str) -> None:
    record, samples = make_run("a", [0, 1])
    store = RecordStore(tmp_path)
    store.append(record, samples)
    path = store.samples_path("a")
    if spoil == "missing":
        path.unlink()
    elif spoil == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        changed = {
            "other verdicts": lambda: samples.assign(is_robust=True),
            "no column": lambda: samples.drop(columns="is_failed"),
            "one is null": lambda: samples.assign(is_clean_correct=[None, *samples["is_clean_correct"][1:]]),
        }[spoil]()
        changed.to_parquet(path)
    with caplog.at_level(logging.WARNING):
        assert read_supplements({tmp_path: [record]}).verdicts == {}
    assert "a.parquet" in caplog.text


def test_a_card_counts_only_for_the_weights_it_describes(make_run, tmp_path: Path) -> None:
    runs = [make_run("a", [0], model="deq-conv.mine")]
    records, supplements = stored(runs, tmp_path, {"deq-conv.mine": card("deq-conv.mine", threat=None)})
    (entry,) = make_leaderboard(records, supplements)
    assert (entry.family, entry.training, entry.trained_against) == ("deq-conv", "standard", "nothing")
    threat = {"norm": "linf", "epsilon": 8 / 255}
    (entry,) = make_leaderboard(records, Supplements(cards={"deq-conv.mine": card("deq-conv.mine", threat=threat)}))
    assert (entry.training, entry.trained_against) == ("adversarial", "L∞, ε = 8/255")
    (entry,) = make_leaderboard(records, Supplements(cards={"deq-conv.mine": card("deq-conv.mine", sha256="other")}))
    assert (entry.card, entry.training, entry.family) == (None, "unknown", "deq-conv")
    assert "No card of these weights" in leaderboard_html(make_leaderboard(records, Supplements()))


@pytest.mark.parametrize("model", ["models/mine.py:build", "./folder", "plain"])
def test_a_file_is_of_no_family(make_run, model: str) -> None:
    (entry,) = make_leaderboard([make_run("a", [0], model=model)[0]], Supplements())
    assert entry.family == "unknown"


def test_no_records_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one record"):
        make_leaderboard([], Supplements())


# ---------------------------------------------------------------- images


def test_images_show_what_the_attack_broke_first_and_survive_the_file(make_run, tmp_path: Path) -> None:
    _, samples = make_run("a", [3, 5], num_samples=12)
    clean = np.linspace(0, 1, 12 * 64, dtype=np.float32).reshape(12, 1, 8, 8)
    images = choose_images(samples, clean, 1 - clean)
    assert images.labels.tolist() == [3, 5, 0, 1, 2, 4, 6, 7]
    np.testing.assert_array_equal(images.clean[1], clean[5])
    save_images(tmp_path, "a", images)
    for wrote, read in zip(images, load_images(tmp_path, "a"), strict=True):
        np.testing.assert_array_equal(wrote, read)
    assert load_images(tmp_path, "b") is None
    (tmp_path / "images" / "b.npz").write_bytes(b"torn")
    assert load_images(tmp_path, "b") is None


def test_a_row_shows_the_images_of_its_strongest_record_that_has_some(make_run, tmp_path: Path) -> None:
    runs = [make_run("strong", [0, 1]), make_run("weak", [0])]
    clean = np.full((8, 3, 4, 4), 0.5, dtype=np.float32)
    save_images(tmp_path, "weak", choose_images(runs[1][1], clean, clean + 0.25))
    records, supplements = stored(runs, tmp_path)
    page = leaderboard_html(make_leaderboard(records, supplements))
    assert page.count("data:image/png;base64,") == 8 * 3
    assert page.count("largest change 0.250") == 8
    assert "true 0, read as 0" in page
    assert '<figcaption class="is-wrong">read as 1</figcaption>' in page


def test_images_of_another_shape_are_left_out(make_run, tmp_path: Path) -> None:
    record, samples = make_run("a", [0])
    two_channels = np.zeros((8, 2, 4, 4), dtype=np.float32)
    classes = samples["label"].to_numpy()
    save_images(tmp_path, "a", Images(two_channels, two_channels, classes, classes, classes))
    records, supplements = stored([(record, samples)], tmp_path)
    assert supplements.galleries["a"] == []
    assert make_leaderboard(records, supplements)[0].gallery == ()


# ---------------------------------------------------------------- the page


def test_page_holds_numbers_evidence_and_commands_and_loads_nothing(make_run, tmp_path: Path) -> None:
    runs = [make_run("first attack", [0, 1], record_id="a"), make_run("second attack", [2], record_id="b")]
    cards = {"deq-conv": card("deq-conv", threat={"norm": "l2", "epsilon": 0.5})}
    page = leaderboard_html(make_leaderboard(*stored(runs, tmp_path, cards)))
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for shown in ("4 of 8 samples withstood all 2 attacks", "50.0 [21.5, 78.5]", "12,345", "50.0 [40.0, 60.0] %"):
        assert shown in text
    assert all(command_of(record) in text for record, _ in runs)
    assert all(column.meaning in text for column in COLUMNS)
    assert not re.search(r"https?:|url\(|@import|<iframe|src=\"(?!data:)|href=\"(?!data:)", page)
    facets = json.loads(html.unescape(re.search(r"data-facets='(.*?)'", page)[1]))
    assert facets == {
        "family": ["deq-conv"],
        "training": ["adversarial"],
        "data": ["digits test"],
        "threat": ["L2, ε = 1"],
        "attack": ["joint-pgd"],
    }


def test_page_shows_what_a_record_warns_of_and_what_is_missing(make_run, tmp_path: Path) -> None:
    warned = {"num_lagging": 0, "num_zero_gradient": 17, "finished_by": "sequential"}
    runs = [make_run("warned of", [0], record_id="a", **warned), make_run("not looked at", [1], record_id="b")]
    page = leaderboard_html(make_leaderboard(*stored(runs, tmp_path)))
    (table,) = [part.split("</table>")[0] for part in page.split("<table")[1:] if "Finished by" in part]
    assert "withstood all 2 attacks" in page and "(warned of: zero gradient on 17 of 8 attacked samples)" in page
    cells = r"<t[hd]\b.*?>(.*?)</t[hd]>"
    names, *rows = [re.findall(cells, line, re.DOTALL) for line in table.split("<tr")[1:]]
    shown = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    for name, values in {"Lagging": "0 –", "Zero gradient": "17 –", "Finished by": "sequential –"}.items():
        assert [shown[label][name] for label in ("warned of", "not looked at")] == values.split()


def test_page_depends_on_the_records_alone(make_run, tmp_path: Path) -> None:
    runs = [make_run(str(number), [number], model=f"model {number % 3}") for number in range(6)]
    records, supplements = stored(runs, tmp_path)
    pages = [leaderboard_html(make_leaderboard(order, supplements)) for order in (records, records[::-1])]
    assert pages[0] == pages[1]


def test_hostile_names_stay_text(make_run, tmp_path: Path) -> None:
    data = {"name": NASTY, "split": NASTY, "num_samples": 8, "digest": NASTY}
    described = card(NASTY) | {"family": NASTY, "config": {NASTY: NASTY}}
    described["card"] |= {"command": NASTY, "data": NASTY}
    changes = {"label": NASTY, "model": NASTY, "attack": NASTY, "data": data, "attack_config": {NASTY: NASTY}}
    run = make_run("a", [0], threat={"norm": NASTY, "epsilon": 1.0}, **changes)
    page = leaderboard_html(make_leaderboard(*stored([run], tmp_path, {NASTY: described})))
    assert "<script>alert" not in page and "<img src=x" not in page
    assert page.count("<script>") == 2
    assert html.escape(NASTY) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def board_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture
def page(make_run, board_path: Path) -> Path:
    """Six models on two radii, one of them named to break out of its cell."""
    path = board_path / "leaderboard.html"
    if not path.exists():
        names = ["deq-fc.one", "deq-fc.two", "deq-conv.three", "deq-conv.four", "mondeq.five", NASTY]
        clean = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
        runs = []
        for index, (name, epsilon) in enumerate((name, epsilon) for epsilon in (0.5, 1.0) for name in names):
            threat = {"norm": "l2", "epsilon": epsilon}
            evals = float((17 * index) % 23 + 5)
            runs.append(
                make_run(f"r{index}", range(index % 6), model=name, threat=threat, cell_evals=evals, label="PGD")
            )
            save_images(board_path, f"r{index}", choose_images(runs[-1][1], clean, 1 - clean))
        runs.append(make_run("extra", [6], model=names[0], threat=threat, attack="noise", label="noise floor"))
        cards = {name: card(name, threat={"norm": "l2", "epsilon": 0.5}) for name in names[:2]}
        path.write_text(leaderboard_html(make_leaderboard(*stored(runs, board_path, cards))), encoding="utf-8")
    return path


VISIBLE = "Array.from(document.querySelectorAll('#board > tbody')).filter((body) => body.offsetHeight > 0)"
COLUMN = "((title) => Array.from(document.querySelectorAll('#board > thead th')).find((th) => th.innerText === title))"


def models(browser) -> list[str]:
    return browser.evaluate(f"{VISIBLE}.map((body) => body.querySelector('.open').innerText)")


def numbers(browser, title: str) -> list[float]:
    return browser.evaluate(
        f"{VISIBLE}.map((b) => Number(b.rows[0].cells[{COLUMN}('{title}').cellIndex].dataset.value))"
    )


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_fails_in_continuous_integration(
    ci: str, outcome: type[BaseException], find_browser: Callable[[], str], monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(outcome, match="no chromium"):
        find_browser()


def test_the_browser_tells_of_errors_and_requests(chromium, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate("console.error('one')")
    chromium.evaluate("void setTimeout(() => { throw new Error('two') })")
    chromium.evaluate(
        "new Promise((done) => { const i = new Image(); i.onerror = done; i.src = 'http://x.test/three' })"
    )
    found = " ".join(chromium.problems)
    chromium.problems.clear()
    assert "one" in found and "two" in found
    assert "Content Security Policy" in found and "three" in found


def test_a_browser_sorts_by_keyboard(chromium, page: Path) -> None:
    chromium.open(page)
    assert len(models(chromium)) == 12
    assert chromium.evaluate(f"{COLUMN}('Cell evals').querySelector('button').focus()") is None
    chromium.press("Enter", 13, "\r")
    costs = numbers(chromium, "Cell evals")
    assert costs == sorted(costs) and len(set(costs)) > 5
    assert chromium.evaluate(f"{COLUMN}('Cell evals').getAttribute('aria-sort')") == "ascending"
    chromium.press("Enter", 13, "\r")
    assert numbers(chromium, "Cell evals") == sorted(costs, reverse=True)
    chromium.evaluate(f"{COLUMN}('Robust %').querySelector('button').click()")
    robust = numbers(chromium, "Robust %")
    assert robust == sorted(robust, reverse=True)
    assert chromium.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    chromium.evaluate(f"{COLUMN}('Model').querySelector('button').click()")
    assert models(chromium)[0::2] == models(chromium)[1::2]
    assert chromium.problems == []


def test_a_browser_filters_and_resets(chromium, page: Path) -> None:
    chromium.open(page)
    before = models(chromium)
    chromium.evaluate("document.getElementById('search').focus()")
    chromium.type("conv THREE")
    assert models(chromium) == ["deq-conv.three"] * 2
    assert chromium.evaluate("document.getElementById('count').innerText") == "2 of 12 rows"

    def choose(name: str, value: str) -> None:
        select = f"document.querySelector('select[name={name}]')"
        chromium.evaluate(
            f"{select}.value = '{value}', {select}.dispatchEvent(new Event('input', {{bubbles: true}})), null"
        )

    choose("threat", "L2, ε = 0.5")
    assert models(chromium) == ["deq-conv.three"]
    chromium.evaluate("document.querySelector('[type=reset]').click()")
    assert chromium.evaluate("new Promise((done) => setTimeout(() => done(true), 50))")
    assert models(chromium) == before
    choose("training", "adversarial")
    assert set(models(chromium)) == {"deq-fc.one", "deq-fc.two"}
    choose("attack", "noise")
    assert models(chromium) == ["deq-fc.one"]
    choose("family", "unknown")
    assert models(chromium) == []
    assert chromium.problems == []


def test_a_browser_opens_a_row(chromium, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate("document.querySelectorAll('.open')[2].focus()")
    chromium.press(" ", 32, " ")
    panel = "document.querySelectorAll('.more')[2]"
    assert chromium.evaluate(f"{panel}.offsetHeight") > 100
    assert chromium.evaluate("document.querySelectorAll('.open')[2].ariaExpanded") == "true"
    assert chromium.evaluate("Array.from(document.querySelectorAll('.more')).filter((x) => x.offsetHeight).length") == 1
    images = f"Array.from({panel}.querySelectorAll('img'))"
    decoded = f"Promise.all({images}.map((image) => image.decode().then(() => image.naturalWidth)))"
    assert chromium.evaluate(decoded) == [8] * 24
    assert "robustbench-deq attack" in chromium.evaluate(f"{panel}.innerText")
    chromium.press(" ", 32, " ")
    assert chromium.evaluate(f"{panel}.offsetHeight") == 0
    assert chromium.problems == []


COLOURS = """((element) => {
  const isClear = (node) => /^rgba\\(.*, 0\\)$/.test(getComputedStyle(node).backgroundColor);
  let behind = element;
  while (isClear(behind)) behind = behind.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
})"""
"""The colour of an element's text, and the one behind it."""


def test_the_tab_key_reaches_all_that_can_be_used_and_shows_where_it_is(chromium, page: Path) -> None:
    chromium.open(page)
    here = "((e) => [e.id || e.name || e.innerText.trim(), getComputedStyle(e).outlineStyle])(document.activeElement)"
    seen = []
    for _ in range(9 + len(COLUMNS)):
        chromium.press("Tab", 9)
        seen.append(chromium.evaluate(here))
    names = [name for name, _ in seen]
    assert names[:7] == ["search", "family", "training", "data", "threat", "attack", "Reset"]
    assert names[8 : 8 + len(COLUMNS)] == [column.title for column in COLUMNS]  # 7 is the table, which scrolls
    assert names[8 + len(COLUMNS)] == models(chromium)[0]
    assert {outline for _, outline in seen} == {"solid"}
    assert chromium.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only_and_text_has_contrast(chromium, page: Path, scheme: str) -> None:
    chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    chromium.open(page, width=390, height=844)
    chromium.evaluate("document.querySelectorAll('.open').forEach((button) => button.click())")
    assert chromium.evaluate("innerWidth") == 390
    assert chromium.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert len(models(chromium)) == 12
    for selector in ("p", "#count", ".open", "dt", "thead button", ".panel p", ".panel dt", ".panel th", "figcaption"):
        text, back = chromium.evaluate(f"{COLOURS}(document.querySelector('{selector}'))")
        assert contrast(text, back) >= 4.5, selector
    assert chromium.problems == []


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio of two colours such as `rgb(1, 2, 3)`."""

    def luminance(colour: str) -> float:
        values = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
