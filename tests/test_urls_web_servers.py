"""Data sets at web servers, which list folders as pages of links."""

import sys
from http.server import SimpleHTTPRequestHandler
from io import BytesIO
from pathlib import Path

import pytest
from test_urls_reading import http_server
from url_places import cache, photos, small_shards, whole  # noqa: F401  (fixtures)

from shards.console import JobError
from shards.dataset import Dataset
from shards.overview import describe
from shards.store import Store
from shards.verify import main as verify_main


class SortingItsLists(SimpleHTTPRequestHandler):
    """Lists a folder with links that sort the list, as Apache does."""

    def list_directory(self, path):
        names = (f"{p.name}/" if p.is_dir() else p.name for p in Path(path).iterdir())
        page = "".join(f'<a href="{link}">x</a>' for link in ["?C=N;O=D", *names]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        return BytesIO(page)


@pytest.mark.parametrize("answer", [SimpleHTTPRequestHandler, SortingItsLists])
def test_a_data_set_at_a_web_server_is_verified_and_described_although_its_lists_tell_no_sizes(
    whole, monkeypatch, capsys, answer
):
    with http_server(whole, answer) as url:
        assert Store.at(url).sizes() == Store.at(f"file://{whole}").sizes()
        monkeypatch.setattr(sys, "argv", ["verify.py", url])
        assert verify_main() == 0
        assert f"{url}: sound" in capsys.readouterr().out
        assert describe(Dataset.open(url)) == describe(Dataset.open(whole)).replace(str(whole), url)


def test_a_web_server_that_tells_no_sizes_is_one_line(whole):
    class Silent(SimpleHTTPRequestHandler):
        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Content-Length":
                super().send_header(keyword, value)

    with http_server(whole, Silent) as url, pytest.raises(JobError, match=rf"{url}/.*: the server does not tell its"):
        Store.at(url).sizes()
