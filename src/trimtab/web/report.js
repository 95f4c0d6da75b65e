"use strict";
document.documentElement.classList.add("js");

// The legend hides and shows a variant in every chart and table.
for (const button of document.querySelectorAll("button[data-v]")) {
  button.addEventListener("click", () => {
    const off = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!off));
    for (const part of document.querySelectorAll(`g[data-v="${button.dataset.v}"], tr[data-v="${button.dataset.v}"]`)) {
      part.classList.toggle("off", off);
    }
  });
}

// One score's trade-off at a time.
const choice = document.getElementById("score");
if (choice) {
  const show = () => {
    for (const part of document.querySelectorAll("[data-score]")) part.hidden = part.dataset.score !== choice.value;
  };
  choice.addEventListener("change", show);
  show();
}

// Values under the pointer, read back from the drawn lines.
const tip = document.getElementById("tip");
const names = new Map([...document.querySelectorAll("button[data-v]")].map((b) => [b.dataset.v, b.textContent.trim()]));
const format = (v) => (Math.abs(v) >= 0.001 ? v.toPrecision(3) : v.toExponential(1));

function invert(pixel, text, log) {
  const [low, high, start, end] = text.split(" ").map(Number);
  const part = (pixel - start) / (end - start);
  return log ? low * (high / low) ** part : low + part * (high - low);
}

function hover(svg, event) {
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const log = svg.dataset.log === "1";
  const lines = [];
  let at = null;
  for (const series of svg.querySelectorAll("g.series:not(.off)")) {
    const line = series.querySelector("polyline.line");
    if (!line) continue;
    let best = null;
    for (const p of line.points) if (best === null || Math.abs(p.x - x) < Math.abs(best.x - x)) best = p;
    if (best === null || Math.abs(best.x - x) > 40) continue;
    if (at === null || Math.abs(best.x - x) < Math.abs(at - x)) at = best.x;
    lines.push([best.y, `${names.get(series.dataset.v)}  ${format(invert(best.y, svg.dataset.y, log))}`]);
  }
  const cross = svg.querySelector(".cross");
  if (at === null) return leave(svg);
  cross.setAttribute("x1", at);
  cross.setAttribute("x2", at);
  cross.classList.add("on");
  lines.sort((a, b) => a[0] - b[0]);
  tip.textContent = [`step ${Math.round(invert(at, svg.dataset.x, false))}`, ...lines.map((l) => l[1])].join("\n");
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = `${Math.max(4, left) + scrollX}px`;
  tip.style.top = `${event.clientY + 16 + scrollY}px`;
}

function leave(svg) {
  svg.querySelector(".cross").classList.remove("on");
  tip.hidden = true;
}

for (const svg of document.querySelectorAll("svg.hover")) {
  svg.addEventListener("pointermove", (event) => hover(svg, event));
  svg.addEventListener("pointerdown", (event) => hover(svg, event));
  svg.addEventListener("pointerleave", () => leave(svg));
}
