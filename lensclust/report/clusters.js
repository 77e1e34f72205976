"use strict";
// A view of clusters: sliders for layer and training step over one set of points.
(() => {
  const { element, panels, scatter } = window.lensclust;

  const slider = (label, values, start) => {
    const input = element("input", { type: "range", min: "0", max: String(values.length - 1), step: "1" });
    input.value = String(start);
    const shown = element("output", {}, String(values[start]));
    const box = element("label", { className: "slider" }, `${label} `, input, shown);
    return { input, shown, box };
  };

  window.lensclust.views.clusters = (node, data) => {
    const pairs = panels(data.points);
    const { layers, steps } = data;
    const controls = element("div", { className: "controls" });
    const status = element("p", { role: "status", className: "status" });
    const points = scatter(data);
    node.replaceChildren(controls, status, points.node);

    const layer = slider("Layer", layers, layers.length - 1);
    const step = slider("Training step", steps, steps.length - 1);
    const show = () => {
      const [l, s] = [Number(layer.input.value), Number(step.input.value)];
      const panel = s * layers.length + l;
      layer.shown.textContent = String(layers[l]);
      step.shown.textContent = String(steps[s]);
      layer.input.setAttribute("aria-valuetext", `layer ${layers[l]}`);
      step.input.setAttribute("aria-valuetext", `step ${steps[s]}`);
      const parts = [`Layer ${layers[l]}`];
      if (steps.length > 1) parts.push(`step ${steps[s]}`);
      const score = data.score[panel];
      if (score !== null) parts.push(`${data.score_name} ${score.toFixed(2)}`);
      const share = data.explained[panel];
      if (share !== null) parts.push(`${Math.round(100 * share)} % of the variance shown`);
      const sentence = `${parts.join(" · ")}.`;
      status.textContent = sentence;
      points.show(pairs(panel), sentence);
    };
    const player = ({ input }, what) => {
      const button = element("button", { type: "button" }, `Play ${what}`);
      let timer = 0;
      const stop = () => {
        clearInterval(timer);
        timer = 0;
        button.textContent = `Play ${what}`;
      };
      button.addEventListener("click", () => {
        if (timer) return stop();
        if (input.value === input.max) input.value = input.min;
        else input.value = String(Number(input.value) + 1);
        show();
        button.textContent = "Stop";
        timer = setInterval(() => {
          if (input.value === input.max) return stop();
          input.value = String(Number(input.value) + 1);
          show();
        }, 900);
      });
      return button;
    };
    for (const { input } of [layer, step]) input.addEventListener("input", show);
    if (layers.length > 1) controls.append(layer.box, player(layer, "layers"));
    if (steps.length > 1) controls.append(step.box, player(step, "training"));
    show();
  };
})();
