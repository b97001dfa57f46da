"""The playground in a real browser, against scripted answers."""

import math
from typing import Any

import pytest
from stub import Script, chat_answer, chat_chunk, text_chunk, token, usage_chunk

ANSWER = ".answer .text"


def ask(page: Any, text: str = "Hello") -> None:
    page.fill("#prompt", text)
    page.click("#send")


def ask_and_wait(page: Any, text: str = "Hello") -> None:
    num_answers = page.locator(".stats span:first-child").count()
    ask(page, text)
    page.locator(".stats span:first-child").nth(num_answers).wait_for()


def wait_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.textContent === text", arg=[selector, text]
    )


def test_an_answer_streams_and_is_counted(open_page: Any, script: Script) -> None:
    script.chunks, script.is_held = chat_answer("Once", " upon", " a", " time.")[:2], True
    page = open_page()
    ask(page, "tell me a tale")
    wait_text(page, ANSWER, "Once upon")  # while the rest is still to come
    assert page.inner_text("#send") == "Stop"
    script.is_held = False
    page.wait_for_selector(".stats span")
    path, body = script.bodies[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "demo",
        "messages": [{"role": "user", "content": "tell me a tale"}],
        "logprobs": True,
        "top_logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert page.inner_text(".stats span:first-child") == "2 tokens"


def test_the_server_counts_tokens_when_it_says_so(open_page: Any, script: Script) -> None:
    script.chunks = [chat_chunk("A", [token("A")]), chat_chunk(" tale", [], "length"), usage_chunk(7, 1234)]
    page = open_page()
    ask_and_wait(page)
    stats = page.inner_text(".stats")
    assert "1234 tokens" in stats
    assert "prompt 7" in stats
    assert "reached the token limit" in stats
    assert "tokens/s" in stats
    assert "first after" in stats


@pytest.mark.parametrize("by_key", [False, True])
def test_stop_ends_the_request_at_the_server(open_page: Any, script: Script, by_key: bool) -> None:
    script.chunks, script.is_held = chat_answer("Once", " upon")[:1], True
    page = open_page()
    ask(page)
    wait_text(page, ANSWER, "Once")
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.click("#send")
    assert script.disconnected.wait(10)
    page.wait_for_selector("text=stopped by you")
    assert page.inner_text(ANSWER) == "Once"
    assert page.inner_text("#send") == "Send"


def test_the_conversation_is_sent_with_the_system_prompt(open_page: Any, script: Script) -> None:
    page = open_page()
    page.fill("#system", "Be brief.")
    ask_and_wait(page, "one")
    ask_and_wait(page, "two")
    assert script.bodies[1][1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Once upon a time."},
        {"role": "user", "content": "two"},
    ]


def test_settings_are_sent_as_numbers_and_empty_ones_are_not(open_page: Any, script: Script) -> None:
    page = open_page()
    page.fill("#set-temperature", "0.333")
    page.fill("#set-top_k", "0")
    page.fill("#set-seed", "9007199254740991")
    page.fill("#set-stop", "\\n\nEND\n")
    ask_and_wait(page)
    body = script.bodies[0][1]
    assert {"temperature": 0.333, "top_k": 0, "seed": 2**53 - 1, "stop": ["\\n", "END"]}.items() <= body.items()
    assert not {"top_p", "min_p", "max_tokens"} & body.keys()


def test_a_setting_out_of_range_is_not_sent(open_page: Any, script: Script) -> None:
    page = open_page()
    page.fill("#set-top_p", "1.5")
    ask(page)
    assert page.evaluate("document.activeElement.id") == "set-top_p"
    page.fill("#set-top_p", "1")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".stats span")
    assert [body["top_p"] for _, body in script.bodies] == [1]


def test_an_error_is_told_with_what_to_do(open_page: Any, script: Script) -> None:
    page = open_page()
    page.watch.allows_refusals = True
    script.refuse(400, "temperature=99 must be from 0 to 2", "temperature")
    ask(page)
    failure = page.locator(".failure")
    assert "Temperature=99 must be from 0 to 2." in failure.inner_text()
    assert "Change it and try again." in failure.inner_text()
    failure.get_by_role("button", name="Show the setting").click()
    assert page.evaluate("document.activeElement.id") == "set-temperature"
    script.status = 200
    page.get_by_role("button", name="Try again").click()
    wait_text(page, ANSWER, "Once upon a time.")
    assert failure.count() == 0


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "Reload the page"), (429, "Try again in a moment"), (503, "Wait a little"), (500, "the server's log")],
)
def test_every_kind_of_error_has_advice(open_page: Any, script: Script, status: int, advice: str) -> None:
    page = open_page()
    page.watch.allows_refusals = True
    script.refuse(status, "so it is")
    ask(page)
    text = page.inner_text(".failure")
    assert "So it is." in text
    assert advice in text


