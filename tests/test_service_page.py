"""The page of a service: a browser sends prompts, sees answers as they come, and the stages."""

import json
import queue
import re
import shutil
import subprocess
from importlib.resources import files

import pytest
from fastapi import Request
from fastapi.responses import HTMLResponse
from serving import WAIT, loaded, save_model, serving, until
from test_service import text_after

from bigint8.service import gate

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = files("bigint8.service").joinpath("page.html").read_text(encoding="utf-8")
KEY = "a key"

SCRIPT = """<script>
(async () => {
  const seen = { wide: [] };
  const until = async (what, so) => {
    for (let i = 0; i < 800 && !so(); i++) await new Promise((wake) => setTimeout(wake, 25));
    if (!so()) throw new Error(what);
    seen.wide.push(document.documentElement.scrollWidth);
  };
  const text = (id) => at(id).textContent;
  const ask = (prompt, tokens) => {
    at("prompt").value = prompt;
    at("tokens").value = tokens;
    at("temperature").value = 0;
    at("form").requestSubmit();
  };
  try {
    await until("a key is asked for", () => text("health").includes("API key"));
    at("key").value = "%s";
    await until("it is ready", () => text("health") === "ready");
    seen.kind = at("kind").value;
    at("kind").value = "completions";
    ask("w5 w17 w99", 12);
    await until("an answer", () => text("usage") && !at("send").disabled);
    Object.assign(seen, { answer: text("answer"), usage: text("usage") });
    ask("w1 ".repeat(3000), 12);
    await until("a refusal", () => text("error"));
    seen.refusal = text("error");
    await until("it may ask again", () => !at("send").disabled);
    ask("w5 w17 w99", 1900);
    await until("a long answer begins", () => text("answer").length > 20);
    at("stop").click();
    await until("it is stopped", () => text("error") === "Stopped.");
    await until("the stages", () => document.querySelectorAll("#stages li").length);
    Object.assign(seen, {
      stages: [...document.querySelectorAll("#stages li")].map((row) => row.textContent),
      figures: [...document.querySelectorAll("#figures dt")].map((term) => term.textContent),
      model: text("model"), window: window.innerWidth,
      labelled: [...document.querySelectorAll("input, select, textarea")].every((one) => one.labels.length === 1),
    });
  } catch (error) { seen.error = `${error} ${text("error")} ${text("health")}`; }
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})();
</script></body>"""

FRAME = '<!DOCTYPE html><body><iframe src="/watched" style="border: 0; width: 400px; height: 900px"></iframe>'
"""A browser's own window is never narrower than 500 pixels; a frame is."""


def test_the_page_needs_no_network():
    assert not re.search(r"https?:|src=|@import|url\(|XMLHttpRequest|WebSocket", PAGE)
    assert re.findall(r'<link [^>]*href="([^"]*)"', PAGE) == ["data:,"]
    assert re.findall(r"fetch\((.*?),", PAGE) == ["`/v1/${kind}`", '"/stats"']


@pytest.mark.parametrize(("path", "width"), [("/watched", 1600), ("/frame", 400)])
def test_a_browser_asks_and_sees_the_stages(tmp_path, monkeypatch, path, width):
    if BROWSER is None:
        pytest.skip("no browser here to look at the page with: install chromium")
    came: queue.Queue[dict] = queue.Queue()

    def change(app):
        async def take(request: Request):
            came.put(json.loads(await request.body()))

        async def watched():
            return HTMLResponse(PAGE.replace("</body>", SCRIPT % KEY))

        async def frame():
            return HTMLResponse(FRAME)

        for where, call, method in (("/seen", take, "POST"), ("/watched", watched, "GET"), ("/frame", frame, "GET")):
            app.add_api_route(where, call, methods=[method])

    monkeypatch.setattr(gate, "OPEN", (*gate.OPEN, "/seen", "/watched", "/frame"))
    folder = save_model(tmp_path / "model")
    with loaded(folder) as pipeline, serving(pipeline, keys=(KEY,), ends=False, change=change) as service:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={max(width, 800)},1000",
            f"--user-data-dir={tmp_path / 'profile'}", service.url + path,
        ]  # fmt: skip
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            seen = came.get(timeout=WAIT)
            until(service.idle, 2)
        finally:
            browser.terminate()
            browser.wait(WAIT)
        assert "error" not in seen, seen["error"]
        assert seen["answer"] == text_after(service, [5, 17, 99], 12)
        assert seen["usage"] == "It ends at the most tokens. 3 tokens in, 12 out"
        assert "context is 2048 tokens" in seen["refusal"]
        assert seen["kind"] == "chat/completions" and seen["model"] == "tiny" and seen["labelled"]
        assert len(seen["stages"]) == 1 and "stage 0: cpu, blocks 0 to 4" in seen["stages"][0]
        assert {"tokens a second", "in line", "pages in use"} <= set(seen["figures"])
        assert seen["window"] == width and max(seen["wide"]) <= width
        assert service.client.get("/").headers["content-security-policy"].startswith("default-src 'none'")
