// The report of a run: curves that tell their values, answers to look through, confusions that lead to them.
(() => {
  const { data, make, showHint, figure } = page;

  // ------------------------------------------------------------------ curves

  for (const chart of document.querySelectorAll(".chart")) {
    const { low, high, series } = data.charts[Number(chart.dataset.chart)];
    const field = chart.querySelector(".field");
    const cursor = chart.querySelector(".cursor");
    const output = chart.querySelector("output");
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    let place = -1;

    const at = (one, step) => {
      const index = one.steps.indexOf(step);
      return index < 0 ? null : one.values[index];
    };
    const tell = (index, y) => {
      place = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[place];
      const box = field.getBoundingClientRect();
      const x = ((step - low) / (high - low)) * box.width;
      cursor.hidden = false;
      cursor.style.left = `${x}px`;
      const known = series.map((one) => [one.name, at(one, step)]).filter(([, value]) => value !== null);
      const list = make("dl", "", make("dt", "", "step"), make("dd", "", step.toLocaleString("en", { maximumFractionDigits: 1 })));
      for (const [name, value] of known) list.append(make("dt", "", name), make("dd", "", figure(value)));
      showHint(list, box.left + x, y ?? box.top + 20);
      output.textContent = `step ${Math.round(step)}: ${known.map(([name, value]) => `${name} ${figure(value)}`).join(", ")}`;
    };
    const leave = () => { cursor.hidden = true; showHint(null); };

    field.addEventListener("pointermove", (event) => {
      const box = field.getBoundingClientRect();
      const step = low + ((event.clientX - box.left) / box.width) * (high - low);
      let nearest = steps.findIndex((one) => one >= step);
      if (nearest < 0) nearest = steps.length - 1;
      if (nearest > 0 && step - steps[nearest - 1] < steps[nearest] - step) nearest -= 1;
      tell(nearest, event.clientY);
    });
    field.addEventListener("pointerleave", leave);
    field.addEventListener("blur", leave);
    field.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      tell(place < 0 ? (by > 0 ? 0 : steps.length - 1) : place + by);
    });
  }

  // ------------------------------------------------------------------ answers

  const names = {
    better: "Better", worse: "Worse", wrong: "Unchanged, wrong", right: "Unchanged, right", same: "Unchanged",
  };
  const alone = { wrong: "Wrong", right: "Right", same: "Not judged" };
  const tones = { better: "better", worse: "worse", wrong: "", right: "", same: "" };
  const [WHERE, ASKED, REFERENCE, BEFORE, AFTER, OUTCOME, SCORES, TOP, TAGS] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const LABELS = 400; // more different answers than this are text, not labels

  const root = document.querySelector(".answers");
  const state = { set: 0, outcome: null, text: "", truth: -1, given: -1, tags: new Map(), order: data.order ?? "file", page: 0 };
  let draw = () => {};

  function answers() {
    const [chips, filters, list, found] = [".chips", ".filters", ".rows", ".found"].map((name) => root.querySelector(name));
    const search = filters.querySelector("input");
    const pager = root.querySelector(".pager");
    let set = null;
    let matching = [];

    function prepare() {
      set = data.answers[state.set];
      set.lower ??= set.texts.map((text) => text.toLowerCase());
      const count = (column) => new Set(set.rows.map((row) => row[column]).filter((index) => index >= 0));
      set.truths ??= count(REFERENCE);
      set.labelled ??= set.rows.some((row) => row[TOP].length > 0) || (set.truths.size < 60 && set.truths.size * 4 < set.rows.length);
      Object.assign(state, { outcome: null, truth: -1, given: -1, page: 0 });
      state.tags.clear();
      controls();
      draw();
    }

    function controls() {
      const buttons = [[null, "All", set.counts.reduce((a, b) => a + b, 0)]];
      data.outcomes.forEach((name, index) => {
        if (set.counts[index]) buttons.push([index, (set.before ? names : alone)[name], set.counts[index]]);
      });
      chips.replaceChildren(...buttons.map(([value, text, count]) => {
        const button = make("button", "", text, make("small", "", count.toLocaleString("en")));
        button.type = "button";
        button.addEventListener("click", () => { state.outcome = value; state.page = 0; draw(); });
        button.dataset.value = String(value);
        return button;
      }));
      for (const old of filters.querySelectorAll("select")) old.remove();
      if (data.answers.length > 1) choose("Data set", data.answers.map((one, index) => [index, one.data]), state.set, (value) => { state.set = value; prepare(); });
      if (set.labelled && set.truths.size <= LABELS) {
        const options = (column) => [...new Set(set.rows.map((row) => row[column]))].filter((i) => i >= 0).map((i) => [i, set.texts[i]]).sort((a, b) => a[1].localeCompare(b[1]));
        choose("True label", [[-1, "True label: any"], ...options(REFERENCE)], state.truth, (value) => { state.truth = value; }, "truth");
        const given = options(AFTER);
        if (given.length <= LABELS) choose("Answer", [[-1, "Answer: any"], ...given], state.given, (value) => { state.given = value; }, "given");
      }
      const tags = new Map();
      for (const row of set.rows) for (const index of row[TAGS]) {
        const name = set.texts[index].split("=", 1)[0];
        if (!tags.has(name)) tags.set(name, new Set());
        tags.get(name).add(index);
      }
      for (const [name, values] of tags) {
        if (values.size < 2 || values.size > LABELS) continue;
        const options = [...values].map((index) => [index, set.texts[index]]).sort((a, b) => a[1].localeCompare(b[1]));
        choose(name, [[-1, `${name}: any`], ...options], -1, (value) => { value < 0 ? state.tags.delete(name) : state.tags.set(name, value); });
      }
      const orders = [["file", "In the file's order"]];
      if (set.before) orders.push(["change", "Largest change first"]);
      if (set.rows.some((row) => row[TOP].length)) orders.push(["sure", "Most confident first"], ["unsure", "Least confident first"]);
      if (orders.length > 1) choose("Order", orders, state.order, (value) => { state.order = value; });
    }

    function choose(label, options, chosen, act, name = "") {
      const select = make("select");
      select.setAttribute("aria-label", label);
      select.dataset.name = name;
      options.forEach(([value, text]) => select.add(new Option(text.length > 60 ? `${text.slice(0, 59)}…` : text, String(value), false, value === chosen)));
      select.addEventListener("change", () => {
        const value = options[select.selectedIndex][0];
        state.page = 0;
        act(value);
        draw();
      });
      filters.append(select);
    }

    function match() {
      const wanted = state.text.trim().toLowerCase();
      const hits = wanted ? set.lower.map((text) => text.includes(wanted)) : null;
      const tags = [...state.tags.values()];
      const rows = set.rows.filter((row) =>
        (state.outcome === null || row[OUTCOME] === state.outcome)
        && (state.truth < 0 || row[REFERENCE] === state.truth)
        && (state.given < 0 || row[AFTER] === state.given)
        && tags.every((tag) => row[TAGS].includes(tag))
        && (!hits || row.slice(0, 5).some((index) => hits[index]) || row[TAGS].some((index) => hits[index])));
      const change = ({ [SCORES]: [before, after] }) => (before === null || after === null ? -1 : Math.abs(after - before));
      const sure = (row) => row[TOP][1] ?? 0;
      const orders = { change: (a, b) => change(b) - change(a), sure: (a, b) => sure(b) - sure(a), unsure: (a, b) => sure(a) - sure(b) };
      return orders[state.order] ? [...rows].sort(orders[state.order]) : rows;
    }

    draw = () => {
      matching = match();
      const size = set.labelled ? 20 : 10;
      const pages = Math.max(1, Math.ceil(matching.length / size));
      state.page = Math.min(state.page, pages - 1);
      const first = state.page * size;
      const shown = matching.slice(first, first + size);
      list.replaceChildren(...shown.map(row));
      for (const box of list.querySelectorAll(".asked, .given .text")) if (box.scrollHeight > box.clientHeight) box.tabIndex = 0;
      for (const button of chips.children) button.setAttribute("aria-pressed", String(button.dataset.value === String(state.outcome)));
      for (const select of filters.querySelectorAll("select[data-name='truth'], select[data-name='given']")) select.value = String(state[select.dataset.name]);
      const judged = set.judge ? ` · judged by ${set.judge}` : "";
      found.textContent = matching.length
        ? `${(first + 1).toLocaleString("en")} to ${(first + shown.length).toLocaleString("en")} of ${matching.length.toLocaleString("en")} rows${judged}`
        : "No row is like that.";
      pager.hidden = pages === 1;
      pager.querySelector("span").textContent = `${state.page + 1} / ${pages}`;
      pager.children[0].disabled = state.page === 0;
      pager.children[2].disabled = state.page === pages - 1;
    };

    const textOf = (index) => (index < 0 ? null : set.texts[index]);

    function row(one) {
      const outcome = data.outcomes[one[OUTCOME]];
      const tags = one[TAGS].map((index) => make("span", "tag text", textOf(index)));
      const head = make("header", "", make("span", `pill ${tones[outcome]}`, (set.before ? names : alone)[outcome]), ...tags, make("span", "where", textOf(one[WHERE])));
      const [reference, before, after] = [REFERENCE, BEFORE, AFTER].map((column) => textOf(one[column]));
      const [expected, answered] = set.labelled || reference === null ? [reference, after] : difference(reference, after);
      const given = make("div", "given",
        reference === null ? null : block("expected", expected),
        set.before && set.before !== "majority" ? block(set.before, before === null || set.labelled || reference === null ? before : difference(reference, before)[1], one[SCORES][0]) : null,
        block(set.after, answered, one[SCORES][1], one[TOP]));
      const item = make("li", set.labelled ? "label" : "prose", head, make("p", "asked text", textOf(one[ASKED])), given);
      return item;
    }

    function block(title, content, score = null, top = []) {
      const graded = score !== null && score !== 0 && score !== 1 ? ` ${figure(score)}` : "";
      const body = make("div", "text");
      body.dir = "auto";
      body.append(...[content ?? ""].flat());
      if (!body.textContent) body.replaceChildren(make("span", "none", "nothing"));
      return make("div", "", make("p", "who", title + graded), body, top.length ? tops(top) : null);
    }

    function tops(top) {
      const grid = make("div", "tops");
      for (let i = 0; i < top.length; i += 2) {
        const bar = make("i");
        bar.style.width = `${Math.max(2, 0.6 * top[i + 1])}px`;
        grid.append(make("span", "text", textOf(top[i])), bar, make("span", "", `${top[i + 1].toFixed(top[i + 1] < 10 ? 1 : 0)}%`));
      }
      return grid;
    }

    pager.addEventListener("click", (event) => {
      const by = Number(event.target.closest("button")?.dataset.go ?? 0);
      if (!by) return;
      state.page += by;
      draw();
      root.scrollIntoView({ block: "start" });
    });
    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state.text = search.value; state.page = 0; draw(); }, 80);
    });
    root.hidden = false;
    prepare();

    /** Shows the rows of one data set with this true label and this answer. */
    return (name, truth, given) => {
      const index = data.answers.findIndex((one) => one.data === name);
      if (index < 0) return;
      if (index !== state.set) { state.set = index; prepare(); }
      const place = (text) => set.texts.indexOf(text);
      search.value = state.text = "";
      Object.assign(state, { outcome: null, truth: place(truth), given: place(given), page: 0 });
      draw();
      document.getElementById("answers").scrollIntoView();
    };
  }

  // ------------------------------------------------------------------ differences of two texts

  const WORDS = 300;

  /** Both texts as nodes: what only the reference has in <del>, what only the answer has in <ins>. */
  function difference(reference, answer) {
    if (reference === answer) return [reference, answer];
    const [a, b] = [reference, answer].map((text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []);
    if (a.length > WORDS || b.length > WORDS) return [reference, answer];
    const long = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i -= 1)
      for (let j = b.length - 1; j >= 0; j -= 1) long[i][j] = a[i] === b[j] ? long[i + 1][j + 1] + 1 : Math.max(long[i + 1][j], long[i][j + 1]);
    if (long[0][0] < 0.3 * Math.max(a.length, b.length)) return [reference, answer]; // too different to compare
    const [left, right] = [[], []];
    const add = (nodes, tag, text) => {
      const last = nodes.at(-1);
      if (last?.tag === tag) last.text += text;
      else nodes.push({ tag, text });
    };
    let [i, j] = [0, 0];
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) { add(left, "", a[i]); add(right, "", b[j]); i += 1; j += 1; }
      else if (j >= b.length || (i < a.length && long[i + 1][j] >= long[i][j + 1])) { add(left, "del", a[i]); i += 1; }
      else { add(right, "ins", b[j]); j += 1; }
    }
    return [left, right].map((nodes) => nodes.map(({ tag, text }) => (tag ? make(tag, "", text) : text)));
  }

  const show = root && data.answers.length ? answers() : () => {};

  // ------------------------------------------------------------------ confusions

  for (const button of document.querySelectorAll("button.pair")) {
    button.addEventListener("click", () => show(button.dataset.set, button.dataset.truth, button.dataset.given));
  }
  for (const picture of document.querySelectorAll(".confusion")) {
    const { labels, cells, set } = data.classes[Number(picture.dataset.classes)];
    const matrix = picture.querySelector(".matrix");
    const counts = new Map(cells.map(([row, column, count]) => [row * labels.length + column, count]));
    const totals = new Array(labels.length).fill(0);
    for (const [row, , count] of cells) totals[row] += count;
    const under = (event) => {
      const box = matrix.getBoundingClientRect();
      const [column, row] = [event.clientX - box.left, event.clientY - box.top].map((way) => Math.floor((way / box.width) * labels.length));
      return row >= 0 && column >= 0 && row < labels.length && column < labels.length ? [row, column] : null;
    };
    matrix.addEventListener("pointermove", (event) => {
      event.stopPropagation();
      const cell = under(event);
      if (!cell) return;
      const count = counts.get(cell[0] * labels.length + cell[1]) ?? 0;
      showHint(`${labels[cell[0]]} answered as ${labels[cell[1]]}: ${count} of ${totals[cell[0]]}`, event.clientX, event.clientY);
    });
    matrix.addEventListener("pointerleave", () => showHint(null));
    matrix.addEventListener("click", (event) => {
      const cell = under(event);
      if (cell && counts.has(cell[0] * labels.length + cell[1])) show(set, labels[cell[0]], labels[cell[1]]);
    });
  }
})();
