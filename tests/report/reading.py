"""A page as its reader gets it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str | None] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "img":
            self.images.append(found)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.text += data
