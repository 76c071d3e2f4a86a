"use strict";
// The shared step cursor: one slider moves a line through every chart, the values beside it, the tables and the patterns.
window.birthlens = window.birthlens || {};
(() => {
  const slider = document.getElementById("step");
  if (!slider) { birthlens.setStep = () => {}; return; }
  const steps = JSON.parse(document.getElementById("steps").textContent);
  const shown = document.getElementById("at"), play = document.getElementById("play");
  const listeners = [];
  const nearest = (list, step) => list.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(list[best] - step) ? i : best), 0);

  birthlens.setStep = (step, from) => {
    const index = nearest(steps, step);
    slider.value = index;
    slider.setAttribute("aria-valuetext", `step ${steps[index]}`);
    shown.textContent = steps[index];
    listeners.forEach((listener) => listener(steps[index]));
    document.dispatchEvent(new CustomEvent("birthlens-step", { detail: { step: steps[index], from } }));
  };
  slider.addEventListener("input", () => birthlens.setStep(steps[slider.value]));

  const spelled = (v) => (v === null ? "-" : Math.abs(v) < 10 ? v.toFixed(3) : Math.abs(v) < 100 ? v.toFixed(1) : v.toFixed(0));

  document.querySelectorAll("figure.chart").forEach((figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
    const span = Math.max(1, data.last - data.first);
    listeners.push((step) => {
      const within = Math.min(data.last, Math.max(data.first, step));
      const x = data.left + ((within - data.first) / span) * (data.right - data.left);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
      cursor.removeAttribute("hidden");
      figure.querySelectorAll("output").forEach((output) => {
        const series = data.series[output.dataset.series];
        output.textContent = series.steps.length ? series.shown[nearest(series.steps, step)] : "";
      });
    });
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      birthlens.setStep(data.first + ((x - data.left) / (data.right - data.left)) * span);
    };
    svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); point(event); });
    svg.addEventListener("pointermove", (event) => { if (event.buttons) point(event); });
  });

  // Blue, paper, red: 0 to 254 with 127 in the middle. On dark pages the middle is dark, and the ends are bright.
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const light = { middle: [255, 255, 255], low: [33, 102, 172], high: [178, 24, 43] };
  const night = { middle: [27, 30, 36], low: [86, 170, 255], high: [255, 120, 96] };
  const colour = (byte) => {
    const share = (byte - 127) / 127, of = dark.matches ? night : light, end = share < 0 ? of.low : of.high;
    return end.map((c, i) => Math.round(of.middle[i] + (c - of.middle[i]) * Math.abs(share)));
  };
  document.querySelectorAll("figure.table").forEach((figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const canvas = figure.querySelector("canvas"), at = figure.querySelector(".at"), note = figure.querySelector(".note"), title = note.textContent;
    const values = Uint8Array.from(atob(data.values), (c) => c.charCodeAt(0));
    const n = data.rows.length, m = data.columns.length, context = canvas.getContext("2d");
    let frame = 0, row = -1, column = -1;
    const read = () => {
      if (row < 0) { note.textContent = title; return; }
      const value = ((values[frame * n * m + row * m + column] - 127) / 127) * data.bound;
      note.textContent = `${data.rowsName} ${data.rows[row]}, ${data.columnsName} ${data.columns[column]}: ${spelled(value)}`;
    };
    const draw = (step) => {
      frame = nearest(data.steps, step);
      const image = context.createImageData(m, n);
      for (let i = 0; i < n * m; i += 1) image.data.set([...colour(values[frame * n * m + i]), 255], i * 4);
      context.putImageData(image, 0, 0);
      figure.dataset.step = at.textContent = data.steps[frame];
      read();
    };
    listeners.push(draw);
    dark.addEventListener("change", () => draw(data.steps[frame]));
    const go = (r, c) => { row = Math.max(0, Math.min(n - 1, r)); column = Math.max(0, Math.min(m - 1, c)); read(); };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      go(Math.floor(((event.clientY - box.top) / box.height) * n), Math.floor(((event.clientX - box.left) / box.width) * m));
    });
    canvas.addEventListener("pointerleave", () => { row = -1; read(); });
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (way) { event.preventDefault(); go(Math.max(0, row) + way[0], Math.max(0, column) + way[1]); }
    });
  });

  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "play"; play.setAttribute("aria-pressed", "false"); };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    play.textContent = "stop"; play.setAttribute("aria-pressed", "true");
    const stride = Math.max(1, Math.round(steps.length / 40));
    let index = Number(slider.value) >= steps.length - 1 ? 0 : Number(slider.value);
    timer = setInterval(() => {
      birthlens.setStep(steps[index]);
      if (index >= steps.length - 1) stop();
      index = Math.min(steps.length - 1, index + stride);
    }, 250);
  });
  document.addEventListener("DOMContentLoaded", () => birthlens.setStep(steps[steps.length - 1]));
})();
