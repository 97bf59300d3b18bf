"""The web page of `alma serve`: chat, two models side by side, and the probability of each token.

One file without network: its style and its script are in it, and its Content-Security-Policy lets only these two run.
It asks the same routes as every other client (pipeline/serve/server.py), so it can do nothing that they refuse.
"""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

WEB = Path(__file__).parent / "web"


@lru_cache(maxsize=1)
def web_page() -> tuple[str, dict[str, str]]:
    """(HTML, headers)."""
    html, css, js = [(WEB / name).read_text(encoding="utf-8") for name in ("chat.html", "chat.css", "chat.js")]
    policy = (
        f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return html.replace("{{ css }}", css).replace("{{ js }}", js), headers


def _hash(text: str) -> str:
    """Of an element's text, as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
