"""The page of a server, in a browser."""

import browser
import pytest
from scripted import TEXT, Scripted

from serving import keys

pytest.importorskip("starlette", reason="pip install -r requirements-deploy.txt")

from test_listen import servers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not browser.PROGRAM, reason="needs Chromium")]


server = pytest.fixture(servers, name="server")


def say(page, text, tokens):
    page.run(f"$('text').value = {text!r}; $('tokens').value = {tokens}; $('temperature').value = 0; $('send').click()")


@pytest.mark.parametrize("template", [True, False], ids=["chat", "completions"])
def test_the_page_asks_and_shows_the_answer_as_it_comes(template, server, tmp_path):
    found = server(Scripted(seconds=0.03), **({} if template else {"template": None}))
    with browser.Browser(tmp_path) as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{found.port}/")
        page.until("document.readyState === 'complete' && $('name').textContent === 'mine'")
        assert page.run("$('about').textContent").startswith("chat" if template else "completions")
        say(page, "<b>hi</b>", 20)
        page.until("document.querySelectorAll('.said')[1]?.textContent.length > 3 && !$('stop').disabled")
        page.until("$('stop').disabled")
        said = page.run("[...document.querySelectorAll('.said')].map((x) => x.textContent)")
        assert said == ["<b>hi</b>", TEXT.encode()[:20].decode()]
        say(page, "more", 150)
        page.until("document.querySelectorAll('.said')[3]?.textContent.length > 3")
        page.run("$('stop').click()")
        page.until("$('stop').disabled")
        assert found.engine.is_idle(1.0), "cancelled"
        if template:
            assert bytes(found.engine.seen[1].prompt).startswith(b"user: <b>hi</b>\nassistant: H")
        say(page, "x" * 300, 1)
        page.until("document.querySelector('.wrong')")
        assert "256 tokens together" in page.run("document.querySelector('.wrong').textContent")
        page.run("$('new').click()")
        assert page.run("document.querySelectorAll('.said').length") == 0
        assert [error for error in page.errors if "400" not in str(error)] == []


def test_the_page_asks_for_a_key(server, tmp_path):
    key = keys.add(tmp_path / "keys", "a", 0, [])
    found = server(keys=keys.Keys(tmp_path / "keys"))
    with browser.Browser(tmp_path / "browser") as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{found.port}/")
        page.until("document.readyState === 'complete' && $('about').textContent.includes('no such key')")
        assert not page.run("$('locked').hidden")
        page.run(f"$('key').value = {key!r}; $('key').dispatchEvent(new Event('change'))")
        page.until("$('name').textContent === 'mine'")
        say(page, "hi", 5)
        page.until("document.querySelectorAll('.said')[1]?.textContent === 'Hëll'")


def test_nothing_that_is_put_into_the_page_runs(server, tmp_path):
    with browser.Browser(tmp_path) as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{server().port}/")
        page.until("document.readyState === 'complete'")
        page.run(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
        )
        page.run("const i = document.createElement('img'); i.src = 'http://127.0.0.2:1/x.png'; document.body.append(i)")
        assert page.run("window.ran") is None
        assert sum("Content Security Policy" in str(error) for error in page.errors) >= 2
