// Keeps the page at / fresh: the changing part every second while it is visible, the images every ten seconds.
// Without scripts the page reloads itself, and the form and the links do the rest.
"use strict";

const SECOND = 1000;
const lost = document.getElementById("lost");
const search = document.getElementById("search");

async function get(url) {
  const answer = await fetch(url, { cache: "no-store", signal: AbortSignal.timeout(10 * SECOND) });
  if (!answer.ok) throw new Error(String(answer.status));
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

// Replaces the parts that have changed; what is selected, open or has the focus stays so.
function show(fresh, id) {
  const old = document.getElementById(id), now = fresh.getElementById(id);
  if (now.dataset.title) document.title = now.dataset.title;
  for (const part of now.children) {
    const before = document.getElementById(part.id);
    // The daemon is another version by now.
    if (!before) return location.reload();
    for (const details of part.querySelectorAll("details"))
      details.open = document.getElementById(details.id)?.open ?? false;
    const selection = getSelection();
    if (before.isEqualNode(part) || (!selection.isCollapsed && selection.containsNode(before, true))) continue;
    const focused = before.contains(document.activeElement) ? document.activeElement.id : "";
    before.replaceWith(document.importNode(part, true));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }
}

let timer = setTimeout(poll, SECOND);
let polling = false;

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(timer);
  try {
    show(await get("live"), "live");
    lost.hidden = true;
  } catch {
    if (lost.hidden) lost.querySelector("time").textContent = new Date().toLocaleTimeString();
    lost.hidden = false;
  }
  polling = false;
  timer = setTimeout(poll, document.hidden ? 20 * SECOND : SECOND);
}

let query = location.search;
let asked = 0;

async function list(address) {
  const mine = ++asked;
  if (address !== undefined) {
    query = address;
    history.replaceState(null, "", query || location.pathname);
  }
  try {
    const fresh = await get("images" + query);
    if (mine === asked) show(fresh, "list");
  } catch {
    // The next poll shows that the daemon does not answer.
  }
}

let typed;
setInterval(() => document.hidden || list(), 10 * SECOND);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  poll();
  list();
});

search.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => list("?" + new URLSearchParams(new FormData(search.form))), 200);
});

search.form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typed);
  list("?" + new URLSearchParams(new FormData(search.form)));
});

document.getElementById("list").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  search.form.elements.sort.value = new URLSearchParams(link.search).get("sort");
  list(link.search);
});
