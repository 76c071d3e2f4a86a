"use strict";
// One attention picture: a token strip that can be walked through by keyboard, and circuitsvis heat maps, at a chosen step.
window.birthlens = window.birthlens || {};

// circuitsvis renders once and offers no update. React updates any component that follows its class protocol, so this one
// passes new patterns on to AttentionHeads and keeps its state (the chosen head) between steps.
birthlens.LiveHeads = function (props) {
  this.props = props;
  this.state = { attention: props.attention };
  props.ready((attention) => this.updater.enqueueSetState(this, { attention }, null));
};
birthlens.LiveHeads.prototype.isReactComponent = {};
birthlens.LiveHeads.prototype.render = function () {
  const props = {
    attention: this.state.attention, tokens: this.props.tokens, attentionHeadNames: this.props.names,
    maxValue: 1, minValue: -1, positiveColor: "#08519c", maskUpperTri: this.props.causal,
  };
  return {
    $$typeof: Symbol.for("react.element"), type: CircuitsVis.AttentionHeads, key: null, ref: null, props, _owner: null,
  };
};

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
  const frame = (step) => data.heads.map((_, head) => Array.from({ length: n }, (_, query) =>
    Array.from({ length: n }, (_, key) => Math.round(at(step, head, query, key) * 1e4) / 1e4)));

  const slider = find("bl-steps"), shown = find("bl-step"), headBox = find("bl-head"), reading = find("bl-reading");
  const tokens = [...root.querySelectorAll(".bl-token")];
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
    reading.textContent = `${data.heads[head]}, from ${data.tokens[query]} at ${query}: looks at ${words.join(", ")}`;
  };
  const choose = (position, focus) => {
    query = Math.max(0, Math.min(n - 1, position));
    paint();
    if (focus) tokens[query].focus();
  };
  const redraw = () => {
    if (waiting || !update) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; update(frame(step)); });
  };
  const move = (index) => {
    step = index;
    if (slider) { slider.value = index; slider.setAttribute("aria-valuetext", `step ${data.steps[index]}`); }
    if (shown) shown.textContent = data.steps[index];
    root.dataset.step = data.steps[index];
    paint();
    redraw();
  };

  tokens.forEach((token, position) => {
    token.addEventListener("click", () => choose(position, true));
    token.addEventListener("keydown", (event) => {
      const far = { ArrowRight: 1, ArrowLeft: -1, Home: -n, End: n }[event.key];
      if (far) { event.preventDefault(); choose(query + far, true); }
    });
  });
  headBox.addEventListener("change", () => { head = headBox.selectedIndex; paint(); });
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

  headBox.selectedIndex = head;
  const scored = tokens.map((token, i) => (token.classList.contains("bl-in_context") ? i : -1)).filter((i) => i >= 0);
  choose(scored.length ? scored[scored.length - 1] : n - 1, false);
  move(step);
  CircuitsVis.render(`${id}-heads`, birthlens.LiveHeads, {
    attention: frame(step), tokens: data.marked, names: data.heads, causal: data.causal, ready: (f) => { update = f; },
  });
};
