import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import ShardError
from curate.shards import write_parquet
from pipelines import report_examples, report_figures
from pipelines.reporting import format_summary, ledger_counts, summarise, write_report
from tests.pipelines.run_folder import SCRIPT, make_pool, make_run

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page and insists that its elements nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pools") / "pool", 400, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pool):
    return make_run(tmp_path_factory.mktemp("runs") / "run", pool=pool)


def change(run, target, **fields):
    """Copy a run, and change fields of the copy's manifest."""
    shutil.copytree(run, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | fields))
    return target


def read_page(run, **options):
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def test_summary_says_what_manifest_and_ledger_say(run):
    summary = summarise(run)
    assert summary.counts == ledger_counts(run)
    assert sum(summary.counts.values()) == summary.rows == 400
    assert summary.kept == summary.budget == summary.stages[-1].rows_out
    assert summary.headline.endswith("as asked)")


def test_terminal_table_adds_up(run):
    lines = format_summary(run).splitlines()
    assert lines[0] == summarise(run).headline
    assert lines[2].split() == ["stage", "rows", "in", "dropped", "reason", "rows", "out"]
    assert [line.split()[0] for line in lines[3:8]] == [
        "decode",
        "filter",
        "dedup",
        "clip_score",
        "prune",
    ]
    assert lines[8].startswith("warning: mind the gap")
    out = [f"{stage.rows_out:,}" for stage in summarise(run).stages]
    assert [line.split()[-1] for line in lines[3:8]] == out


def test_headline_names_a_budget_that_was_not_met(run, tmp_path):
    kept = summarise(run).kept
    fewer = change(run, tmp_path / "run", budget=kept + 5)
    assert summarise(fewer).headline.endswith(f"{kept + 5} were asked for)")


def test_ledger_that_differs_from_the_manifest_is_an_error(run, tmp_path):
    counts = dict(summarise(run).counts)
    counts["kept"] -= 1
    with pytest.raises(ShardError, match=r"differ: kept \("):
        summarise(change(run, tmp_path / "run", counts=counts, stages=[]))


def test_missing_part_is_an_error(run, tmp_path):
    copy = change(run, tmp_path / "run")
    (copy / "selection" / "part-00001.parquet").unlink()
    with pytest.raises(ShardError, match="differ"):
        summarise(copy)


def test_stages_that_do_not_add_up_are_an_error(run, tmp_path):
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    stages[2]["rows_out"] += 1
    with pytest.raises(ShardError, match="stage 'dedup'"):
        summarise(change(run, tmp_path / "run", stages=stages))


def test_kept_row_of_another_reason_is_an_error(run, tmp_path):
    copy = change(run, tmp_path / "run")
    part = copy / "selection" / "part-00000.parquet"
    table = pq.read_table(part, partitioning=None)
    kept = table["kept"].to_pylist()
    kept[0] = not kept[0]
    write_parquet(part, table.set_column(1, "kept", pa.array(kept)))
    with pytest.raises(ShardError, match="row 0 of part 0"):
        summarise(copy)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"step": "prune", "counts": 3}'])
def test_folder_without_a_usable_manifest_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError):
        summarise(tmp_path)


def test_page_is_whole_and_loads_nothing(run):
    page = read_page(run)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "style"):
            assert attrs.get(name, "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    policy = next(a for a in page.all("meta") if a.get("http-equiv"))["content"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    style = (run / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_page_is_accessible(run):
    page = read_page(run)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert all(
        attrs["aria-labelledby"] in ids and attrs["role"] == "img" for attrs in page.all("svg")
    )
    assert len(page.all("svg")) == 6
    assert page.all("img") and all(attrs["alt"] for attrs in page.all("img"))
    assert len(page.all("table")) == len(page.all("caption"))


def test_hostile_text_stays_text(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "<i>" not in text and "<b>rule" not in text
    assert all(attrs["src"] != "x" for attrs in page.all("img"))
    assert SCRIPT in page.text  # shown, as text
    assert not {"\x00", "\x07", "\u202e", "\u202c"} & set(text)
    assert "long " * 60 not in text


def test_counts_on_the_page_are_those_of_the_ledger(run):
    page = read_page(run)
    for reason, count in ledger_counts(run).items():
        share = f"{100 * count / 400:.2f} %"
        assert f"{reason} " in page.text and f"{count} {share}" in page.text
    assert "sum = rows of the pool 400 100.00 %" in page.text
    for stage in summarise(run).stages:
        lost = sum(stage.dropped.values())
        row = f"{stage.stage} {stage.rows_in} \u2212 {lost} = {stage.rows_out}"
        assert row in page.text


def test_same_run_gives_the_same_bytes(run, pool, tmp_path):
    first = write_report(run).read_bytes()
    assert write_report(run, pool=pool).read_bytes() == first
    later = change(run, tmp_path / "run", times={"seconds": 99})
    assert write_report(later).read_bytes() == first
    assert len(first) < 3_000_000
    assert not list(run.glob("*.tmp")) and not list(run.glob(".*.tmp"))


def test_pool_that_is_gone_leaves_a_note(tmp_path):
    page = read_page(make_run(tmp_path / "run"))
    assert "the pool could not be read" in page.text
    assert not page.all("img")
    assert "Most pruned clusters" in page.text


def test_pool_that_changed_gives_no_pictures(run, tmp_path):
    page = read_page(change(run, tmp_path / "run", inputs={"pool": "cd" * 32}))
    assert "not those that the run read" in page.text and not page.all("img")


@pytest.mark.parametrize("shards", [2, 3])
def test_pool_of_other_rows_gives_no_pictures(run, tmp_path, shards):
    other = make_pool(tmp_path / "pool", 400 if shards == 2 else 402, shards)
    page = read_page(change(run, tmp_path / "run"), pool=other)
    assert "it has other rows" in page.text and not page.all("img")


def test_pool_of_other_uids_gives_no_pictures(tmp_path, pool):
    run = make_run(tmp_path / "run", pool=pool)
    for path in (run / "selection").glob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        write_parquet(
            path, table.set_column(0, "uid", table["uid"].take(pa.array(range(len(table)))[::-1]))
        )
    page = read_page(run)
    assert "is not that of the run" in page.text and not page.all("img")


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"clusters": 1}, "Least pruned clusters"),
        ({"clip": False}, "CLIP score below the cut"),
        ({"dedup": False}, "Near-duplicates ("),
        ({"clip": False, "dedup": False, "clusters": 2}, "Near-duplicates ("),
        ({"rows": 60, "shards": 20}, "no such text"),
        ({"rows": 4000, "clusters": 1200}, "Each dot"),
    ],
)
def test_runs_of_other_shapes(tmp_path, options, absent):
    page = read_page(make_run(tmp_path / "run", **options))
    assert absent not in page.text
    assert "nan" not in page.text.lower().split() and "inf" not in page.text.lower().split()


