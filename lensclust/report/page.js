"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = { labelColor: "#c9d0d7", titleColor: "#c9d0d7" };
  const night = {
    axis: { ...ink, gridColor: "#30363d", domainColor: "#7b838c", tickColor: "#7b838c" },
    legend: ink,
    header: ink,
    title: { color: "#e4e7ea", subtitleColor: "#c9d0d7" },
    view: { stroke: "#363c43" },
    text: { color: "#e4e7ea" },
    rule: { color: "#e4e7ea" },
    range: { ordinal: { scheme: "viridis", extent: [0.2, 1] } },
  };
  // The two colours of lensclust.figures.PALETTE that are too dark for a dark page.
  const brighten = (text) =>
    text.replaceAll('"#0072B2"', '"#4aa8e8"').replaceAll('"#A05A2C"', '"#cf8f5e"');
  const merge = (base, over) => {
    const merged = { ...base };
    for (const [key, value] of Object.entries(over)) {
      const nested = value && typeof value === "object" && !Array.isArray(value);
      merged[key] = nested ? merge(base[key] ?? {}, value) : value;
    }
    return merged;
  };

  // A chart takes the width that there is; panels wrap; a narrow page has its legend below.
  const fit = (spec, room) => {
    const narrow = room < 620;
    const beside = narrow ? 70 : 250;
    const fitted = { ...spec, config: { ...spec.config }, background: "transparent", padding: 4 };
    if (narrow) {
      const legend = { orient: "bottom", columns: 3, labelLimit: 130 };
      fitted.config = merge(fitted.config, { legend });
    }
    if (spec.facet && spec.spec && typeof spec.spec.width === "number") {
      const cell = Math.min(spec.spec.width, room - 70);
      const most = Math.max(1, Math.floor((room - beside) / (cell + 36)));
      const width = most > 1 ? cell : Math.min(Math.round(spec.spec.width * 1.6), room - beside);
      fitted.spec = { ...spec.spec, width: Math.max(220, width) };
      fitted.columns = Math.min(spec.columns ?? most, most);
    } else if (typeof spec.width === "number") {
      fitted.width = Math.max(220, Math.min(Math.round(spec.width * 1.6), room - beside));
    }
    // The page writes the title itself, where it can wrap.
    delete fitted.title;
    return fitted;
  };

  const draw = async (node) => {
    const figure = node.closest("figure");
    const text = document.getElementById(node.dataset.spec).textContent;
    const name = figure.querySelector("h3").textContent.replace(/[^\w-]+/g, "_");
    const actions = { export: true, source: false, compiled: false, editor: false };
    // Expressions are interpreted, not compiled: the policy of the page allows no code from text.
    const options = { renderer: "svg", actions, downloadFileName: name, ast: true };
    if (dark.matches) options.tooltip = { theme: "dark" };
    try {
      const room = node.parentElement.clientWidth;
      const spec = fit(JSON.parse(dark.matches ? brighten(text) : text), room);
      if (dark.matches) spec.config = merge(spec.config, night);
      if (node.view) node.view.finalize();
      node.view = (await vegaEmbed(node, spec, options)).view;
      figure.classList.add("is-live");
    } catch (error) {
      // The still stays in place.
      figure.classList.remove("is-live");
      console.error(`figure ${name}: ${error.message}`);
    }
  };
  // A page over many runs has many figures: each is drawn when it comes near.
  const waitingFor = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        waitingFor.unobserve(target);
        draw(target.querySelector(".live"));
      }
    },
    { rootMargin: "800px" },
  );
  const drawAll = () => {
    for (const node of document.querySelectorAll(".live")) {
      if (node.view) draw(node);
      else waitingFor.observe(node.closest("figure"));
    }
  };

  let drawnAt = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (innerWidth === drawnAt) return;
      drawnAt = innerWidth;
      drawAll();
    }, 200);
  });
  dark.addEventListener("change", drawAll);
  drawAll();
})();
