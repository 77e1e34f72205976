"use strict";
(() => {
  for (const node of document.querySelectorAll("section.view")) {
    const stage = node.querySelector(".stage");
    const data = JSON.parse(node.querySelector("script[type='application/json']").textContent);
    try {
      lensclust.views[node.dataset.kind](stage, data);
      node.classList.add("is-live");
    } catch (error) {
      stage.replaceChildren();
      console.error(`view ${data.title}: ${error.message}`);
    }
  }
})();
