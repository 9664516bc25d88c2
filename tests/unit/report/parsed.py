"""A page as a reader and a browser meet it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Text, ids and everything that a browser would fetch."""

    def __init__(self, path):
        super().__init__()
        self.text, self.ids, self.fetched, self.tags = "", [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " if tag in ("td", "th", "li") else ""
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            is_link = name in ("src", "href", "xlink:href", "action", "srcset")
            if is_link and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text += data
