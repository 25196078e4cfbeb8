"use strict";
// What every page can do; `page` is what the scripts after this one use.
const page = (() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const hint = document.querySelector(".hint");

  /** An element with classes and children; text is only ever text. */
  function make(tag, classes = "", ...children) {
    const element = document.createElement(tag);
    if (classes) element.className = classes;
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** Shows `content` (text or nodes) beside a point of the window; null takes it away. */
  function showHint(content, x = 0, y = 0) {
    hint.hidden = content === null;
    if (content === null) return;
    hint.replaceChildren(...[content].flat());
    const { width, height } = hint.getBoundingClientRect();
    const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
    hint.style.left = `${Math.max(4, left)}px`;
    hint.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
  }

  /** A number in the digits that figures.figure gives it. */
  function figure(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1).replace("e+", "e").replace("-", "−");
    return value.toFixed(size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0).replace("-", "−");
  }

  function themes() {
    const button = document.querySelector("button.theme");
    const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    const tell = () => button.setAttribute("aria-pressed", String(dark()));
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("tunesmith-theme", root.dataset.theme); } catch { /* kept for this visit only */ }
      tell();
    });
    tell();
  }

  function contents() {
    const links = new Map([...document.querySelectorAll("nav.contents a")].map((a) => [a.hash.slice(1), a]));
    const seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === first) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-10% 0px -60%" });
    for (const section of document.querySelectorAll("main > section")) watch.observe(section);
  }

  /** Headings of `table.sorts` become buttons; a cell sorts by its `data-sort`, else by its text. */
  function sorting() {
    for (const table of document.querySelectorAll("table.sorts")) {
      const headings = [...table.tHead.rows[0].cells];
      headings.forEach((heading, column) => {
        if (heading.hasAttribute("data-fixed")) return;
        const button = make("button", "", ...heading.childNodes);
        button.type = "button";
        heading.append(button);
        button.addEventListener("click", () => sort(table, headings, column));
      });
    }
  }

  function sort(table, headings, column) {
    const up = headings[column].getAttribute("aria-sort") !== "ascending";
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    const numeric = rows.every(([value]) => value === "" || !Number.isNaN(Number(value)));
    const order = numeric ? (a, b) => Number(a[0] || -Infinity) - Number(b[0] || -Infinity) : (a, b) => a[0].localeCompare(b[0]);
    rows.sort((a, b) => (up ? 1 : -1) * order(a, b));
    table.tBodies[0].append(...rows.map(([, row]) => row));
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  }

  function hints() {
    const of = (event) => event.target.closest?.("[data-hint]");
    document.addEventListener("pointermove", (event) => {
      const element = of(event);
      if (element) showHint(element.dataset.hint, event.clientX, event.clientY);
      else if (!event.target.closest?.(".chart")) showHint(null);
    });
    document.addEventListener("focusin", (event) => {
      const element = of(event);
      const box = element?.getBoundingClientRect();
      if (element) showHint(element.dataset.hint, box.left, box.bottom);
    });
    document.addEventListener("focusout", () => showHint(null));
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") showHint(null); });
  }

  function copying() {
    for (const button of document.querySelectorAll("button.copy")) {
      button.addEventListener("click", async () => {
        const block = button.parentElement.querySelector("pre");
        try {
          await navigator.clipboard.writeText(block.textContent);
          button.textContent = "Copied";
        } catch { // no clipboard for pages of a file in this browser: select it instead
          getSelection().selectAllChildren(block);
          button.textContent = "Selected";
        }
        setTimeout(() => { button.textContent = "Copy"; }, 1600);
      });
    }
  }

  function printing() {
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const details of opened) details.open = true;
    });
    addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
  }

  for (const start of [themes, contents, sorting, hints, copying, printing]) start();
  return { data, make, showHint, figure };
})();
