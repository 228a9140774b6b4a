"""The report opened from disk in headless Chromium: it draws without an error, and the inspector reacts."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect, sync_playwright

from megatron_tip.observability.token_table import read_token_table, token_table_file
from megatron_tip.report.page import write_report_page
from tools.synthetic_runs import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

NAME = "na<b>me"
NASTY = '<img src=x onerror="window.broken=1"></script><script>window.broken=1</script>\x07\u202e&amp;'


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run; one that lacks metrics and has nasty texts in its view; one without views; one without tokens."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "whole", steps=6, view_steps=[3, 6], responses=3, tokens=200)
    older = token_table_file(folder / "whole" / "views", 3)
    facts = {key: value for key, value in pq.read_metadata(older).metadata.items() if key != b"ARROW:schema"}
    pq.write_table(pq.read_table(older).drop_columns(["compatibility"]).replace_schema_metadata(facts), older)
    lacking = ["train/teacher_entropy", "memory/"]
    texts = dict.fromkeys(range(0, 400, 3), NASTY)
    rule = "tip_soft_or"
    write_run(folder / NAME, steps=4, seed=2, rule=rule, view_steps=[3], without=lacking, texts=texts, sample=NASTY)
    write_run(folder / "no views", steps=5, seed=3)
    result = {"benchmark": "gsm8k", "model": NASTY, "metric": "m", "mean": 1 / 3, "sd": 0.05, "num_seeds": 2}
    result |= {"num_questions": 9, "limit": 9}
    (folder / "whole" / "eval.jsonl").write_text(json.dumps(result) + "\n")
    write_run(folder / "no tokens", steps=2, seed=4, view_steps=[1], responses=1, tokens=0)
    (folder / "whole" / "trace").mkdir()
    events = [{"name": "rollout", "ph": "X", "ts": 0, "dur": 1e6}, {"name": "train", "ph": "X", "ts": 2e6, "dur": 1e6}]
    events = [event for step in (1, 2) for event in (*events, {"name": f"step {step}", "ph": "i", "ts": 3e6})]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "whole" / "trace" / "rank_00000.jsonl").write_text(lines)
    target = folder / "report.html"
    write_report_page([folder / "whole", folder / NAME, folder / "no views", folder / "no tokens"], target)
    return target


@pytest.fixture
def page(browser, report):
    """The report, drawn; fails for anything that the console or the network saw."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, color_scheme="light")
    page = context.new_page()
    seen = []
    page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: seen.append(request.url) if not request.url.startswith(("file:", "blob:", "data:")) else None,
    )
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    yield page
    assert seen == []
    context.close()


def test_figures_are_drawn_and_gaps_are_named(page):
    assert page.locator("#failure").is_hidden()
    assert page.locator("#curve-figures .main-svg").count() > 0
    drawn = page.locator("#curve-figures .drawing.js-plotly-plot")
    assert drawn.count() == page.locator("#curve-figures .drawing").count()
    entropy = page.locator("#curve-figures figure", has_text="Entropy of the next token")
    expect(entropy.locator(".gap")).to_have_text("Not recorded: train/teacher_entropy in na<b>me")
    memory = page.locator("#memory-figures figure", has_text="Memory by phase")
    expect(memory.locator(".gap")).to_have_text("Not recorded: memory/… in na<b>me")
    expect(page.locator("#plane-figures figure").nth(2)).to_contain_text("tracking.view_every_steps turns them on")
    page.select_option("#any-metric", "train/teacher_entropy")
    expect(page.locator("#any-figure .gap")).to_contain_text(NAME)


def test_toolbars_are_seen_on_hover_alone_and_never_cover_data(page):
    drawings = page.locator(".drawing.js-plotly-plot")
    assert drawings.count() > 10
    page.mouse.move(0, 0)
    for drawing in drawings.all():
        expect(drawing.locator(".modebar-group").first).to_have_css("opacity", "0")
        bar, data = (drawing.locator(part).first.bounding_box() for part in (".modebar", ".nsewdrag"))
        assert bar["y"] + bar["height"] <= data["y"]
    drawings.first.hover()
    expect(drawings.first.locator(".modebar-group").first).to_have_css("opacity", "1")


def test_timeline_is_drawn_and_its_gap_is_named(page):
    (figure,) = page.locator("#timeline-figures figure").all()
    expect(figure.locator("figcaption")).to_contain_text("whole")
    expect(figure.locator(".legendtext")).to_have_text(["rollout", "train"])
    heights = {label.text_content(): label.bounding_box()["y"] for label in figure.locator(".ytick text").all()}
    assert heights["step 1"] < heights["step 2"]
    bars = [bar.bounding_box() for bar in figure.locator(".bars .point path").all()]
    (rollout, _), (train, _) = bars[:2], bars[2:]
    assert train["x"] - rollout["x"] == pytest.approx(2 * rollout["width"], rel=0.05)
    expect(page.locator("#timeline-note")).to_contain_text(f"by {NAME}, no views, no tokens: monitoring.trace")


