"""The page of a report: headings, tables and charts of a run as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.report_charts import (
    FunnelBar,
    binned,
    funnel_chart,
    histogram_chart,
    kept_by_size_chart,
    share_by_complexity_chart,
)
from pipelines.report_coreset import Choice, choice_section
from pipelines.report_examples import Examples
from pipelines.report_figures import ClusterTable, Figures, Histogram
from pipelines.report_pictures import pool_record
from pipelines.report_strips import chosen_section, clusters_section, reasons_section
from pipelines.report_style import STYLE
from pipelines.report_text import (
    STAGES,
    attribute,
    facts_table,
    figure,
    percent,
    plain,
    reason_text,
    safe,
)

if TYPE_CHECKING:
    from pipelines.reporting import RunSummary

# The page can load nothing and run nothing, whatever a caption says: the second line of defence
# behind the escaping.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def render(
    summary: RunSummary, figures: Figures, examples: Examples, choice: Choice | None = None
) -> str:
    """Return the report as HTML.

    Parameters
    ----------
    summary : RunSummary
        What the run did.
    figures : Figures
        What the charts show.
    examples : Examples
        The rows to show.
    choice : Choice, optional
        The order and the weights of a coreset, whose run has no clusters and no scores.
    """
    if choice is not None:
        middle = [choice_section(summary, choice), chosen_section(examples)]
    else:
        middle = [
            _histograms_section(summary, figures),
            _scatter_section(figures.clusters),
            clusters_section(figures.clusters, examples),
        ]
    sections = [
        header(
            summary.step,
            summary.headline,
            manifest=summary.manifest,
            fingerprint=summary.fingerprint,
            warnings=summary.warnings,
        ),
        _stages_section(summary),
        *middle,
        reasons_section(examples, summary.counts),
        _footer(summary),
    ]
    return page(summary.headline, sections)


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole HTML file; it can load nothing but its own style and pictures."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{attribute(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def header(
    step: str,
    headline: str,
    *,
    manifest: Mapping[str, Any],
    fingerprint: str,
    warnings: Sequence[str] = (),
) -> str:
    """Return the head of a page: what happened, with which parameters, from what."""
    pool = pool_record(manifest)
    source = {"pool": pool.get("path"), **(pool.get("mapping") or {})}
    source |= {"image root": pool.get("image_root"), "pool fingerprint": pool.get("fingerprint")}
    source |= {"run fingerprint": fingerprint, "clusters": manifest.get("clusters")}
    source |= dict(manifest.get("environment", {}))
    source |= dict(manifest.get("versions", {}))
    said = "".join(
        f'<p class="warning"><b>Warning.</b> {safe(warning, 600)}</p>' for warning in warnings
    )
    params = {
        str(name).replace("_", " "): value for name, value in manifest.get("params", {}).items()
    }
    return (
        f'<header>\n<p class="over">curate {safe(step)} · report</p>\n'
        f"<h1>{safe(headline)}</h1>\n{said}\n"
        f'<div class="pair">{facts_table("Parameters", params)}'
        f"{facts_table('Input and software', source)}</div>\n</header>"
    )


def _stages_section(summary: RunSummary) -> str:
    bars = [FunnelBar("Rows of the pool", summary.rows)]
    for stage in summary.stages:
        name = STAGES.get(stage.stage, stage.stage)
        dropped = tuple(count for count in stage.dropped.values() if count)
        bars.append(FunnelBar(plain(name, 48), stage.rows_out, dropped))
    funnel = (
        f"<div><figure>{funnel_chart(bars, name='funnel')}<figcaption>"
        '<span class="key one">left</span> <span class="key two">dropped by that stage</span>'
        "</figcaption></figure>"
    )
    return (
        "<section>\n<h2>What became of the rows</h2>\n"
        f'<div class="pair">{funnel + _stage_table(summary) if summary.stages else ""}'
        f"{_reason_table(summary)}</div>\n</section>"
    )


def _stage_table(summary: RunSummary) -> str:
    rows = "".join(
        f'<tr><th scope="row">{safe(stage.stage)}</th>{_number(stage.rows_in)}'
        f"{_number(sum(stage.dropped.values()), sign='&minus; ')}"
        f"{_number(stage.rows_out, sign='= ')}</tr>"
        for stage in summary.stages
    )
    return (
        '<div class="scroll"><table><caption>Rows by stage</caption><thead><tr>'
        '<th scope="col">stage</th><th scope="col" class="n">rows in</th>'
        '<th scope="col" class="n">dropped</th><th scope="col" class="n">rows out</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _reason_table(summary: RunSummary) -> str:
    # In the order in which the stages dropped them; what no stage names comes last.
    order = ["kept", *(reason for stage in summary.stages for reason in stage.dropped)]
    order += sorted(summary.counts.keys() - set(order))
    rows = "".join(
        f'<tr><th scope="row"><code>{safe(reason)}</code>{_gloss(reason)}</th>'
        f'{_number(summary.counts[reason])}<td class="n">'
        f"{percent(summary.counts[reason], summary.rows)}</td></tr>"
        for reason in dict.fromkeys(order)
        if summary.counts.get(reason)
    )
    return (
        '<div class="scroll"><table><caption>Rows by reason, as counted in the ledger</caption>'
        '<thead><tr><th scope="col">reason</th><th scope="col" class="n">rows</th>'
        f'<th scope="col" class="n">share</th></tr></thead><tbody>{rows}</tbody><tfoot><tr>'
        f'<th scope="row">sum = rows of the pool</th>{_number(sum(summary.counts.values()))}'
        f'<td class="n">{percent(summary.rows, summary.rows)}</td></tr></tfoot></table></div>'
    )


def _gloss(reason: str) -> str:
    words = reason_text(reason)
    # The name of a filter is all that there is to say about it.
    return (
        ""
        if words == reason or reason.startswith("filtered:")
        else f'<br><span class="muted">{safe(words)}</span>'
    )


def _number(value: int, sign: str = "") -> str:
    return f'<td class="n">{sign}{value:,}</td>'


def _histograms_section(summary: RunSummary, figures: Figures) -> str:
    charts = [
        _clip_figure(figures.clip_score, summary),
        _distance_figure(figures.cosine_distance),
        _similarity_figure(figures.similarity),
    ]
    drawn = [chart for chart in charts if chart]
    absent = [
        text
        for text, chart in zip(
            (
                "There are no CLIP scores in this run.",
                "There are no distances to centroids in this run.",
                "Near-duplicates were not looked for in this run.",
            ),
            charts,
            strict=True,
        )
        if not chart
    ]
    notes = f'<p class="muted">{" ".join(absent)}</p>' if absent else ""
    return (
        "<section>\n<h2>Distributions</h2>\n"
        f'{notes}<div class="pair">{"".join(drawn)}</div>\n</section>'
    )


def _clip_figure(data: Histogram | None, summary: RunSummary) -> str:
    if data is None:
        return ""
    low = summary.counts.get("low_clip_score", 0)
    cut = f"{data.mark:.3f}" if data.mark is not None else ""
    chart = histogram_chart(
        data,
        name="clip-score",
        title=f"CLIP score of {_of(data)} rows, kept and dropped",
        x_label="CLIP score",
        mark_label=f"cut {cut}",
    )
    text = "The caption's agreement with the image."
    if data.mark is not None:
        text += f" {low:,} rows were dropped for it: the lowest score that passed is {cut}."
    return figure(chart, "CLIP score", _KEPT_KEYS, text + _remainder(data))


def _distance_figure(data: Histogram | None) -> str:
    if data is None:
        return ""
    chart = histogram_chart(
        data,
        name="cosine-distance",
        title=f"Cosine distance to the centroid of {_of(data)} rows, kept and dropped",
        x_label="cosine distance to the centroid of the row's cluster",
    )
    text = "How unlike the rest of its cluster a row is: near 0 typical, to the right unusual."
    return figure(chart, "Distance to the centroid", _KEPT_KEYS, text + _remainder(data))


def _similarity_figure(data: Histogram | None) -> str:
    if data is None:
        return ""
    mark = f"1 \u2212 ε = {data.mark:.6g}" if data.mark is not None else ""
    chart = histogram_chart(
        data,
        name="similarity",
        title=f"Cosine similarity of {_of(data)} rows to their nearest row, where one is near",
        x_label="cosine similarity to the nearest row compared",
        mark_label=mark,
    )
    text = f"{int(data.second.sum()):,} rows were dropped as near-duplicates."
    keys = '<span class="key one">not a duplicate</span> <span class="key two">duplicate</span>'
    return figure(chart, "Near-duplicates", keys, text + _remainder(data))


_KEPT_KEYS = '<span class="key one">kept</span> <span class="key two">dropped</span>'


def _of(data: Histogram) -> str:
    return f"{int((data.first + data.second).sum()):,}"


def _remainder(data: Histogram) -> str:
    text = f" Rows without a value: {data.missing:,}." if data.missing else ""
    if data.beyond:
        text += f" Rows beyond the axis, counted at its ends: {data.beyond:,}."
    return text


def _scatter_section(clusters: ClusterTable | None) -> str:
    if clusters is None or not (clusters.size > 0).any():
        return ""
    held = int((clusters.size > 0).sum())
    each = "square holds the clusters that fall into it; the stronger its colour, the more"
    each = f"Each {each}." if binned(held) else "Each dot is a cluster."
    none = int(((clusters.kept == 0) & (clusters.size > 0)).sum())
    nothing = f" {none:,} of {held:,} clusters keep no row." if none else ""
    by_size = figure(
        kept_by_size_chart(clusters.size, clusters.kept, name="by-size"),
        "Kept rows by size",
        "",
        f"{each} The lines: every row kept, and the same share of every cluster.{nothing}",
    )
    overall = float(clusters.kept.sum() / clusters.size.sum())
    share = share_by_complexity_chart(
        clusters.complexity, clusters.share, overall=overall, name="by-complexity"
    )
    by_complexity = (
        ""
        if not share
        else figure(
            share,
            "Kept share by complexity",
            "",
            "Clusters that are wide (d_intra) and far from others (d_inter) are given more rows. "
            f"All together keep {percent(overall, 1)} of the rows that reached this stage.",
        )
    )
    return (
        f"<section>\n<h2>Clusters</h2>\n<p>{_sizes(clusters)}</p>"
        f'\n<div class="pair">{by_size}{by_complexity}</div>\n</section>'
    )


def _sizes(clusters: ClusterTable) -> str:
    size = clusters.size[clusters.size > 0]
    low, middle, high = (round(float(q)) for q in np.quantile(size, [0, 0.5, 1]))
    rows = f"{int(size.sum()):,} rows in"
    if len(size) == 1:
        return f"{rows} one cluster."
    spread = f"of {low:,} to {high:,} rows, half of them of {middle:,} or fewer"
    return f"{rows} {len(size):,} clusters, {spread}."


def _footer(summary: RunSummary) -> str:
    return (
        f'<footer class="muted">Made by curate from <code>manifest.json</code> and '
        f"<code>selection/</code> of run <code>{safe(summary.fingerprint[:16])}</code>; "
        "the same run gives the same file. This page loads nothing and runs no scripts.</footer>"
    )
