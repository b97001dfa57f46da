"""The live view, and what both views share: themes, widths, and the policy."""

import re
from typing import Any

import pytest
from stub import POLICY, WEB, Script, chat_answer, live_state

from evenflow.server.middleware import PAGE_POLICY

TEAL = (13, 110, 110)  # --accent in the light theme


def pixels(page: Any, selector: str) -> dict[tuple[int, int, int], int]:
    """How many opaque pixels of each colour a canvas shows."""
    counts = page.evaluate(
        """(selector) => {
            const canvas = document.querySelector(selector);
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const counts = {};
            for (let i = 0; i < data.length; i += 4) {
                if (data[i + 3] === 255) counts[data.slice(i, i + 3)] = (counts[data.slice(i, i + 3)] ?? 0) + 1;
            }
            return counts;
        }""",
        selector,
    )
    return {tuple(int(part) for part in key.split(",")): count for key, count in counts.items()}  # type: ignore[misc]


def open_live(open_page: Any, **options: Any) -> Any:
    page = open_page("/#live", **options)
    page.wait_for_function("() => document.querySelector('#output-rate').textContent !== '–'")
    return page


def test_the_figures(open_page: Any, script: Script) -> None:
    page = open_live(open_page, height=400)
    assert page.evaluate("scrollY") == 0  # the browser goes to #live, and the header must not lie on it
    figures = {
        "#live-about": "demo · Evenflow 0.1.0 · up 01:02:03",
        "#output-rate": "1,234",
        "#output-foot": "prompts 45 tokens/s",
        "#running": "3",
        "#waiting": "1",
        "#requests-foot": "10 completed, 1 aborted, 0 failed",
        "#kv-used": "19%",
        "#kv-summary": "12 of 64 blocks held, 4 of them shared; 8 cached, 44 free. A block is 16 tokens.",
        "#ttft-p50": "12 ms",
        "#ttft-p99": "–",
        "#itl-p50": "3.2 ms",
        "#itl-p99": "12.3 s",
        "#hit-rate": "40%",
        "#hit-foot": "400 of 1,000 tokens",
        "#preemptions": "2",
    }
    assert {selector: page.inner_text(selector) for selector in figures} == figures
    assert page.get_attribute("#rate-spark", "aria-label") == "Output tokens a second: 1,234 now, peak 1,234 in 30 s"


def test_a_server_without_a_number_yet(open_page: Any, script: Script) -> None:
    none = {"p50": None, "p90": None, "p99": None}
    kv = {"num_blocks": 0, "block_size": 16, "num_used": 0, "num_cached": 0}
    script.live = lambda: live_state(
        state="starting",
        uptime_s=0.2,
        output_tokens_per_s=0.0,
        prefix={"queries": 0, "hits": 0},
        kv=kv,
        ttft_ms=none,
        itl_ms=none,
    )
    page = open_live(open_page)
    assert page.inner_text("#live-about") == "starting · demo · Evenflow 0.1.0 · up 00:00:00"
    assert page.inner_text("#output-rate") == "0"
    assert page.inner_text("#hit-rate") == "–"
    assert page.inner_text("#kv-used") == "0%"
    assert page.is_hidden("#kv-map")


def test_the_map_has_a_cell_for_each_character(open_page: Any, script: Script) -> None:
    page = open_live(open_page)
    counts = pixels(page, "#kv-map")
    area = min(counts.values()) // 4  # the rarest colour has four cells
    assert sorted(count / area for count in counts.values()) == [4, 8, 8, 44]
    assert counts[TEAL] == 8 * area


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("num_cells", [1, 64, 2048, 6000])
def test_the_map_fits_its_card(open_page: Any, script: Script, num_cells: int, width: int) -> None:
    kv = live_state()["kv"] | {"map": "2" * num_cells, "blocks_per_cell": 3, "num_blocks": 3 * num_cells}
    script.live = lambda: live_state(kv=kv)
    page = open_live(open_page, width=width)
    box = page.locator("#kv-map").bounding_box()
    assert box["x"] + box["width"] <= width
    assert box["height"] <= 260
    side = page.evaluate("async ([n, w]) => (await import('/web/charts.js')).cellSize(n, w)", [num_cells, box["width"]])
    gap = 2 if side >= 8 else 1
    assert sum(pixels(page, "#kv-map").values()) == num_cells * (side - gap) ** 2
    assert "A cell is 3 blocks." in page.inner_text("#kv-summary")


def test_the_view_follows_and_draws_a_history(open_page: Any, script: Script) -> None:
    page = open_live(open_page)
    script.live = lambda: live_state(output_tokens_per_s=99.0)
    page.wait_for_function("() => document.querySelector('#output-rate').textContent === '99'")
    assert "peak 1,234" in page.inner_text("#rate-peak")
    assert pixels(page, "#rate-spark")[TEAL] > 20


