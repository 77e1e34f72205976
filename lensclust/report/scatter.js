"use strict";
// Points that can be coloured, picked and read: what views of clusters and of heads share.
(() => {
  window.lensclust ??= { views: {} };
  const SVG = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT, MARGIN] = [560, 460, 16];
  const COLOURS = 8;
  // Circle, square, triangle, diamond, cross, of about the same area.
  const SHAPES = [
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z",
    "M-3.6-3.6H3.6V3.6H-3.6Z",
    "M0-5L4.6 3.4H-4.6Z",
    "M0-5.2L5.2 0L0 5.2L-5.2 0Z",
    "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
  ];

  const element = (tag, properties = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const drawn = (tag, attributes = {}) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };

  // Panel by panel the pairs that lensclust.views.view_parts.quantised packed.
  const panels = ({ shape, low, step, data }) => {
    const held = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const counts = new DataView(held.buffer);
    const n = shape.at(-2);
    return (panel) =>
      Array.from({ length: n }, (_, row) =>
        [0, 2].map((axis) => low + step * counts.getUint16(4 * (panel * n + row) + axis, true)),
      );
  };

  let count = 0;
  // data: title, labels [{name, values}] and texts of the points. Returns the drawing as a node,
  // and show(points, sentence), which moves the points to pairs of coordinates on a scale of
  // their own.
  const scatter = (data) => {
    const { texts } = data;
    const id = `scatter-${count++}`;
    const labels = {};
    for (const { name, values } of data.labels) {
      const words = [...new Set(values)];
      const places = new Map(words.map((word, place) => [word, place]));
      labels[name] = { words, codes: values.map((value) => places.get(value)) };
    }
    const names = Object.keys(labels);
    const colour = element("select", {}, ...names.map((each) => element("option", {}, each)));
    const legend = element("div", { className: "legend", role: "group" });
    const said = element("div", { className: "said", id: `${id}-said` });
    said.setAttribute("aria-live", "polite");
    const hint = "Point at a mark, or focus the picture and press the arrow keys, to read its prompt.";
    said.textContent = hint;
    const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: "0", class: "points" });
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-describedby", said.id);
    const marks = texts.map((_, index) => {
      const mark = drawn("path", { class: "mark" });
      mark.dataset.index = String(index);
      return mark;
    });
    svg.append(...marks);
    const state = { by: names[0], picked: null, at: -1 };

    const paint = () => {
      const { words, codes } = labels[state.by];
      marks.forEach((mark, index) => {
        const code = codes[index];
        mark.setAttribute("d", SHAPES[code % SHAPES.length]);
        const faint = state.picked !== null && state.picked !== code ? " faint" : "";
        const here = index === state.at ? " here" : "";
        mark.setAttribute("class", `mark c${code % COLOURS}${faint}${here}`);
      });
      legend.replaceChildren(
        ...words.map((word, code) => {
          const key = drawn("svg", { viewBox: "-7 -7 14 14", width: "14", height: "14", "aria-hidden": "true" });
          key.append(drawn("path", { d: SHAPES[code % SHAPES.length], class: `c${code % COLOURS}` }));
          const button = element("button", { type: "button", className: "key" }, key, ` ${word}`);
          button.setAttribute("aria-pressed", String(state.picked === code));
          button.addEventListener("click", () => {
            state.picked = state.picked === code ? null : code;
            paint();
            legend.children[code].focus();
          });
          return button;
        }),
      );
      legend.setAttribute("aria-label", `Show one ${state.by} alone`);
    };
    const read = (index) => {
      const before = marks[state.at];
      if (before) before.classList.remove("here");
      state.at = index;
      if (index < 0) {
        said.textContent = hint;
        return;
      }
      marks[index].classList.add("here");
      const facts = names.map((each) => `${each}: ${labels[each].words[labels[each].codes[index]]}`);
      said.replaceChildren(
        element("strong", {}, facts.join(" · ")),
        element("span", { className: "prompt" }, texts[index]),
      );
    };
    colour.addEventListener("change", () => {
      state.by = colour.value;
      state.picked = null;
      paint();
    });
    svg.addEventListener("pointermove", (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined && Number(index) !== state.at) read(Number(index));
    });
    svg.addEventListener("pointerdown", (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined) read(Number(index));
    });
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
      if (event.key in steps) read((state.at + steps[event.key] + marks.length) % marks.length);
      else if (event.key === "Home") read(0);
      else if (event.key === "End") read(marks.length - 1);
      else if (event.key === "Escape") read(-1);
      else return;
      event.preventDefault();
    });
    paint();
    const controls = element("div", { className: "controls" }, element("label", {}, "Colour by ", colour));
    const node = element("div", { className: "scatter" }, controls, svg, legend, said);
    const show = (points, sentence = "") => {
      let largest = 0;
      for (const [x, y] of points) largest = Math.max(largest, Math.abs(x), Math.abs(y));
      // One scale for both axes, so that distances are seen as they are.
      const unit = (Math.min(WIDTH, HEIGHT) / 2 - MARGIN) / (largest || 1);
      points.forEach(([x, y], index) => {
        const across = WIDTH / 2 + x * unit;
        marks[index].style.transform = `translate(${across.toFixed(1)}px, ${(HEIGHT / 2 - y * unit).toFixed(1)}px)`;
      });
      svg.setAttribute("aria-label", `${data.title}: ${texts.length} points. ${sentence}`);
    };
    return { node, controls, show };
  };
  Object.assign(window.lensclust, { element, panels, scatter });
})();
