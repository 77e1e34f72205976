"use strict";
// Mounts every view of the page with the script of its kind, when it comes near.
(() => {
  const mount = (section) => {
    const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
    const node = section.querySelector(".stage");
    try {
      window.lensclust.views[section.dataset.kind](node, data);
      section.classList.add("is-live");
    } catch (error) {
      console.error(`view ${data.title}: ${error.message}`);
    }
  };
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watcher.unobserve(entry.target);
        mount(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  for (const section of document.querySelectorAll("section.view")) watcher.observe(section);
})();
