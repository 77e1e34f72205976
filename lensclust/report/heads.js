"use strict";
// A view of heads: a heat map of scores, and of the head that is open its clusters and attention.
(() => {
  const { element, panels, scatter } = window.lensclust;
  // Ten steps of viridis; what lies between two of them is mixed.
  const VIRIDIS = [
    [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
    [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
  ];
  const viridis = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    return VIRIDIS[low].map((c, i) => Math.round(c + (at - low) * (VIRIDIS[low + 1][i] - c)));
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.03928 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // Black on what is bright and white on what is not: whichever has the greater contrast.
  const ink = (rgb) => (luminance(rgb) > 0.179 ? "#000" : "#fff");
  const short = (value) => (value === null ? "–" : value.toFixed(3));
  const brief = (value) => value.toFixed(2).replace(/^-(0\.00)$/, "$1").replace(/^(-?)0\./, "$1.");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const choice = (label, options, chosen) => {
    const select = element("select", {}, ...options.map((text) => element("option", {}, text)));
    select.addEventListener("change", () => chosen(select.selectedIndex));
    return element("label", {}, `${label} `, select);
  };
  // What a key of a grid or row of things does to the place in it.
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  // -- the heat map ----------------------------------------------------------------------

  // Rows are blocks, columns heads. One cell takes part in the order of tabs; arrows move it.
  class HeatMap {
    constructor(shape, opened, open) {
      [this.blocks, this.heads] = shape;
      this.cells = [];
      // Numbers fit into the cells of few heads only.
      this.dense = this.heads > 16;
      const head = element("tr", {}, element("th", { scope: "col" }, "block"));
      for (let h = 0; h < this.heads; h++) head.append(element("th", { scope: "col" }, String(h)));
      const body = element("tbody");
      for (let b = 0; b < this.blocks; b++) {
        const row = element("tr", {}, element("th", { scope: "row" }, String(b)));
        for (let h = 0; h < this.heads; h++) {
          const cell = element("td", { role: "gridcell", tabindex: "-1" });
          if (!opened.has(b * this.heads + h)) cell.setAttribute("aria-disabled", "true");
          cell.addEventListener("click", () => open(b, h));
          this.cells.push(cell);
          row.append(cell);
        }
        body.append(row);
      }
      this.node = element("table", { role: "grid", class: this.dense ? "heat dense" : "heat" }, element("thead", {}, head), body);
      this.node.addEventListener("keydown", (event) => this.key(event, open));
      this.node.addEventListener("focusin", (event) => this.rove(this.cells.indexOf(event.target)));
      this.at = 0;
    }

    key(event, open) {
      let [b, h] = [Math.floor(this.at / this.heads), this.at % this.heads];
      if (event.key === "Enter" || event.key === " ") open(b, h);
      else if (event.key === "Home") h = 0;
      else if (event.key === "End") h = this.heads - 1;
      else if (event.key === "PageUp") b = 0;
      else if (event.key === "PageDown") b = this.blocks - 1;
      else if (event.key in STEPS) {
        b = Math.min(Math.max(b + STEPS[event.key][0], 0), this.blocks - 1);
        h = Math.min(Math.max(h + STEPS[event.key][1], 0), this.heads - 1);
      } else return;
      event.preventDefault();
      this.cells[b * this.heads + h].focus();
    }

    rove(index) {
      if (index < 0) return;
      this.cells[this.at].tabIndex = -1;
      this.at = index;
      this.cells[index].tabIndex = 0;
    }

    mark(index) {
      for (const cell of this.cells) cell.removeAttribute("aria-selected");
      this.cells[index].setAttribute("aria-selected", "true");
      this.rove(index);
    }

    paint(name, values) {
      this.node.setAttribute("aria-label", `${name} of every head: blocks down, heads across`);
      const there = values.filter((value) => value !== null);
      const low = Math.min(0, ...there);
      const high = Math.max(...there) > low ? Math.max(...there) : low + 1;
      this.cells.forEach((cell, index) => {
        const value = values[index];
        const place = `block ${Math.floor(index / this.heads)}, head ${index % this.heads}`;
        const can = cell.hasAttribute("aria-disabled") ? ", cannot be opened" : "";
        const said = `${place}: ${name} ${value === null ? "not measured" : short(value)}${can}`;
        cell.setAttribute("aria-label", said);
        cell.title = said;
        const color = value === null ? null : viridis((value - low) / (high - low));
        cell.classList.toggle("unmeasured", value === null);
        cell.style.backgroundColor = color ? `rgb(${color})` : "";
        cell.style.color = color ? ink(color) : "";
        cell.textContent = this.dense ? "" : value === null ? "–" : brief(value);
      });
      return [low, high];
    }
  }

  const scale = () => {
    const stops = VIRIDIS.map((rgb) => `rgb(${rgb})`).join(", ");
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.backgroundImage = `linear-gradient(to right, ${stops})`;
    const [low, high] = [element("span"), element("span")];
    const node = element("p", { class: "scale" }, low, bar, high);
    return { node, say: (from, to) => ([low.textContent, high.textContent] = [short(from), short(to)]) };
  };

  // -- an attention pattern --------------------------------------------------------------

  // Weights of one head on one prompt, from the bytes of the lower triangles of all heads.
  const weights = (prompt, index) => {
    const n = prompt.tokens.length;
    const size = (n * (n + 1)) / 2;
    const from = index * size;
    const rows = [];
    for (let q = 0, at = from; q < n; at += ++q) {
      rows.push(Array.from({ length: n }, (_, k) => (k <= q ? prompt.bytes[at + k] / 255 : 0)));
    }
    return rows;
  };
  const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
  const clipped = (token) => {
    const letters = Array.from(visible(token));
    return letters.length > 14 ? `${letters.slice(0, 13).join("")}…` : letters.join("");
  };

  // The tokens as a row of choices: the chosen one looks, the others are as dark as it looks
  // at them. All that the picture beside it shows is here for keyboards and screen readers too.
  class TokenRow {
    constructor() {
      this.node = element("div", { class: "tokens", role: "listbox", "aria-orientation": "horizontal" });
      this.said = element("p", { class: "looks", "aria-live": "polite" });
      this.node.addEventListener("keydown", (event) => {
        const to = { Home: 0, End: this.cells.length - 1 }[event.key];
        const step = STEPS[event.key];
        if (to === undefined && !step) return;
        event.preventDefault();
        const at = to ?? this.at + step[0] + step[1];
        this.look(Math.min(Math.max(at, 0), this.cells.length - 1));
        this.cells[this.at].focus();
      });
    }

    show(tokens, rows, name) {
      const kept = this.tokens === tokens ? this.at : tokens.length - 1;
      [this.tokens, this.rows] = [tokens, rows];
      this.node.setAttribute("aria-label", `Tokens of the prompt: choose which one looks (${name})`);
      this.cells = tokens.map((token, index) => {
        const cell = element("span", { role: "option", tabindex: "-1" }, visible(token));
        cell.addEventListener("click", () => this.look(index));
        return cell;
      });
      this.node.replaceChildren(...this.cells);
      this.look(kept);
    }

    look(index) {
      this.at = index;
      const row = this.rows[index];
      this.cells.forEach((cell, key) => {
        const share = key <= index ? row[key] : 0;
        cell.setAttribute("aria-selected", String(key === index));
        cell.tabIndex = key === index ? 0 : -1;
        cell.style.setProperty("--share", `${Math.round(100 * share)}%`);
        const weight = key <= index ? `attended ${share.toFixed(2)}` : "comes later";
        cell.setAttribute("aria-label", `${visible(this.tokens[key])}, token ${key}: ${weight}`);
        cell.title = `token ${key}: ${weight}`;
      });
      const best = row.map((share, key) => [share, key]).slice(0, index + 1);
      best.sort((a, b) => b[0] - a[0]);
      const most = best.slice(0, 3).map(([share, key]) => `${visible(this.tokens[key])} (${key}) ${share.toFixed(2)}`);
      this.said.textContent = `${visible(this.tokens[index])} (${index}) looks at ${most.join(", ")}.`;
    }
  }

  let drawings = 0;
  class Pattern {
    constructor(prompts) {
      this.prompts = prompts.map((prompt) => ({ ...prompt, bytes: bytes(prompt.weights) }));
      this.at = 0;
      this.row = new TokenRow();
      this.chart = element("div", { class: "pattern", "aria-hidden": "true" });
      const names = prompts.map((prompt) => prompt.name);
      const chosen = choice("Prompt", names, (index) => {
        this.at = index;
        this.draw();
      });
      this.node = element(
        "div", { class: "attention" }, element("h4", {}, "Attention pattern"),
        element("p", { class: "controls" }, chosen), this.row.node, this.row.said, this.chart,
      );
    }

    show(index, name) {
      [this.index, this.name] = [index, name];
      this.draw();
    }

    draw() {
      const prompt = this.prompts[this.at];
      const attention = weights(prompt, this.index);
      this.row.show(prompt.tokens, attention, this.name);
      // The component takes no new values: it is drawn anew, in a place of its own.
      const place = element("div", { id: `pattern-${drawings++}` });
      place.style.maxWidth = `${Math.min(40, 12 + 2 * prompt.tokens.length)}rem`;
      this.chart.replaceChildren(place);
      CircuitsVis.render(place.id, CircuitsVis.AttentionPattern, {
        tokens: prompt.tokens.map(clipped),
        attention,
        minValue: 0,
        maxValue: 1,
        positiveColor: "#0b5cad",
        upperTriColor: "#eceef0",
      });
    }
  }

  // -- the view --------------------------------------------------------------------------

  const mount = (node, data) => {
    const { shape, scores, explained } = data;
    const opened = new Map(data.opened.map(([b, h], index) => [b * shape[1] + h, index]));
    const points = panels(data.points);
    const status = element("p", { class: "status", role: "status" });
    const heading = element("h4");
    const bar = scale();
    const clusters = scatter({ ...data, title: "Prompts in the plane of one head" });
    const pattern = data.samples.length ? new Pattern(data.samples) : null;

    const open = (b, h) => {
      const [place, at] = [`Block ${b}, head ${h}`, b * shape[1] + h];
      const index = opened.get(at);
      if (index === undefined) {
        status.textContent = `${place} cannot be opened: only its scores are in this page.`;
        return;
      }
      heat.mark(at);
      heading.textContent = place;
      const all = scores.map(({ name, values }) => `${name} ${short(values[at])}`).join(", ");
      const share = Math.round(100 * explained[index]);
      status.textContent = `${place} is open: ${all}; the plane holds ${share} % of the variance.`;
      clusters.show(points(index), `${place}.`);
      pattern?.show(index, place);
    };
    const heat = new HeatMap(shape, opened, open);
    const paint = (score) => bar.say(...heat.paint(scores[score].name, scores[score].values));

    const chosen = choice("Score", scores.map(({ name }) => name), paint);
    const help = element("p", { class: "help" }, "Choose a head to open it: click, or arrow keys and Enter.");
    const detail = element("div", { class: "opened" }, heading, clusters.node);
    if (pattern) detail.append(pattern.node);
    const map = element("div", { class: "map" }, element("div", { class: "heads" }, heat.node), bar.node);
    node.replaceChildren(
      element("p", { class: "controls" }, chosen), help,
      element("div", { class: "beside" }, map, element("div", {}, status, detail)),
    );
    paint(0);
    open(...data.opened[0]);
  };

  window.lensclust.views.heads = mount;
})();