def test_an_error_in_the_stream_keeps_what_arrived(open_page: Any, script: Script) -> None:
    script.chunks = [chat_chunk("Once", [token("Once")]), {"error": {"message": "the engine has stopped"}}]
    page = open_page()
    ask(page)
    assert "The engine has stopped." in page.inner_text(".failure")
    assert page.inner_text(ANSWER) == "Once"


def test_an_answer_that_breaks_off_is_not_taken_for_complete(open_page: Any, script: Script) -> None:
    script.breaks_off = True
    page = open_page()
    ask(page)
    assert "The connection broke" in page.inner_text(".failure")


def test_a_question_without_an_answer_is_not_sent_again(open_page: Any, script: Script) -> None:
    page = open_page()
    page.watch.allows_refusals = True
    script.refuse(429, "full")
    ask(page, "lost")
    page.wait_for_selector(".failure")
    script.status = 200
    ask_and_wait(page, "kept")
    assert script.bodies[1][1]["messages"] == [{"role": "user", "content": "kept"}]


def test_edit_replaces_what_follows(open_page: Any, script: Script) -> None:
    page = open_page()
    for text in ("one", "two", "three"):
        ask_and_wait(page, text)
    page.get_by_role("button", name="Edit: two").click()
    assert page.input_value("#prompt") == "two"
    page.fill("#prompt", "deux")
    page.press("#prompt", "Enter")
    wait_text(page, ".turn:nth-child(2) .stats span", "4 tokens")
    assert page.locator(".question .text").all_inner_texts() == ["one", "deux"]
    contents = [message["content"] for message in script.bodies[-1][1]["messages"]]
    assert contents == ["one", "Once upon a time.", "deux"]


def test_try_again_asks_the_same(open_page: Any, script: Script) -> None:
    page = open_page()
    ask_and_wait(page, "one")
    script.chunks = chat_answer("Another", " one.")
    page.get_by_role("button", name="Try again").click()
    wait_text(page, ANSWER, "Another one.")
    assert script.bodies[0][1]["messages"] == script.bodies[1][1]["messages"]
    assert page.locator(".turn").count() == 1


def test_raw_text_is_continued_and_goes_on(open_page: Any, script: Script) -> None:
    script.model = {"id": "other"}
    script.chunks = [
        text_chunk(", there", [(",", -0.1), (" there", -1.0)]),
        text_chunk(" was", [(" was", -0.2)], "length"),
    ]
    page = open_page()
    page.click("text=Raw text")
    page.fill("#prompt", "Once upon a time")
    page.press("#prompt", "Control+Enter")
    wait_text(page, ANSWER, ", there was")
    page.click("text=Keep going")
    wait_text(page, ".question .text", "Once upon a time, there was")
    wait_text(page, ANSWER, ", there was")
    (path, first), (_, second) = script.bodies
    assert path == "/v1/completions"
    assert (first["prompt"], second["prompt"]) == ("Once upon a time", "Once upon a time, there was")
    assert (first["max_tokens"], first["logprobs"]) == (256, 5)
    assert "messages" not in first


def test_tokens_show_their_alternatives_on_hover_focus_and_tap(open_page: Any, script: Script) -> None:
    best = [(" a", math.log(0.6)), (" the", math.log(0.25)), ("\n", math.log(0.0004))]
    script.chunks = [
        chat_chunk("Once", [token("Once", -0.001)]),
        chat_chunk(" the", [token(" the", math.log(0.25), best)]),
    ]
    page = open_page(has_touch=True)
    ask_and_wait(page)
    assert page.locator(".answer .token").count() == 0
    page.check("#show-tokens")
    tokens = page.locator(".answer .token")
    assert tokens.all_text_contents() == ["Once", " the"]
    assert tokens.nth(0).get_attribute("class") == "token p0"
    assert tokens.nth(1).get_attribute("class") == "token p2"
    expected = ["␣a 60%", "␣the 25%", "⏎ <0.1%"]
    for act in (tokens.nth(1).hover, tokens.nth(1).focus, tokens.nth(1).tap):
        act()
        rows = page.locator("#tooltip .row").all()
        assert [row.inner_text().replace("\n", " ") for row in rows] == expected
        assert page.locator("#tooltip .chosen .name").inner_text() == "␣the"
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_selector("#tooltip", state="hidden")