def test_tables_show_runs_and_benchmarks(page):
    expect(page.locator("#overview")).to_contain_text("4.000 → 1.000 nats per token")
    expect(page.locator("#overview details")).to_contain_text("tip_soft_or")
    expect(page.locator("#benchmarks td").nth(4)).to_have_text("33.3 ± 5.0")
    expect(page.locator("#benchmarks td").nth(6)).to_have_text("9, a part (--limit)")
    assert "onerror=" in page.locator("#benchmarks").text_content()


def test_plane_follows_its_step(page):
    note = page.locator("#plane-figures figure").nth(1)
    expect(note).to_contain_text("no view of step 6")
    page.locator("#plane-step").press("ArrowLeft")
    expect(page.locator("#plane-step-shown")).to_have_text("3")
    expect(note).to_contain_text("tokens of step 3")


def test_a_statistic_that_an_older_view_lacks_is_named(page):
    note, shade = page.locator("#token-note"), page.locator("#shade input[value=compatibility]")
    expect(shade).to_have_count(1)
    expect(note).not_to_contain_text("Not recorded in this view")
    page.select_option("#token-step", label="3")
    expect(note).to_contain_text("Not recorded in this view: C.")
    expect(shade).to_have_count(0)


def test_hover_and_focus_show_the_token(page, report):
    token = page.locator("#text span.token:not(.not-valid)").nth(5)
    token.hover()
    place = token.get_attribute("data-token")
    expect(page.locator("#card .facts").first).to_contain_text(f"position {place} of 200")
    lists = page.locator("#card .candidates")
    assert [lists.nth(k).locator("h4").text_content() for k in (0, 1)] == ["Student", "Teacher"]
    expect(lists.first.locator("li.sampled")).to_have_count(1)
    table = read_token_table(token_table_file(report.parent / "whole" / "views", 6))
    row = table.tokens.to_pylist()[int(place)]
    for k, model in enumerate(("student", "teacher")):
        shares = np.exp(np.array(row[f"{model}_support_logprobs"], dtype=float))
        texts = [table.facts.id_texts[token] for token in row[f"{model}_support_ids"]]
        expected = [(text, share) for text, share in zip(texts, shares, strict=True) if share >= 1e-3]
        shown = lists.nth(k).locator("li").all()
        assert len(shown) == len(expected)
        for item, (text, share) in zip(shown, expected, strict=True):
            assert item.locator(".token-name").text_content() == text.replace(" ", "␣").replace("\n", "↵")
            value = item.locator(".value").text_content()
            assert value in ("100 %", "< 0.1 %") or abs(float(value.removesuffix(" %")) / 100 - share) < 1.1e-3
    page.locator("#text span.token").nth(9).focus()
    expect(page.locator("#card .facts").first).to_contain_text("position 9 of 200")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#card .facts").first).to_contain_text("position 10 of 200")


def test_shading_switches_and_marks_the_supervised(page):
    classes = "[...document.querySelectorAll('#text span')].map(s => s.className).join()"
    by_score = page.evaluate(classes)
    assert "is-selected" in by_score
    page.locator("#shade label", has_text="H(p)").click()
    assert page.evaluate(classes) != by_score
    expect(page.locator("#legend")).to_contain_text("student's entropy")
    page.locator("#shade label", has_text="none").click()
    assert "shade-" not in page.evaluate(classes)


def test_quadrant_filter_dims_the_others(page):
    chip = page.locator("#filter-Q3")
    count = int(chip.text_content().split("=")[1])
    assert 0 < count < 200
    chip.click()
    assert page.locator("#text span.token:not(.dimmed)").count() == count
    expect(chip).to_have_attribute("aria-pressed", "true")
    page.locator("body").press("Escape")
    assert page.locator("#text span.dimmed").count() == 0
    page.locator("body").press("3")
    assert page.locator("#text span.token:not(.dimmed)").count() == count


def test_keys_step_by_score_and_through_responses(page):
    def score():
        return float(page.locator("#card dl div", has_text="Score").locator("dd").text_content())

    page.locator("#tokens").scroll_into_view_if_needed()
    scores = [score()]
    for _ in range(6):
        page.keyboard.press("n")
        scores.append(score())
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    page.keyboard.press("p")
    assert score() == scores[-2]
    first = page.locator("#text").text_content()
    page.keyboard.press("]")
    expect(page.locator("#token-response")).to_have_value("1")
    expect(page.locator("#text")).not_to_have_text(first)