def test_cluster_that_keeps_nothing_is_the_most_pruned(run):
    page = read_page(run)
    assert "1 of 7 clusters keep no row" in page.text
    first = page.text.split("Most pruned clusters")[1]
    assert first.split("Cluster ")[1].startswith("6: 0 of")


def test_runs_without_clusters_or_stages(tmp_path):
    run = make_run(tmp_path / "run", stages=[], budget=None, warnings=[])
    shutil.rmtree(run / "clusters")
    page = read_page(run)
    assert "Most pruned" not in page.text and "Near-duplicates" in page.text
    assert "as asked" not in page.text


def test_duplicates_stand_beside_the_row_that_they_duplicate(run, pool):
    shown = report_examples.collect_examples(run, summarise(run), None, count=6, pool=pool)
    assert len(shown.duplicates) == 6
    ledger = pq.read_table(run / "selection").to_pylist()
    by_uid = {row["uid"]: row for row in ledger}
    for row, other in shown.duplicates:
        assert row.reason == "duplicate" and other is not None
        assert by_uid[row.uid]["duplicate_of"] == other.uid
        assert other.reason == "kept" and other.picture.thumbnail


def test_examples_are_the_first_and_last_by_rank_and_the_lowest_scores(run, pool):
    table = report_figures.read_clusters(run)
    shown = report_examples.collect_examples(run, summarise(run), table, count=4, pool=pool)
    rows = pq.read_table(run / "selection").to_pylist()
    for found in (*shown.most_pruned, *shown.least_pruned):
        inside = [row for row in rows if row["cluster"] == found.position]
        ranks = sorted(row["rank"] for row in inside if row["kept"])
        assert [row.rank for row in found.kept] == ranks[:4]
        ranks = sorted((row["rank"] for row in inside if not row["kept"]), reverse=True)
        assert [row.rank for row in found.dropped] == ranks[:4]
    low = sorted(row["clip_score"] for row in rows if row["reason"] == "low_clip_score")
    assert [row.clip_score for row in shown.reasons["low_clip_score"]] == low[:4]


def test_examples_come_from_few_shards(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", rows=600, shards=60)
    read = set()
    original = report_examples._ledger_rows
    monkeypatch.setattr(
        report_examples, "_ledger_rows", lambda r, part, x: read.add(part) or original(r, part, x)
    )
    page = read_page(run)
    assert len(read) <= 16 and {0, 59} <= set(report_examples._spread(range(60)))
    assert "16 of 60 shards" in page.text


def test_no_examples_on_request(run):
    page = read_page(run, examples=0)
    assert not page.all("img") and "Cluster 6: 0 of" in page.text


@pytest.mark.parametrize("examples", [-1, 13])
def test_examples_out_of_range(run, examples):
    with pytest.raises(ValueError, match="from 0 to 12"):
        write_report(run, examples=examples)


def test_pictures_stop_at_the_size_limit(run, pool, monkeypatch):
    monkeypatch.setattr("pipelines.report_pictures._MOST_BYTES", 5_000)
    page = read_page(run)
    assert 0 < len(page.all("img")) < 10
    assert "the report would be too large" in page.text


def test_damaged_duplicates_are_an_error(run, tmp_path):
    copy = change(run, tmp_path / "run")
    path = copy / "duplicates" / "part-00000.parquet"
    write_parquet(path, pq.read_table(path, partitioning=None).slice(1))
    with pytest.raises(ShardError, match="part 0"):
        write_report(copy)


def test_run_may_be_named_by_a_string(run):
    assert write_report(str(run)) == Path(run) / "report.html"
