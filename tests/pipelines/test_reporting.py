import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.errors import ShardError
from curate.pool import Pool
from curate.shards import write_parquet, write_part
from pipelines import report_examples, report_figures
from pipelines.reporting import format_summary, ledger_counts, summarise, write_report

SCRIPT = "<script>alert('pwned')</script>"
CAPTIONS = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "it's \"quoted\" & 'single' &lt;b&gt;",
    "👩‍👩‍👧 a family at the sea 🌊",
    "‮שלום עולם‬ قطة على السجادة",
    "long " * 2000,
    None,
    "",
    "null \x00 and bell \x07",
    "http://evil.example/x.png",
    "]]></style></svg></title><script>",
]
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


def jpeg(number):
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def uid_of(row):
    return f'"><i>{row}' if row % 50 == 1 else f"{row:08x}"


def make_pool(folder, rows, shards):
    folder.mkdir()
    for index, block in enumerate(np.array_split(np.arange(rows), shards)):
        table = pa.table(
            {
                "image": pa.array([jpeg(int(row)) for row in block], pa.binary()),
                "caption": pa.array([CAPTIONS[row % len(CAPTIONS)] for row in block], pa.string()),
                "uid": [uid_of(int(row)) for row in block],
            }
        )
        pq.write_table(table, folder / f"{index:03d}.parquet")
    return Pool.open(folder)


def fates(rows, clusters, rng, *, clip, dedup):
    """Decide the fate of each row, as `curate prune` would; returns the ledger's columns."""
    reason = np.full(rows, "over_budget", dtype=object)
    score = rng.normal(0.3, 0.05, rows).astype(np.float32)
    reason[rng.random(rows) < 0.03] = "decode_failed"
    reason[(rng.random(rows) < 0.02) & (reason == "over_budget")] = "filtered:<b>rule</b>"
    if dedup:
        reason[(rng.random(rows) < 0.1) & (reason == "over_budget")] = "duplicate"
    if clip:
        reason[(score < 0.28) & (reason == "over_budget")] = "low_clip_score"
    alive = np.flatnonzero(reason == "over_budget")
    cluster = np.full(rows, -1)
    cluster[alive] = rng.integers(0, clusters, alive.size)
    distance = np.where(cluster >= 0, rng.uniform(0, 0.8, rows), np.nan).astype(np.float32)
    rank = np.full(rows, -1)
    for number in range(clusters):
        inside = np.flatnonzero(cluster == number)
        rank[inside[np.argsort(-distance[inside], kind="stable")]] = np.arange(inside.size)
        # The last of several clusters keeps nothing.
        budget = 0 if number and number == clusters - 1 else inside.size * (number + 1) // clusters
        reason[inside[rank[inside] < budget]] = "kept"
    return reason, score, cluster, distance, rank


def make_run(
    run, *, rows=400, shards=3, clusters=7, clip=True, dedup=True, seed=0, pool=None, **fields
):
    rng = np.random.default_rng(seed)
    reason, score, cluster, distance, rank = fates(rows, clusters, rng, clip=clip, dedup=dedup)
    originals = np.flatnonzero(reason == "kept")
    duplicate_of = [
        uid_of(int(originals[row % originals.size])) if why == "duplicate" else None
        for row, why in enumerate(reason)
    ]
    similarity = np.where(reason == "duplicate", 0.97, rng.uniform(0.2, 0.9, rows))
    for index, part in enumerate(np.array_split(np.arange(rows), shards)):
        kept = reason[part] == "kept"
        uids = [uid_of(int(row)) for row in part]
        table = {
            "uid": uids,
            "kept": kept,
            "weight": kept.astype(np.float32),
            "reason": list(reason[part]),
            "detail": pa.array([f"cannot read {SCRIPT}"] * part.size, pa.string()),
            "cluster": pa.array(cluster[part], pa.int32(), mask=cluster[part] < 0),
            "rank": pa.array(rank[part], pa.int32(), mask=rank[part] < 0),
            "cosine_distance": pa.array(distance[part], mask=np.isnan(distance[part])),
            "clip_score": pa.array(score[part], pa.float32(), mask=np.full(part.size, not clip)),
            "duplicate_of": pa.array([duplicate_of[row] for row in part], pa.string()),
        }
        write_part(run / "selection", index, pa.table(table), row_group_rows=50)
        if dedup:
            near = {"uid": uids, "nearest": uids, "cosine_similarity": np.float32(similarity[part])}
            write_part(run / "duplicates", index, pa.table(near))
    write_clusters(run, clusters, cluster, reason, rng)
    manifest = make_manifest(reason, clusters, pool) | fields
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def write_clusters(run, clusters, cluster, reason, rng):
    (run / "clusters").mkdir()
    kept = np.bincount(cluster[reason == "kept"], minlength=clusters)
    d_intra, d_inter = rng.uniform(0.1, 0.5, clusters), rng.uniform(0.2, 0.9, clusters)
    table = {
        "cluster": pa.array(range(clusters), pa.int32()),
        "size": np.bincount(cluster[cluster >= 0], minlength=clusters),
        "d_intra": d_intra,
        "d_inter": d_inter,
        "complexity": d_intra * d_inter,
        "target": kept + 0.25,
        "kept": kept,
    }
    write_parquet(run / "clusters" / "summary.parquet", pa.table(table))


def make_manifest(reason, clusters, pool):
    counts = {str(name): int((reason == name).sum()) for name in np.unique(reason.astype(str))}
    stages, left = [], len(reason)
    plan = {
        "decode": ["decode_failed"],
        "filter": ["filtered:<b>rule</b>"],
        "dedup": ["duplicate"],
        "clip_score": ["low_clip_score", "no_clip_score"],
        "prune": ["over_budget"],
    }
    for stage, names in plan.items():
        dropped = {name: counts.get(name, 0) for name in names}
        after = left - sum(dropped.values())
        stages.append({"stage": stage, "rows_in": left, "dropped": dropped, "rows_out": after})
        left = after
    fingerprint = "ab" * 32 if pool is None else pool.fingerprint()
    source = {"path": "/nowhere/pool.parquet", "mapping": {}}
    if pool is not None:
        source = {
            "path": pool.source.root,
            "mapping": {"image": "image", "text": "caption", "uid": "uid", "url": None},
            "image_root": None,
        }
    return {
        "format": "curate/1",
        "step": "prune",
        "fingerprint": "0f" * 32,
        "complete": True,
        "params": {"keep": 0.28, "epsilon": 0.05, "which": "hard", "model": f"ViT{SCRIPT}"},
        "inputs": {"pool": fingerprint, "embeddings": "cd" * 32},
        "pool": source,
        "source": {"imported": "column"},
        "rows": len(reason),
        "budget": counts.get("kept", 0),
        "counts": counts,
        "stages": stages,
        "clusters": clusters,
        "warnings": [f"mind the gap {SCRIPT} \ud800"],
        "versions": {"torch": "2.13.0"},
        "environment": {"device": "cpu", "precision": None},
        "times": {"seconds": 1.5},
    }


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


def test_pool_may_be_recorded_among_the_inputs(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    record = manifest["pool"] | {"fingerprint": manifest["inputs"]["pool"]}
    page = read_page(change(run, tmp_path / "run", pool={}, inputs={"pool": record}))
    assert page.all("img")


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
