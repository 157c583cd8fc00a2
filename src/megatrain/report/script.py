"""What the page does under the mouse: the values at the nearest step. Without it the page is complete."""

SCRIPT = """
"use strict";
const make = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  return element;
};
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const place = (x, y) => {
  const left = Math.min(x + 14, innerWidth - tip.offsetWidth - 6);
  tip.style.setProperty("left", Math.max(6, left) + "px");
  tip.style.setProperty("top", Math.max(6, y - tip.offsetHeight - 10) + "px");
};
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const lines = JSON.parse(svg.dataset.chart);
  const box = svg.viewBox.baseVal;
  const steps = lines.flatMap(line => line.points);
  const layer = make("g", {});
  svg.append(layer);
  svg.querySelector("title").remove();  // aria-label says it, and it would cover the values
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * box.width;
    let near = steps[0];
    for (const point of steps) if (Math.abs(point[1] - x) < Math.abs(near[1] - x)) near = point;
    layer.replaceChildren(make("line", {x1: near[1], x2: near[1], y1: 12, y2: box.height - 34, class: "cross"}));
    const texts = ["step " + near[0].toLocaleString("en")];
    for (const line of lines) {
      const point = line.points.find(one => one[0] === near[0]);
      if (!point) continue;
      layer.append(make("circle", {cx: point[1], cy: point[2], r: 4, class: "dot f" + line.color}));
      texts.push(line.name + "  " + point[3]);
    }
    tip.textContent = texts.join("\\n");
    tip.hidden = false;
    place(event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => { layer.replaceChildren(); tip.hidden = true; });
}
"""
