"""The page's server: the standard library's, made safe for a browser that has other pages open.

    GET  /                          index.html, and the files beside it that it names
    GET  /item?annotator=A[&id=ID]  A's next answer, or one that A has done
    GET  /image/ID                  the image of an answer, as it is
    POST /segments                  {id, chosen} -> how training would weigh this correction
    POST /submit                    {id, annotator, status, chosen, ...} -> saved; the next item

Images are requested by the id of an answer, never by a path. Only the page itself may post, under a
strict Content-Security-Policy. Requests must name the loopback interface as their host (a foreign
domain could resolve to it); on any other interface every path lies below /TOKEN/.
"""

import hmac
import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs, urlsplit

from annotation.diff import Units, compare
from annotation.store import ANONYMOUS, Answer, Store
from formats.files import parse_json
from formats.tokenizer import IMAGE

LONGEST = 20_000  # characters of a correction
TYPES = {"object", "attribute", "position", "number", "relation", "other"}  # of segments
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STATIC = {"": "text/html", "page.js": "text/javascript", "page.css": "text/css",
          "icon.svg": "image/svg+xml"}
IMAGES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(Exception):
    """A refused request: HTTP status, and a sentence for the page."""


def require(holds, status: int, message: str) -> None:
    if not holds:
        raise Refused(status, message)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, store: Store, units: Units, token: str = ""):
        """Bind; port 0 takes a free one. If there is a token, every path must begin with it."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.store, self.units, self.token = store, units, token
        super().__init__((host, port), Handler)

    def is_addressed(self, header: str) -> bool:
        """Return whether a Host header names this machine; no page elsewhere has the token."""
        return bool(self.token) or re.sub(r":\d*$", "", header) in (*LOOPBACK, "[::1]")


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a delayed acknowledgement costs 40 ms
    timeout = 60  # seconds without a byte

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        """Answer a request, or say in one sentence why not."""
        try:
            (self.post if self.command == "POST" else self.get)(*self.checked())
        except Refused as refusal:
            self.send_error(*refusal.args)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except ValueError as error:  # of `compare`
            self.send_error(400, f"{error}; skip the answer")
        except OSError as error:
            post = self.command == "POST"
            self.send_error(507 if post else 500,
                            f"{'not saved' if post else 'cannot be read'}: {error.strerror}")

    do_POST = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request without reading the rest of it; `http.server` itself calls this, too."""
        self.close_connection = True
        self.reply({"error": message or explain or str(code)}, code)

    def reply(self, content: dict | bytes, status: int = 200, kind: str = "application/json",
              cache: str = "no-store") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response_only(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body),
                   "Cache-Control": cache, "Connection": "close" if self.close_connection else ""}
        for name, value in (HEADERS | headers).items():
            if value != "":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    # ------------------------------------------------------------------------------------ requests

    def checked(self) -> tuple[str, dict]:
        """Check a request; return its path below the token, and its query or body."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        require(self.server.is_addressed(host), 403, "this host name is not served here")
        require(origin is None or urlsplit(origin).netloc == host, 403, "another page may not ask")
        url = urlsplit(self.path)
        token, slash, path = "", "/", url.path.removeprefix("/")
        if self.server.token:
            token, slash, path = path.partition("/")
        require(hmac.compare_digest(token.encode(), self.server.token.encode()), 403,
                "the address lacks its token; copy all of it")
        require(slash, 404, "the address lacks the slash at its end; add it")
        site = self.headers.get("Sec-Fetch-Site", "none")
        require(not path or site in ("none", "same-origin"), 403, "another page may not ask")
        if self.command == "GET":
            return path, {name: values[0] for name, values in parse_qs(url.query).items()}
        require(origin is not None, 403, "only the page itself may post")
        return path, self.body()

    def body(self) -> dict:
        """Return the JSON object that was posted."""
        require(self.headers.get_content_type() == "application/json", 415, "only JSON is taken")
        length = self.headers.get("Content-Length", "")
        require(re.fullmatch("[0-9]{1,6}", length), 413, "give a length of at most 999,999 bytes")
        try:
            values = parse_json(self.rfile.read(int(length)))
        except ValueError:
            raise Refused(400, "not JSON in whole characters") from None
        require(isinstance(values, dict), 400, "not a JSON object")
        return values

    def annotator(self, values: dict) -> str:
        name = str(values.get("annotator", ANONYMOUS))
        require(re.fullmatch(r"[\w .@+-]{1,40}", name), 400,
                "an annotator's name has 1 to 40 letters, digits, spaces or . @ + - _")
        return name

    def answer(self, key) -> Answer:
        found = self.server.store.answers.get(str(key))
        require(found, 404, "no such answer here; was the server started with another file?")
        return found

    # ------------------------------------------------------------------------------------- replies

    def get(self, path: str, query: dict[str, str]) -> None:
        if path in STATIC:
            file = Path(__file__).with_name(path or "index.html")
            self.reply(file.read_bytes(), kind=STATIC[path])
        elif path == "item":
            self.reply(self.item(self.annotator(query), query.get("id")))
        else:
            require(path.startswith("image/"), 404, "nothing is served under this address")
            image = self.answer(path.removeprefix("image/")).path
            require(image.is_file(), 404, f"{image.name}: no longer there")
            content = image.read_bytes()
            kind = next((IMAGES[magic] for magic in IMAGES if content.startswith(magic)), None)
            require(kind, 415, f"{image.name}: only JPEG, PNG and WebP files are shown")
            self.reply(content, kind=kind, cache="private, max-age=3600")

    def post(self, path: str, values: dict) -> None:
        require(path in ("segments", "submit"), 404, "nothing is served under this address")
        answer = self.answer(values.get("id"))
        if path == "segments":
            self.reply(compare(self.server.units, answer.text, chosen_text(values)))
        else:
            annotator = self.annotator(values)
            given = submission(self.server.units, answer, values)
            self.server.store.save(answer, {"annotator": annotator, **given})
            self.reply(self.item(annotator))

    def item(self, annotator: str, key: str | None = None) -> dict:
        """Return an answer as the page shows it, and the annotator's progress."""
        store, units = self.server.store, self.server.units
        own, (done, upcoming) = store.own(annotator), store.upcoming(annotator)
        around = [None, *own, *upcoming, None]
        key = key or around[len(own) + 1]
        place = around.index(key) if key in own else len(own) + 1
        found = {
            "done": done, "total": len(store.answers), "own": len(own), "units": units.name,
            "median": median(line["seconds"] for line in own.values()) if own else None,
            "before": around[place - 1], "after": around[place + 1] if key in own else None,
            "answer": None, "versions": []}
        if key is None:
            return found
        answer = self.answer(key)
        return found | {
            "answer": {name: getattr(answer, name) for name in ("id", "image", "question", "text")},
            "line": own.get(key), "ahead": [i for i in upcoming if i != key],
            "versions": [{"chosen": line["chosen"], "segments": line["segments"],
                          **compare(units, answer.text, line["chosen"])}
                         for line in store.versions.get(key, {}).values() if line["chosen"]]}


