"use strict";
// Stills are many, and each is a picture to unpack: they come in one by one when the page is there.
(() => {
  const waiting = [...document.querySelectorAll(".canvas > noscript")];
  const soon = window.requestIdleCallback ?? ((next) => setTimeout(next, 30));
  const next = () => {
    const held = waiting.shift();
    if (!held) return;
    held.outerHTML = held.textContent;
    soon(next);
  };
  addEventListener("load", () => soon(next));
})();
