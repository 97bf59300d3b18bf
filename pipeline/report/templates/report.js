"use strict";
// Unpacks plotly.js, which is in the page, and draws every figure with the colors of the page.
const page = document.getElementById("page-data");
const options = JSON.parse(page.textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colors() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), grid = style.getPropertyValue("--grid").trim();
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": text,
    "xaxis.gridcolor": grid, "yaxis.gridcolor": grid, "xaxis.linecolor": grid, "yaxis.linecolor": grid,
    "hoverlabel.bgcolor": style.getPropertyValue("--card").trim(), "hoverlabel.font.color": text,
  };
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return await new Response(stream).text();
}

async function draw() {
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("old-browser").hidden = false;
    return;
  }
  const script = document.createElement("script");
  script.nonce = page.nonce || options.nonce;
  script.textContent = await unpack("plotly-packed");
  document.head.appendChild(script);
  const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  for (const element of document.querySelectorAll(".plot")) {
    const figure = options.figures[element.id];
    await Plotly.newPlot(element, figure.data, figure.layout, settings);
    await Plotly.relayout(element, colors());
    element.dataset.drawn = "yes";
  }
  dark.addEventListener("change", () => {
    for (const element of document.querySelectorAll(".plot")) Plotly.relayout(element, colors());
  });
  document.documentElement.dataset.ready = "yes";
}

async function watch() {
  try {
    const answer = await fetch("/version");
    const version = await answer.text();
    if (answer.ok && version !== options.version) location.reload();
  } catch (error) { /* the server has ended; the page stays as it is */ }
}

if (options.figures && Object.keys(options.figures).length) draw();
else document.documentElement.dataset.ready = "yes";
if (options.live) setInterval(watch, 5000);
