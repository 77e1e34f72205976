"use strict";
(() => {
  // lensclust.figures.PALETTE, and what stands for it on a dark page. Eight colours and five
  // shapes: forty labels before a pair comes back.
  const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A05A2C"];
  const DARK = LIGHT.with ? LIGHT.with(0, "#4aa8e8").with(7, "#cf8f5e") : LIGHT;
  const SHAPES = [
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.6L4.4,3.4H-4.4z",
    "M0,-5L4.4,0L0,5L-4.4,0z", "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
  ];
  const SVG = "http://www.w3.org/2000/svg";
  const SIZE = { width: 420, height: 340, margin: 14 };
  const night = matchMedia("(prefers-color-scheme: dark)");
  const svg = (tag, attributes = {}) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  let made = 0;

  // Prompts as points. `labels` are [{name, values}], `texts` what is read when one is pointed at;
  // `show` takes a pair of coordinates for each prompt.
  class Scatter {
    constructor({ labels, texts }) {
      [this.labels, this.texts, this.by, this.at, this.picked] = [labels, texts, 0, -1, null];
      this.plot = svg("svg", {
        viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, class: "plane", tabindex: "0", role: "img",
      });
      this.marks = texts.map((_, index) => {
        const mark = svg("path");
        mark.addEventListener("pointerenter", () => this.point(index));
        return mark;
      });
      this.plot.append(...this.marks);
      this.plot.addEventListener("keydown", (event) => this.key(event));
      this.plot.addEventListener("pointerleave", () => this.point(-1));
      this.plot.addEventListener("blur", () => this.point(-1));
      this.said = document.createElement("p");
      this.said.className = "pointed";
      this.said.setAttribute("aria-live", "polite");
      this.legend = document.createElement("ul");
      this.legend.className = "legend";
      this.node = document.createElement("div");
      this.node.className = "scatter";
      this.node.append(this.chooser(), this.plot, this.said, this.legend);
      night.addEventListener("change", () => this.paint());
      this.paint();
      this.point(-1);
    }

    chooser() {
      const [line, label, select] = ["p", "label", "select"].map((tag) => document.createElement(tag));
      line.className = "controls";
      select.id = `scatter-${made++}`;
      label.htmlFor = select.id;
      label.textContent = "Colour ";
      this.labels.forEach(({ name }, value) => {
        const option = document.createElement("option");
        [option.value, option.textContent] = [value, name];
        select.append(option);
      });
      select.addEventListener("change", () => {
        [this.by, this.picked] = [Number(select.value), null];
        this.paint();
      });
      line.append(label, select);
      return line;
    }

    look(code) {
      const color = (night.matches ? DARK : LIGHT)[code % LIGHT.length];
      return { d: SHAPES[code % SHAPES.length], fill: color };
    }

    paint() {
      const { name, values } = this.labels[this.by];
      const levels = [...new Set(values)];
      const codes = new Map(levels.map((level, code) => [level, code]));
      this.marks.forEach((mark, index) => {
        const { d, fill } = this.look(codes.get(values[index]));
        mark.setAttribute("d", d);
        mark.setAttribute("fill", fill);
      });
      this.legend.setAttribute("aria-label", `${name}: choose one to see it alone`);
      this.legend.replaceChildren(...levels.map((level) => this.entry(level, codes.get(level))));
      this.fade();
    }

    entry(level, code) {
      const [item, button] = ["li", "button"].map((tag) => document.createElement(tag));
      const key = svg("svg", { viewBox: "-6 -6 12 12", class: "key", "aria-hidden": "true" });
      key.append(svg("path", this.look(code)));
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.append(key, level === "" ? "(none)" : level);
      button.addEventListener("click", () => {
        this.picked = this.picked === level ? null : level;
        for (const other of this.legend.querySelectorAll("button")) {
          other.setAttribute("aria-pressed", String(other === button && this.picked !== null));
        }
        this.fade();
      });
      item.append(button);
      return item;
    }

    fade() {
      const { values } = this.labels[this.by];
      this.marks.forEach((mark, index) => {
        mark.classList.toggle("faded", this.picked !== null && values[index] !== this.picked);
      });
    }

    show(points, what) {
      const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
      const middle = (held) => (Math.min(...held) + Math.max(...held)) / 2;
      const reach = (held) => Math.max(...held) - Math.min(...held) || 1;
      const { width, height, margin } = SIZE;
      // One scale for both axes: distances in the plane are distances.
      const scale = Math.min((width - 2 * margin) / reach(xs), (height - 2 * margin) / reach(ys));
      this.marks.forEach((mark, index) => {
        const x = width / 2 + scale * (xs[index] - middle(xs));
        const y = height / 2 - scale * (ys[index] - middle(ys));
        mark.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px)`;
      });
      this.order = points.map((_, index) => index).sort((a, b) => xs[a] - xs[b]);
      this.plot.setAttribute("aria-label", `${what}: ${points.length} prompts in a plane; arrow keys walk through them`);
    }

    key(event) {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const last = this.order.length - 1;
      const from = this.order.indexOf(this.at);
      const to = from < 0 ? (step > 0 ? 0 : last) : Math.min(Math.max(from + step, 0), last);
      this.point(this.order[to]);
    }

    point(index) {
      if (this.at >= 0) this.marks[this.at].classList.remove("pointed");
      this.at = index;
      if (index < 0) {
        this.said.textContent = "Point at a prompt to read it.";
        return;
      }
      this.marks[index].classList.add("pointed");
      const all = this.labels.map(({ name, values }) => `${name} ${values[index]}`).join(" · ");
      this.said.textContent = `${this.texts[index]} (${all})`;
    }
  }

  window.lensclust = { ...window.lensclust, Scatter };
})();