def submission(units: Units, answer: Answer, values: dict) -> dict:
    """Check a submission; return the fields of the file's line that come from the page."""
    status, seconds, types = (values.get(key) for key in ("status", "seconds", "types"))
    require(isinstance(seconds, int | float) and 0 <= seconds < 1e6, 400, "bad number of seconds")
    given = {"status": status, "segments": [], "seconds": round(seconds, 1)}
    if status == "skipped":
        return {"chosen": None, **given, "reason": str(values.get("reason", ""))[:500]}
    if status == "accepted":
        return {"chosen": answer.text, **given}
    chosen = chosen_text(values)
    require(status == "corrected", 400, "status must be corrected, accepted or skipped")
    require(chosen, 400, "the correction is empty; skip the answer instead")
    require(chosen != answer.text, 400, "nothing was changed; accept the answer instead")
    require(isinstance(types, dict) and set(map(str, types.values())) <= TYPES, 400, "unknown type")
    given["segments"] = [
        {"rejected": part["rejected"], "chosen": part["chosen"],
         "type": types.get(str(part["rejected"][0]), "")}
        for part in compare(units, answer.text, chosen)["parts"] if "old" in part]
    return {"chosen": chosen, **given}


def chosen_text(values: dict) -> str:
    """Return the text of a correction as training reads it, without white space around it."""
    text = values.get("chosen")
    require(isinstance(text, str) and len(text) <= LONGEST, 400,
            f"a correction is a text of at most {LONGEST} characters")
    require(IMAGE not in text, 400, f"{IMAGE} stands for the image; an answer cannot have it")
    return text.strip()