def test_a_token_that_is_not_among_the_best_is_listed_too(open_page: Any, script: Script) -> None:
    script.chunks = [chat_chunk("rare", [token("rare", math.log(0.01), [("often", math.log(0.9))])])]
    page = open_page()
    page.check("#show-tokens")
    ask_and_wait(page)
    page.hover(".answer .token")
    assert page.locator("#tooltip .value").all_inner_texts() == ["90%", "1.0%"]


def test_tokens_that_are_parts_of_a_character_are_joined(open_page: Any, script: Script) -> None:
    wolf = "🐺".encode()
    parts = [token(wolf[:2]), token(wolf[2:3]), token(wolf[3:])]
    script.chunks = [
        chat_chunk("A", [token("A")]),
        chat_chunk("", parts[:2]),
        chat_chunk("🐺", parts[2:]),
        chat_chunk("!", [token("!")]),
    ]
    page = open_page()
    page.check("#show-tokens")
    ask_and_wait(page)
    assert page.locator(".answer .token").all_text_contents() == ["A", "🐺", "!"]
    page.hover(".answer .token:nth-child(2)")
    assert "3 tokens make this text" in page.inner_text("#tooltip")


def test_completions_name_parts_of_characters_as_bytes(open_page: Any, script: Script) -> None:
    script.chunks = [text_chunk("", [("bytes:\\xc3", -1.0)]), text_chunk("é", [("bytes:\\xa9", -1.0)], "stop")]
    page = open_page()
    page.check("#show-tokens")
    page.click("text=Raw text")
    page.fill("#prompt", "caf")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(".stats span")
    assert page.locator(".answer .token").all_text_contents() == ["é"]


ALIGNMENTS = [
    ("special tokens are not shown", ["Hi", "<|end|>"], "Hi", [("Hi", 1)]),
    ("a special token amid the text", ["Hi", "<|x|>", " you"], "Hi you", [("Hi", 1), (" you", 1)]),
    ("a stop string cuts inside of a token", ["Hi", " there\nEND"], "Hi there", [("Hi", 1), (" there", 1)]),
    ("the first space is dropped", [" Hi", " you"], "Hi you", [("Hi", 1), (" you", 1)]),
    ("text that no token explains", ["Hi"], "Hi you", [("Hi", 1), (" you", 0)]),
    ("no tokens", [], "Hi", [("Hi", 0)]),
    ("a byte order mark is text", ["\ufeffHi"], "\ufeffHi", [("\ufeffHi", 1)]),
]


