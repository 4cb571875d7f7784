"""evaluation/serve.py: its page in a real browser, where there is one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, Page
from page_server import MEGABYTES, Server, encoded, serving, square, write_served
from tiny import SOUTH, WEST, photo

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def opened(page: Page, server: Server, width: int = 1280) -> Page:
    page.open(server.address, width)
    page.wait_for("document.body?.dataset.state === 'ready'")
    return page


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_places_of_a_chosen_photo_and_known_photos(
    page: Page, server: Server, folder: Path
) -> None:
    path = sorted((folder / "queries").iterdir())[5]
    _, expected = server.locate(path.read_bytes(), path.name)
    for width in (1280, 390):
        opened(page, server, width).choose("#file", path)
        page.wait_for("document.body.dataset.state === 'answer' && !document.getElementById('known').hidden")
        assert page.evaluate("document.getElementById('within').textContent") == "probability within 25 m"
        shown = page.evaluate("[...document.querySelectorAll('#places .percent')].map((n) => n.textContent)")
        places = expected["photos"][0]["places"]
        assert shown == ["< 0.1 %" if p["confidence"] < 1e-3 else f"{100 * p['confidence']:.1f} %" for p in places]
        assert page.evaluate("document.getElementById('photo').naturalWidth") == 32
        assert page.evaluate("document.querySelectorAll('#known figure img').length") == 4
        assert "mlat=37.76" in page.evaluate("document.querySelector('#places a').href")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # The first place is where the map says that it is: pointing there shows its card.
        page.evaluate("map.canvas.scrollIntoView({ block: 'center' })")
        x, y = page.evaluate(
            "(() => { const b = map.canvas.getBoundingClientRect(), [x, y] = map.toScreen(...local(answer.places[0]));"
            " return [b.left + x, b.top + y]; })()"
        )
        page.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        page.wait_for("!document.getElementById('card').hidden")
        assert page.evaluate("document.getElementById('card').textContent").startswith(f"1. {shown[0]}")
    assert page.problems == []


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_reason_for_a_broken_and_for_a_huge_image_and_goes_on(
    page: Page, server: Server, folder: Path, tmp_path: Path
) -> None:
    opened(page, server)
    good = sorted((folder / "queries").iterdir())[0]
    cases = {
        "cut.jpg": (good.read_bytes()[:300], "damaged"),
        "huge.jpg": (square(30_000), "more pixels"),
        "large.bin": (bytes(3 * MEGABYTES * 10**6), "larger than the 1 MB"),
        "<img src=x onerror=alert(1)>.jpg": (b"text", "no photo of a known format"),
    }
    for name, (body, words) in cases.items():
        (tmp_path / name).write_bytes(body)
        page.choose("#file", tmp_path / name)
        page.wait_for("document.body.dataset.state === 'error'")
        assert words in page.evaluate("document.getElementById('status').textContent")
        assert page.evaluate("document.getElementById('answer').hidden")
        page.choose("#file", good)
        page.wait_for("document.body.dataset.state === 'answer'")
    assert all('"level": "error"' in problem and "status of 4" in problem for problem in page.problems)
    page.problems.clear()


@pytest.mark.slow
@needs_browser
def test_twenty_uploads_at_once_from_a_page_and_a_pasted_photo_are_answered(page: Page, server: Server) -> None:
    opened(page, server)
    picture = json.dumps(list(encoded(photo(WEST, SOUTH, 32, 3))))
    page.evaluate(f"globalThis.photo = new File([new Uint8Array({picture})], 'a.jpg', {{ type: 'image/jpeg' }})")
    statuses = page.evaluate(
        "Promise.all(Array.from({ length: 20 }, () => fetch('locate', { method: 'POST', body: photo })"
        ".then((reply) => reply.status)))"
    )
    assert statuses == [200] * 20
    page.evaluate(
        "(() => { const clipboardData = new DataTransfer(); clipboardData.items.add(photo);"
        " document.dispatchEvent(new ClipboardEvent('paste', { clipboardData })); })()"
    )
    page.wait_for("document.body.dataset.state === 'answer'")
