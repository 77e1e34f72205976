"use strict";
// Tables of scores: unpacked when opened, then sorted, filtered, paged and given out as CSV.
(() => {
  const PAGE = 50;
  const FEW = 24;
  const element = (tag, properties = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const grouped = new Intl.NumberFormat("en");
  const text = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
    const small = Math.abs(value) < 5e-4 || Math.abs(value) >= 1e6;
    return small ? String(Number(value.toPrecision(2))) : value.toFixed(3);
  };

  class Column {
    constructor(held) {
      this.name = held.name;
      this.numeric = "values" in held;
      this.held = held;
      if (held.infinite)
        for (const [row, sign] of Object.entries(held.infinite))
          held.values[row] = sign === "∞" ? Infinity : -Infinity;
    }
    at(row) {
      return this.numeric ? this.held.values[row] : this.held.words[this.held.codes[row]];
    }
    shown(row) {
      const value = this.at(row);
      if (value === Infinity || value === -Infinity) return value > 0 ? "∞" : "−∞";
      return this.numeric ? text(value) : value;
    }
    // Missing values stand last either way.
    compare(way) {
      if (this.numeric) {
        const values = this.held.values;
        return (a, b) => {
          const [x, y] = [values[a], values[b]];
          if (x === y) return a - b;
          if (x === null) return 1;
          if (y === null) return -1;
          return way * (x - y) || a - b;
        };
      }
      const order = new Int32Array(this.held.words.length);
      const words = this.held.words.map((word, code) => [word, code]);
      const numeric = new Intl.Collator("en", { numeric: true });
      words.sort((a, b) => numeric.compare(a[0], b[0]));
      words.forEach(([word, code], place) => (order[code] = word === "–" ? way * 1e9 : place));
      const codes = this.held.codes;
      return (a, b) => way * (order[codes[a]] - order[codes[b]]) || a - b;
    }
    matches(needle) {
      // A word is in no number: only what looks like one is looked for there.
      if (this.numeric && !/[\d∞–]/.test(needle)) return () => false;
      if (this.numeric) return (row) => this.shown(row).includes(needle);
      const hit = this.held.words.map((word) => word.toLowerCase().includes(needle));
      return (row) => hit[this.held.codes[row]];
    }
  }

  const build = (box, data) => {
    const columns = data.columns.map((held) => new Column(held));
    const name = box.dataset.name;
    const all = Uint32Array.from({ length: data.rows }, (_, row) => row);
    const state = { rows: all, page: 0, sort: null, way: 1, needle: "", chosen: new Map() };

    const search = element("input", { type: "search", placeholder: "any column" });
    const controls = element("div", { className: "controls" });
    controls.append(element("label", {}, "Filter ", search));
    for (const column of columns) {
      if (column.numeric || column.held.words.length < 2 || column.held.words.length > FEW) continue;
      const select = element("select", {}, element("option", { value: "" }, "all"));
      column.held.words.forEach((word, code) =>
        select.append(element("option", { value: String(code) }, word)),
      );
      select.addEventListener("change", () => {
        if (select.value === "") state.chosen.delete(column);
        else state.chosen.set(column, Number(select.value));
        update();
      });
      controls.append(element("label", {}, `${column.name} `, select));
    }
    const save = element("button", { type: "button" });
    const status = element("p", { role: "status", className: "status" });
    const head = element("tr");
    const headings = columns.map((column) => {
      const button = element("button", { type: "button" }, column.name);
      const cell = element("th", { scope: "col", className: column.numeric ? "num" : "" }, button);
      button.addEventListener("click", () => {
        const again = state.sort === column;
        state.way = again ? -state.way : column.numeric ? -1 : 1;
        state.sort = column;
        update();
      });
      head.append(cell);
      return cell;
    });
    const body = element("tbody");
    const table = element("table", { className: "scores" }, element("thead", {}, head), body);
    const scroll = element("div", { className: "scroll", tabIndex: 0, role: "region" }, table);
    scroll.setAttribute("aria-label", `Scores of ${name}`);
    const back = element("button", { type: "button" }, "Previous");
    const on = element("button", { type: "button" }, "Next");
    const place = element("span", { className: "place" });
    const pager = element("nav", { className: "pager" }, back, place, on);
    pager.setAttribute("aria-label", `Pages of the scores of ${name}`);

    const show = () => {
      const first = state.page * PAGE;
      const rows = state.rows.subarray(first, first + PAGE);
      body.replaceChildren(
        ...Array.from(rows, (row) =>
          element(
            "tr",
            {},
            ...columns.map((column) =>
              element("td", { className: column.numeric ? "num" : "" }, column.shown(row)),
            ),
          ),
        ),
      );
      const pages = Math.max(1, Math.ceil(state.rows.length / PAGE));
      place.textContent = `page ${grouped.format(state.page + 1)} of ${grouped.format(pages)}`;
      back.disabled = state.page === 0;
      on.disabled = state.page + 1 >= pages;
      headings.forEach((cell, index) => {
        const sorted = columns[index] === state.sort;
        const way = state.way > 0 ? "ascending" : "descending";
        cell.setAttribute("aria-sort", sorted ? way : "none");
      });
    };
    const update = () => {
      const tests = [];
      for (const [column, code] of state.chosen)
        tests.push((row) => column.held.codes[row] === code);
      for (const word of state.needle.split(/\s+/).filter(Boolean)) {
        const any = columns.map((column) => column.matches(word));
        tests.push((row) => any.some((matches) => matches(row)));
      }
      state.rows = tests.length ? all.filter((row) => tests.every((test) => test(row))) : all.slice();
      if (state.sort) state.rows.sort(state.sort.compare(state.way));
      state.page = 0;
      const n = state.rows.length;
      const sorted = state.sort
        ? `, sorted by ${state.sort.name}, ${state.way > 0 ? "smallest" : "largest"} first`
        : "";
      status.textContent =
        `${grouped.format(n)} of ${grouped.format(data.rows)} rows${sorted}`;
      save.textContent = `Download ${grouped.format(n)} rows as CSV`;
      show();
    };
    const quote = (value) => {
      const said = value === null || value === undefined ? "" : String(value);
      return /[",\r\n]/.test(said) ? `"${said.replaceAll('"', '""')}"` : said;
    };
    save.addEventListener("click", () => {
      const lines = [columns.map((column) => quote(column.name)).join(",")];
      for (const row of state.rows)
        lines.push(columns.map((column) => quote(column.at(row) === "–" ? "" : column.at(row))).join(","));
      const url = URL.createObjectURL(new Blob([lines.join("\r\n"), "\r\n"], { type: "text/csv" }));
      const link = element("a", { href: url, download: `${name}-scores.csv` });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        state.needle = search.value.trim().toLowerCase();
        update();
      }, 150);
    });
    back.addEventListener("click", () => {
      state.page -= 1;
      show();
    });
    on.addEventListener("click", () => {
      state.page += 1;
      show();
    });
    controls.append(save);
    update();
    box.replaceChildren(controls, status, scroll, pager);
  };

  for (const details of document.querySelectorAll("details.table")) {
    details.addEventListener("toggle", async () => {
      const box = details.querySelector(".table-box");
      if (!details.open || box.dataset.state) return;
      box.dataset.state = "unpacking";
      try {
        build(box, await unpack(document.getElementById(box.dataset.packed).textContent));
        box.dataset.state = "ready";
      } catch (error) {
        // The first rows stay in place.
        box.dataset.state = "failed";
        console.error(`scores: ${error.message}`);
      }
    });
  }
})();
