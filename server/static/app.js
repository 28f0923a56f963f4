// The page: which view is shown, the key, the theme; each view is a module of its own.

import { ApiError, getJson } from "./api.js";
import { showCards } from "./card.js";
import { showDashboard } from "./dashboard.js";
import { $ } from "./dom.js";
import { showModels, startPlayground } from "./playground.js";

const VIEWS = ["playground", "dashboard", "model"];

async function loadModels() {
  try {
    const { data } = await getJson("/v1/models", $("key").value);
    $("model").textContent = data[0].id;
    document.title = `${data[0].id} · llmserve`;
    showModels(data);
    await showCards(data);
    setStatus("ready", "ok");
  } catch (error) {
    const needsKey = error instanceof ApiError && error.status === 401;
    const isForbidden = error instanceof ApiError && error.status === 403;
    if (!(error instanceof ApiError) && !(error instanceof TypeError)) throw error;
    setStatus(
      needsKey ? "needs an API key" : isForbidden ? "not a key for models" : "not reachable", "bad",
    );
    $("model").textContent = needsKey || isForbidden ? "locked" : "no server";
    if (needsKey) $("key").focus();
  }
}

function setStatus(text, kind) {
  $("status").textContent = text;
  $("status").dataset.kind = kind;
}

// The view that the address names; other anchors, as the skip link's, change nothing.
function showView() {
  const named = location.hash.slice(1) || VIEWS[0];
  if (!VIEWS.includes(named)) return;
  for (const view of VIEWS) {
    $(`view-${view}`).hidden = view !== named;
    if (view === named) $(`nav-${view}`).setAttribute("aria-current", "page");
    else $(`nav-${view}`).removeAttribute("aria-current");
  }
  showDashboard(named === "dashboard");
  if (named === "playground") $("prompt").focus();
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
}

$("theme").addEventListener("click", switchTheme);
$("key").addEventListener("change", loadModels);
$("access").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", showView);
startPlayground();
showView();
await loadModels();
