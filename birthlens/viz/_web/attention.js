"use strict";
// One attention picture: a token strip that can be walked through by keyboard, and the heat map of a chosen head
// at a chosen step, drawn by circuitsvis.
window.birthlens = window.birthlens || {};

// circuitsvis renders once and offers no update. React updates any component that follows its class protocol, so this one
// passes the pattern of the chosen head and step on to circuitsvis, and names the canvas for those who do not see it.
birthlens.LivePattern = function (props) {
  this.props = props;
  this.state = { attention: props.attention };
  props.ready((attention) => this.updater.enqueueSetState(this, { attention }, null));
};
birthlens.LivePattern.prototype.isReactComponent = {};
birthlens.LivePattern.prototype.componentDidMount = birthlens.LivePattern.prototype.componentDidUpdate = function () {
  this.props.drawn();
};
birthlens.LivePattern.prototype.render = function () {
  const props = {
    attention: this.state.attention, tokens: this.props.tokens, zoomed: true, maskUpperTri: this.props.causal,
    maxValue: 1, minValue: -1, positiveColor: "#08519c", upperTriColor: "#ececec",
  };
  return {
    $$typeof: Symbol.for("react.element"), type: CircuitsVis.AttentionPattern, key: null, ref: null, props, _owner: null,
  };
};

// A row of buttons with one place in the tab order: arrows, Home and End walk through it.
birthlens.walk = (buttons, current, choose) => buttons.forEach((button, place) => {
  button.addEventListener("click", () => choose(place, true));
  button.addEventListener("keydown", (event) => {
    const far = { ArrowRight: 1, ArrowLeft: -1, Home: -buttons.length, End: buttons.length }[event.key];
    if (!far) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(buttons.length - 1, current() + far)), true);
  });
});

birthlens.decode = (text, Type) => new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

birthlens.attention = (id) => {
  const root = document.getElementById(id);
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const find = (name) => root.querySelector("." + name);
  const n = data.tokens.length, levels = birthlens.decode(data.patterns, Uint16Array);
  const size = data.causal ? (n * (n + 1)) / 2 : n * n;
  const at = (step, head, query, key) => {
    if (data.causal && key > query) return 0;
    const place = data.causal ? (query * (query + 1)) / 2 + key : query * n + key;
    return levels[(step * data.heads.length + head) * size + place] / data.levels;
  };
  const pattern = () => Array.from({ length: n }, (_, query) =>
    Array.from({ length: n }, (_, key) => Math.round(at(step, head, query, key) * 1e4) / 1e4));

  const slider = find("bl-steps"), shown = find("bl-step"), headBox = find("bl-head"), reading = find("bl-reading");
  const tokens = [...root.querySelectorAll(".bl-token")], thumbs = [...root.querySelectorAll(".bl-thumb")];
  let step = data.steps.length - 1, head = data.heads.length - 1, query = -1;
  let update = null, waiting = false;

  const paint = () => {
    const weights = data.tokens.map((_, key) => at(step, head, query, key));
    tokens.forEach((token, key) => {
      token.style.setProperty("--weight", weights[key].toFixed(4));
      token.classList.toggle("bl-query", key === query);
      token.tabIndex = key === query ? 0 : -1;
    });
    const best = weights.map((w, key) => [w, key]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w >= 0.005);
    const words = best.map(([w, key]) => `${data.tokens[key]} at ${key} (${w.toFixed(2)})`);
    reading.textContent = `${data.heads[head]}, from ${data.tokens[query]} at ${query}: attends to ${words.join(", ")}`;
  };
  const choose = (position, focus) => {
    query = position;
    paint();
    if (focus) tokens[query].focus();
  };
  const redraw = () => {
    find("bl-shown").textContent = `${data.heads[head]} at step ${data.steps[step]}`;
    if (waiting || !update) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; update(pattern()); });
  };
  // Small pictures of all heads: white (dark on dark pages) to blue, what is masked in grey.
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const sketch = () => thumbs.forEach((thumb, of) => {
    const context = thumb.querySelector("canvas").getContext("2d"), image = context.createImageData(n, n);
    const [none, all, hidden] = dark.matches
      ? [[24, 27, 32], [110, 185, 255], [52, 56, 63]] : [[255, 255, 255], [8, 81, 156], [236, 236, 236]];
    for (let i = 0; i < n * n; i += 1) {
      const query = Math.floor(i / n), key = i % n, share = at(step, of, query, key);
      const masked = data.causal && key > query;
      const colour = masked ? hidden : all.map((c, k) => Math.round(none[k] + (c - none[k]) * share));
      image.data.set([...colour, 255], i * 4);
    }
    context.putImageData(image, 0, 0);
  });
  dark.addEventListener("change", () => sketch());
  const look = (place, focus) => {
    head = place;
    headBox.selectedIndex = head;
    thumbs.forEach((thumb, of) => {
      thumb.setAttribute("aria-pressed", String(of === head));
      thumb.tabIndex = of === head ? 0 : -1;
    });
    if (focus) thumbs[head].focus();
    paint();
    redraw();
  };
  const move = (index) => {
    step = index;
    if (slider) { slider.value = index; slider.setAttribute("aria-valuetext", `step ${data.steps[index]}`); }
    if (shown) shown.textContent = data.steps[index];
    root.dataset.step = data.steps[index];
    sketch();
    paint();
    redraw();
  };

  birthlens.walk(tokens, () => query, choose);
  birthlens.walk(thumbs, () => head, look);
  headBox.addEventListener("change", () => look(headBox.selectedIndex, false));
  if (slider) slider.addEventListener("input", () => {
    move(Number(slider.value));
    if (birthlens.setStep) birthlens.setStep(data.steps[step], root);
  });
  document.addEventListener("birthlens-step", (event) => {
    if (event.detail.from === root) return;
    let nearest = 0;
    data.steps.forEach((s, i) => {
      if (Math.abs(s - event.detail.step) < Math.abs(data.steps[nearest] - event.detail.step)) nearest = i;
    });
    if (nearest !== step) move(nearest);
  });

  const scored = tokens.map((token, i) => (token.classList.contains("bl-in_context") ? i : -1)).filter((i) => i >= 0);
  choose(scored.length ? scored[scored.length - 1] : n - 1, false);
  look(head, false);
  move(step);
  CircuitsVis.render(`${id}-heads`, birthlens.LivePattern, {
    attention: pattern(), tokens: data.marked, causal: data.causal, ready: (f) => { update = f; },
    drawn: () => root.querySelector(".bl-heads canvas").setAttribute("aria-label",
      `Heat map of attention, ${data.heads[head]} at step ${data.steps[step]}. ${data.alt}`),
  });
};