def test_silence_is_told_and_ends(open_page: Any, script: Script) -> None:
    page = open_live(open_page)
    page.watch.allows_refusals = True
    script.is_live_up = False
    page.wait_for_selector("#live-banner:not([hidden])")
    page.get_by_text(re.compile(r"^The server stopped answering [2-9] s ago; retrying$")).wait_for()
    assert re.fullmatch(r"The server stopped answering \d s ago", page.inner_text("#announce"))
    assert page.inner_text("#running") == "3"  # what was known last
    script.is_live_up = True
    page.wait_for_selector("#live-banner", state="hidden")
    assert page.inner_text("#announce") == "The server answers again"


def test_nothing_is_polled_while_nobody_looks(open_page: Any, script: Script) -> None:
    page = open_live(open_page)
    page.click("text=Playground")
    page.clock.install()
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    before = script.num_live_polls
    page.clock.run_for(10_000)
    assert script.num_live_polls == before
    page.click("text=Live")
    page.wait_for_function("() => document.querySelector('#running').textContent === '3'")
    assert script.num_live_polls > before


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_follows_the_system_until_chosen(open_page: Any, system: str) -> None:
    page = open_page(color_scheme=system)
    other = "dark" if system == "light" else "light"
    papers = {"light": "rgb(250, 248, 243)", "dark": "rgb(20, 24, 26)"}
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == papers[system]
    page.click("#theme")
    assert page.evaluate(paper) == papers[other]
    assert page.get_attribute("#theme", "aria-pressed") == str(other == "dark").lower()
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert page.evaluate(paper) == papers[other]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("text", "paper"),
    [
        ("--ink", "--paper"),
        ("--soft", "--paper"),
        ("--soft", "--raised"),
        ("--soft", "--sunk"),
        ("--accent", "--paper"),
        ("--on-accent", "--accent"),
        ("--bad", "--raised"),
    ],
)
def test_text_has_contrast(open_page: Any, theme: str, text: str, paper: str) -> None:
    """WCAG 2.2's contrast of at least 4.5, by its own formula."""
    page = open_page(color_scheme=theme)
    rgb = [
        page.evaluate(
            """(name) => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(${name})`;
                return getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number);
            }""",
            name,
        )
        for name in (text, paper)
    ]
    luminances = [
        sum(
            weight * (c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4)
            for weight, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True)
        )
        for colour in rgb
    ]
    assert (max(luminances) + 0.05) / (min(luminances) + 0.05) >= 4.5


LONG = "a" * 400 + " " + "word " * 60


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_width_scrolls_sideways(open_page: Any, script: Script, width: int) -> None:
    script.chunks = chat_answer(LONG, "\n```\n" + "x = 1; " * 60 + "\n```\n")
    script.model = {"id": "organisation/a-model-with-a-very-long-name-0123456789-instruct", "max_model_len": 32768}
    page = open_page(width=width, height=740)
    page.check("#show-tokens")
    for mode in ("Raw text", "Chat"):
        page.click(f"text={mode}")
        page.fill("#prompt", LONG)
        page.click("#send")
        page.wait_for_selector(".turn .actions")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 1000:
        page.click("#settings-toggle")
        assert page.evaluate("document.querySelector('#settings').scrollWidth") <= width
        page.keyboard.press("Escape")
        assert page.is_hidden("#settings")
    page.click("text=Live")
    page.wait_for_function("() => document.querySelector('#running').textContent === '3'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_motion_is_left_out_where_it_is_not_wanted(open_page: Any, script: Script) -> None:
    script.is_held = True
    page = open_page(reduced_motion="reduce")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".writing")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.writing .text'), '::after').animationName") == "none"
    )


def test_the_page_waits_for_a_server_that_starts(open_page: Any, script: Script) -> None:
    page = open_page()
    page.watch.allows_refusals = True
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#model[data-state=lost]")
    page.unroute("**/v1/models")
    page.wait_for_selector("#model[data-state=ready]")


def test_the_policy_is_enforced(open_page: Any, script: Script) -> None:
    """The other tests rely on it: an inline script must be refused, and be seen as a problem."""
    page = open_page()
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    assert page.evaluate("window.ran") is None
    assert len(page.watch.problems) == 1
    assert "Content Security Policy" in page.watch.problems.pop()


def test_the_server_sends_the_same_policy() -> None:
    assert PAGE_POLICY == POLICY


def test_the_page_is_small() -> None:
    files = list(WEB.iterdir())
    assert {file.suffix for file in files} <= {".html", ".css", ".js", ".svg"}
    assert sum(file.stat().st_size for file in files) < 60 * 1024
    parsing = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://")
    for file in files:
        found = [word for word in parsing if word in file.read_text().replace("http://www.w3.org/2000/svg", "")]
        assert found == [], file.name