@pytest.mark.parametrize(
    ("tokens", "text", "spans"), [case[1:] for case in ALIGNMENTS], ids=[case[0] for case in ALIGNMENTS]
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_tokens_are_laid_over_the_text(
    open_page: Any, tokens: list[str], text: str, spans: list[tuple[str, int]], is_streamed: bool
) -> None:
    page = open_page()
    found = page.evaluate(
        """async ([tokens, text, isStreamed]) => {
            const { Alignment } = await import("/web/tokens.js");
            const alignment = new Alignment();
            const spans = [];
            tokens.forEach((token, i) => {
                alignment.push({ text: token, bytes: [...new TextEncoder().encode(token)] });
                // The text is behind its tokens, as when a stop string might begin.
                if (isStreamed) spans.push(...alignment.advance(text.slice(0, i), false));
            });
            spans.push(...alignment.advance(text, true));
            return spans.map((span) => [span.text, span.tokens.length]);
        }""",
        [tokens, text, is_streamed],
    )
    assert [tuple(span) for span in found] == spans


def test_events_are_read_however_the_network_cuts_them(open_page: Any) -> None:
    page = open_page()
    stream = 'data: {"a": "é🐺"}\r\n\r\n: comment\n\ndata: [DONE]\n\n'
    found = page.evaluate(
        """async (text) => {
            const { readEvents } = await import("/web/api.js");
            const bytes = new TextEncoder().encode(text);
            const results = new Set();
            for (let size = 1; size <= bytes.length; size++) {
                let at = 0;
                const reader = { read: async () => {
                    const value = bytes.slice(at, at += size);
                    return { done: value.length === 0, value };
                } };
                const events = [];
                for await (const event of readEvents(reader)) events.push(event);
                results.add(JSON.stringify(events));
            }
            return [...results];
        }""",
        stream,
    )
    assert found == ['["{\\"a\\": \\"é🐺\\"}","[DONE]"]']


def test_what_the_model_writes_is_text(open_page: Any, script: Script) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    script.chunks = [
        chat_chunk(evil, [token(evil, -3.0, [(evil, -3.0)])], "stop"),
        chat_chunk("\n```html\n" + evil + "\n```\n", []),
    ]
    script.model = {"id": "<b>demo</b>"}
    page = open_page()
    for shows_tokens in (False, True):
        page.set_checked("#show-tokens", shows_tokens)
        ask_and_wait(page, evil)
        assert evil in page.inner_text(ANSWER)
    page.locator(".answer .token").first.hover()
    assert page.inner_text("#tooltip .name") == evil
    assert page.inner_text("#model-name") == "<b>demo</b>"
    page.reload()
    page.wait_for_selector(ANSWER)
    assert page.locator("main img, main script, .tooltip img, #announce img, .model b").count() == 0
    assert page.title() == "Evenflow"


def test_fenced_code_gets_a_box(open_page: Any, script: Script) -> None:
    script.chunks = chat_answer("See:\n```py\nx = 1\n```\nDone. ``` is no fence here")
    page = open_page()
    ask_and_wait(page)
    assert page.locator(".answer pre").all_inner_texts() == ["x = 1\n"]
    assert "Done. ``` is no fence here" in page.inner_text(ANSWER)


def test_a_reload_keeps_the_conversation_and_the_settings(open_page: Any, script: Script) -> None:
    page = open_page()
    page.fill("#set-seed", "7")
    page.check("#show-tokens")
    ask_and_wait(page, "one")
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert page.locator(".answer .token").all_text_contents() == ["Once", " upon", " a", " time."]
    assert page.input_value("#set-seed") == "7"
    ask_and_wait(page, "two")
    assert len(script.bodies[-1][1]["messages"]) == 3
    page.click("#clear")
    page.reload()
    page.wait_for_selector("#empty")
    assert page.locator(".turn").count() == 0


@pytest.mark.parametrize(
    "stored", ["no json", "null", '{"mode": "chat"}', '{"mode":"chat","chat":[{"question":1}],"text":[]}']
)
def test_a_broken_store_is_ignored(open_page: Any, script: Script, stored: str) -> None:
    page = open_page()
    page.evaluate(
        "stored => { for (const key of ['playground', 'settings', 'theme']) localStorage[`evenflow.${key}`] = stored }",
        stored,
    )
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.reload()
    ask_and_wait(page)
    assert page.inner_text(ANSWER) == "Once upon a time."
    before = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != before


def test_the_demo_suggests_prompts_and_others_do_not(open_page: Any, script: Script) -> None:
    page = open_page()
    page.click("text=Once upon a time")
    page.wait_for_selector(".turn")
    page.wait_for_function("() => document.querySelector('#send').textContent === 'Continue'")
    assert script.bodies[0][0] == "/v1/completions"
    page.click("text=Chat")
    page.click("text=tell me the tale of the wolf and the lamb")
    page.wait_for_selector(".stats span")
    assert script.bodies[1][1]["messages"][0]["content"] == "tell me the tale of the wolf and the lamb"
    script.model = {"id": "other", "max_model_len": 4096}
    assert open_page().locator(".chip").count() == 0


def test_copy_copies_the_text(open_page: Any, script: Script) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask_and_wait(page)
    page.click("text=Copy")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Once upon a time."


def test_all_by_keyboard(open_page: Any, script: Script) -> None:
    script.model = {"id": "other"}  # without chips
    page = open_page()
    page.keyboard.press("Tab")
    assert page.inner_text(":focus") == "Skip to content"
    page.keyboard.press("Enter")
    reached = []
    while "prompt" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached == ["chat", "show-tokens", "prompt"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    while page.evaluate("document.activeElement.id") != "prompt":
        page.keyboard.press("Tab")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.wait_for_selector(".stats span")
    assert script.bodies[0][1]["messages"][0]["content"] == "Hello\nthere"
    while page.evaluate("!document.activeElement.matches('.answer .token')"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == " time."
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == " a"
    assert page.is_visible("#tooltip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tooltip")


def test_screen_readers_hear_the_answer_once(open_page: Any, script: Script) -> None:
    page = open_page()
    page.evaluate(
        """window.heard = []; new MutationObserver(() => heard.push(document.querySelector("#announce").textContent))
            .observe(document.querySelector("#announce"), { childList: true, subtree: true })"""
    )
    ask_and_wait(page)
    assert page.evaluate("heard") == ["Writing", "Once upon a time."]


def test_every_control_has_a_name(open_page: Any, script: Script) -> None:
    page = open_page()
    page.check("#show-tokens")
    ask_and_wait(page)
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, a, canvas")].filter((element) =>
            !(element.labels?.length || element.ariaLabel || element.textContent.trim() || element.dataset.of)
            && element.id !== "kv-map").map((element) => element.outerHTML)"""
    )
    assert nameless == []
