"""What the page says of models, and what it is like for everybody: names, contrast, both themes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.browser import opened

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.http


def test_the_model_card_shows_a_certificate_where_there_is_one(folder: Path, page: Any) -> None:
    certificate = {
        "source_perplexity": 3.25,
        "forms": [{"executed_form": "int8 <b>", "mean_kl": 0.00123, "scatter": [[1, 2]] * 20}],
    }

    def with_certificate(route: Any) -> None:
        reply = route.fetch()
        body = json.dumps({**reply.json(), "certificate": certificate, "lineage": None})
        route.fulfill(response=reply, body=body)

    page.route("**/v1/models/tiny", with_certificate)
    with opened(page, folder, "#model"):
        card = page.inner_text("#models")
        assert "fake" in card
        assert "3.25" in card
        assert "Lineage" not in card
        page.click("#models summary")
        assert page.inner_text("#models td >> nth=0") == "int8 <b>"
        assert page.inner_text("#models td >> nth=1") == "0.00123"
        page.click("#nav-playground")
        assert page.is_visible("#prompt")
        assert page.get_attribute("#nav-playground", "aria-current") == "page"


def test_the_model_card_draws_the_curves_of_its_training(folder: Path, page: Any) -> None:
    training = {
        "loss": [[10 * step, 2 + 3 / step] for step in range(1, 60)],
        "held_out_loss": [[100, 3.1], [590, 2.25]],
    }

    def with_training(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=json.dumps({**reply.json(), "training": training}))

    page.route("**/v1/models/tiny", with_training)
    with opened(page, folder, "#model"):
        picture = page.locator("#models svg.curves")
        assert "held out loss from 3.100 at step 100 to 2.250 at step 590" in str(
            picture.get_attribute("aria-label")
        )
        line = str(page.get_attribute("#models polyline.curve-0", "points")).split()
        assert len(line) == 59
        heights = [float(point.split(",")[1]) for point in line]
        assert heights == sorted(heights)  # the loss falls: lines go down the page
        assert page.locator("#models circle").count() == 2
        assert "training: 2.051 at the end" in page.inner_text("#models .curve-legend")


UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button, meter")]
  .filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim()))
  .map((node) => node.outerHTML)"""

COLOURS = """() => {
  const names = "ground sheet ink faint accent on-accent made bad".split(" ");
  const shown = document.body.appendChild(document.createElement("i"));
  const read = (name) => {
    shown.style.color = `var(--${name})`;
    return getComputedStyle(shown).color;
  };
  return names.map((name) => [`--${name}`, read(name)]);
}"""


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    assert len(parts) == 3, colour
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_control_has_a_name_and_every_text_contrast(folder: Path, page: Any) -> None:
    with opened(page, folder):
        assert page.evaluate(UNNAMED) == []
        grounds = []
        for theme in ("light", "dark"):
            page.evaluate("theme => (document.documentElement.dataset.theme = theme)", theme)
            light = {name: luminance(colour) for name, colour in page.evaluate(COLOURS)}
            grounds.append(light["--ground"])
            for text, ground in (
                ("--ink", "--ground"), ("--ink", "--sheet"), ("--ink", "--made"),
                ("--faint", "--ground"), ("--faint", "--sheet"), ("--bad", "--sheet"),
                ("--on-accent", "--accent"), ("--accent", "--ground"),
            ):  # fmt: skip
                low, high = sorted((light[text], light[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}, {theme}"
        assert grounds[0] > 0.5 > grounds[1]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_is_the_system_s_until_switched(folder: Path, page: Any, theme: str) -> None:
    page.emulate_media(color_scheme=theme)
    with opened(page, folder):
        first = luminance(dict(page.evaluate(COLOURS))["--ground"])
        assert (first > 0.5) == (theme == "light")
        page.click("#theme")
        second = luminance(dict(page.evaluate(COLOURS))["--ground"])
        assert (second > 0.5) != (theme == "light")