def test_the_response_asked_for_last_is_shown(page):
    """Though the one before it takes longer to unpack."""
    texts = []
    for response in ("0", "1", "2"):
        page.select_option("#token-response", response)
        page.wait_for_function("document.querySelector('#text span.current')")
        page.wait_for_timeout(200)
        texts.append(page.locator("#text").text_content())
    assert len(set(texts)) == 3
    page.select_option("#token-response", "0")
    page.wait_for_function("text => document.getElementById('text').textContent === text", arg=texts[0])
    page.evaluate("""() => {
      const unpack = Response.prototype.arrayBuffer;
      let milliseconds = 600;
      Response.prototype.arrayBuffer = async function () {
        const wait = milliseconds;
        milliseconds = 0;
        await new Promise((done) => setTimeout(done, wait));
        return unpack.call(this);
      };
      document.getElementById("response-on").click();
      document.getElementById("response-on").click();
    }""")
    page.wait_for_timeout(1200)
    expect(page.locator("#token-response")).to_have_value("2")
    assert page.locator("#text").text_content() == texts[2]


def test_an_empty_response_has_nothing_to_point_at(page):
    page.select_option("#token-run", label="no tokens")
    expect(page.locator("#card")).to_have_text("An empty response.")
    page.evaluate("document.getElementById('text').dispatchEvent(new MouseEvent('mouseleave'))")
    for key in ("n", "ArrowRight", "s", "3", "Escape"):
        page.locator("body").press(key)
    expect(page.locator("#card")).to_have_text("An empty response.")


def test_search_finds_across_tokens_and_steps(page):
    text = page.evaluate("[...document.querySelectorAll('#text span')].map(s => s.textContent)")
    wanted = (text[50] + text[51] + text[52]).strip()
    page.locator("#search").fill(wanted.upper())
    expect(page.locator("#search-count")).to_contain_text("hit")
    assert int(page.locator("#search-count").text_content().split()[0]) == "".join(text).lower().count(wanted.lower())
    assert page.locator("#text span.hit").count() >= 3
    before = page.locator("#text span.current").get_attribute("data-token")
    page.locator("#search").press("Enter")
    expect(page.locator("#text span.current.hit")).to_have_count(1)
    page.locator("#search").press("n")  # typed, not a key of the inspector
    assert page.locator("#search").input_value().endswith("n")
    assert before is not None


def test_text_of_models_is_shown_and_never_run(page):
    page.select_option("#token-run", label=NAME)
    expect(page.locator("#token-step option")).to_have_text(["3"])
    expect(page.locator("#text")).to_contain_text(NASTY.replace("\x07", "\u2407").replace("\u202e", "⟨U+202E⟩"))
    assert page.evaluate("window.broken") is None
    assert page.locator("#text img, #samples img, #text script, h1 b").count() == 0
    assert "onerror=" in page.locator("#samples").text_content()


def test_dark_narrow_and_print(browser, report):
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 400, f"the page is {width} pixels wide"
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 26)"
    page.select_option("#theme", "light")
    assert page.evaluate(background) == "rgb(251, 251, 250)"
    assert len(page.pdf()) > 50_000
    context.close()


def test_axes_of_steps_have_whole_numbers_and_logarithmic_ones_say_so(page):
    kl = page.locator("#curve-figures figure", has_text="Reverse KL, student to teacher")
    expect(kl.locator("figcaption span")).to_have_text("nats per token, logarithmic")
    expect(page.locator("#curve-figures figure", has_text="Loss on the").locator("figcaption span")).to_have_text(
        "nats"
    )
    ticks = page.locator("#curve-figures .xtick text, #time-figures .xtick text").all_text_contents()
    assert ticks
    assert all(tick.replace(",", "").isdigit() for tick in ticks), ticks


def test_the_quadrants_of_a_single_step_are_seen(browser, tmp_path):
    write_run(tmp_path / "run", steps=1, view_steps=[1], responses=1, tokens=8)
    write_report_page([tmp_path / "run"], tmp_path / "report.html")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    bars = page.locator("#share-figures .barlayer .point path")
    expect(bars).to_have_count(8)
    assert all(bars.nth(place).bounding_box()["width"] > 20 for place in range(8))
    page.close()


def test_held_out_points_are_joined_at_any_spacing(page):
    """Six steps, of which two are measured; and all three points of a run of two steps."""
    joined = page.evaluate(
        """[...document.querySelectorAll('#curve-figures .drawing')].flatMap(drawing => drawing.data ?? [])
        .filter(trace => trace.name.includes('held-out')).map(trace => trace.connectgaps)"""
    )
    assert len(joined) == 4
    assert all(joined)


def test_nothing_overflows_a_narrow_screen(browser, report):
    context = browser.new_context(viewport={"width": 420, "height": 800})
    narrow = context.new_page()
    narrow.goto(report.as_uri())
    narrow.wait_for_selector("html[data-ready]", timeout=60_000)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 420
    too_wide = narrow.evaluate(
        """[...document.querySelectorAll('main *')].filter(element => {
          const box = element.getBoundingClientRect();
          return box.width && box.right > 421 && !element.closest('.wide, nav, svg, pre, .drawing');
        }).map(element => element.outerHTML.slice(0, 120))"""
    )
    assert too_wide == []
    context.close()
